"""From a model's name to a compressed checkpoint in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..calibration.statistics_file import check_fit, open_statistics
from ..calibration.text import draw_windows, load_text
from ..calibration.windows import described
from ..compression.pipeline import CompressionReport, compress
from ..compression.recipe import check_supported
from ..config import EigenAttentionConfig
from ..errors import EigenAttnError
from ..journal import Journal
from ..models.bases_file import are_beside, save_bases
from ..models.checkpoint_format import checkpoint_of
from ..models.conversion import layouts_of, quantiser_of
from ..models.loading import Source, load_tokenizer
from ..models.placement import save_model
from ..report.card import model_card
from .calibrate import CalibrationText, Subject

# Windows of each held-out text (chosen: 8,192 tokens, a fourth of which are judged).
HELD_WINDOWS = 8


@dataclass(frozen=True)
class BoundedLoss:
    """The loss that is allowed, in place of a size.

    Args:
        max_divergence: the mean KL divergence of predictions from the original's, in nats a token: see
            `eigenattn.compress`. None: a size is asked for.
        held_out: text sources that it is measured on, other than those that are calibrated on.
    """

    max_divergence: float | None = None
    held_out: list[str] = field(default_factory=lambda: ["python-docs"])

    def arguments(self, tokenizer: Any, length: int, seed: int) -> dict[str, Any]:
        """As `compress` takes them, with windows of so many tokens.

        Raises:
            EigenAttnError: if a source cannot be read, or is too short.
        """
        if self.max_divergence is None:
            return {}
        texts = [load_text(source) for source in self.held_out]
        windows = {text.source: draw_windows(tokenizer, text, HELD_WINDOWS, length, seed).split(1) for text in texts}
        return {"max_divergence": self.max_divergence, "held_out": windows}


def compress_checkpoint(
    name: str,
    out: Path,
    config: EigenAttentionConfig,
    text: CalibrationText | Sequence[Path],
    *,
    dtype: str | None = None,
    device: str | None = None,
    max_memory: Mapping[int | str, str] | None = None,
    offload_folder: Path | None = None,
    loss: BoundedLoss | None = None,
    checkpoint: bool = False,
    progress: bool = False,
) -> CompressionReport:
    """Load a model, compress it on windows of a text, and write it with tokenizer, generation settings and model card.

    Killed at any moment, it goes on when it is called again in the same way.

    Args:
        name: a folder, a hub id, a `.gguf` file, or `smollm2`.
        out: a folder that does not exist yet; it appears when everything is written. `OUT.partial` keeps what is done.
        text: what to calibrate on; or folders of statistics, which are added up and read no text.
        dtype, device, max_memory, offload_folder: see `Subject`.
        loss: in place of a size, the loss that is allowed.
        checkpoint: write the whole model. Without it bases are written, which belong to the model by this name; where
            maps are folded into the weights there is no choice.

    Raises:
        EigenAttnError: on any bad input; nothing is written then.
    """
    check_supported(config)
    loss = loss or BoundedLoss()
    drawn = text if isinstance(text, CalibrationText) else CalibrationText()
    if isinstance(text, CalibrationText):  # read before the model, which takes longer to load
        texts, files = text.load(), []
        read = {"text": [described(each) for each in texts], **text.drawn}
        known = read
    else:
        texts, files = [], open_statistics(text)
        if files:
            check_fit(files, config)
        read = {"statistics": [file.provenance() for file in files]}
        known = {"statistics": [file.facts.get("sha256") for file in files]}
    subject = Subject(Source.of(name), dtype, device, max_memory, offload_folder)
    command = {"verb": "compress", **subject.facts(), **config.to_dict(), "checkpoint": checkpoint, **known}
    command |= asdict(loss)
    with Journal(out, command) as journal:
        tokenizer = load_tokenizer(subject.source)
        options = {"journal": journal, "progress": progress, **loss.arguments(tokenizer, drawn.length, drawn.seed)}
        if isinstance(text, CalibrationText):
            model, windows = subject.load_with_windows(journal, tokenizer, text, texts)
            _check_savable(model, checkpoint)
            provenance = subject.provenance(model) | read
            report = compress(model, windows.split(1), config, provenance=provenance, **options)
        else:
            model = subject.load(journal)
            _check_savable(model, checkpoint)
            provenance = subject.provenance(model) | read
            report = compress(model, config=config, statistics=text, provenance=provenance, **options)
        whole = checkpoint or not are_beside(layouts_of(model))
        with journal.output() as folder:
            if whole:
                save_model(model, folder)
            else:
                save_bases(model, folder)
            tokenizer.save_pretrained(folder)
            made = checkpoint_of(model)
            assert made is not None  # of a model that was compressed
            card = model_card(made, report, layouts_of(model), whole)
            (folder / "README.md").write_text(card, encoding="utf-8")
    return report


def _check_savable(model: PreTrainedModel, checkpoint: bool) -> None:
    quantiser = quantiser_of(model) if checkpoint else None
    if quantiser is not None:
        raise EigenAttnError(
            f"{quantiser} quantises weights of this model, which no checkpoint of ours can hold: write its bases, "
            "without --checkpoint."
        )
