"""From the names of a model and some texts to statistics in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.text import DEFAULT_SOURCE, Text
from ..calibration.windows import WITHOUT_TEXT, complete, described, load_texts, text_windows, unwritten
from ..compression.pipeline import calibrate
from ..config import EigenAttentionConfig
from ..journal import Journal, identity
from ..models.loading import Source, load_model, load_tokenizer
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
    def drawn(self) -> dict[str, int]:
        """Which windows are drawn, as `text_windows` takes it and checkpoints record it."""
        return {"samples": self.samples, "length": self.length, "seed": self.seed}

    def load(self) -> list[Text]:
        """The texts; those that need none have no content.

        Raises:
            EigenAttnError: if one cannot be read.
        """
        return load_texts(self.text)


@dataclass(frozen=True)
class Subject:
    """A model that is to be calibrated or compressed, by its name, and how it is loaded.

    Args:
        source: where it is.
        dtype, device, max_memory, offload_folder: see `load_model`. Weights that are put on disk, and do not lie there
            already, go to a folder inside the journal's, by default.
    """

    source: Source
    dtype: str | None = None
    device: str | None = None
    max_memory: Mapping[int | str, str] | None = None
    offload_folder: Path | None = None

    def facts(self) -> dict[str, Any]:
        """What tells it from others, and what a result depends on besides."""
        model = identity(self.source.path, self.source.gguf_file)
        return {"model": model, "dtype": self.dtype, "device": self.device, "versions": versions()}

    def load(self, journal: Journal) -> PreTrainedModel:
        """The model."""
        folder = self.offload_folder or journal.folder / "offload"
        return load_model(self.source, self.dtype, self.device, max_memory=self.max_memory, offload_folder=folder)

    def load_with_windows(
        self, journal: Journal, tokenizer: Any, text: CalibrationText, texts: Sequence[Text]
    ) -> tuple[PreTrainedModel, Tensor]:
        """The model, and windows of the texts, which are drawn before it is loaded."""
        parts = text_windows(texts, tokenizer, **text.drawn)
        model = self.load(journal)
        return model, _windows(parts, model, text, journal)

    def provenance(self, model: PreTrainedModel) -> dict[str, Any]:
        """Facts to keep with what is made of it."""
        return {**self.source.origin(), "dtype": str(model.dtype).removeprefix("torch.")}


def of_one_kind(sources: Sequence[str]) -> bool:
    """Whether text is all from one source, and that is neither of many kinds nor the model's own."""
    return len(set(sources)) == 1 and sources[0] not in (DEFAULT_SOURCE, *WITHOUT_TEXT)


def calibrate_checkpoint(
    name: str,
    out: Path,
    text: CalibrationText,
    *,
    window: int = 32,
    share: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    max_memory: Mapping[int | str, str] | None = None,
    offload_folder: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Load a model, collect its statistics on windows of a text, and write them, for `compress_checkpoint` to add up.

    Killed at any moment, it goes on when it is called again in the same way.

    Args:
        name: a folder, a hub id, a `.gguf` file, or `smollm2`.
        out: a folder that does not exist yet; it appears when everything is written. `OUT.partial` keeps what is done.
        text: what to calibrate on.
        window, share: which tokens stay exact, and which latents are shared: see `EigenAttentionConfig`.
        dtype, device, max_memory, offload_folder: see `Subject`.

    Returns:
        What the folder says of them.

    Raises:
        EigenAttnError: on any bad input; nothing is written then.
    """
    config = EigenAttentionConfig(window=window, share=share)
    texts = text.load()  # before the model, which takes longer to load
    subject = Subject(Source.of(name), dtype, device, max_memory, offload_folder)
    read = [described(each) for each in texts]
    command = {"verb": "calibrate", **subject.facts(), "text": read, **text.drawn, "window": window, "share": share}
    with Journal(out, command) as journal:
        model, windows = subject.load_with_windows(journal, load_tokenizer(subject.source), text, texts)
        found = calibrate(model, windows.split(1), config, journal=journal, progress=progress)
        facts = {**subject.provenance(model), "text": read, **text.drawn}
        with journal.output() as folder:
            return found.save(folder, facts | {"versions": versions()})


def _windows(parts: Sequence[Tensor], model: PreTrainedModel, text: CalibrationText, journal: Journal) -> Tensor:
    """All calibration windows; those the model writes go to the journal, for writing takes long."""
    finished = journal.read("windows")
    if finished is not None:
        return finished[0]["windows"]
    windows = complete(parts, model, text.length, text.seed)
    if unwritten(parts, text.length):
        journal.write("windows", {"windows": windows})
    return windows
