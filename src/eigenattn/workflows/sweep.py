"""From the name of a model to a folder of results, cell by cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..calibration.statistics import Batch
from ..calibration.text import SOURCES, Kind, Text, load_text
from ..calibration.windows import WITHOUT_TEXT, complete, described, load_texts, text_windows
from ..errors import EigenAttnError
from ..evaluation.grid import Cell, Grid
from ..evaluation.measuring import EvaluationPlan, measure, report
from ..evaluation.reading import Logits, uncached
from ..evaluation.rivals import Rival
from ..evaluation.sweep import SweepModel, rival_sizes, sizes
from ..evaluation.sweep_folder import SweepFolder
from ..models.loading import Source, load_model, load_tokenizer
from ..models.placement import input_device
from ..progress import Clock, TokenProgress

# One part in so many of a file is held out for evaluation, if no other text is given for that.
HELD_OUT = 5


def sweep_texts(sources: Sequence[str], evaluation: Sequence[str]) -> tuple[list[Text], list[Text]]:
    """Texts to calibrate on, and texts to evaluate on, which share nothing with them.

    Args:
        evaluation: other sources to evaluate on. By default the same: named ones have a held-out part, and of a file
            the last fifth is held out.

    Raises:
        EigenAttnError: if a source cannot be read, or nothing is left to evaluate on.
    """
    if evaluation:
        return load_texts(sources), [load_text(source, "evaluation") for source in evaluation]
    calibration, held_out = [], []
    for source, text in zip(sources, load_texts(sources), strict=True):
        if source in WITHOUT_TEXT or source in SOURCES:
            calibration.append(text)
            held_out += [] if source in WITHOUT_TEXT else [load_text(source, "evaluation")]
            continue
        first, last = _first_and_last(text)
        calibration.append(first)
        held_out.append(last)
    if not held_out:
        raise EigenAttnError("there is no text to evaluate on: give --evaluation-text.")
    return calibration, held_out


def _first_and_last(text: Text) -> tuple[Text, Text]:
    """A file without its last fifth, and that; conversations are not cut."""
    names = f"{text.source}, first part", f"{text.source}, last fifth"
    if not text.kinds:
        cut = len(text.content) - len(text.content) // HELD_OUT
        return Text(names[0], text.content[:cut]), Text(names[1], text.content[cut:])
    passages = text.kinds[0].passages
    cut = len(passages) - len(passages) // HELD_OUT
    return Text.of(names[0], (Kind("", passages[:cut]),)), Text.of(names[1], (Kind("", passages[cut:]),))


@dataclass(frozen=True)
class Calibration:
    """What statistics are collected on: so many windows of some texts together."""

    texts: tuple[Text, ...]
    samples: int

    @property
    def name(self) -> str:
        """The sources."""
        return " + ".join(text.source for text in self.texts)

    @property
    def key(self) -> str:
        """Tells it from all others."""
        return f"{self.name}/{self.samples}"


def run_sweep(
    name: str,
    out: Path,
    grid: Grid,
    plan: EvaluationPlan,
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
        "evaluation": [described(text) for text in plan.texts],
        "protocol": plan.protocol(dtype or "checkpoint", "uncached"),
        "tasks": list(plan.tasks),
        "needles": list(plan.needles.lengths) if plan.needles else [],
    }
    # A quantised cache with no exact token does not exist: its piece is at least one token.
    exact = max(grid.windows) or 32
    named = {each.name: [described(text) for text in each.texts] for each in calibrations}
    with SweepFolder(out, settings, named) as results:
        wanted: dict[Calibration, list[Cell]] = {}
        for calibration in calibrations:
            cells = [cell for cell in grid.cells() if f"{calibration.key}/{cell.key}" not in results.cells]
            if cells:
                wanted[calibration] = cells
        missing = [rival for rival in rivals if f"{rival.name}/{exact}" not in results.cells]
        if not wanted and not missing:
            results.save_beside()  # it may have been killed between the files
            return results.values | {"seconds": results.seconds}
        bars, clock = TokenProgress(progress), Clock(results.seconds)
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
        with clock.stage("baseline"):
            base = measure(model, tokenizer, plan, items, title="the original", bars=bars, keep=True)
        results.values["baseline"] = report(base)
        subject = SweepModel(model, [], grid, bars, clock)

        def record(key: str, title: str, facts: dict[str, Any], what: EvaluationPlan, logits_of: Logits) -> None:
            options = {"title": title, "bars": bars, "logits_of": logits_of, "original": base.predictions}
            with clock.stage("evaluation"):
                found = measure(model, tokenizer, what, items, **options)
            results.cells[key] = facts | report(found, base)
            results.save()
            done(key, results.cells[key])

        for rival in missing:
            facts = {"method": rival.name, "window": exact, **rival_sizes(subject.layouts, rival, exact, plan.length)}
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
                    **cell.describe(),
                    "calibration": calibration.name,
                    "samples": calibration.samples,
                    **sizes(subject.layouts, plan.length),
                    "layers": [layout.to_dict() for layout in subject.layouts],
                }
                key = f"{calibration.key}/{cell.key}"
                record(key, key, facts, plan, uncached)
                subject.restore()
        return results.values | {"seconds": results.seconds}
