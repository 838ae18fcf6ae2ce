"""`eigenattn sweep`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..calibration.text import DEFAULT_SOURCE
from ..compression.methods import BASES
from ..compression.ranks import RANK_RULES
from ..errors import EigenAttnError
from ..evaluation.grid import Grid
from ..evaluation.rivals import RIVALS, Rival
from ..evaluation.sweep_folder import table
from ..report.figures import calibration_study, frontier, new_figure, save_figure
from ..report.tables import calibrations, sweep_table
from ..workflows.sweep import Calibration, run_sweep, sweep_texts
from .common import WORDS, Json, Model, command, emit, rich_table, say, several
from .options import (
    CALIBRATION_HELP,
    CODED_HELP,
    SHARE_HELP,
    WINDOW_HELP,
    EvaluationOptions,
    LoadingOptions,
    seed_of,
    sources,
)

# By default, of latents in 16 bits and of coded ones.
RATIOS, CODED_RATIOS = "0.9,0.8,0.7,0.6,0.5", "0.25,0.1875,0.125"
LIST = "Several are separated by commas."
# Without variants, which docs/evaluation.md has.
RIVAL_NAMES = ", ".join(name for name in RIVALS if not name.endswith(("-rotated", "-centred", "-sinks")))


@dataclass(frozen=True)
class GridOptions:
    """Which compressions are compared: all combinations."""

    kv_ratio: str = ""
    coded: bool = False
    basis: str = ""
    ranks: str = "sensitivity"
    window: str = "32"
    share: str = "1"
    rank_multiple: int = 8
    shrinkage: str = "0"
    refit: bool | None = None

    def grid(self) -> Grid:
        """The cells asked for.

        Raises:
            EigenAttnError: if one of them is none.
        """
        return Grid(
            kv_ratios=several("--kv-ratio", self.kv_ratio or (CODED_RATIOS if self.coded else RATIOS), float),
            coded=self.coded,
            bases=several("--basis", self.basis) or (None,),
            ranks=several("--ranks", self.ranks),
            windows=several("--window", self.window, int),
            share=several("--share", self.share),
            rank_multiple=self.rank_multiple,
            shrinkage=several("--shrinkage", self.shrinkage, float),
            refit=self.refit,
        )


WORDS[GridOptions] = {
    "kv_ratio": typer.Option(
        help=f"Compress the cache to these shares of its bytes. {LIST} By default {RATIOS}, and with --coded "
        f"{CODED_RATIOS}.",
        metavar="LIST",
    ),
    "coded": CODED_HELP,
    "basis": f"How subspaces are found: {', '.join(BASES)}. {LIST} By default attention, and fisher with --coded.",
    "ranks": f"How ranks are shared out over the layers: {', '.join(RANK_RULES)}. {LIST}",
    "window": f"{WINDOW_HELP}. {LIST}",
    "share": f"{SHARE_HELP} {LIST}",
    "rank_multiple": "Ranks are multiples of this number.",
    "shrinkage": typer.Option(
        help=f"Take these shares of the statistics from the weights and not from the text. {LIST}", metavar="LIST"
    ),
    "refit": "Fit the decoders of values anew once ranks are chosen. By default only without a window.",
}


@command(
    "eigenattn sweep smollm2 smollm2-sweep --kv-ratio 0.9,0.8,0.7,0.6,0.5",
    "eigenattn sweep my-model sweep --kv-ratio 0.6,0.4 --basis attention,eigen --window 0,32 --text prompts.jsonl",
    "eigenattn sweep smollm2 sweep --coded --share 1,3kv --rivals plain-4,plain-2 --tasks my-task.jsonl",
    "eigenattn sweep smollm2 study --each-text --text wikitext2 --text python-docs --text self --samples 4,8,16,32",
    rivals=typer.Option(help=f"Compare with caches that need no text: {RIVAL_NAMES}. {LIST}", metavar="LIST"),
    text=sources(f"What to calibrate on: {CALIBRATION_HELP}"),
    evaluation_text=sources(
        "What to evaluate on. By default what named sources hold out, and the last fifth of files."
    ),
    each_text="Calibrate on each text by itself, not on all together.",
    samples=f"How many calibration windows to draw from the text. {LIST}",
    seed=seed_of("the draw"),
)
def sweep(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder of results; a sweep that is there goes on.")],
    *,
    grid: GridOptions,
    evaluation: EvaluationOptions,
    rivals: str = "",
    text: list[str] = [DEFAULT_SOURCE],  # noqa: B006 (typer copies it)
    evaluation_text: list[str] = [],  # noqa: B006
    each_text: bool = False,
    samples: str = "32",
    seed: int = 0,
    loading: LoadingOptions,
    json_file: Json = None,
) -> None:
    """Measure quality against cache size: statistics are collected once, for all ratios.

    With several texts by themselves, or several numbers of samples, it says which text to calibrate on, and how much.
    """
    cells = grid.grid()
    sizes = several("--samples", samples, int)
    if min(sizes, default=0) < 1:
        raise EigenAttnError("--samples must be 1 or more.")
    new_figure(1, 1)  # without matplotlib it ends here, not after the work
    chosen = [Rival.of(name) for name in several("--rivals", rivals)]
    calibration, held_out = sweep_texts(text, evaluation_text)
    groups = [[each] for each in calibration] if each_text else [calibration]
    results = run_sweep(
        model,
        out,
        cells,
        evaluation.plan(held_out),
        calibrations=[Calibration(tuple(texts), size) for texts in groups for size in sizes],
        length=evaluation.length,
        seed=seed,
        rivals=chosen,
        **vars(loading),
        progress=True,
    )
    pictures = {"frontier": frontier}
    if len(calibrations(results)) > 1:
        pictures["calibration"] = calibration_study
    for name, draw in pictures.items():
        save_figure(draw(results), out / name)
    console = emit(results, json_file)
    texts = [row["text"] for row in results["baseline"]["texts"]]
    title = f"increase of perplexity against the KV ratio, and the whole cache's at {evaluation.length:,} tokens"
    console.print(rich_table(sweep_table(table(results), texts), title))
    took = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in results["seconds"].items())
    drawn = ", ".join(f"{name}.png, {name}.svg" for name in pictures)
    say(console, f"{out}: sweep.json, sweep.csv, {drawn}. {took}.")
