"""Choosing ranks: from spectra, measured costs and a target to `(R_k, R_v)` for each layer."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..config import TARGETS, EigenAttentionConfig
from ..errors import EigenAttnError
from .bases import Bases

Ranks = list[tuple[int, int]]

# Step in which an energy threshold falls (the paper's).
ENERGY_STEP = 0.02
# Costs are measured where this share of the spectrum is cut off at least (chosen: what costs less than rounding does
# tells nothing). Keys and values of all heads together often fill no more than the hidden state's dimensions.
LEAST_CUT = 1e-4
# What a unit of a tail counts where nothing was measured, so that such sides are ranked by their tails (chosen).
TIE = 1e-30


class Costs(Protocol):
    """What `eigenattn.compression.measure.Measurement` gives to rank rules."""

    def layer_errors(self, candidates: Sequence[Ranks]) -> list[list[float]]: ...

    def divergences(self, trials: Sequence[Ranks]) -> list[list[float]]: ...


@dataclass(frozen=True)
class RankProblem:
    """What a rank rule may look at.

    Args:
        keys, values: spectra of each layer, [G, D], descending. Where keys and values share a latent, that of keys is
            of both, and that of values [G, 0].
        config: the target, and the multiple that ranks are held to.
        costs: measures what truncation costs, by running the model.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    config: EigenAttentionConfig
    costs: Costs

    @classmethod
    def of(cls, bases: Bases, config: EigenAttentionConfig, costs: Costs) -> RankProblem:
        """The problem of bases at full rank."""
        keys, values = ([basis.spectrum.cpu() for basis in side] for side in zip(*bases, strict=True))
        return cls(keys, values, config, costs)

    def at(self, kv_ratio: float) -> RankProblem:
        """The same for a KV ratio, or the smallest one that can be met, whatever the target was."""
        targets = dict.fromkeys(TARGETS) | {"kv_ratio": max(kv_ratio, self.ratio(smallest(self)))}
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **targets, ranks="sensitivity"))

    def allowed(self, head_dim: int) -> list[int]:
        """Ranks a side may have: multiples of `rank_multiple` and the head dimension."""
        multiple = self.config.rank_multiple
        return sorted({*range(multiple, head_dim, multiple), head_dim})

    def ratio(self, ranks: Ranks) -> float:
        """The KV ratio of a choice."""
        sides = zip(zip(self.keys, self.values, strict=True), ranks, strict=True)
        kept = sum(
            len(spectrum) * rank for spectra, pair in sides for spectrum, rank in zip(spectra, pair, strict=True)
        )
        return kept / self.elements

    @property
    def elements(self) -> int:
        """Elements of a token's keys and values, all layers together."""
        return sum(spectrum.numel() for spectrum in (*self.keys, *self.values))

    def at_energy(self, epsilon: float) -> Ranks:
        """The smallest ranks that keep a share `epsilon` of the squared singular values in every head."""
        return [
            (self._rank(keys, epsilon), self._rank(values, epsilon))
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def _rank(self, spectrum: Tensor, epsilon: float) -> int:
        share = _shares(spectrum)
        # Heads of a layer share one rank, the largest that any of them needs. In floating point a cumulative sum may
        # end just below 1, so the last direction always suffices.
        needed = int((share < epsilon * (1 - 1e-12)).sum(-1).max()) + 1
        head_dim = spectrum.shape[-1]
        return next(rank for rank in self.allowed(head_dim) if rank >= min(needed, head_dim))


def uniform(problem: RankProblem) -> Ranks:
    """The same ratio everywhere, to within one multiple: what rounding leaves over is spread evenly over the sides."""
    if problem.config.kv_ratio is None:
        raise EigenAttnError('ranks="uniform" needs a kv_ratio.')
    choices = [problem.allowed(spectrum.shape[-1]) for spectrum in (*problem.keys, *problem.values)]
    # Sides in the order keys of layer 0, values of layer 0, keys of layer 1 ...
    layers = len(problem.keys)
    order = [side for layer in range(layers) for side in (layer, layers + layer)]

    levels = len(choices) * max(len(choice) for choice in choices)

    def ranks_at(level: int) -> Ranks:
        """The share `level / levels` of each side's choices; parts of one are spread evenly by error diffusion."""
        ranks, carried = [0] * len(choices), levels
        for side in order:
            step, carried = divmod(carried + 2 * level * len(choices[side]), 2 * levels)
            ranks[side] = choices[side][min(max(step, 1), len(choices[side])) - 1]
        return list(zip(ranks[:layers], ranks[layers:], strict=True))

    return _largest_within(problem, map(ranks_at, range(levels, 0, -1)))


def energy(problem: RankProblem) -> Ranks:
    """The smallest ranks that keep a share `epsilon` of the energy (arXiv 2408.05646, equation 4)."""
    if problem.config.energy is not None:
        return problem.at_energy(problem.config.energy)
    # Ranks change only where a head's cumulative share does, so these are all the thresholds there are.
    shares = [_shares(spectrum).flatten() for spectrum in (*problem.keys, *problem.values)]
    thresholds = torch.cat(shares).unique().tolist()
    low, high = 0, len(thresholds)
    while low < high:  # the first threshold that is too large
        middle = (low + high) // 2
        if problem.ratio(problem.at_energy(thresholds[middle])) <= problem.config.kv_ratio:
            low = middle + 1
        else:
            high = middle
    return _largest_within(problem, (problem.at_energy(t) for t in (thresholds[low - 1 : low] or [0.0])))


def error_budget(problem: RankProblem) -> Ranks:
    """The paper's rule: lower each layer's energy threshold until its output error exceeds the budget (algorithm 1).

    For a KV ratio, the smallest budget that meets it is found on the measured errors.
    """
    steps = int(1 / ENERGY_STEP)
    by_step = [problem.at_energy(1 - ENERGY_STEP * step) for step in range(steps)]
    candidates = [list(dict.fromkeys(pairs)) for pairs in zip(*by_step, strict=True)]
    errors = problem.costs.layer_errors(candidates)

    def ranks_at(budget: float) -> Ranks:
        ranks = []
        for pairs, measured in zip(candidates, errors, strict=True):
            # The first candidate over the budget ends the descent, even if a later one came out under it.
            over = next((i for i, error in enumerate(measured) if error > budget), len(pairs))
            ranks.append(pairs[max(over - 1, 0)])
        return ranks

    if problem.config.error_budget is not None:
        return ranks_at(problem.config.error_budget)
    budgets = sorted({0.0, *(error for measured in errors for error in measured)})
    return _largest_within(problem, (ranks_at(budget) for budget in budgets))


def sensitivity(problem: RankProblem) -> Ranks:
    """Spend one byte budget over all layers, keys and values, where a direction is worth most to the model."""
    if problem.config.kv_ratio is None:
        raise EigenAttnError('ranks="sensitivity" needs a kv_ratio.')
    return allot(problem, measured_costs(problem))


def sensitivities(problem: RankProblem) -> list[list[float]]:
    """What a unit of its keys' and of its values' tail costs the model, for each layer, near the problem's KV ratio."""
    weights = _measured_weights(problem)
    ranks = allot(problem, _costs(problem, weights))
    return [
        [float(side[rank]) for side, rank in zip(sides, pair, strict=True)]
        for sides, pair in zip(weights, ranks, strict=True)
    ]


def measured_costs(problem: RankProblem) -> list[tuple[Tensor, Tensor]]:
    """What truncating each layer's keys, and its values, costs the model at every rank.

    A cost is a KL divergence of the model's predictions, with one side truncated and all others as they were. It is
    measured twice: at a uniform truncation, then at the ranks which that suggests. In between, the cost of a unit of
    the spectrum's tail is interpolated on a logarithmic scale, and beyond it stays as it is.

    Returns:
        For each layer, for keys and for values, the costs at ranks 0 .. D in nats a token, [D + 1].
    """
    return _costs(problem, _measured_weights(problem))


def _measured_weights(problem: RankProblem) -> list[tuple[Tensor, Tensor]]:
    """What a unit of its tail costs each side at every rank: as `measured_costs`, over the tail."""
    tails = [tuple(_tail(spectrum) for spectrum in pair) for pair in zip(problem.keys, problem.values, strict=True)]
    measured: list[tuple[dict[int, float], dict[int, float]]] = [({}, {}) for _ in tails]
    ranks = uniform(problem)
    for _ in range(2):
        _measure(problem, ranks, measured)
        weights = [
            tuple(_interpolated(tail, points) for tail, points in zip(*pair, strict=True))
            for pair in zip(tails, measured, strict=True)
        ]
        ranks = allot(problem, _costs(problem, weights))
    return weights


def first_weights(problem: RankProblem) -> list[list[float]]:
    """What a unit of its keys' and of its values' tail costs the model, for each layer, at a uniform truncation."""
    measured: list[tuple[dict[int, float], dict[int, float]]] = [({}, {}) for _ in problem.keys]
    _measure(problem, uniform(problem), measured)
    found = []
    for pair, sides in zip(zip(problem.keys, problem.values, strict=True), measured, strict=True):
        rows = zip(pair, sides, strict=True)
        found.append([float(_interpolated(_tail(spectrum).cpu(), points)[0]) for spectrum, points in rows])
    return found


def _measure(problem: RankProblem, ranks: Ranks, measured: Sequence[tuple[dict[int, float], dict[int, float]]]) -> None:
    """Measure what each side costs, truncated by itself near these ranks, and note it at the rank."""
    trials: list[Ranks] = []
    noted: list[list[tuple[dict[int, float], int]]] = []
    for pair, sides, *spectra in zip(ranks, measured, problem.keys, problem.values, strict=True):
        allowed = [problem.allowed(spectrum.shape[-1]) for spectrum in spectra]
        top_k, top_v = (choices[-1] for choices in allowed)
        telling = [_telling(*each) for each in zip(allowed, spectra, strict=True)]
        rank_k, rank_v = (_unmeasured(*each) for each in zip(telling, pair, sides, strict=True))
        trials.append([(rank_k, top_v), (top_k, rank_v)] if top_v else [(rank_k, top_v)])
        noted.append([(sides[0], rank_k), (sides[1], rank_v)][: len(trials[-1])])
    for costs, points in zip(problem.costs.divergences(trials), noted, strict=True):
        for cost, (at, rank) in zip(costs, points, strict=True):
            at[rank] = cost


def _costs(problem: RankProblem, weights: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [
        tuple(_tail(spectrum).cpu() * weight for spectrum, weight in zip(*pair, strict=True))
        for pair in zip(zip(problem.keys, problem.values, strict=True), weights, strict=True)
    ]


def _telling(allowed: list[int], spectrum: Tensor) -> list[int]:
    """The ranks at which a cost can be measured; the smallest one always counts as such."""
    tail = _tail(spectrum)
    return [rank for rank in allowed if rank == allowed[0] or tail[rank] > LEAST_CUT * tail[0]]


def _unmeasured(telling: list[int], rank: int, measured: dict[int, float]) -> int:
    """The rank nearest to `rank` that tells something new."""
    new = [each for each in telling if each not in measured]
    return min(new, key=lambda each: abs(each - rank), default=telling[0])


def _interpolated(tail: Tensor, measured: dict[int, float]) -> Tensor:
    """What a unit of a side's tail [D + 1] costs at all ranks [D + 1], from costs measured at some ranks."""
    found = {rank: cost / float(tail[rank]) for rank, cost in sorted(measured.items()) if tail[rank] > 0 < cost}
    if not found:
        return torch.full((len(tail),), TIE, dtype=torch.float64)
    logs = np.interp(range(len(tail)), list(found), [math.log(weight) for weight in found.values()])
    return torch.from_numpy(logs).exp()


def allot(problem: RankProblem, costs: Sequence[tuple[Tensor, Tensor]]) -> Ranks:
    """The ranks of least total cost within the budget, by taking the best step for its bytes again and again.

    That is exact for costs that are convex in the rank and steps of equal bytes; other costs are replaced by the
    largest convex curves below them.

    Args:
        costs: for each layer the costs of its keys and of its values at ranks 0 .. D, [D + 1].
    """
    sides = []
    for pair in zip(zip(problem.keys, problem.values, strict=True), costs, strict=True):
        for spectrum, curve in zip(*pair, strict=True):
            allowed = problem.allowed(spectrum.shape[-1])
            sides.append((_convex(allowed, curve[allowed].tolist()), allowed, spectrum.shape[0]))
    chosen = [0] * len(sides)
    left = problem.config.kv_ratio * problem.elements * (1 + 1e-12) - sum(
        heads * allowed[0] for _, allowed, heads in sides
    )
    if left < 0:
        return _largest_within(problem, [smallest(problem)])  # raises

    def step(index: int) -> tuple[float, int] | None:
        curve, allowed, heads = sides[index]
        at = chosen[index]
        if at + 1 == len(allowed):
            return None
        size = heads * (allowed[at + 1] - allowed[at])
        return (curve[at + 1] - curve[at]) / size, size

    queue = [(first[0], index, first[1]) for index in range(len(sides)) if (first := step(index)) is not None]
    heapq.heapify(queue)
    while queue:
        _, index, size = heapq.heappop(queue)
        if size > left:
            continue
        left -= size
        chosen[index] += 1
        following = step(index)
        if following is not None:
            heapq.heappush(queue, (following[0], index, following[1]))
    ranks = [allowed[i] for i, (_, allowed, _) in zip(chosen, sides, strict=True)]
    return list(zip(ranks[::2], ranks[1::2], strict=True))


def _convex(at: list[int], values: list[float]) -> list[float]:
    """The largest convex curve below points at ascending places, at these places."""
    hull: list[int] = []
    for i in range(len(at)):
        # The last corner goes if it lies on or above the line from the one before it to the new point.
        while len(hull) > 1 and (values[hull[-1]] - values[hull[-2]]) * (at[i] - at[hull[-2]]) >= (
            values[i] - values[hull[-2]]
        ) * (at[hull[-1]] - at[hull[-2]]):
            hull.pop()
        hull.append(i)
    return np.interp(at, [at[i] for i in hull], [values[i] for i in hull]).tolist()


def _shares(spectrum: Tensor) -> Tensor:
    """Share of each head's spectrum [G, D] in its first 1 .. D directions; all of it in any, where there is nothing."""
    total = spectrum.sum(-1, keepdim=True)
    return torch.where(total > 0, spectrum.cumsum(-1) / total, 1.0)


def _tail(spectrum: Tensor) -> Tensor:
    """What is cut off at ranks 0 .. D, over all heads: [D + 1]."""
    total = spectrum.sum(0)
    return torch.cat([total.flip(0).cumsum(0).flip(0), total.new_zeros(1)])


def smallest(problem: RankProblem) -> Ranks:
    """The smallest ranks allowed."""
    return [
        (problem.allowed(keys.shape[-1])[0], problem.allowed(values.shape[-1])[0])
        for keys, values in zip(problem.keys, problem.values, strict=True)
    ]


def _largest_within(problem: RankProblem, choices: Iterable[Ranks]) -> Ranks:
    """The first choice, of those in falling order of size, that keeps to the KV ratio."""
    ratio = None
    for ranks in choices:
        ratio = problem.ratio(ranks)
        if ratio <= problem.config.kv_ratio + 1e-9:
            return ranks
    raise EigenAttnError(
        f"kv_ratio {problem.config.kv_ratio} cannot be met: with ranks in multiples of {problem.config.rank_multiple} "
        f"the smallest cache has a ratio of {ratio:.3f}. Ask for more, or lower rank_multiple."
    )


RANK_RULES: dict[str, Callable[[RankProblem], Ranks]] = {
    "uniform": uniform,
    "energy": energy,
    "error_budget": error_budget,
    "sensitivity": sensitivity,
}
