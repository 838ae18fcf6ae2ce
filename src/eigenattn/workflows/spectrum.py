"""From the name of a model to its spectra in a folder, with pictures of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..calibration.statistics import Batch
from ..calibration.windows import complete, described, text_windows
from ..evaluation.spectra import FILE, VERSION, describe, spectra_of
from ..files import to_json
from ..journal import Journal
from ..models.loading import Source, load_model, load_tokenizer
from ..models.placement import input_device
from ..report.figures import decay, effective_ranks, energy, new_figure, save_figure
from ..version import versions
from .calibrate import CalibrationText


def write_spectra(
    name: str,
    out: Path,
    text: CalibrationText,
    *,
    basis: str,
    window: int,
    dtype: str | None = None,
    device: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Take a model's spectra on windows of texts, and write and draw them.

    Args:
        name: folder, hub id, `.gguf` file or `smollm2`.
        out: a folder that does not exist yet.
        basis, window: see `spectra_of`.

    Returns:
        What `spectrum.json` holds.

    Raises:
        EigenAttnError: on a model or text that cannot be used, or without matplotlib.
    """
    new_figure(1, 1)  # without matplotlib it ends here, not after the work
    asked = {"basis": basis, "window": window}
    options = {**vars(text), **asked, "dtype": dtype, "device": device}
    with Journal(out, {"verb": "spectrum", "model": name, **options}) as journal:
        texts, source = text.load(), Source.of(name)
        parts = text_windows(texts, load_tokenizer(source), **text.drawn)
        model = load_model(source, dtype, device)
        windows = complete(parts, model, text.length, text.seed).to(input_device(model))
        spectra = spectra_of(model, [Batch(each) for each in windows.split(1)], **asked, progress=progress)
        found = {
            "version": VERSION,
            "model": name,
            **asked,
            "text": [described(each) for each in texts],
            **text.drawn,
            "versions": versions(),
            **describe(spectra),
        }
        with journal.output() as folder:
            (folder / FILE).write_text(to_json(found), encoding="utf-8")
            for name, draw in (("decay", decay), ("energy", energy), ("effective-rank", effective_ranks)):
                save_figure(draw(found), folder / name)
    return found
