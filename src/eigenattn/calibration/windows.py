"""Calibration windows from one or several sources, and those that need no text: chance, and the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import EigenAttnError
from ..models.placement import input_device
from .checks import check_length, checked
from .text import Text, draw_windows, evenly, load_text

SELF, RANDOM, NONE = "self", "random", "none"
# Sources that need no text, and the share of their windows that is chance; the model writes the others.
WITHOUT_TEXT = {SELF: 0.0, RANDOM: 1.0, NONE: 0.5}
# Sequences that the model writes at a time (chosen: the cache of that many fits wherever the model does).
BATCH = 32


def load_texts(sources: Sequence[str]) -> list[Text]:
    """Read every source; those that need no text have no content.

    Raises:
        EigenAttnError: if there is none, or one cannot be read.
    """
    if not sources:
        raise EigenAttnError("no calibration text was given.")
    return [Text(source, "") if source in WITHOUT_TEXT else load_text(source) for source in sources]


def described(text: Text) -> dict[str, str | None]:
    """Which text it was, as checkpoints and results record it."""
    return {"source": text.source, "sha256": text.sha256}


def text_windows(texts: Sequence[Text], tokenizer: Any, samples: int, length: int, seed: int) -> list[Tensor]:
    """Windows [n, length] of each text, samples shared out evenly, and beginnings [n, 1] of those to be written.

    Raises:
        EigenAttnError: if there are fewer samples than sources, or a text is too short for its share.
    """
    if samples < len(texts):
        raise EigenAttnError(f"{samples} samples cannot be shared by {len(texts)} texts: raise --samples.")
    parts: list[Tensor] = []
    for text, share in zip(texts, evenly(samples, len(texts)), strict=True):
        if text.content:
            parts.append(draw_windows(tokenizer, text, share, length, seed))
            continue
        by_chance = int(share * WITHOUT_TEXT[text.source])
        parts += [random_tokens(tokenizer, by_chance, length, seed)] if by_chance else []
        parts += [random_tokens(tokenizer, share - by_chance, 1, seed)] if by_chance < share else []
    return parts


def random_tokens(tokenizer: Any, samples: int, length: int, seed: int) -> Tensor:
    """Windows [samples, length] of tokens each as likely as any other, special and added ones left out."""
    others = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ordinary = torch.tensor(sorted(set(tokenizer.get_vocab().values()) - others))
    drawn = torch.randint(len(ordinary), (samples, length), generator=torch.Generator().manual_seed(seed))
    return ordinary[drawn]


def unwritten(parts: Sequence[Tensor], length: int) -> bool:
    """Whether the model is to write any windows."""
    return any(part.shape[1] < length for part in parts)


def complete(parts: Sequence[Tensor], model: PreTrainedModel, length: int, seed: int) -> Tensor:
    """All windows [samples, length] in an order that mixes the sources; those only begun are written by the model."""
    windows = [written_by(model, part, length, seed) if part.shape[1] < length else part for part in parts]
    joined = torch.cat([window.cpu() for window in windows])
    return joined[torch.randperm(len(joined), generator=torch.Generator().manual_seed(seed))]


@torch.no_grad()
def written_by(model: PreTrainedModel, beginnings: Tensor, length: int, seed: int) -> Tensor:
    """Text [N, length] that the model writes from beginnings [N, T], sampled from its own distribution.

    Raises:
        EigenAttnError: if the model does not know the tokens, or has too few positions, or its predictions are no
            numbers.
    """
    check_length(model.config, length)
    torch.manual_seed(seed)
    new = length - beginnings.shape[1]
    pieces = []
    for ids in beginnings.to(input_device(model)).split(BATCH):
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "use_cache": True}
        # As many as asked for: an end of text is never drawn, and so nothing is padded.
        options |= {"min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
        with checked(model):
            pieces.append(cast(Any, model).generate(ids, attention_mask=torch.ones_like(ids), **options))
    return torch.cat(pieces)
