"""Calibration windows from one or several sources, the model itself among them."""

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

SELF = "self"
# Sequences that the model writes at a time (chosen: the cache of that many fits wherever the model does).
BATCH = 32


def load_texts(sources: Sequence[str]) -> list[Text | None]:
    """Read every source; None stands for `self`, which is written later.

    Raises:
        EigenAttnError: if there is none, or one cannot be read.
    """
    if not sources:
        raise EigenAttnError("no calibration text was given.")
    return [None if source == SELF else load_text(source) for source in sources]


def described(text: Text | None) -> dict[str, str | None]:
    """Which text it was, as checkpoints and results record it; None is what the model wrote."""
    return {"source": text.source if text else SELF, "sha256": text.sha256 if text else None}


def text_windows(
    texts: Sequence[Text | None], tokenizer: Any, samples: int, length: int, seed: int
) -> list[Tensor | int]:
    """Windows [n, length] drawn from each text, samples shared out evenly; for `self` the number it is to write.

    Raises:
        EigenAttnError: if there are fewer samples than sources, or a text is too short for its share.
    """
    if samples < len(texts):
        raise EigenAttnError(f"{samples} samples cannot be shared by {len(texts)} texts: raise --samples.")
    return [
        share if text is None else draw_windows(tokenizer, text, share, length, seed)
        for text, share in zip(texts, evenly(samples, len(texts)), strict=True)
    ]


def complete(parts: Sequence[Tensor | int], model: PreTrainedModel, length: int, seed: int) -> Tensor:
    """All windows [samples, length] in an order that mixes the sources, those of `self` written by the model."""
    windows = [written_by(model, part, length, seed) if isinstance(part, int) else part for part in parts]
    joined = torch.cat([window.cpu() for window in windows])
    return joined[torch.randperm(len(joined), generator=torch.Generator().manual_seed(seed))]


@torch.no_grad()
def written_by(model: PreTrainedModel, samples: int, length: int, seed: int) -> Tensor:
    """Text [samples, length] that the model writes from nothing, sampled from its own distribution.

    Raises:
        EigenAttnError: if the model names no token to start from, or has too few positions, or its predictions are no
            numbers.
    """
    config = model.config.get_text_config(decoder=True)
    start = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    start = start[0] if isinstance(start, list) else start
    if start is None:
        raise EigenAttnError("the model has neither a bos nor an eos token to start from: give a text instead of self.")
    check_length(model.config, length)
    device = input_device(model)
    torch.manual_seed(seed)
    pieces = []
    for first in range(0, samples, BATCH):
        ids = torch.full((min(BATCH, samples - first), 1), start, device=device)
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "use_cache": True}
        # As many as asked for: an end of text is never drawn.
        options |= {"min_new_tokens": length - 1, "max_new_tokens": length - 1, "pad_token_id": start}
        with checked(model):
            pieces.append(cast(Any, model).generate(ids, attention_mask=torch.ones_like(ids), **options))
    return torch.cat(pieces)
