"""Quality against cache size: many compressions of one model, from statistics collected once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from ..cache.layout import Layout
from ..cache.size import HALF, baseline_bytes_per_token, bytes_per_token, cache_bytes
from ..calibration.statistics import Batch
from ..compression.checks import check_sharing
from ..compression.folding import attach, detach
from ..compression.recipe import Recipe, as_attached, check_tied
from ..compression.shared_costs import SharedCosts
from ..models.attention import EigenAttention
from ..models.conversion import convert_attention, eigen_layers
from ..progress import Clock, TokenProgress
from .grid import Cell, Grid
from .rivals import Rival


class SweepModel:
    """A model that can be compressed again and again, in memory.

    Args:
        model: an uncompressed transformers model; it is converted in place.
        batches: calibration tokens, which `calibrate` may replace.
        clock: counts the time that each stage takes.
        share_costs: measure costs once for all cells with the same statistics, near the grid's middle; otherwise each
            cell is measured by itself, as `compress` does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        grid: Grid,
        bars: TokenProgress,
        clock: Clock | None = None,
        share_costs: bool = True,
    ) -> None:
        self.model, self.grid, self.bars, self.share_costs = model, grid, bars, share_costs
        convert_attention(model)
        self.layers: list[EigenAttention] = eigen_layers(model)
        for cell in grid.cells():
            check_sharing(self.layers[0].kv_heads, cell.config.sharing)
            check_tied(cell.config, self.layouts)
        self.clock = clock or Clock()
        self.calibrate(batches)

    @property
    def layouts(self) -> list[Layout]:
        """Of what latents each layer's cache consists now."""
        return [attention.layout for attention in self.layers]

    def calibrate(self, batches: Sequence[Batch]) -> None:
        """Take statistics over these tokens from now on."""
        self.batches = batches
        self._made: tuple[str, Recipe] | None = None

    def compress(self, cell: Cell, curves: dict[str, list]) -> None:
        """Give the model the cell's bases, truncated or coded.

        Args:
            curves: measured costs by statistics: taken from here if they are there, and put there if not.
        """
        self.restore()
        recipe = self._recipe(cell, curves)
        chosen = recipe.choose(cell.config)
        costs = recipe.problem.costs
        if isinstance(costs, SharedCosts) and costs.curves is not None:
            curves[cell.statistics] = costs.curves
        for attention, bases in zip(self.layers, chosen, strict=True):
            attach(attention, bases, as_attached(cell.config, chosen).window)

    def restore(self) -> None:
        """Back to the original model."""
        for attention in self.layers:
            detach(attention)

    def _recipe(self, cell: Cell, curves: dict[str, list]) -> Recipe:
        """Of all cells with the same statistics."""
        if self._made is None or self._made[0] != cell.statistics:
            self._made = None  # freed before the next one is made
            recipe = Recipe(self.model, self.layers, cell.config, self.batches, self.bars, clock=self.clock)
            if self.share_costs:
                problem = recipe.problem
                shared = SharedCosts(problem.at(self.grid.anchor), curves.get(cell.statistics))
                recipe.problem = dataclasses.replace(problem, costs=shared)
            self._made = cell.statistics, recipe
        return self._made[1]


def sizes(layouts: Sequence[Layout], length: int) -> dict[str, Any]:
    """Cache bytes at 16 bits an element: of a token outside the window, and of a sequence with its window."""
    token, sequence = bytes_per_token(layouts, HALF), cache_bytes(layouts, HALF, length)
    return _sizes(token, sequence, baseline_bytes_per_token(layouts, HALF), length)


def _sizes(token: float, sequence: float, original_token: int, length: int) -> dict[str, Any]:
    return {
        "kv_ratio": token / original_token,
        "bytes_per_token": token,
        "cache_bytes": sequence,
        "cache_ratio": sequence / (original_token * length),
    }


def rival_sizes(layouts: Sequence[Layout], rival: Rival, window: int, length: int) -> dict[str, Any]:
    """The same of a plain quantised cache that holds up to `window` tokens exactly.

    What it stores once a sequence is counted as a part of each token outside the window.
    """
    original = baseline_bytes_per_token(layouts, HALF)
    exact = min(window, length) if rival.keeps_window else 0
    once = sum(rival.once_a_sequence(layout) for layout in layouts)
    token = original * rival.bits_per_element(layouts[0].head_dim) / (8 * HALF) + once / max(length - exact, 1)
    return _sizes(token, token * (length - exact) + original * exact, original, length)
