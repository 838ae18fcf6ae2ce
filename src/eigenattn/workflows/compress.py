"""From a model's name to a compressed checkpoint in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from ..calibration.statistics_file import check_fit, open_statistics
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
        checkpoint: write the whole model. Without it bases are written, which belong to the model by this name; where
            maps are folded into the weights there is no choice.

    Raises:
        EigenAttnError: on any bad input; nothing is written then.
    """
    check_supported(config)
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
    with Journal(out, command) as journal:
        tokenizer = load_tokenizer(subject.source)
        options = {"journal": journal, "progress": progress}
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
