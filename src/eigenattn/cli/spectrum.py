"""`eigenattn spectrum`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..calibration.text import DEFAULT_SOURCE
from ..calibration.windows import load_texts
from ..compression.methods import BASES
from ..evaluation.spectra import FILE, SIDES, measure_spectra
from ..files import to_json
from ..journal import Journal
from ..report.figures import decay, effective_ranks, energy, new_figure, save_figure
from .common import SEEDS, Json, Model, app, emit, examples
from .options import NO_TEXT_HELP, TEXT_HELP, WINDOW_HELP, LoadingOptions, grouped

# Energies whose ranks the table shows.
SHOWN = (0.9, 0.99)


@app.command(
    epilog=examples(
        "eigenattn spectrum smollm2 smollm2-spectrum",
        "eigenattn spectrum ./my-model spectra --text prompts.jsonl --basis attention --window 32",
    )
)
@grouped
def spectrum(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    *,
    basis: Annotated[
        str,
        typer.Option(
            help=f"One of {', '.join(BASES)}: eigen shows keys, queries and values as they are, attention the error "
            "that leaving a direction out would make."
        ),
    ] = "eigen",
    window: Annotated[
        int,
        typer.Option(min=0, help=f"{WINDOW_HELP}: with the attention basis, only what lies further back is looked at."),
    ] = 0,
    text: Annotated[
        list[str],
        typer.Option(
            "--text",
            help=f"What to read: {TEXT_HELP}. {NO_TEXT_HELP}",
            metavar="SOURCE",
        ),
    ] = [DEFAULT_SOURCE],  # noqa: B006 (typer copies it)
    samples: Annotated[int, typer.Option(min=1, help="How many windows to draw from the text.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="How many tokens a window has.")] = 1024,
    seed: Annotated[int, typer.Option(**SEEDS, help="The seed of the draw.")] = 0,
    loading: LoadingOptions,
    json_file: Json = None,
) -> None:
    """Show how fast eigenvalues fall, by layer and head: pictures and JSON."""
    new_figure(1, 1)  # without matplotlib it ends here, not after the work
    options = {
        "samples": samples,
        "length": length,
        "seed": seed,
        "basis": basis,
        "window": window,
        **vars(loading),
    }
    with Journal(out, {"verb": "spectrum", "model": model, "text": text, **options}) as journal:
        found = measure_spectra(model, calibration=load_texts(text), progress=True, **options)
        with journal.output() as folder:
            (folder / FILE).write_text(to_json(found), encoding="utf-8")
            for name, draw in (("decay", decay), ("energy", energy), ("effective-rank", effective_ranks)):
                save_figure(draw(found), folder / name)
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
    console.print(
        f"{out}: {FILE}, and decay, energy and effective-rank as .png and .svg", highlight=False, soft_wrap=True
    )
