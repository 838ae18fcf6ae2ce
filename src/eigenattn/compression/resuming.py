"""Compression in stages that outlive the process: moments batch by batch, and costs layer by layer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..calibration.statistics import Batch, Moments, named_tensors, tensors_of
from ..errors import EigenAttnError
from ..journal import Journal
from ..models.attention import EigenAttention

STATISTICS, COSTS = "statistics", "costs"
# Seconds between saves of unfinished moments (chosen: little to lose, and far less time than the work).
SAVE_SECONDS = 60.0


class ResumableMoments:
    """Moments that are saved while they grow, and go on from what was saved.

    Sums are taken up as they were and batches come in the same order, so the result has the bits of an uninterrupted
    run.

    Args:
        empty: gives the empty moments of a layer.
        journal: where they are saved; None saves nothing.
    """

    def __init__(self, empty: Callable[[EigenAttention], Moments], journal: Journal | None) -> None:
        self.make, self.journal = empty, journal
        self.moments: list[Moments] = []
        self.saved = journal.read(STATISTICS) if journal else None

    def empty(self, attention: EigenAttention) -> Moments:
        """The moments a layer starts with."""
        made = self.make(attention)
        if self.saved is not None:
            tensors, values = self.saved
            for name, value in tensors_of(made):
                value.copy_(tensors[f"{len(self.moments)}.{name}"])
            made.tokens = values["tokens"]
        self.moments.append(made)
        return made

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass on the batches that are not counted yet."""
        done = self.saved[1]["batches"] if self.saved else 0
        count, saved = 0, time.monotonic()
        for batch in batches:
            count += 1
            if count <= done:
                continue
            yield batch
            if self.journal and time.monotonic() - saved > SAVE_SECONDS:
                self._save(self.journal, count)
                saved = time.monotonic()
        if self.journal and count > done:
            self._save(self.journal, count)

    def _save(self, journal: Journal, count: int) -> None:
        journal.write(STATISTICS, named_tensors(self.moments), {"batches": count, "tokens": self.moments[0].tokens})


class MemoisedMeasurements:
    """Results of measurements: with a journal each is measured once, over all of a command's runs.

    Args:
        journal: where they are saved; None saves nothing.
    """

    def __init__(self, journal: Journal | None) -> None:
        self.journal = journal
        saved = journal.read(COSTS) if journal else None
        self.found: dict[str, list[Any]] = saved[1] if saved else {}
        self.saved = time.monotonic()

    def of(self, name: str, measure: Callable[[], list[Any]]) -> list[Any]:
        """The result of that name: as it was measured before, or measured now.

        Args:
            measure: gives numbers, or a list of numbers for each layer.

        Raises:
            EigenAttnError: if one of them is not finite.
        """
        if self.journal is None:
            return _checked(measure())
        if name not in self.found:
            self.found[name] = _checked(measure())
            if time.monotonic() - self.saved > SAVE_SECONDS:
                self.journal.write(COSTS, {}, self.found)
                self.saved = time.monotonic()
        return self.found[name]


def _checked(costs: list[Any]) -> list[Any]:
    numbers = (cost for each in costs for cost in (each if isinstance(each, list) else [each]))
    if not all(map(math.isfinite, numbers)):
        raise EigenAttnError(
            "truncating a layer was measured to cost NaN or infinitely much: try --dtype float32, or check the model's "
            "weights."
        )
    return costs
