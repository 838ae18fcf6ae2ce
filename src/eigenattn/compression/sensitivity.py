"""The rank rule `sensitivity`: bytes go where a direction is worth most to the model, as measured."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .rank_problem import RankProblem, Ranks, tail

# Costs are measured where this share of the spectrum is cut off at least (chosen: what costs less than rounding does
# tells nothing). Keys and values of all heads together often fill no more than the hidden state's dimensions.
LEAST_CUT = 1e-4
# What a unit of a tail counts where nothing was measured, so that such latents are ranked by their tails (chosen).
TIE = 1e-30

# For each latent the cost measured at some ranks.
Measured = list[dict[int, float]]


def sensitivity(problem: RankProblem) -> Ranks:
    """Spend one byte budget over all layers, keys and values, where a direction is worth most to the model."""
    return allot(problem, measured_costs(problem))


def sensitivities(problem: RankProblem) -> list[tuple[float, ...]]:
    """What a unit of each latent's tail costs the model, layer by layer, near the problem's KV ratio."""
    if problem.in_nats:
        return [(1.0,) * len(layer) for layer in problem.spectra]
    weights = _measured_weights(problem)
    ranks = allot(problem, _costs(problem, weights))
    return [
        tuple(float(weight[rank]) for weight, rank in zip(*layer, strict=True))
        for layer in zip(weights, ranks, strict=True)
    ]


def first_weights(problem: RankProblem) -> list[tuple[float, ...]]:
    """What a unit of each latent's tail costs the model, layer by layer, at a uniform truncation."""
    measured = _nothing(problem)
    _measure(problem, problem.uniform(), measured)
    return [tuple(float(weight[0]) for weight in layer) for layer in _interpolated(problem, measured)]


def measured_costs(problem: RankProblem) -> list[tuple[Tensor, ...]]:
    """What truncating each latent costs the model at every rank.

    A cost is a KL divergence of the model's predictions, with one latent truncated and all others as they were. It is
    measured twice: at a uniform truncation, then at the ranks which that suggests. In between, the cost of a unit of
    the spectrum's tail is interpolated on a logarithmic scale, and beyond it stays as it is.

    Returns:
        For each layer, for each of its latents, the costs at ranks 0 .. D in nats a token, [D + 1].
    """
    if problem.in_nats:
        return [tuple(tail(spectrum) for spectrum in layer) for layer in problem.spectra]
    return _costs(problem, _measured_weights(problem))


def _measured_weights(problem: RankProblem) -> list[tuple[Tensor, ...]]:
    """What a unit of its tail costs each latent at every rank: as `measured_costs`, over the tail."""
    measured, ranks = _nothing(problem), problem.uniform()
    _measure(problem, ranks, measured)
    ranks = allot(problem, _costs(problem, _interpolated(problem, measured)))
    _measure(problem, ranks, measured)
    return _interpolated(problem, measured)


def _nothing(problem: RankProblem) -> list[Measured]:
    return [[{} for _ in layer] for layer in problem.spectra]


def _measure(problem: RankProblem, ranks: Ranks, measured: Sequence[Measured]) -> None:
    """Measure what each latent costs, truncated by itself near these ranks, and note it at the rank."""
    trials: list[Ranks] = []
    places: list[list[int]] = []
    for spectra, near, notes in zip(problem.spectra, ranks, measured, strict=True):
        allowed = [problem.allowed(spectrum) for spectrum in spectra]
        full = [choices[-1] for choices in allowed]
        telling = [_telling(*each) for each in zip(allowed, spectra, strict=True)]
        places.append([_unmeasured(*each) for each in zip(telling, near, notes, strict=True)])
        trials.append([(*full[:i], rank, *full[i + 1 :]) for i, rank in enumerate(places[-1])])
    for costs, at, notes in zip(problem.costs.divergences(trials), places, measured, strict=True):
        for cost, rank, found in zip(costs, at, notes, strict=True):
            found[rank] = cost


def _costs(problem: RankProblem, weights: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    return [
        tuple(tail(spectrum) * weight for spectrum, weight in zip(*layer, strict=True))
        for layer in zip(problem.spectra, weights, strict=True)
    ]


def _telling(allowed: list[int], spectrum: Tensor) -> list[int]:
    """The ranks at which a cost can be measured; the smallest one always counts as such."""
    cut = tail(spectrum)
    return [rank for rank in allowed if rank == allowed[0] or cut[rank] > LEAST_CUT * cut[0]]


def _unmeasured(telling: list[int], rank: int, measured: dict[int, float]) -> int:
    """The rank nearest to `rank` that tells something new."""
    new = [each for each in telling if each not in measured]
    return min(new, key=lambda each: abs(each - rank), default=telling[0])


def _interpolated(problem: RankProblem, measured: Sequence[Measured]) -> list[tuple[Tensor, ...]]:
    """What a unit of each latent's tail costs at ranks 0 .. D, [D + 1], from costs measured at some ranks."""

    def weight(spectrum: Tensor, costs: dict[int, float]) -> Tensor:
        cut = tail(spectrum)
        found = {rank: cost / float(cut[rank]) for rank, cost in sorted(costs.items()) if cut[rank] > 0 < cost}
        if not found:
            return torch.full((len(cut),), TIE, dtype=torch.float64)
        logs = np.interp(range(len(cut)), list(found), [math.log(weight) for weight in found.values()])
        return torch.from_numpy(logs).exp()

    return [
        tuple(weight(spectrum, costs) for spectrum, costs in zip(*layer, strict=True))
        for layer in zip(problem.spectra, measured, strict=True)
    ]


def allot(problem: RankProblem, costs: Sequence[tuple[Tensor, ...]]) -> Ranks:
    """The ranks of least total cost within the budget, by taking the best step for its bytes again and again.

    That is exact for costs that are convex in the rank and steps of equal bytes; other costs are replaced by the
    largest convex curves below them.

    Args:
        costs: for each layer the costs of its latents at ranks 0 .. D, [D + 1].
    """
    curves = []
    for spectrum, cost in zip(problem.flat, (cost for layer in costs for cost in layer), strict=True):
        allowed = problem.allowed(spectrum)
        curves.append((_convex(allowed, cost[allowed].tolist()), allowed, spectrum.shape[0]))
    chosen = [0] * len(curves)
    left = problem.kv_ratio * problem.elements * (1 + 1e-12) - sum(heads * allowed[0] for _, allowed, heads in curves)
    if left < 0:
        return problem.largest_within([problem.smallest()])  # raises

    def step(index: int) -> tuple[float, int] | None:
        curve, allowed, heads = curves[index]
        at = chosen[index]
        if at + 1 == len(allowed):
            return None
        size = heads * (allowed[at + 1] - allowed[at])
        return (curve[at + 1] - curve[at]) / size, size

    queue = [(first[0], index, first[1]) for index in range(len(curves)) if (first := step(index)) is not None]
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
    return problem.by_layer(allowed[i] for i, (_, allowed, _) in zip(chosen, curves, strict=True))


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
