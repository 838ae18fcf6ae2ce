"""`eigenattn spectrum`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..compression.methods import BASES
from ..evaluation.spectra import FILE, SIDES
from ..workflows.calibrate import CalibrationText
from ..workflows.spectrum import write_spectra
from .common import WORDS, Json, Model, command, emit, say
from .options import CALIBRATION_HELP, WINDOW_HELP, LoadingOptions, sources

# Energies whose ranks the table shows.
SHOWN = (0.9, 0.99)


@dataclass(frozen=True)
class SpectrumText(CalibrationText):
    """What spectra are taken of."""

    samples: int = 16


WORDS[SpectrumText] = WORDS[CalibrationText] | {"text": sources(f"What to read: {CALIBRATION_HELP}")}


@command(
    "eigenattn spectrum smollm2 smollm2-spectrum",
    "eigenattn spectrum ./my-model spectra --text prompts.jsonl --basis attention --window 32",
    basis=f"One of {', '.join(BASES)}: eigen shows keys, queries and values as they are, attention the error "
    "that leaving a direction out would make.",
    window=typer.Option(
        min=0, help=f"{WINDOW_HELP}: with the attention basis, only what lies further back is looked at."
    ),
)
def spectrum(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    *,
    basis: str = "eigen",
    window: int = 0,
    text: SpectrumText,
    loading: LoadingOptions,
    json_file: Json = None,
) -> None:
    """Show how fast eigenvalues fall, by layer and head: pictures and JSON."""
    found = write_spectra(model, out, text, basis=basis, window=window, **vars(loading), progress=True)
    console = emit(found, json_file)
    head_dim = len(found["keys"]["eigenvalues"][0][0])
    columns = [f"{side}, {what}" for side in SIDES for what in ("effective rank", *(f"{e:.0%} energy" for e in SHOWN))]
    table = Table("layer", *columns, title=f"{model}, of {head_dim}; means over heads")
    for layer in range(len(found["keys"]["eigenvalues"])):
        cells = []
        for side in SIDES:
            ranks = found[side]["effective_rank"][layer]
            cells.append(f"{sum(ranks) / len(ranks):.1f}")
            kept = found[side]["energy_kept"][layer]
            for share in SHOWN:
                needed = [1 + sum(energy < share for energy in head) for head in kept]
                cells.append(f"{min(sum(needed) / len(needed), head_dim):.1f}")
        table.add_row(str(layer), *cells)
    console.print(table)
    say(console, f"{out}: {FILE}, and decay, energy and effective-rank as .png and .svg")
