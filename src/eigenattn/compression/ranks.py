"""Choosing ranks: from spectra, measured costs and a target to `(R_k, R_v)` for each layer."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..config import EigenAttentionConfig
from ..errors import EigenAttnError

Ranks = list[tuple[int, int]]

# Step in which an energy threshold falls (the paper's).
ENERGY_STEP = 0.02
# What a tail counts whatever was measured, so that sides measured at nothing are ranked by their tails (chosen).
TIE = 1e-12


class Costs(Protocol):
    """What `eigenattn.compression.measure.Measurement` gives to rank rules."""

    def layer_errors(self, candidates: Sequence[Ranks]) -> list[list[float]]: ...

    def divergences(self, ranks: Ranks | None, trials: Sequence[Ranks]) -> list[list[float]]: ...


@dataclass(frozen=True)
class RankProblem:
    """What a rank rule may look at.

    Args:
        keys, values: spectra of each layer, [G, D], descending.
        config: the target, and the multiple that ranks are held to.
        costs: measures what truncation costs, by running the model.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    config: EigenAttentionConfig
    costs: Costs

    def allowed(self, head_dim: int) -> list[int]:
        """Ranks a side may have: multiples of `rank_multiple` and the head dimension."""
        multiple = self.config.rank_multiple
        return sorted({*range(multiple, head_dim, multiple), head_dim})

    def ratio(self, ranks: Ranks) -> float:
        """The KV ratio of a choice."""
        kept = sum(spectrum.shape[0] * sum(pair) for spectrum, pair in zip(self.keys, ranks, strict=True))
        return kept / sum(2 * spectrum.numel() for spectrum in self.keys)

    def at_energy(self, epsilon: float) -> Ranks:
        """The smallest ranks that keep a share `epsilon` of the squared singular values in every head."""
        return [
            (self._rank(keys, epsilon), self._rank(values, epsilon))
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def _rank(self, spectrum: Tensor, epsilon: float) -> int:
        share = spectrum.cumsum(-1) / spectrum.sum(-1, keepdim=True)
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

    def ranks_at(level: float) -> Ranks:
        """`level` multiples a side; its fraction is spread evenly by error diffusion."""
        ranks, carried = [0] * len(choices), 0.5
        for side in order:
            carried += level
            step = int(carried)
            carried -= step
            ranks[side] = choices[side][min(max(step, 1), len(choices[side])) - 1]
        return list(zip(ranks[:layers], ranks[layers:], strict=True))

    sides, most = len(choices), max(len(choice) for choice in choices)
    return _largest_within(problem, (ranks_at(total / sides) for total in range(sides * most, sides - 1, -1)))


def energy(problem: RankProblem) -> Ranks:
    """The smallest ranks that keep a share `epsilon` of the energy (arXiv 2408.05646, equation 4)."""
    if problem.config.energy is not None:
        return problem.at_energy(problem.config.energy)
    # Ranks change only where a head's cumulative share does, so these are all the thresholds there are.
    shares = [(s.cumsum(-1) / s.sum(-1, keepdim=True)).flatten() for s in (*problem.keys, *problem.values)]
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
    return allot(problem, sensitivities(problem))


def sensitivities(problem: RankProblem) -> list[list[float]]:
    """What a unit of its keys' and of its values' tail costs the model, for each layer, near the problem's KV ratio.

    A side's truncation error, its spectrum's tail, costs the model in proportion to a sensitivity. It is first measured
    on one side at a time, at a uniform truncation, as a KL divergence over the tail; then once more around the ranks
    which that gives, as the change of the whole compressed model's divergence over the change of the tail. The two
    estimates meet half way, at their geometric mean.
    """
    start = uniform(problem)
    tails = [tuple(_tail(spectrum) for spectrum in pair) for pair in zip(problem.keys, problem.values, strict=True)]
    dims = [spectrum.shape[-1] for spectrum in problem.keys]
    alone = problem.costs.divergences(
        None, [[(rank_k, d), (d, rank_v)] for (rank_k, rank_v), d in zip(start, dims, strict=True)]
    )
    weights = [
        [max(cost, 0.0) / float(tail[rank]) if tail[rank] > 0 else 0.0 for cost, tail, rank in zip(*side, strict=True)]
        for side in zip(alone, tails, start, strict=True)
    ]
    ranks = allot(problem, weights)
    # One multiple less on each side in turn (one more where there is no less), and, once, the ranks as they are.
    others = [[_neighbour(problem.allowed(d), rank) for rank in pair] for pair, d in zip(ranks, dims, strict=True)]
    trials = [
        [(other_k, rank_v), (rank_k, other_v)]
        for (other_k, other_v), (rank_k, rank_v) in zip(others, ranks, strict=True)
    ]
    trials[0].append(ranks[0])
    together = problem.costs.divergences(ranks, trials)
    as_they_are = together[0].pop()
    for layer, costs in enumerate(together):
        for side, cost in enumerate(costs):
            tail, rank, other = tails[layer][side], ranks[layer][side], others[layer][side]
            change = float(tail[other] - tail[rank])
            slope = (cost - as_they_are) / change if change else 0.0
            if slope > 0:
                weights[layer][side] = math.sqrt(weights[layer][side] * slope)
    return weights


def allot(problem: RankProblem, weights: Sequence[Sequence[float]]) -> Ranks:
    """The ranks of least total weighted tail within the budget, by taking the best step for its bytes again and again.

    Tails are convex, for spectra fall, so that with steps of equal cost no other choice is better.

    Args:
        weights: for each layer what a unit of its keys' and of its values' tail costs.
    """
    sides = []
    for layer, pair in enumerate(zip(problem.keys, problem.values, strict=True)):
        for side, spectrum in enumerate(pair):
            sides.append(
                (weights[layer][side], _tail(spectrum), problem.allowed(spectrum.shape[-1]), spectrum.shape[0])
            )
    chosen = [0] * len(sides)
    total = sum(2 * spectrum.numel() for spectrum in problem.keys)
    left = problem.config.kv_ratio * total * (1 + 1e-12) - sum(heads * allowed[0] for _, _, allowed, heads in sides)
    if left < 0:
        return _largest_within(problem, [smallest(problem)])  # raises

    def step(index: int) -> tuple[float, int] | None:
        weight, tail, allowed, heads = sides[index]
        if chosen[index] + 1 == len(allowed):
            return None
        low, high = allowed[chosen[index]], allowed[chosen[index] + 1]
        cost = heads * (high - low)
        return -(weight + TIE) * float(tail[low] - tail[high]) / cost, cost

    queue = [(first[0], index, first[1]) for index in range(len(sides)) if (first := step(index)) is not None]
    heapq.heapify(queue)
    while queue:
        _, index, cost = heapq.heappop(queue)
        if cost > left:
            continue
        left -= cost
        chosen[index] += 1
        following = step(index)
        if following is not None:
            heapq.heappush(queue, (following[0], index, following[1]))
    ranks = [allowed[i] for i, (_, _, allowed, _) in zip(chosen, sides, strict=True)]
    return list(zip(ranks[::2], ranks[1::2], strict=True))


def _tail(spectrum: Tensor) -> Tensor:
    """What is cut off at ranks 0 .. D, over all heads: [D + 1]."""
    total = spectrum.sum(0)
    return torch.cat([total.flip(0).cumsum(0).flip(0), total.new_zeros(1)])


def smallest(problem: RankProblem) -> Ranks:
    """The smallest ranks allowed."""
    return [(problem.allowed(s.shape[-1])[0],) * 2 for s in problem.keys]


def _neighbour(allowed: list[int], rank: int) -> int:
    """The allowed rank below, or above the lowest one."""
    index = allowed.index(rank)
    return allowed[index - 1] if index else allowed[min(1, len(allowed) - 1)]


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
