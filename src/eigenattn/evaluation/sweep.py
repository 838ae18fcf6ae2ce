"""Quality against cache size: many compressions of one model, from statistics collected once."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from torch import nn

from ..cache.size import Shape, baseline_bytes_per_token, bytes_per_token, cache_bytes
from ..calibration.statistics import Batch, collect_moments
from ..compression.bases import BASES, Bases, truncated
from ..compression.folding import attach, detach
from ..compression.joint import joint_bases
from ..compression.measure import Measurement
from ..compression.pipeline import COST_TOKENS, check_sharing, quantised_problem
from ..compression.quantise import Fitted, equivalent_ratio, fit_quantisers, quantise_bases
from ..compression.ranks import RANK_RULES, RankProblem, sensitivities
from ..compression.refit import refit
from ..compression.shared_costs import SharedCosts
from ..config import EigenAttentionConfig, Sharing
from ..errors import EigenAttnError
from ..models.attention import EigenAttention
from ..models.conversion import convert_attention, eigen_layers
from ..progress import TokenProgress
from .rivals import Rival

# Caches are counted at 16 bits an element, whatever dtype the sweep runs in.
ELEMENT_BYTES = 2


class Cell(NamedTuple):
    """One compression of a sweep: to a KV ratio, or to so many bits an element."""

    basis: str
    ranks: str
    window: int
    shared_heads: int
    kv_ratio: float | None
    bits_per_element: float | None = None
    refit: bool | None = None
    shrinkage: float = 0.0
    joint: bool = False
    shared_values: int | None = None

    @property
    def sharing(self) -> Sharing:
        return Sharing(self.shared_heads, self.shared_values or self.shared_heads)

    @property
    def kind(self) -> str:
        keys, values = self.sharing
        if self.joint:
            shared = f":{keys}kv"
        elif keys != values:
            shared = f":{keys}-{values}"
        else:
            shared = f":{keys}" if keys > 1 else ""
        return f"{self.basis}{shared}{f'~{self.shrinkage:g}' if self.shrinkage else ''}"

    @property
    def statistics(self) -> str:
        """What statistics are collected for."""
        return f"{self.kind}/{self.window}"

    @property
    def method(self) -> str:
        kind = f"{self.kind}+refit" if self.refit else self.kind
        return f"{kind}/{self.ranks if self.bits_per_element is None else 'bits'}/{self.window}"

    @property
    def asked(self) -> float:
        return self.kv_ratio if self.bits_per_element is None else self.bits_per_element

    @property
    def key(self) -> str:
        return f"{self.method}/{self.asked:g}"


@dataclass(frozen=True)
class Grid:
    """The cells of a sweep: every combination.

    Quantised latents have one rank rule, and the basis `attention`: `bits_per_element` goes with that, whatever other
    rules and bases there are.

    Raises:
        EigenAttnError: if a value is outside its range, or a rank rule takes no KV ratio.
    """

    kv_ratios: Sequence[float] = ()
    bases: Sequence[str] = ("attention",)
    ranks: Sequence[str] = ("sensitivity",)
    windows: Sequence[int] = (32,)
    shared_heads: Sequence[int] = (1,)
    rank_multiple: int = 8
    bits_per_element: Sequence[float] = ()
    refit: bool | None = None
    shrinkage: Sequence[float] = (0.0,)
    joint: bool = False
    shared_values: Sequence[int | None] = (None,)

    def __post_init__(self) -> None:
        sizes = (*self.kv_ratios, *self.bits_per_element)
        varied = self.bases, self.ranks, self.windows, self.shared_heads, self.shared_values, self.shrinkage
        if not all((sizes, *varied)):
            raise EigenAttnError(
                "a sweep needs at least one KV ratio, basis, rank rule, window, shared_heads, shared_values and "
                "shrinkage."
            )
        for names, table in ((self.bases, BASES), (self.ranks, RANK_RULES)):
            for name in names:
                if name not in table:
                    raise EigenAttnError(f"unknown name {name!r}: choose one of {', '.join(table)}.")
        if self.bits_per_element and "attention" not in self.bases:
            raise EigenAttnError('bits_per_element goes with the basis "attention".')
        self.cells()  # raises what `EigenAttentionConfig` does

    def cells(self) -> list[Cell]:
        """All cells, those that share statistics next to each other.

        Raises:
            EigenAttnError: if one is no valid configuration.
        """
        ratios = sorted(set(self.kv_ratios), reverse=True)
        cells = []
        for basis, window, shared, shared_values, shrinkage in itertools.product(
            *map(dict.fromkeys, (self.bases, self.windows, self.shared_heads, self.shared_values, self.shrinkage))
        ):
            choices = {
                "refit": self.refit,
                "shrinkage": shrinkage,
                "joint": self.joint,
                "shared_values": shared_values,
            }
            some = Cell(basis, "sensitivity", window, shared, None, **choices)
            rules = dict.fromkeys(self.ranks)
            cells += [some._replace(ranks=rule, kv_ratio=ratio) for rule in rules for ratio in ratios]
            if basis == "attention":
                bits = sorted(set(self.bits_per_element), reverse=True)
                cells += [some._replace(bits_per_element=each) for each in bits]
        return [cell._replace(refit=self.config(cell).refit) for cell in cells]

    def config(self, cell: Cell) -> EigenAttentionConfig:
        """What `compress` would be given."""
        return EigenAttentionConfig(**cell._asdict(), rank_multiple=self.rank_multiple)

    @property
    def anchor(self) -> float:
        """The ratio near which divergences are measured: the middle one, of quantised latents an equivalent one."""
        ratios = sorted({*self.kv_ratios, *map(equivalent_ratio, self.bits_per_element)})
        return ratios[len(ratios) // 2]


@contextmanager
def added(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time spent within to a stage's."""
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Statistics:
    """What all cells with one basis, window and number of shared heads have in common."""

    bases: Bases
    problem: RankProblem
    shared: SharedCosts
    quantisers: Callable[[], list[Fitted]]


class SweepModel:
    """A model that can be compressed again and again, in memory.

    Args:
        model: an uncompressed transformers model; it is converted in place.
        batches: calibration tokens, which `calibrate` may replace.
        seconds: where wall-clock seconds of statistics and ranks are added up.
        share_costs: measure costs once for all cells with the same statistics, near the grid's middle; otherwise each
            cell is measured by itself, as `compress` does.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        grid: Grid,
        bars: TokenProgress,
        seconds: dict[str, float] | None = None,
        share_costs: bool = True,
    ) -> None:
        self.model, self.grid, self.bars, self.share_costs = model, grid, bars, share_costs
        convert_attention(model)
        self.layers: list[EigenAttention] = eigen_layers(model)
        check_sharing(self.layers[0].kv_heads, *(heads for cell in grid.cells() for heads in cell.sharing))
        self.seconds = {} if seconds is None else seconds
        self.calibrate(batches)

    def calibrate(self, batches: Sequence[Batch]) -> None:
        """Take statistics over these tokens from now on."""
        self.batches = batches
        self._made: tuple[str, Statistics] | None = None

    def compress(self, cell: Cell, curves: dict[str, list]) -> None:
        """Give the model the cell's bases, truncated or quantised.

        Args:
            curves: measured costs by basis and window: taken from here if they are there, and put there if not.
        """
        made = self._statistics(cell, curves)
        costs = made.shared if self.share_costs else made.problem.costs
        if cell.bits_per_element is None:
            with added(self.seconds, "ranks"):
                problem = dataclasses.replace(made.problem, config=self.grid.config(cell), costs=costs)
                ranks = RANK_RULES[cell.ranks](problem)
            chosen = truncated(made.bases, ranks)
        else:
            fitted = made.quantisers()
            with added(self.seconds, "ranks"):
                weights = sensitivities(quantised_problem(dataclasses.replace(made.problem, costs=costs), cell.asked))
                chosen = quantise_bases(self.layers, made.bases, fitted, weights, cell.asked)
        if cell.refit:
            with added(self.seconds, "refit"):
                chosen = refit(self.model, self.layers, chosen, cell.window, cell.sharing, self.batches, self.bars)
        if made.shared.curves is not None:
            curves[cell.statistics] = made.shared.curves
        for attention, pair in zip(self.layers, chosen, strict=True):
            attach(attention, *pair, cell.window, cell.sharing)

    def restore(self) -> None:
        """Back to the original model."""
        for attention in self.layers:
            detach(attention)

    def _statistics(self, cell: Cell, curves: dict[str, list]) -> Statistics:
        if self._made is None or self._made[0] != cell.statistics:
            self._made = None  # freed before the next ones are collected
            self._made = cell.statistics, self._collect(cell, curves)
        return self._made[1]

    def _collect(self, cell: Cell, curves: dict[str, list]) -> Statistics:
        method = BASES[cell.basis]
        with added(self.seconds, "statistics"):
            moments = collect_moments(
                self.model,
                self.layers,
                self.bars.batches("Calibrating", self.batches, len(self.batches)),
                lambda attention: method.moments(attention, cell.window, cell.sharing, cell.shrinkage, cell.joint),
            )
        count = math.ceil(COST_TOKENS / self.batches[0].tokens)
        middle = cell._replace(kv_ratio=self.grid.anchor, bits_per_element=None, ranks="sensitivity")

        def problem_of(bases: Bases) -> RankProblem:
            costs = Measurement(self.model, self.layers, bases, cell.window, self.batches[:count], self.bars)
            return RankProblem.of(bases, self.grid.config(middle), costs)

        with added(self.seconds, "ranks" if cell.joint else "statistics"):
            bases = joint_bases(moments, problem_of) if cell.joint else [method.build(sums) for sums in moments]
        problem = problem_of(bases)

        @cache
        def quantisers() -> list[Fitted]:
            with added(self.seconds, "quantisers"):
                batches = self.bars.batches("Fitting quantisers", self.batches, len(self.batches))
                return fit_quantisers(self.model, self.layers, bases, batches, cell.window)

        return Statistics(bases, problem, SharedCosts(problem, curves.get(cell.statistics)), quantisers)


def sizes(layers: Sequence[EigenAttention], length: int) -> dict[str, Any]:
    """Cache bytes at 16 bits an element: of a token outside the window, and of a sequence with its window."""
    exact = all(
        (a.rank_k, a.rank_v) == (a.latent_dim("key"), a.latent_dim("value")) and a.widths_k is None for a in layers
    )
    return _sizes(
        bytes_per_token(layers, ELEMENT_BYTES),
        cache_bytes(layers, ELEMENT_BYTES, length, 0 if exact else layers[0].window),
        baseline_bytes_per_token(layers, ELEMENT_BYTES),
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
    token = original * rival.bits_per_element(layers[0].head_dim) / (8 * ELEMENT_BYTES)
    exact = 0 if rival.backend == "fp8" else min(window, length)
    return _sizes(token, token * (length - exact) + original * exact, original, length)
