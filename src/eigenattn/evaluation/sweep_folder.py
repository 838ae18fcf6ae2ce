"""A sweep from the command line: names in, a folder of results out, cell by cell."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..calibration.statistics import Batch
from ..calibration.text import SOURCES, Text, load_text
from ..calibration.windows import SELF, complete, load_texts, text_windows
from ..errors import EigenAttnError
from ..files import lock, whole
from ..models.checkpoint import layer_entry
from ..models.loading import Source, load_model, load_tokenizer
from ..models.placement import input_device
from ..progress import TokenProgress
from ..version import versions
from .measuring import Plan, measure, report
from .reading import Logits, uncached
from .rivals import Rival
from .sweep import Cell, Grid, SweepModel, added, rival_sizes, sizes

VERSION = 2
FILE, TABLE, SECONDS = "sweep.json", "sweep.csv", "seconds.json"
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


@dataclass(frozen=True)
class Calibration:
    """What statistics are collected on: so many windows of some texts together, None being what the model writes."""

    texts: tuple[Text | None, ...]
    samples: int

    @property
    def name(self) -> str:
        return " + ".join(text.source if text else SELF for text in self.texts)

    @property
    def key(self) -> str:
        return f"{self.name}/{self.samples}"


def run_sweep(
    name: str,
    out: Path,
    grid: Grid,
    plan: Plan,
    *,
    calibrations: Sequence[Calibration],
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
        calibrations: what to calibrate on; the whole grid is measured with each.
        length, seed: of how many tokens calibration windows are, and their draw.
        rivals: plain quantised caches, each measured with the largest of the grid's windows as exact tokens.
        done: called with each cell's key and figures.

    Returns:
        What `sweep.json` holds, and the `seconds` that each stage took.

    Raises:
        EigenAttnError: on bad input, or a folder that holds something else or is in use.
    """
    if length <= max(grid.windows) or plan.length <= max(grid.windows):
        raise EigenAttnError(f"windows of text must be longer than the {max(grid.windows)} exact tokens.")
    settings = {
        "model": name,
        "length": length,
        "seed": seed,
        "rank_multiple": grid.rank_multiple,
        "evaluation": [_named(text) for text in plan.texts],
        "protocol": plan.protocol(dtype or "checkpoint", "uncached"),
        "tasks": list(plan.tasks),
        "needles": list(plan.needles.lengths) if plan.needles else [],
    }
    # A quantised cache with no exact token does not exist: its piece is at least one token.
    exact = max(grid.windows) or 32
    with Results(out, settings, calibrations) as results:
        wanted = {calibration: _missing(grid, calibration, results.cells) for calibration in calibrations}
        wanted = {calibration: cells for calibration, cells in wanted.items() if cells}
        missing = [rival for rival in rivals if f"{rival.name}/{exact}" not in results.cells]
        if not wanted and not missing:
            results.save_beside()  # it may have been killed between the files
            return results.values | {"seconds": results.seconds}
        bars = TokenProgress(progress)
        source = Source.of(name)
        tokenizer = load_tokenizer(source)
        parts = {each: text_windows(each.texts, tokenizer, each.samples, length, seed) for each in wanted}
        items = plan.items(tokenizer)
        model = load_model(source, dtype, device)
        for rival in missing:
            rival.check(model.config, exact)
        device_of_input = input_device(model)
        # Before the model is converted, as `compress` does: what it writes may hang on a rounding.
        batches = {
            each: [Batch(window) for window in complete(part, model, length, seed).to(device_of_input).split(1)]
            for each, part in parts.items()
        }
        # Distributions are too large to keep: a sweep that goes on reads the original again.
        with added(results.seconds, "baseline"):
            base = measure(model, tokenizer, plan, items, title="the original", bars=bars, keep=True)
        results.values["baseline"] = report(base)
        subject = SweepModel(model, [], grid, bars, results.seconds)

        def record(key: str, title: str, facts: dict[str, Any], what: Plan, logits_of: Logits) -> None:
            options = {"title": title, "bars": bars, "logits_of": logits_of, "original": base.predictions}
            with added(results.seconds, "evaluation"):
                found = measure(model, tokenizer, what, items, **options)
            results.cells[key] = facts | report(found, base)
            results.save()
            done(key, results.cells[key])

        for rival in missing:
            facts = {"method": rival.name, "window": exact, **rival_sizes(subject.layers, rival, exact, plan.length)}
            without_tasks = dataclasses.replace(plan, tasks={})  # lm-eval reads without a cache
            with rival.reading(subject.layers, exact) as logits_of:
                record(f"{rival.name}/{exact}", rival.name, facts, without_tasks, logits_of)
        for calibration, cells in wanted.items():
            subject.calibrate(batches[calibration])
            curves = results.values["costs"].setdefault(calibration.key, {})
            for cell in cells:
                known = set(curves)
                subject.compress(cell, curves)
                if set(curves) != known:
                    results.save()  # measuring costs takes longer than evaluating a cell
                facts = {
                    "method": cell.method,
                    "calibration": calibration.name,
                    "samples": calibration.samples,
                    **cell._asdict(),
                    "asked": cell.asked,
                    **sizes(subject.layers, plan.length),
                    "layers": [layer_entry(attention) for attention in subject.layers],
                }
                key = f"{calibration.key}/{cell.key}"
                record(key, key, facts, plan, uncached)
                subject.restore()
        return results.values | {"seconds": results.seconds}


def _missing(grid: Grid, calibration: Calibration, done: Mapping[str, Any]) -> list[Cell]:
    return [cell for cell in grid.cells() if f"{calibration.key}/{cell.key}" not in done]


def _named(text: Text | None) -> dict[str, str | None]:
    return {"source": text.source if text else SELF, "sha256": text.sha256 if text else None}


class Results:
    """A sweep's folder: `sweep.json`, written anew after every cell, and the table `sweep.csv` beside it.

    Both are the same however often a sweep was stopped. What is not, the time each stage took, is in `seconds.json`. A
    lock on the folder keeps a second process out.

    Raises:
        EigenAttnError: if the folder holds something else, or a sweep with other settings, or another process uses it.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], calibrations: Sequence[Calibration]) -> None:
        self.folder = folder
        self.texts = {each.name: [_named(text) for text in each.texts] for each in calibrations}
        settings = json.loads(json.dumps(settings))  # as they will be read back: tuples become lists
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(folder, folder)  # refused, nothing is undone: an empty folder is the other process's
        except OSError as error:
            raise EigenAttnError(f"{folder} could not be written: {error.strerror}.") from error
        try:
            self._take_up(settings)
        except BaseException:
            self.close()
            raise

    def _take_up(self, settings: dict[str, Any]) -> None:
        killed_at_first = self.folder / f".{FILE}.partial"
        if all(path == killed_at_first for path in self.folder.iterdir()):
            self.seconds: dict[str, float] = {}
            self.values: dict[str, Any] = {
                "version": VERSION,
                "settings": settings,
                "calibration": self.texts,
                "versions": versions(),
                "costs": {},
                "baseline": None,
                "cells": {},
            }
            return
        self.values, self.seconds = read_sweep(self.folder), read_seconds(self.folder)
        stored = self.values["settings"]
        other = sorted(name for name in settings if settings[name] != stored.get(name))
        if other:
            raise EigenAttnError(f"{self.folder} holds a sweep with another {', '.join(other)}: choose another folder.")
        for name, texts in self.texts.items():
            if self.values["calibration"].setdefault(name, texts) != texts:
                raise EigenAttnError(f"{self.folder} holds a sweep calibrated on another {name}: rename the file.")

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        return self.values["cells"]

    def save(self) -> None:
        """Write all files. A cell is done when `sweep.json`, the first of them, holds it."""
        with whole(self.folder / FILE) as beside:
            beside.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
        self.save_beside()

    def save_beside(self) -> None:
        """Write what stands beside `sweep.json`."""
        with whole(self.folder / TABLE) as beside, beside.open("w", newline="", encoding="utf-8") as file:
            rows = table(self.values)
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
        with whole(self.folder / SECONDS) as beside:
            beside.write_text(json.dumps(self.seconds, indent=1) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Let go of the lock. A folder that nothing was written to is removed."""
        with suppress(OSError):
            self.folder.rmdir()
        os.close(self._lock)

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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


def read_seconds(folder: Path) -> dict[str, float]:
    """Wall-clock seconds that each stage of a sweep has taken so far, over all of its runs."""
    try:
        return json.loads((folder / SECONDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # they are not worth refusing a sweep


COLUMNS = (
    "method",
    "calibration",
    "samples",
    "window",
    "asked",
    "bits_per_element",
    "kv_ratio",
    "bytes_per_token",
    "cache_bytes",
    "cache_ratio",
)
FIGURES = ("perplexity", "relative_increase", "relative_increase_error", "divergence", "top1_agreement")


def _order(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return cell["method"], cell.get("calibration", ""), cell.get("samples", 0), -cell["kv_ratio"]


def table(values: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat row for each cell, by method, calibration and falling size."""
    rows = []
    for cell in sorted(values["cells"].values(), key=_order):
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
