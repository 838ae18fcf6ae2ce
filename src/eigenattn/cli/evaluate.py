"""`eigenattn evaluate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..calibration.text import DEFAULT_SOURCE, load_text
from ..errors import EigenAttnError
from ..evaluation.checkpoint import Evaluation, evaluate_checkpoint
from ..evaluation.measuring import Plan
from ..evaluation.retrieval import Needles
from ..evaluation.tasks import PAPER_TASKS, load_tasks, task_names
from .common import TEXT_HELP, Device, Dtype, Json, Model, app, emit, examples

TASKS_HELP = (
    f"Zero-shot multiple choice: `paper` ({', '.join(PAPER_TASKS)}), other names that lm-eval knows, or .jsonl files "
    "of `query`, `choices` and `gold`. With commas, or repeated."
)


def needles_of(lengths: str, trials: int = 4) -> Needles | None:
    """Needles at the lengths given with commas between them, or none."""
    try:
        found = [int(part) for part in lengths.split(",") if part.strip()]
    except ValueError:
        raise EigenAttnError(f"--needles takes lengths with commas between them, not {lengths!r}.") from None
    return Needles(found, trials=trials) if found else None


@app.command(
    epilog=examples(
        "eigenattn evaluate smollm2-60 --baseline smollm2",
        "eigenattn evaluate smollm2-60 --text speeches.txt --text wikitext2 --tokens 49152 --stride 512 --json -",
        "eigenattn evaluate llama-60 --baseline meta-llama/Llama-3.1-8B --tasks paper --needles 1024,4096",
        "eigenattn evaluate smollm2-60 --baseline smollm2 --tasks my-task.jsonl --limit 100",
    )
)
def evaluate(
    model: Model,
    baseline: Annotated[
        str | None, typer.Option("--baseline", "--against", help="The original, measured on the same items.")
    ] = None,
    text: Annotated[list[str], typer.Option("--text", help=f"{TEXT_HELP}. May be repeated.", metavar="SOURCE")] = [],  # noqa: B006 (typer copies it)
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each text to read.")] = 16384,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 1024,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens from one window to the next, and scored in each; all by default.")
    ] = None,
    cached: Annotated[bool, typer.Option("--cached", help="Through the cache: half a window, then by token.")] = False,
    tasks: Annotated[list[str], typer.Option(help=TASKS_HELP)] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Choices of tasks read at a time.")] = 1,
    needles: Annotated[
        str, typer.Option(help="Lengths in tokens at which to hide needles, with commas: 1024,4096.")
    ] = "",
    trials: Annotated[int, typer.Option(min=1, help="Needles for each length and depth.")] = 4,
    copies: Annotated[int, typer.Option(min=0, help="Windows to measure copying on.")] = 4,
    dtype: Dtype = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Measure perplexity, tasks and retrieval; with a baseline also paired differences and agreement.

    Texts are read unless only tasks are asked for; named sources use their held-out part.
    """
    texts = [load_text(source, "evaluation") for source in text or ([] if tasks and not needles else [DEFAULT_SOURCE])]
    plan = Plan(
        texts,
        tokens=tokens,
        length=length,
        stride=stride,
        copies=copies,
        needles=needles_of(needles, trials),
        tasks=load_tasks(task_names(tasks)),
        limit=limit,
        batch_size=batch_size,
    )
    result = evaluate_checkpoint(
        model, plan, baseline=baseline, cached=cached, dtype=dtype, device=device, progress=True
    )
    _show(emit(result.to_dict(), json_file), result)


def _show(console: Console, result: Evaluation) -> None:
    found, protocol = result.results, result.protocol
    if found["texts"]:
        shown = Table(
            "text", "tokens", "perplexity", *(("baseline", "increase", "KL", "top-1") if result.baseline else ())
        )
        for row in found["texts"]:
            cells = [row["text"], f"{row['tokens']:,}", _figure(row, "perplexity", ".3f")]
            if result.baseline:
                cells += [f"{row['baseline_perplexity']:.3f}", _figure(row, "relative_increase", "+.2%")]
                cells += [_figure(row, "divergence", ".4f"), _figure(row, "top1_agreement", ".2%")]
            shown.add_row(*cells)
        console.print(shown)
    rows = [(row["task"], row) for row in found["tasks"]]
    rows += [(f"{row['task']}, normalised", row["normalised"]) for row in found["tasks"] if "normalised" in row]
    rows += [("copying", found["copying"])] if "copying" in found else []
    rows += [(f"needle at {row['depth']:.0%} of {row['length']:,}", row) for row in found["needles"]]
    if rows:
        shown = Table("", "items", "accuracy", *(("baseline", "difference") if result.baseline else ()))
        for name, row in rows:
            cells = [name, str(row["items"]), _figure(row, "accuracy", ".1%")]
            if result.baseline:
                cells += [f"{row['baseline_accuracy']:.1%}", _figure(row, "difference", "+.1%")]
            shown.add_row(*cells)
        console.print(shown)
    console.print(
        f"KV ratio {result.kv_ratio:.3f}, last {result.window} tokens exact. Windows of {protocol['length']:,} tokens, "
        f"one every {protocol['stride']:,}, {protocol['reading']}, {protocol['dtype']}. ± is one standard error"
        + (", of the paired difference where two models are compared." if result.baseline else "."),
        highlight=False,
        soft_wrap=True,
    )
    for row in found["tasks"]:
        if 0 < row["mean_tokens"] <= 2 * result.window:
            console.print(
                f"{row['task']} has {row['mean_tokens']:.0f} tokens an item, and the last {result.window} are exact: "
                "it says little of the compressed cache.",
                highlight=False,
                soft_wrap=True,
            )


def _figure(row: dict[str, Any], name: str, form: str) -> str:
    error = row[f"{name}_error"]
    return f"{row[name]:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}")
