"""Rank rules: from spectra, measured costs and a target to the rank of every latent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .rank_problem import RankProblem, Ranks
from .sensitivity import sensitivities, sensitivity

# Step in which an energy threshold falls (the paper's).
ENERGY_STEP = 0.02


def energy(problem: RankProblem) -> Ranks:
    """The smallest ranks that keep a share `epsilon` of the energy (arXiv 2408.05646, equation 4)."""
    if problem.config.energy is not None:
        return at_energy(problem, problem.config.energy)
    # Ranks change only where a head's cumulative share does, so these are all the thresholds there are.
    shares = [_shares(spectrum).flatten() for spectrum in problem.flat]
    thresholds = torch.cat(shares).unique().tolist()
    low, high = 0, len(thresholds)
    while low < high:  # the first threshold that is too large
        middle = (low + high) // 2
        if problem.ratio(at_energy(problem, thresholds[middle])) <= problem.kv_ratio:
            low = middle + 1
        else:
            high = middle
    return problem.largest_within(at_energy(problem, t) for t in (thresholds[low - 1 : low] or [0.0]))


def at_energy(problem: RankProblem, epsilon: float) -> Ranks:
    """The smallest ranks that keep a share `epsilon` of the squared singular values in every head."""

    def rank(spectrum: Tensor) -> int:
        # Heads of a layer share one rank, the largest that any of them needs. In floating point a cumulative sum may
        # end just below 1, so the last direction always suffices.
        needed = int((_shares(spectrum) < epsilon * (1 - 1e-12)).sum(-1).max()) + 1
        return next(rank for rank in problem.allowed(spectrum) if rank >= min(needed, spectrum.shape[-1]))

    return problem.by_layer(map(rank, problem.flat))


def _shares(spectrum: Tensor) -> Tensor:
    """Share of each head's spectrum [G, D] in its first 1 .. D directions; all of it in any, where there is nothing."""
    total = spectrum.sum(-1, keepdim=True)
    return torch.where(total > 0, spectrum.cumsum(-1) / total, 1.0)


def error_budget(problem: RankProblem) -> Ranks:
    """The paper's rule: lower each layer's energy threshold until its output error exceeds the budget (algorithm 1).

    For a KV ratio, the smallest budget that meets it is found on the measured errors.
    """
    steps = int(1 / ENERGY_STEP)
    by_step = [at_energy(problem, 1 - ENERGY_STEP * step) for step in range(steps)]
    candidates = [list(dict.fromkeys(each)) for each in zip(*by_step, strict=True)]
    errors = problem.costs.layer_errors(candidates)

    def ranks_at(budget: float) -> Ranks:
        ranks = []
        for choices, measured in zip(candidates, errors, strict=True):
            # The first candidate over the budget ends the descent, even if a later one came out under it.
            over = next((i for i, error in enumerate(measured) if error > budget), len(choices))
            ranks.append(choices[max(over - 1, 0)])
        return ranks

    if problem.config.error_budget is not None:
        return ranks_at(problem.config.error_budget)
    budgets = sorted({0.0, *(error for measured in errors for error in measured)})
    return problem.largest_within(ranks_at(budget) for budget in budgets)


@dataclass(frozen=True)
class RankRule:
    """A way to choose ranks. Another package adds its own to `RANK_RULES`.

    Args:
        choose: the ranks of a problem.
        targets: the targets of a configuration that it takes.
        weights: what a unit of each latent's tail costs the model, by which coded latents share out their bits; None if
            the rule does not choose for those.
    """

    choose: Callable[[RankProblem], Ranks]
    targets: frozenset[str] = frozenset({"kv_ratio"})
    weights: Callable[[RankProblem], list[tuple[float, ...]]] | None = None


RANK_RULES: dict[str, RankRule] = {
    "uniform": RankRule(RankProblem.uniform),
    "energy": RankRule(energy, frozenset({"kv_ratio", "energy"})),
    "error_budget": RankRule(error_budget, frozenset({"kv_ratio", "error_budget"})),
    "sensitivity": RankRule(sensitivity, weights=sensitivities),
}
