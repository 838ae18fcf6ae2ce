"""From a model's name to a compressed checkpoint in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..calibration.text import load_text, sample_windows, tokenize
from ..config import EigenAttentionConfig
from ..models.loading import Source, check_new, load_model, load_tokenizer, new_folder
from ..report.card import model_card
from .pipeline import CompressionReport, compress


def compress_checkpoint(
    name: str,
    out: Path,
    config: EigenAttentionConfig,
    *,
    text: str,
    samples: int,
    length: int,
    seed: int,
    dtype: str | None = None,
    device: str | None = None,
    progress: bool = False,
) -> CompressionReport:
    """Load a model, compress it on windows of a text, and write it with tokenizer, generation settings and model card.

    Args:
        name: a folder, a hub id, a `.gguf` file, or `smollm2`.
        out: a folder that does not exist yet; it appears when everything is written.
        text: a text source (`eigenattn.calibration.text.load_text`).
        samples, length, seed: how many windows of how many tokens are drawn from the text, and the draw.
        dtype, device: see `load_model`.

    Raises:
        EigenAttnError: on any bad input; nothing is written then.
    """
    check_new(out)
    calibration = load_text(text)  # before the model, which takes longer to load
    source = Source.of(name)
    tokenizer = load_tokenizer(source)
    windows = sample_windows(tokenize(tokenizer, calibration), samples, length, seed)
    model = load_model(source, dtype, device)
    provenance: dict[str, Any] = {
        "base_model": name,
        "text": {"source": calibration.source, "sha256": calibration.sha256},
        "samples": samples,
        "length": length,
        "seed": seed,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    report = compress(model, windows.split(1), config, provenance=provenance, progress=progress)
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(model.config.quantization_config, report), encoding="utf-8")
    return report
