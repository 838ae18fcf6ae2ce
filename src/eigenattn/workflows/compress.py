"""From a model's name to a compressed checkpoint in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..calibration.statistics_file import check_fit, open_statistics
from ..calibration.windows import described
from ..compression.pipeline import CompressionReport, compress
from ..compression.recipe import check_supported
from ..config import EigenAttentionConfig
from ..errors import EigenAttnError
from ..journal import Journal
from ..models.bases_file import save_bases
from ..models.conversion import layouts_of
from ..models.loading import Source, load_tokenizer
from ..models.placement import save_model
from ..report.card import model_card
from .calibrate import CalibrationText, Subject

# What a bounded loss is measured on by default: text that is everywhere at hand, and in no calibration text.
HELD_OUT = ("python-docs",)
# Windows of each text that it is measured on (chosen: 8,192 tokens, a fourth of them judged).
HELD_WINDOWS = 8


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
    max_divergence: float | None = None,
    held_out: Sequence[str] = HELD_OUT,
    bases_only: bool = False,
    progress: bool = False,
) -> CompressionReport:
    """Load a model, compress it on windows of a text, and write it with tokenizer, generation settings and model card.

    Killed at any moment, it goes on when it is called again in the same way.

    Args:
        name: a folder, a hub id, a `.gguf` file, or `smollm2`.
        out: a folder that does not exist yet; it appears when everything is written. `OUT.partial` keeps what is done.
        text: what to calibrate on; or folders of statistics, which are added up and read no text.
        dtype, device, max_memory, offload_folder: see `Subject`.
        max_divergence: in place of a size, the loss that is allowed: see `eigenattn.compress`.
        held_out: text sources that it is measured on, besides passages of the calibration text that are not read.
        bases_only: write the bases alone, to be attached to the base model; needs a window.

    Raises:
        EigenAttnError: on any bad input; nothing is written then.
    """
    check_supported(config)
    if bases_only and not config.window:
        raise EigenAttnError("--bases-only needs a window: without one the bases are folded into the weights.")
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
    command = {"verb": "compress", **subject.facts(), **config.to_dict(), "bases_only": bases_only, **known}
    with Journal(out, command) as journal:
        tokenizer = load_tokenizer(subject.source)
        options = {"journal": journal, "progress": progress}
        if isinstance(text, CalibrationText):
            model, windows = subject.load_with_windows(journal, tokenizer, text, texts)
            provenance = subject.provenance(model) | read
            report = compress(model, windows.split(1), config, provenance=provenance, **options)
        else:
            model = subject.load(journal)
            provenance = subject.provenance(model) | read
            report = compress(model, config=config, statistics=text, provenance=provenance, **options)
        with journal.output() as folder:
            if bases_only:
                save_bases(model, folder)
            else:
                save_model(model, folder)
                tokenizer.save_pretrained(folder)
            card = model_card(model.config.quantization_config, report, layouts_of(model), bases_only)
            (folder / "README.md").write_text(card, encoding="utf-8")
    return report
