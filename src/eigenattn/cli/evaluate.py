"""`eigenattn evaluate`."""

from __future__ import annotations

from pathlib import Path

import typer

from ..cache.evicting import EigenCache
from ..calibration.text import DEFAULT_SOURCE, load_text
from ..report.card import check_savable, save_evaluation
from ..report.tables import evaluation_tables, notes
from ..workflows.evaluate import evaluate_checkpoint
from .common import Json, Model, command, emit, rich_table, say
from .options import TEXT_HELP, EvaluationOptions, EvictionOptions, LoadingOptions, sources


@command(
    "eigenattn evaluate smollm2-60 --baseline smollm2",
    "eigenattn evaluate smollm2-60 --text speeches.txt --text wikitext2 --tokens 49152 --stride 512 --json -",
    "eigenattn evaluate llama-60 --baseline meta-llama/Llama-3.1-8B --tasks paper --needles 1024,4096",
    "eigenattn evaluate smollm2-60 --baseline smollm2 --tasks my-task.jsonl --save",
    "eigenattn evaluate smollm2-60 --baseline smollm2 --needles 1024 --evict snapkv --budget 256",
    baseline=typer.Option("--baseline", "--against", help="The original model, to be measured on the same items."),
    text=sources(f"What to read: {TEXT_HELP}. May be repeated."),
    stride=typer.Option(
        min=1, help="How many tokens lie from one window to the next, and are scored in each; all by default."
    ),
    cached="Read through the cache: half a window at once, then token by token.",
    batch_size=typer.Option(min=1, help="How many choices of tasks to read at a time."),
    trials=typer.Option(min=1, help="How many needles to hide for each length and depth."),
    save="Keep the result in the checkpoint's folder, and show it in its model card.",
)
def evaluate(
    model: Model,
    *,
    evaluation: EvaluationOptions,
    eviction: EvictionOptions,
    baseline: str | None = None,
    text: list[str] = [],  # noqa: B006 (typer copies it)
    stride: int | None = None,
    cached: bool = False,
    batch_size: int = 1,
    trials: int = 4,
    save: bool = False,
    loading: LoadingOptions,
    json_file: Json = None,
) -> None:
    """Measure perplexity, tasks and retrieval; with a baseline also paired differences and agreement.

    Texts are read unless only tasks are asked for; named sources use their held-out part. With --evict tokens of the
    model, not of the baseline, are evicted before those that are judged: by default the last half of each window.
    """
    rule = None
    if eviction != EvictionOptions():
        rule = EigenCache(**eviction.arguments()).eviction
        stride = evaluation.length // 2 if stride is None else stride
    if save:
        check_savable(Path(model))
    read = text or ([] if evaluation.tasks and not evaluation.needles else [DEFAULT_SOURCE])
    texts = [load_text(source, "evaluation") for source in read]
    plan = evaluation.plan(texts, trials, stride=stride, batch_size=batch_size)
    result = evaluate_checkpoint(
        model, plan, baseline=baseline, cached=cached, eviction=rule, **vars(loading), progress=True
    )
    values = result.to_dict()
    if save:
        save_evaluation(Path(model), values)
    console = emit(values, json_file)
    for table in evaluation_tables(values):
        console.print(rich_table(table))
    for note in notes(values):
        say(console, note)
