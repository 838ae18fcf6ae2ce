"""Quality against cache size: many compressions of one model, from statistics collected once."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from ..cache.size import Shape, baseline_bytes_per_token, bytes_per_token, cache_bytes
from ..calibration.statistics import Batch, collect_moments
from ..compression.bases import BASES, Basis
from ..compression.folding import attach, detach
from ..compression.measure import Measurement
from ..compression.pipeline import COST_TOKENS, check_sharing
from ..compression.ranks import RANK_RULES, RankProblem, Ranks
from ..compression.shared_costs import SharedCosts
from ..config import EigenAttentionConfig
from ..errors import EigenAttnError
from ..models.attention import EigenAttention
from ..models.conversion import convert_attention, eigen_layers
from ..progress import TokenProgress
from .rivals import Rival

# Caches are counted at 16 bits an element, whatever dtype the sweep runs in.
ELEMENT_BYTES = 2


class Cell(NamedTuple):
    """One compression of a sweep."""

    basis: str
    ranks: str
    window: int
    shared_heads: int
    kv_ratio: float

    @property
    def kind(self) -> str:
        """What statistics are collected for, the window apart."""
        return self.basis if self.shared_heads == 1 else f"{self.basis}:{self.shared_heads}"

    @property
    def method(self) -> str:
        return f"{self.kind}/{self.ranks}/{self.window}"

    @property
    def key(self) -> str:
        return f"{self.method}/{self.kv_ratio:g}"


@dataclass(frozen=True)
class Grid:
    """The cells of a sweep: every combination.

    Raises:
        EigenAttnError: if a value is outside its range, or a rank rule takes no KV ratio.
    """

    kv_ratios: Sequence[float]
    bases: Sequence[str] = ("attention",)
    ranks: Sequence[str] = ("sensitivity",)
    windows: Sequence[int] = (32,)
    shared_heads: Sequence[int] = (1,)
    rank_multiple: int = 8

    def __post_init__(self) -> None:
        if not all((self.kv_ratios, self.bases, self.ranks, self.windows, self.shared_heads)):
            raise EigenAttnError("a sweep needs at least one KV ratio, basis, rank rule, window and shared_heads.")
        for names, table in ((self.bases, BASES), (self.ranks, RANK_RULES)):
            for name in names:
                if name not in table:
                    raise EigenAttnError(f"unknown name {name!r}: choose one of {', '.join(table)}.")
        for cell in self.cells():
            self.config(cell)

    def cells(self) -> list[Cell]:
        """All cells, those that share statistics next to each other."""
        return [
            Cell(basis, rule, window, shared, ratio)
            for basis, window, shared, rule, ratio in itertools.product(
                dict.fromkeys(self.bases),
                dict.fromkeys(self.windows),
                dict.fromkeys(self.shared_heads),
                dict.fromkeys(self.ranks),
                sorted(set(self.kv_ratios), reverse=True),
            )
        ]

    def config(self, cell: Cell) -> EigenAttentionConfig:
        """What `compress` would be given."""
        return EigenAttentionConfig(**cell._asdict(), rank_multiple=self.rank_multiple)

    @property
    def anchor(self) -> float:
        """The ratio near which divergences are measured: the middle one."""
        return sorted(set(self.kv_ratios))[len(set(self.kv_ratios)) // 2]


@contextmanager
def added(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time spent within to a stage's."""
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


class SweepModel:
    """A model that can be compressed again and again, in memory.

    Args:
        model: an uncompressed transformers model; it is converted in place.
        batches: calibration tokens.
        seconds: where wall-clock seconds of statistics and ranks are added up.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        grid: Grid,
        bars: TokenProgress,
        seconds: dict[str, float] | None = None,
    ) -> None:
        self.model, self.batches, self.grid, self.bars = model, batches, grid, bars
        convert_attention(model)
        self.layers: list[EigenAttention] = eigen_layers(model)
        self._made: tuple[tuple[str, int], list[tuple[Basis, Basis]], SharedCosts] | None = None
        check_sharing(self.layers[0].kv_heads, *grid.shared_heads)
        self.seconds = {} if seconds is None else seconds

    def compress(self, cell: Cell, curves: dict[str, list]) -> Ranks:
        """Give the model the cell's bases and ranks.

        Args:
            curves: measured costs by basis and window: taken from here if they are there, and put there if not.
        """
        bases, costs = self._statistics(cell, curves)
        with added(self.seconds, "ranks"):
            problem = dataclasses.replace(costs.anchor, config=self.grid.config(cell), costs=costs)
            ranks = RANK_RULES[cell.ranks](problem)
        if costs.curves is not None:
            curves[f"{cell.kind}/{cell.window}"] = costs.curves
        for attention, (keys, values), (rank_k, rank_v) in zip(self.layers, bases, ranks, strict=True):
            attach(attention, keys.truncate(rank_k), values.truncate(rank_v), cell.window, cell.shared_heads)
        return ranks

    def restore(self) -> None:
        """Back to the original model."""
        for attention in self.layers:
            detach(attention)

    def _statistics(self, cell: Cell, curves: dict[str, list]) -> tuple[list[tuple[Basis, Basis]], SharedCosts]:
        wanted = (cell.kind, cell.window)
        if self._made is None or self._made[0] != wanted:
            self._made = None  # freed before the next ones are collected
            method = BASES[cell.basis]
            with added(self.seconds, "statistics"):
                moments = collect_moments(
                    self.model,
                    self.layers,
                    self.bars.batches("Calibrating", self.batches, len(self.batches)),
                    lambda attention: method.moments(attention, cell.window, cell.shared_heads),
                )
                bases = [method.build(sums) for sums in moments]
            count = math.ceil(COST_TOKENS / self.batches[0].tokens)
            costs = Measurement(self.model, self.layers, bases, cell.window, self.batches[:count], self.bars)
            keys, values = ([basis.spectrum.cpu() for basis in side] for side in zip(*bases, strict=True))
            middle = self.grid.config(cell._replace(kv_ratio=self.grid.anchor, ranks="sensitivity"))
            anchor = RankProblem(keys, values, middle, costs)
            self._made = wanted, bases, SharedCosts(anchor, curves.get("/".join(map(str, wanted))))
        return self._made[1:]


def sizes(layers: Sequence[EigenAttention], ranks: Ranks, window: int, length: int) -> dict[str, Any]:
    """Cache bytes at 16 bits an element: of a token outside the window, and of a sequence with its window."""
    shapes = [
        Shape(a.kv_heads, a.head_dim, *pair, shared_heads=a.shared_heads) for a, pair in zip(layers, ranks, strict=True)
    ]
    window = 0 if all(pair == (a.latent_dim,) * 2 for a, pair in zip(layers, ranks, strict=True)) else window
    return _sizes(
        bytes_per_token(shapes, ELEMENT_BYTES),
        cache_bytes(shapes, ELEMENT_BYTES, length, window),
        baseline_bytes_per_token(shapes, ELEMENT_BYTES),
        length,
    )


def _sizes(token: float, sequence: float, original_token: int, length: int) -> dict[str, Any]:
    return {
        "kv_ratio": token / original_token,
        "bytes_per_token": token,
        "cache_bytes": sequence,
        "cache_ratio": sequence / (original_token * length),
    }


def rival_sizes(layers: Sequence[EigenAttention], rival: Rival, window: int, length: int) -> dict[str, Any]:
    """The same of a plain quantised cache that holds up to `window` tokens exactly."""
    shapes = [Shape(a.kv_heads, a.head_dim, a.head_dim, a.head_dim) for a in layers]
    original = baseline_bytes_per_token(shapes, ELEMENT_BYTES)
    token = original * rival.bits_per_element / (8 * ELEMENT_BYTES)
    exact = 0 if rival.backend == "fp8" else min(window, length)
    return _sizes(token, token * (length - exact) + original * exact, original, length)
