"""Zero-shot multiple-choice tasks through lm-eval: its own by name, and local files in the same harness."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from ..errors import EigenAttnError
from ..files import holds_rows, is_text, read_rows

PAPER = "paper"
# The five of arXiv 2408.05646, table 1.
PAPER_TASKS = ("piqa", "winogrande", "arc_easy", "arc_challenge", "hellaswag")
FIELDS = ("query", "choices", "gold")


@dataclass(frozen=True)
class TaskResult:
    """How a model answered the items of one task, in a fixed order.

    Args:
        correct: 1 or 0 for each item: the likeliest choice.
        correct_normalised: the same with log-likelihoods divided by the choices' bytes; None if the task has no such.
        mean_tokens: mean tokens of a question with one choice. Below a model's exact window a task says nothing of the
            compressed cache.
    """

    correct: list[float]
    correct_normalised: list[float] | None
    mean_tokens: float


def task_names(asked: Sequence[str]) -> list[str]:
    """Names with `paper` written out, each once; commas separate names, too."""
    names = [name.strip() for each in asked for name in each.split(",") if name.strip()]
    written_out = [task for name in names for task in (PAPER_TASKS if name == PAPER else (name,))]
    return list(dict.fromkeys(written_out))


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """Read tasks: those of lm-eval by name, from the hub, and files of JSON rows with `query`, `choices` and `gold`.

    Raises:
        EigenAttnError: if lm-eval is absent, a file is malformed, a task is unknown, or its data cannot be reached.
    """
    if not names:
        return {}
    files = {name: _rows(Path(name)) for name in names if holds_rows(Path(name))}
    manager = _manager(len(files) < len(names))
    known = set(manager.all_tasks)
    tasks = {}
    for name in names:
        if name not in files and name not in known:
            raise EigenAttnError(
                f"task {name!r} is neither a .jsonl file, nor `{PAPER}`, nor one that lm-eval knows (lm-eval ls tasks)."
            )
        try:
            loaded = manager.load([_local(Path(name), files[name]) if name in files else name])["tasks"]
        except Exception as error:  # lm-eval lets through what datasets, fsspec and the network raise
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if name in files:
                raise EigenAttnError(f"task {name} could not be made of its items ({first}).") from error
            raise EigenAttnError(
                f"the data of task {name!r} could not be read from the hub ({first}). Offline, use a local .jsonl file."
            ) from error
        for label, task in loaded.items():
            if task.OUTPUT_TYPE != "multiple_choice":
                raise EigenAttnError(f"task {label!r} is not multiple choice: only such tasks are supported.")
            if label in tasks:
                raise EigenAttnError(f"two tasks are called {label!r}: rename one of the files.")
            tasks[label] = task
    return tasks


@functools.cache
def _manager(include_defaults: bool) -> Any:
    """lm-eval's index of tasks, which takes seconds to build."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise EigenAttnError("tasks need lm-eval: pip install 'eigenattn[eval]'.") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_defaults=include_defaults)


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for place, row in read_rows(path):
        query, choices, gold = (row.get(name) if isinstance(row, dict) else None for name in FIELDS)
        texts = [query, *choices] if isinstance(choices, list) and all(choices) else [None]
        if not all(map(is_text, texts)) or type(gold) is not int or not 0 <= gold < len(texts) - 1:
            raise EigenAttnError(
                f"{place}: expected an object with `query`, a list of `choices` and `gold`, the right one's number "
                "from 0."
            )
        rows.append({"query": query, "choices": choices, "gold": gold})
    if not rows:
        raise EigenAttnError(f"task {path} has no items.")
    return rows


def _local(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """lm-eval's configuration of a local task: the query as it stands, a space, and a choice."""

    def dataset(**_: Any) -> Any:
        from datasets import Dataset

        return {"test": Dataset.from_list(rows)}

    return {
        "task": path.stem,
        "custom_dataset": dataset,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def run_tasks(
    model: PreTrainedModel, tokenizer: Any, tasks: dict[str, Any], *, limit: int | None = None, batch_size: int = 1
) -> dict[str, TaskResult]:
    """Answer the first `limit` items of every task, without examples.

    Args:
        tasks: from `load_tasks`.
    """
    if not tasks:
        return {}
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # Types are lost in lm-eval's decorators.
    harness = cast(Any, HFLM)(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = cast(Any, simple_evaluate)(
        model=harness, tasks=list(tasks.values()), num_fewshot=0, limit=limit, bootstrap_iters=0, log_samples=True
    )
    results = {}
    for name in tasks:
        items = sorted(found["samples"][name], key=lambda item: item["doc_id"])
        lengths = [
            len(tokenizer(context + continuation)["input_ids"])
            for item in items
            for context, continuation in item["arguments"]
        ]
        normalised = "acc_norm" in items[0]
        results[name] = TaskResult(
            [float(item["acc"]) for item in items],
            [float(item["acc_norm"]) for item in items] if normalised else None,
            sum(lengths) / len(lengths),
        )
    return results
