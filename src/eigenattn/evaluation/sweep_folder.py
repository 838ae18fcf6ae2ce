"""A sweep from the command line: names in, a folder of results out, cell by cell."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..calibration.statistics import Batch
from ..calibration.text import SOURCES, Text, load_text
from ..calibration.windows import SELF, complete, load_texts, text_windows
from ..errors import EigenAttnError
from ..models.loading import Source, load_model, load_tokenizer
from ..models.placement import input_device
from ..progress import TokenProgress
from ..version import versions
from .measuring import Plan, measure, report
from .reading import Logits, uncached
from .rivals import Rival
from .sweep import Grid, SweepModel, added, rival_sizes, sizes

VERSION = 1
FILE = "sweep.json"
# One part in so many of a file is held out for evaluation, if no other text is given for that.
HELD_OUT = 5


def sweep_texts(sources: Sequence[str], evaluation: Sequence[str]) -> tuple[list[Text | None], list[Text]]:
    """Texts to calibrate on, None standing for `self`, and texts to evaluate on, which share nothing with them.

    Args:
        evaluation: other sources to evaluate on. By default the same: named ones have a held-out part, and of a file
            the last fifth is held out.

    Raises:
        EigenAttnError: if a source cannot be read, or nothing is left to evaluate on.
    """
    if evaluation:
        return load_texts(sources), [load_text(source, "evaluation") for source in evaluation]
    calibration: list[Text | None] = []
    held_out = []
    for source, text in zip(sources, load_texts(sources), strict=True):
        if text is None or source in SOURCES:
            calibration.append(text)
            held_out += [] if source == SELF else [load_text(source, "evaluation")]
            continue
        cut = len(text.content) - len(text.content) // HELD_OUT
        calibration.append(Text(f"{text.source}, first part", text.content[:cut]))
        held_out.append(Text(f"{text.source}, last fifth", text.content[cut:]))
    if not held_out:
        raise EigenAttnError("there is no text to evaluate on: give --evaluation-text.")
    return calibration, held_out


def run_sweep(
    name: str,
    out: Path,
    grid: Grid,
    plan: Plan,
    *,
    calibration: Sequence[Text | None],
    samples: int,
    length: int,
    seed: int,
    rivals: Sequence[Rival] = (),
    dtype: str | None = None,
    device: str | None = None,
    progress: bool = False,
    done: Callable[[str, dict[str, Any]], None] = lambda key, cell: None,
) -> dict[str, Any]:
    """Measure every cell of a grid that `out` does not hold yet, and write each as soon as it is known.

    Args:
        name: a model: folder, hub id, `.gguf` file or `smollm2`.
        calibration: texts to calibrate on, None standing for text that the model writes.
        samples, length, seed: how many windows of how many tokens are drawn from them, and the draw.
        rivals: plain quantised caches, each measured with the largest of the grid's windows as exact tokens.
        done: called with each cell's key and figures.

    Returns:
        What `sweep.json` holds.

    Raises:
        EigenAttnError: on bad input, or a folder that holds something else.
    """
    if length <= max(grid.windows) or plan.length <= max(grid.windows):
        raise EigenAttnError(f"windows of text must be longer than the {max(grid.windows)} exact tokens.")
    results = Results(
        out,
        {
            "model": name,
            "calibration": [_named(text) for text in calibration],
            "samples": samples,
            "length": length,
            "seed": seed,
            "rank_multiple": grid.rank_multiple,
            "evaluation": [_named(text) for text in plan.texts],
            "protocol": plan.protocol(dtype or "checkpoint", "uncached"),
            "tasks": list(plan.tasks),
            "needles": list(plan.needles.lengths) if plan.needles else [],
        },
    )
    cells = [cell for cell in grid.cells() if cell.key not in results.cells]
    # A quantised cache with no exact token does not exist: its piece is at least one token.
    exact = max(grid.windows) or 32
    missing = [rival for rival in rivals if f"{rival.name}/{exact}" not in results.cells]
    if not cells and not missing:
        return results.values
    bars = TokenProgress(progress)
    source = Source.of(name)
    tokenizer = load_tokenizer(source)
    parts = text_windows(calibration, tokenizer, samples, length, seed)
    items = plan.items(tokenizer)
    model = load_model(source, dtype, device)
    for rival in missing:
        rival.cache(model.config, exact)  # so that one which does not take this model ends it now
    windows = complete(parts, model, length, seed).to(input_device(model))
    # Distributions are too large to keep: a sweep that goes on reads the original again.
    seconds = results.values["seconds"]
    with added(seconds, "baseline"):
        base = measure(model, tokenizer, plan, items, title="the original", bars=bars, keep=True)
    results.values["baseline"] = report(base)
    subject = SweepModel(model, [Batch(window) for window in windows.split(1)], grid, bars, seconds)

    def record(key: str, title: str, facts: dict[str, Any], what: Plan, logits_of: Logits) -> None:
        with added(seconds, "evaluation"):
            found = measure(
                model, tokenizer, what, items, title=title, bars=bars, logits_of=logits_of, original=base.predictions
            )
        results.cells[key] = facts | report(found, base)
        results.save()
        done(key, results.cells[key])

    for rival in missing:
        facts = {"method": rival.name, "window": exact, **rival_sizes(subject.layers, rival, exact, plan.length)}
        without_tasks = dataclasses.replace(plan, tasks={})  # lm-eval reads without a cache
        record(f"{rival.name}/{exact}", rival.name, facts, without_tasks, rival.logits(exact))
    for cell in cells:
        ranks = subject.compress(cell, results.values["costs"])
        facts = {
            "method": cell.method,
            **cell._asdict(),
            "asked": cell.kv_ratio,
            **sizes(subject.layers, ranks, cell.window, plan.length),
            "layers": [{"rank_k": rank_k, "rank_v": rank_v} for rank_k, rank_v in ranks],
        }
        record(cell.key, cell.key, facts, plan, uncached)
        subject.restore()
    return results.values


def _named(text: Text | None) -> dict[str, str | None]:
    return {"source": text.source if text else SELF, "sha256": text.sha256 if text else None}


class Results:
    """A sweep's folder: `sweep.json`, written anew after every cell, and the table `sweep.csv` beside it.

    Raises:
        EigenAttnError: if the folder holds something else, or a sweep with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        settings = json.loads(json.dumps(settings))  # as they will be read back: tuples become lists
        if folder.is_dir() and not (folder / FILE).exists() and not any(folder.iterdir()):
            folder.rmdir()
        if not folder.exists():
            self.values: dict[str, Any] = {
                "version": VERSION,
                "settings": settings,
                "versions": versions(),
                "seconds": {},
                "costs": {},
                "baseline": None,
                "cells": {},
            }
            return
        self.values = read_sweep(folder)
        stored = self.values["settings"]
        other = sorted(name for name in settings if settings[name] != stored.get(name))
        if other:
            raise EigenAttnError(f"{folder} holds a sweep with another {', '.join(other)}: choose another folder.")

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        return self.values["cells"]

    def save(self) -> None:
        """Write both files beside, and rename them."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with renamed(self.folder / FILE) as beside:
                beside.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
            with renamed(self.folder / "sweep.csv") as beside, beside.open("w", newline="", encoding="utf-8") as file:
                rows = table(self.values)
                writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
                writer.writeheader()
                writer.writerows(rows)
        except OSError as error:
            raise EigenAttnError(f"{self.folder} could not be written: {error.strerror}.") from error


@contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when everything is written."""
    beside = path.with_name(f".{path.name}.partial")
    yield beside
    beside.replace(path)


def read_sweep(folder: Path) -> dict[str, Any]:
    """What a sweep wrote.

    Raises:
        EigenAttnError: if the folder holds none, or one of another version.
    """
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EigenAttnError(f"{folder} holds no sweep: it has no readable {FILE}.") from error
    if not isinstance(values, dict) or values.get("version") != VERSION:
        raise EigenAttnError(f"{folder} holds a sweep of another version: install the eigenattn that wrote it.")
    return values


COLUMNS = ("method", "window", "asked", "kv_ratio", "bytes_per_token", "cache_bytes", "cache_ratio")
FIGURES = ("perplexity", "relative_increase", "relative_increase_error", "divergence", "top1_agreement")


def table(values: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat row for each cell, by method and falling size."""
    rows = []
    for cell in sorted(values["cells"].values(), key=lambda cell: (cell["method"], -cell["kv_ratio"])):
        row = {name: cell.get(name) for name in COLUMNS}
        for text in cell["texts"]:
            row |= {f"{name} ({text['text']})": text[name] for name in FIGURES}
        if "copying" in cell:
            row["copying"] = cell["copying"]["accuracy"]
        if cell["needles"]:
            row["needles"] = sum(each["accuracy"] for each in cell["needles"]) / len(cell["needles"])
        row |= {f"task {task['task']}": task["accuracy"] for task in cell["tasks"]}
        rows.append(row)
    return rows
