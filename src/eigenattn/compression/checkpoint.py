"""From a model's name to a compressed checkpoint in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..calibration.windows import SELF, complete, load_texts, text_windows
from ..config import EigenAttentionConfig
from ..errors import EigenAttnError
from ..journal import Journal, identity
from ..models.bases_file import save_bases
from ..models.loading import Source, load_model, load_tokenizer
from ..models.placement import save_model
from ..report.card import model_card
from ..version import versions
from .pipeline import CompressionReport, compress


def compress_checkpoint(
    name: str,
    out: Path,
    config: EigenAttentionConfig,
    *,
    texts: Sequence[str],
    samples: int,
    length: int,
    seed: int,
    dtype: str | None = None,
    device: str | None = None,
    max_memory: Mapping[int | str, str] | None = None,
    offload_folder: Path | None = None,
    bases_only: bool = False,
    progress: bool = False,
) -> CompressionReport:
    """Load a model, compress it on windows of a text, and write it with tokenizer, generation settings and model card.

    Killed at any moment, it goes on when it is called again in the same way.

    Args:
        name: a folder, a hub id, a `.gguf` file, or `smollm2`.
        out: a folder that does not exist yet; it appears when everything is written. `OUT.partial` keeps what is done.
        texts: text sources (`eigenattn.calibration.text.load_text`); `self` is text the model writes.
        samples, length, seed: how many windows of how many tokens are drawn from the texts, and the draw.
        dtype, device, max_memory, offload_folder: see `load_model`. Weights that are put on disk, and do not lie there
            already, go to a folder inside `OUT.partial`, by default.
        bases_only: write the bases alone, to be attached to the base model; needs a window.

    Raises:
        EigenAttnError: on any bad input; nothing is written then.
    """
    if bases_only and not config.window:
        raise EigenAttnError("--bases-only needs a window: without one the bases are folded into the weights.")
    loaded = load_texts(texts)  # before the model, which takes longer to load
    source = Source.of(name)
    sources = [{"source": text.source if text else SELF, "sha256": text.sha256 if text else None} for text in loaded]
    command = {
        "verb": "compress",
        "model": identity(source.path, source.gguf_file),
        "text": [text["sha256"] for text in sources],
        "samples": samples,
        "length": length,
        "seed": seed,
        **config.to_dict(),
        "bases_only": bases_only,
        "dtype": dtype,
        "device": device,
        "versions": versions(),
    }
    with Journal(out, command) as journal:
        tokenizer = load_tokenizer(source)
        parts = text_windows(loaded, tokenizer, samples, length, seed)
        offload_folder = offload_folder or journal.folder / "offload"
        model = load_model(source, dtype, device, max_memory=max_memory, offload_folder=offload_folder)
        windows = _windows(parts, model, length, seed, journal)
        provenance: dict[str, Any] = {
            "base_model": name,
            "text": sources,
            "samples": samples,
            "length": length,
            "seed": seed,
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        report = compress(model, windows.split(1), config, provenance=provenance, journal=journal, progress=progress)
        with journal.output() as folder:
            if bases_only:
                save_bases(model, folder)
            else:
                save_model(model, folder)
                tokenizer.save_pretrained(folder)
            card = model_card(model.config.quantization_config, report, bases_only)
            (folder / "README.md").write_text(card, encoding="utf-8")
    return report


def _windows(parts: Sequence[Tensor | int], model: nn.Module, length: int, seed: int, journal: Journal) -> Tensor:
    """All calibration windows; those the model writes are kept, for writing takes long."""
    kept = journal.read("windows")
    if kept is not None:
        return kept[0]["windows"]
    windows = complete(parts, model, length, seed)
    if any(isinstance(part, int) for part in parts):
        journal.write("windows", {"windows": windows})
    return windows
