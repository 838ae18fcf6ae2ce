"""Choosing ranks: from spectra, measured errors and a target to `(R_k, R_v)` for each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import EigenAttentionConfig
from ..errors import EigenAttnError

Ranks = list[tuple[int, int]]

# Step and lowest value of the energy threshold (the paper's step; its code stops where ranks do).
ENERGY_STEP = 0.02


@dataclass(frozen=True)
class RankProblem:
    """What a rank rule may look at.

    Args:
        keys, values: spectra of each layer, [G, D], descending.
        config: the target, and the multiple that ranks are held to.
        errors: measures, for each layer, the relative errors of candidate pairs of ranks.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    config: EigenAttentionConfig
    errors: Callable[[list[Ranks]], list[list[float]]]

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
    errors = problem.errors(candidates)

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
}
