"""One latent for a token's keys and values together: joint bases (compare arXiv 2405.04434, section 2.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..calibration.attention_moments import AttentionMoments
from .bases import TINY, Bases, Basis, best_maps, blocks, covariance_under_attention, floored, outer, trace
from .ranks import RankProblem, first_weights

# The KV ratio at which errors of keys are weighed against those of values, whatever is asked for: bases are then the
# same for all ratios, as other bases are (chosen).
WEIGHED_AT = 0.6
# What a unit of error counts at least, in proportion to what that of the other side does (chosen: a side that was
# measured to cost nothing is kept where it is free).
LEAST_SHARE = 1e-6


def joint_bases(moments: Sequence[AttentionMoments], problem_of: Callable[[Bases], RankProblem]) -> Bases:
    """Joint bases of all layers.

    What errors of keys cost the model in proportion to errors of values is measured first, with bases of either side by
    itself.

    Args:
        moments: joint ones, of each layer.
        problem_of: gives the rank problem of some bases.
    """
    apart = problem_of([separate(sums) for sums in moments])
    weights = first_weights(apart.at(WEIGHED_AT))
    return [joint(sums, *pair) for sums, pair in zip(moments, weights, strict=True)]


def separate(moments: AttentionMoments) -> tuple[Basis, Basis]:
    """Bases of keys and of values, each by itself, from joint moments."""
    covariance, mean = _covariance(moments)
    keys, values = (
        best_maps(floored(blocks(metric, len(mean))), covariance[:, part, part], mean[:, part])
        for metric, part in zip((moments.key_metric, moments.value_metric), _halves(mean), strict=True)
    )
    return keys, values


def joint(moments: AttentionMoments, weight_k: float, weight_v: float) -> tuple[Basis, Basis]:
    """The best map of each rank for keys and values side by side.

    As `eigenattn.compression.bases.attention`, with a metric that has the blocks of keys and of values, each times
    what a unit of its error costs the model: the spectrum is in units of that cost. Values are taken token by token
    here, not as they are summed up in outputs, for that is how they share a latent with keys.

    Returns:
        The joint basis at full rank, in float64, and an empty one in the place of the values'.
    """
    covariance, mean = _covariance(moments)
    most = max(weight_k, weight_v)
    weights = [max(weight, LEAST_SHARE * most) if most > 0 else 1.0 for weight in (weight_k, weight_v)]
    sides = [
        weight * floored(blocks(metric, len(mean)))
        for weight, metric in zip(weights, (moments.key_metric, moments.value_metric), strict=True)
    ]
    metric = torch.stack([torch.block_diag(*pair) for pair in zip(*sides, strict=True)])
    empty = Basis(covariance[:, :0, :0], covariance[:, :0, :0], mean[:, :0])
    found = best_maps(metric, covariance, mean)
    # A squared error in a direction costs `u M u^T = 1`, of which this is the keys' part.
    of_keys = found.decoder[..., _halves(mean)[0]]
    key_share = (of_keys @ sides[0] * of_keys).sum(-1).clamp(0, 1)
    return dataclasses.replace(found, key_share=key_share), empty


def _covariance(moments: AttentionMoments) -> tuple[Tensor, Tensor]:
    """Covariance [G/N, 2 * N * D, 2 * N * D] and mean of keys and values side by side, shrunk if asked for."""
    covariance, mean = covariance_under_attention(moments)
    if not moments.shrinkage:
        return covariance, mean
    # Keys and values have units of their own, so the prior of each is scaled for itself.
    prior, scale = moments.key_prior, torch.empty_like(mean)
    for part in _halves(mean):
        own, other = (trace(x[:, part, part]) for x in (covariance, prior))
        scale[:, part] = (own / other.clamp_min(TINY)).sqrt().unsqueeze(-1)
    return (1 - moments.shrinkage) * covariance + moments.shrinkage * prior * outer(scale), mean


def _halves(x: Tensor) -> tuple[slice, slice]:
    """Where keys and where values lie in the last dimension."""
    middle = x.shape[-1] // 2
    return slice(0, middle), slice(middle, None)
