"""Costs measured once and carried over to every ratio of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .ranks import RankProblem, Ranks, measured_costs


@dataclass
class SharedCosts:
    """Stands in for a `Measurement` over several ratios of one sweep.

    Neither relative layer errors nor the divergences of one truncated side depend on the ratio. The errors are measured
    once; divergences at the ranks that the anchor asks for, and the curves through them answer for all others.

    Args:
        anchor: a problem in the middle of the sweep, whose costs are measured.
        curves: what truncating each layer's keys and values costs at ranks 0 .. D, if an earlier run measured it.
    """

    anchor: RankProblem
    curves: list[list[list[float]]] | None = None

    def __post_init__(self) -> None:
        self._errors: dict[str, list[list[float]]] = {}

    def layer_errors(self, candidates: Sequence[Ranks]) -> list[list[float]]:
        """As `Measurement.layer_errors`."""
        asked = repr(candidates)
        if asked not in self._errors:
            self._errors[asked] = self.anchor.costs.layer_errors(candidates)
        return self._errors[asked]

    def divergences(self, trials: Sequence[Ranks]) -> list[list[float]]:
        """As `Measurement.divergences`, from the curves; costs of keys and values add up."""
        if self.curves is None:
            self.curves = [[side.tolist() for side in pair] for pair in measured_costs(self.anchor)]
        return [
            [keys[rank_k] + values[rank_v] for rank_k, rank_v in pairs]
            for (keys, values), pairs in zip(self.curves, trials, strict=True)
        ]
