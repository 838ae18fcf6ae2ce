"""`eigenattn sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..calibration.text import DEFAULT_SOURCE
from ..compression.bases import BASES
from ..compression.ranks import RANK_RULES
from ..errors import EigenAttnError
from ..evaluation.measuring import Plan
from ..evaluation.rivals import NAMES, Rival
from ..evaluation.sweep import Grid
from ..evaluation.sweep_folder import Calibration, run_sweep, sweep_texts, table
from ..evaluation.tasks import load_tasks, task_names
from ..report.figures import calibration_study, frontier, new_figure, save_figure
from ..report.tables import calibrations, sweep_table
from .common import TEXT_HELP, Device, Dtype, Json, Model, app, emit, examples, rich_table
from .evaluate import TASKS_HELP, needles_of


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise EigenAttnError(f"{option} takes numbers with commas between them, not {text!r}.") from None


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


RATIOS = "0.9,0.8,0.7,0.6,0.5"


@app.command(
    epilog=examples(
        "eigenattn sweep smollm2 smollm2-sweep --kv-ratio 0.9,0.8,0.7,0.6,0.5",
        "eigenattn sweep my-model sweep --kv-ratio 0.6,0.4 --basis attention,eigen --window 0,32 --text prompts.jsonl",
        "eigenattn sweep smollm2 sweep --bits-per-element 4,3,2 --rivals plain-4,plain-2 --tasks my-task.jsonl",
        "eigenattn sweep smollm2 study --each-text --text wikitext2 --text python-docs --text self --samples 4,8,16,32",
    )
)
def sweep(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder of results; a sweep that is there goes on.")],
    kv_ratio: Annotated[
        str,
        typer.Option(
            help=f"KV ratios, with commas between them; {RATIOS} if no bits are given either.", metavar="LIST"
        ),
    ] = "",
    bits_per_element: Annotated[
        str, typer.Option(help="Bits an element of quantised latents, with commas between them.", metavar="LIST")
    ] = "",
    basis: Annotated[str, typer.Option(help=f"Of {', '.join(BASES)}, with commas between them.")] = "attention",
    ranks: Annotated[
        str, typer.Option(help=f"Rank rules, of {', '.join(RANK_RULES)}, with commas between them.")
    ] = "sensitivity",
    window: Annotated[str, typer.Option(help="Exact tokens, with commas between them.")] = "32",
    shared_heads: Annotated[str, typer.Option(help="KV heads that share one latent, with commas between them.")] = "1",
    shared_values: Annotated[
        str,
        typer.Option(
            help="KV heads that share one latent of their values, with commas between them; by default --shared-heads.",
            metavar="LIST",
        ),
    ] = "",
    joint: Annotated[bool, typer.Option("--joint", help="Keys and values share latents too.")] = False,
    rank_multiple: Annotated[int, typer.Option(help="Ranks are multiples of this.")] = 8,
    shrinkage: Annotated[
        str, typer.Option(help="Shares of statistics taken from the weights, with commas between them.", metavar="LIST")
    ] = "0",
    refit: Annotated[
        bool | None,
        typer.Option("--refit/--no-refit", help="Fit value decoders anew. By default without a window."),
    ] = None,
    rivals: Annotated[str, typer.Option(help=f"Plain quantised caches to compare with: {NAMES}.")] = "",
    text: Annotated[
        list[str],
        typer.Option("--text", help=f"{TEXT_HELP}, or `self`: to calibrate on. May be repeated.", metavar="SOURCE"),
    ] = [DEFAULT_SOURCE],  # noqa: B006 (typer copies it)
    evaluation_text: Annotated[
        list[str],
        typer.Option(
            help="To evaluate on; by default what named sources hold out, and the last fifth of files.",
            metavar="SOURCE",
        ),
    ] = [],  # noqa: B006
    each_text: Annotated[
        bool, typer.Option("--each-text", help="Calibrate on each text by itself, not on all together.")
    ] = False,
    samples: Annotated[
        str, typer.Option(help="Calibration windows to draw from the text: a number, or several with commas.")
    ] = "32",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each text to evaluate on.")] = 16384,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window, of calibration and evaluation.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    tasks: Annotated[list[str], typer.Option(help=TASKS_HELP)] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task.")] = None,
    needles: Annotated[str, typer.Option(help="Lengths in tokens at which to hide needles, with commas.")] = "",
    copies: Annotated[int, typer.Option(min=0, help="Windows to measure copying on.")] = 4,
    dtype: Dtype = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Measure quality against cache size: statistics are collected once, for all ratios.

    With several texts by themselves, or several numbers of samples, it tells which text to calibrate on, and how much.
    """
    ratios = kv_ratio or ("" if bits_per_element else RATIOS)
    grid = Grid(
        _numbers("--kv-ratio", ratios, float),
        _names(basis),
        _names(ranks),
        _numbers("--window", window, int),
        _numbers("--shared-heads", shared_heads, int),
        rank_multiple,
        _numbers("--bits-per-element", bits_per_element, float),
        refit,
        _numbers("--shrinkage", shrinkage, float),
        joint,
        _numbers("--shared-values", shared_values, int) or (None,),
    )
    sizes = _numbers("--samples", samples, int)
    if min(sizes, default=0) < 1:
        raise EigenAttnError("--samples must be 1 or more.")
    new_figure(1, 1)  # without matplotlib it ends here, not after the work
    chosen = [Rival.of(name) for name in _names(rivals)]
    calibration, held_out = sweep_texts(text, evaluation_text)
    groups = [[each] for each in calibration] if each_text else [calibration]
    plan = Plan(
        held_out,
        tokens=tokens,
        length=length,
        copies=copies,
        needles=needles_of(needles),
        tasks=load_tasks(task_names(tasks)),
        limit=limit,
    )
    results = run_sweep(
        model,
        out,
        grid,
        plan,
        calibrations=[Calibration(tuple(texts), size) for texts in groups for size in sizes],
        length=length,
        seed=seed,
        rivals=chosen,
        dtype=dtype,
        device=device,
        progress=True,
    )
    pictures = {"frontier": frontier}
    if len(calibrations(results)) > 1:
        pictures["calibration"] = calibration_study
    for name, draw in pictures.items():
        save_figure(draw(results), out / name)
    console = emit(results, json_file)
    texts = [row["text"] for row in results["baseline"]["texts"]]
    title = f"increase of perplexity against the KV ratio, and the whole cache's at {length:,} tokens"
    console.print(rich_table(sweep_table(table(results), texts), title))
    took = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in results["seconds"].items())
    drawn = ", ".join(f"{name}.png, {name}.svg" for name in pictures)
    console.print(f"{out}: sweep.json, sweep.csv, {drawn}. {took}.", highlight=False, soft_wrap=True)
