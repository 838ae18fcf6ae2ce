"""`eigenattn evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..cache.evicting import EigenCache
from ..calibration.text import DEFAULT_SOURCE, load_text
from ..errors import EigenAttnError
from ..evaluation.checkpoint import evaluate_checkpoint
from ..evaluation.measuring import Plan
from ..evaluation.retrieval import Needles
from ..evaluation.tasks import PAPER_TASKS, load_tasks, task_names
from ..report.card import check_savable, save_evaluation
from ..report.tables import evaluation_tables, notes
from .common import TEXT_HELP, Budget, Device, Dtype, Evict, Json, Model, app, budget_of, emit, examples, rich_table

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
        "eigenattn evaluate smollm2-60 --baseline smollm2 --tasks my-task.jsonl --save",
        "eigenattn evaluate smollm2-60 --baseline smollm2 --needles 1024 --evict snapkv --budget 256",
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
    evict: Evict = None,
    budget: Budget = None,
    tasks: Annotated[list[str], typer.Option(help=TASKS_HELP)] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Choices of tasks read at a time.")] = 1,
    needles: Annotated[
        str, typer.Option(help="Lengths in tokens at which to hide needles, with commas: 1024,4096.")
    ] = "",
    trials: Annotated[int, typer.Option(min=1, help="Needles for each length and depth.")] = 4,
    copies: Annotated[int, typer.Option(min=0, help="Windows to measure copying on.")] = 4,
    save: Annotated[
        bool, typer.Option("--save", help="Keep the result in the checkpoint's folder, and in its model card.")
    ] = False,
    dtype: Dtype = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Measure perplexity, tasks and retrieval; with a baseline also paired differences and agreement.

    Texts are read unless only tasks are asked for; named sources use their held-out part. With --evict tokens of the
    model, not of the baseline, are evicted before those that are judged: by default the last half of each window.
    """
    eviction = None
    if evict is not None or budget is not None:
        eviction = EigenCache(evict=evict, budget=budget_of(budget)).eviction
        stride = length // 2 if stride is None else stride
    if save:
        check_savable(Path(model))
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
        model, plan, baseline=baseline, cached=cached, eviction=eviction, dtype=dtype, device=device, progress=True
    )
    values = result.to_dict()
    if save:
        save_evaluation(Path(model), values)
    console = emit(values, json_file)
    for table in evaluation_tables(values):
        console.print(rich_table(table))
    for note in notes(values):
        console.print(note, highlight=False, soft_wrap=True)
