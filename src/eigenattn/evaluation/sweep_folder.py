"""A sweep's folder of results: written after every cell, and taken up where it stopped."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import EigenAttnError
from ..files import check_name, lock, read_results, to_json, whole
from ..version import versions

VERSION = 2
FILE, TABLE, SECONDS = "sweep.json", "sweep.csv", "seconds.json"


class SweepFolder:
    """What a sweep writes: `sweep.json`, written anew after every cell, and the table `sweep.csv` beside it.

    Both are the same however often a sweep was stopped. What is not, the time each stage took, is in `seconds.json`. A
    lock on the folder keeps a second process out.

    Args:
        folder: an empty one, one that does not exist, or one that a sweep with the same settings has begun.
        settings: what all cells have in common, in plain values.
        texts: what each calibration text is made of, by its name.

    Raises:
        EigenAttnError: if the folder holds something else, or a sweep with other settings, or another process uses it.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], texts: dict[str, list[dict[str, Any]]]) -> None:
        check_name(folder)
        self.folder, self.texts = folder, texts
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
        """What was measured, by the cell's key."""
        return self.values["cells"]

    def save(self) -> None:
        """Write all files. A cell is done when `sweep.json`, the first of them, holds it."""
        with whole(self.folder / FILE) as beside:
            beside.write_text(to_json(self.values, indent=1), encoding="utf-8")
        self.save_beside()

    def save_beside(self) -> None:
        """Write what stands beside `sweep.json`."""
        with whole(self.folder / TABLE) as beside, beside.open("w", newline="", encoding="utf-8") as file:
            rows = table(self.values)
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
        with whole(self.folder / SECONDS) as beside:
            beside.write_text(to_json(self.seconds, indent=1), encoding="utf-8")

    def close(self) -> None:
        """Let go of the lock. A folder that nothing was written to is removed."""
        with suppress(OSError):
            self.folder.rmdir()
        os.close(self._lock)

    def __enter__(self) -> SweepFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_sweep(folder: Path) -> dict[str, Any]:
    """What a sweep wrote.

    Raises:
        EigenAttnError: if the folder holds none, or one of another version.
    """
    return read_results(folder / FILE, "sweep", VERSION)


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
