"""Costs measured once and carried over to every ratio of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .rank_problem import RankProblem, Ranks
from .sensitivity import measured_costs


@dataclass
class SharedCosts:
    """Stands in for a `Measurement` over several ratios of one sweep.

    Neither relative layer errors nor the divergences of one truncated latent depend on the ratio. The errors are
    measured once; divergences at the ranks that the anchor asks for, and the curves through them answer for all others.

    Args:
        anchor: a problem in the middle of the sweep, whose costs are measured.
        curves: what truncating each latent of each layer costs at ranks 0 .. D, if an earlier run measured it.
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
            self.curves = [[cost.tolist() for cost in layer] for layer in measured_costs(self.anchor)]
        # Not strict: an earlier version wrote a second curve, of nothing, beside one of both sides.
        return [
            [sum(curve[rank] for curve, rank in zip(layer, ranks, strict=False)) for ranks in choices]
            for layer, choices in zip(self.curves, trials, strict=True)
        ]
