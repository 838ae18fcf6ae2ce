"""Costs measured at one truncation and carried over to others, so that many ratios share one measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .ranks import Costs, Ranks, _tail


@dataclass
class SharedCosts:
    """Stands in for a `Measurement` over several ratios of one sweep.

    Relative layer errors do not depend on the ratio, and are measured once. Divergences are measured one side at a time
    at the ranks `anchor`; at others a side's is taken in proportion to its spectrum's tail, and those of several sides
    add up: the very model that the `sensitivity` rule makes its choice by. Its second measurement, around the ranks
    chosen for one ratio, then finds nothing new, and is what a sweep saves.

    Args:
        costs: measures.
        keys, values: spectra of each layer, [G, D], descending.
        anchor: the ranks that divergences are measured at.
        weights: what a unit of each layer's two tails costs, if an earlier run measured it.
    """

    costs: Costs
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    anchor: Ranks
    weights: list[list[float]] | None = None

    def __post_init__(self) -> None:
        self._errors: dict[str, list[list[float]]] = {}

    def layer_errors(self, candidates: Sequence[Ranks]) -> list[list[float]]:
        """As `Measurement.layer_errors`."""
        asked = repr(candidates)
        if asked not in self._errors:
            self._errors[asked] = self.costs.layer_errors(candidates)
        return self._errors[asked]

    def divergences(self, ranks: Ranks | None, trials: Sequence[Ranks]) -> list[list[float]]:
        """As `Measurement.divergences`, from the weights."""
        weights = self._measured()
        tails = [[_tail(side) for side in pair] for pair in zip(self.keys, self.values, strict=True)]

        def cost(layer: int, pair: tuple[int, int]) -> float:
            return sum(w * float(tail[r]) for w, tail, r in zip(weights[layer], tails[layer], pair, strict=True))

        standing = [cost(layer, pair) for layer, pair in enumerate(ranks)] if ranks else [0.0] * len(trials)
        total = sum(standing)
        return [[total - standing[layer] + cost(layer, pair) for pair in pairs] for layer, pairs in enumerate(trials)]

    def _measured(self) -> list[list[float]]:
        if self.weights is None:
            full = [spectrum.shape[-1] for spectrum in self.keys]
            trials = [[(k, d), (d, v)] for (k, v), d in zip(self.anchor, full, strict=True)]
            alone = self.costs.divergences(None, trials)
            self.weights = [
                [
                    max(found, 0.0) / tail if (tail := float(_tail(spectrum)[rank])) > 0 else 0.0
                    for found, spectrum, rank in zip(costs, spectra, pair, strict=True)
                ]
                for costs, spectra, pair in zip(
                    alone, zip(self.keys, self.values, strict=True), self.anchor, strict=True
                )
            ]
        return self.weights
