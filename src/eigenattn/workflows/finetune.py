"""From the name of a compressed checkpoint and a text to a trained checkpoint in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.text import Text, load_text, tokenize
from ..calibration.windows import described
from ..errors import EigenAttnError
from ..files import read_text
from ..finetuning import FinetuneConfig, FinetuneReport, finetune
from ..journal import Journal, identity
from ..models.bases_file import save_bases
from ..models.checkpoint_format import checkpoint_of
from ..models.loading import Source, load_model, load_tokenizer
from ..report.card import finetuning_section
from ..version import versions


def finetune_checkpoint(
    name: str,
    out: Path,
    config: FinetuneConfig,
    *,
    texts: Sequence[str],
    length: int,
    validation_windows: int,
    distil: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    progress: bool = False,
) -> FinetuneReport:
    """Train a compressed checkpoint on a text, and write it as another. A folder of bases gives a folder of bases.

    Killed at any moment, it goes on when it is called again in the same way.

    Args:
        name: a compressed checkpoint: a folder or a hub id.
        out: a folder that does not exist yet; it appears when everything is written. `OUT.partial` keeps the state.
        texts: text sources (`eigenattn.calibration.text.load_text`); their calibration part is read.
        length: tokens in a window.
        validation_windows: windows at the end of the texts that are not trained on, but validated with.
        distil: name of the original model, whose predictions are to be met; without it the text's next tokens.
        dtype, device: see `load_model`.

    Raises:
        EigenAttnError: on any bad input; nothing is written then.
    """
    loaded = [load_text(source) for source in texts]
    source, teacher = Source.of(name), Source.of(distil) if distil else None
    command = {
        "verb": "finetune",
        "model": [_identity(source), dtype],
        "distil": _identity(teacher) if teacher else None,
        "text": [text.sha256 for text in loaded],
        "windows": [length, validation_windows],
        **config.to_dict(),
        "device": device,
        "versions": versions(),
    }
    card = Path(source.bases or source.path) / "README.md"
    written = read_text(card) if card.is_file() else f"# {name}\n"
    with Journal(out, command) as journal:
        tokenizer = load_tokenizer(source)
        training, validation = split_windows(tokenizer, loaded, length, validation_windows)
        model = load_model(source, dtype, device)
        baseline = load_model(teacher, dtype, device).requires_grad_(False) if teacher else None
        model, report = finetune(
            model, training, validation, config, baseline=baseline, journal=journal, progress=progress
        )
        facts: dict[str, Any] = {
            "text": [described(text) for text in loaded],
            "distil": distil,
            "length": length,
            "measure": report.measure,
            "before": report.before,
            "after": report.after,
            **config.to_dict(),
            "versions": versions(),
        }
        checkpoint = checkpoint_of(model)
        assert checkpoint is not None  # it was trained
        checkpoint.provenance["finetuning"] = facts
        with journal.output() as folder:
            if source.bases is not None:
                save_bases(model, folder)
            else:
                model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (folder / "README.md").write_text(written + finetuning_section(facts), encoding="utf-8")
    return report


def _identity(source: Source) -> list[Any]:
    own = identity(source.path, source.gguf_file)
    return [own, identity(source.bases) if source.bases is not None else None]


def split_windows(tokenizer: Any, texts: Sequence[Text], length: int, validation_windows: int) -> tuple[Tensor, Tensor]:
    """Windows [N, length] that tile the texts: those to train on, and the last ones, to validate with.

    Raises:
        EigenAttnError: if the texts are too short for one window of each.
    """
    pieces = []
    for text in texts:
        tokens = tokenize(tokenizer, text)
        count = len(tokens) // length
        pieces.append(tokens[: count * length].view(count, length))
    # Every text gives its last windows, in proportion to its own length, and at least one.
    total = sum(len(piece) for piece in pieces)
    shares = [max(1, round(validation_windows * len(piece) / max(total, 1))) for piece in pieces]
    for text, piece, share in zip(texts, pieces, shares, strict=True):
        if len(piece) <= share:
            raise EigenAttnError(
                f"text {text.source} has {len(piece)} windows of {length} tokens, and {share} are for validation: give "
                "a longer text, or lower --length or --validation-windows."
            )
    training = torch.cat([piece[:-share] for piece, share in zip(pieces, shares, strict=True)])
    validation = torch.cat([piece[-share:] for piece, share in zip(pieces, shares, strict=True)])
    return training, validation
