"""From a model's name to a compressed checkpoint in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.text import DEFAULT_SOURCE, Text
from ..calibration.windows import WITHOUT_TEXT, complete, described, load_texts, text_windows, unwritten
from ..compression.pipeline import CompressionReport, compress
from ..compression.recipe import check_supported
from ..config import EigenAttentionConfig
from ..errors import EigenAttnError
from ..journal import Journal, identity
from ..models.bases_file import save_bases
from ..models.conversion import layouts_of
from ..models.loading import Source, load_model, load_tokenizer
from ..models.placement import save_model
from ..report.card import model_card
from ..version import versions


@dataclass(frozen=True)
class CalibrationText:
    """What a model is calibrated on: windows drawn from texts.

    Args:
        text: text sources (`eigenattn.calibration.text.load_text`); or one that needs no text
            (`eigenattn.calibration.windows.WITHOUT_TEXT`).
        samples, length, seed: how many windows of how many tokens are drawn, and the seed of the draw.
    """

    text: list[str] = field(default_factory=lambda: [DEFAULT_SOURCE])
    samples: int = 32
    length: int = 1024
    seed: int = 0

    @property
    def one_kind(self) -> bool:
        """Whether it is all from one source, and that is neither of many kinds nor the model's own."""
        return len(self.text) == 1 and self.text[0] not in (DEFAULT_SOURCE, *WITHOUT_TEXT)

    @property
    def drawn(self) -> dict[str, int]:
        """Which windows are drawn, as `text_windows` takes it and checkpoints record it."""
        return {"samples": self.samples, "length": self.length, "seed": self.seed}

    def load(self) -> list[Text]:
        """The texts; those that need none have no content.

        Raises:
            EigenAttnError: if one cannot be read.
        """
        return load_texts(self.text)


def compress_checkpoint(
    name: str,
    out: Path,
    config: EigenAttentionConfig,
    text: CalibrationText,
    *,
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
        text: what to calibrate on.
        dtype, device, max_memory, offload_folder: see `load_model`. Weights that are put on disk, and do not lie there
            already, go to a folder inside `OUT.partial`, by default.
        bases_only: write the bases alone, to be attached to the base model; needs a window.

    Raises:
        EigenAttnError: on any bad input; nothing is written then.
    """
    check_supported(config)
    if bases_only and not config.window:
        raise EigenAttnError("--bases-only needs a window: without one the bases are folded into the weights.")
    texts = text.load()  # before the model, which takes longer to load
    source = Source.of(name)
    command = {
        "verb": "compress",
        "model": identity(source.path, source.gguf_file),
        "text": [described(each) for each in texts],
        **text.drawn,
        **config.to_dict(),
        "bases_only": bases_only,
        "dtype": dtype,
        "device": device,
        "versions": versions(),
    }
    with Journal(out, command) as journal:
        tokenizer = load_tokenizer(source)
        parts = text_windows(texts, tokenizer, **text.drawn)
        offload_folder = offload_folder or journal.folder / "offload"
        model = load_model(source, dtype, device, max_memory=max_memory, offload_folder=offload_folder)
        windows = _windows(parts, model, text, journal)
        provenance: dict[str, Any] = {
            **source.origin(),
            "text": [described(each) for each in texts],
            **text.drawn,
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        report = compress(model, windows.split(1), config, provenance=provenance, journal=journal, progress=progress)
        with journal.output() as folder:
            if bases_only:
                save_bases(model, folder)
            else:
                save_model(model, folder)
                tokenizer.save_pretrained(folder)
            card = model_card(model.config.quantization_config, report, layouts_of(model), bases_only)
            (folder / "README.md").write_text(card, encoding="utf-8")
    return report


def _windows(parts: Sequence[Tensor], model: PreTrainedModel, text: CalibrationText, journal: Journal) -> Tensor:
    """All calibration windows; those the model writes go to the journal, for writing takes long."""
    finished = journal.read("windows")
    if finished is not None:
        return finished[0]["windows"]
    windows = complete(parts, model, text.length, text.seed)
    if unwritten(parts, text.length):
        journal.write("windows", {"windows": windows})
    return windows
