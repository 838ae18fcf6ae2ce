"""From moments to bases: which subspace of each head keys and values are kept in."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..cache.layout import SIDES
from ..calibration.attention_moments import AttentionMoments, Sums
from ..calibration.statistics import LayerMoments
from .basis import TINY, Basis, orthonormal

# A metric's smallest eigenvalues are raised by this share of their mean, for no calibration text shows every query
# (chosen: small, so that it decides only among directions that hardly matter).
METRIC_FLOOR = 1e-4
# The KV ratio at which errors of keys are weighed against those of values in latents of both sides, whatever is asked
# for: bases are then the same for all ratios, as other bases are (chosen).
WEIGHED_AT = 0.6
# What a unit of error counts at least, in proportion to what that of the other side does (chosen: a side that was
# measured to cost nothing is kept where it is free).
LEAST_SHARE = 1e-6


def eigen(moments: LayerMoments) -> tuple[Basis, Basis]:
    """The paper's bases (arXiv 2408.05646, section 4.1): left singular vectors of stacked `[K; Q]` and of `V`.

    Keys and queries are taken before rotation, and the queries of a group stand in the stack of their KV head.

    Returns:
        The bases of keys and of values at full rank, in float64.
    """
    keys, values = orthonormal(moments.key + moments.query), orthonormal(moments.value)
    return keys, dataclasses.replace(values, sides=("value",))


def attention(moments: AttentionMoments) -> tuple[Basis, Basis]:
    """The best map of each rank under the error that matters: that of scores and of attention outputs.

    A key's error meets the queries that attend to it, a value's error the output projection. Taking either error as a
    product of a metric M and a covariance C, Eckart-Young gives the best rank-R map: with W the leading eigenvectors of
    `M^(1/2) C M^(1/2)`, the encoder is `M^(1/2) W` and the decoder `W^T M^(-1/2)`. Where heads share a latent, C is of
    all their vectors together, and M has a block for each. See docs/mathematics.md.

    From moments of keys and values side by side values are taken token by token, not as they are summed up in outputs.

    Returns:
        The bases of keys and of values at full rank, in float64; the spectrum is in units of the error itself.
    """
    metrics = moments.key_metric, moments.value_metric
    keys, values = (
        dataclasses.replace(
            best_maps(floored(blocks(metric, len(mean))), covariance, mean),
            sides=(side,),
            heads=len(metric) // len(mean),
        )
        for side, metric, (covariance, mean) in zip(SIDES, metrics, _spreads(moments), strict=True)
    )
    return keys, values


def attention_of_both(moments: AttentionMoments, key_weight: float, value_weight: float) -> Basis:
    """The best map of each rank for keys and values side by side (compare arXiv 2405.04434, section 2.1).

    As `attention`, with a metric that has the blocks of keys and of values, each times what a unit of its error costs
    the model: the spectrum is in units of that cost. Values are taken token by token, for that is how they share a
    latent with keys.

    Returns:
        The basis at full rank, in float64.
    """
    covariance, mean = _spread_of_both(moments)
    most = max(key_weight, value_weight)
    weights = [max(weight, LEAST_SHARE * most) if most > 0 else 1.0 for weight in (key_weight, value_weight)]
    sides = [
        weight * floored(blocks(metric, len(mean)))
        for weight, metric in zip(weights, (moments.key_metric, moments.value_metric), strict=True)
    ]
    metric = torch.stack([torch.block_diag(*pair) for pair in zip(*sides, strict=True)])
    found = best_maps(metric, covariance, mean)
    # A squared error in a direction costs `u M u^T = 1`, of which this is the keys' part.
    of_keys = found.decoder[..., _halves(mean)[0]]
    key_share = (of_keys @ sides[0] * of_keys).sum(-1).clamp(0, 1)
    heads = len(moments.key_metric) // len(mean)
    return dataclasses.replace(found, sides=SIDES, heads=heads, key_share=key_share)


def _spreads(moments: AttentionMoments) -> list[tuple[Tensor, Tensor]]:
    """Covariance [G/N, N * D, N * D] and mean [G/N, N * D] that keys' errors, and values', are weighed by."""
    if moments.outputs is None:
        covariance, mean = _spread_of_both(moments)
        return [(covariance[:, half, half], mean[:, half]) for half in _halves(mean)]
    share = moments.outputs.weight.clamp_min(TINY)
    mean = moments.outputs.first / share[:, None]
    found = [spread(moments.vectors), (moments.outputs.second - outer(mean) * share[:, None, None], mean)]
    if not moments.shrinkage:
        return found
    return [
        (_shrunk(covariance, prior, moments.shrinkage), mean)
        for (covariance, mean), prior in zip(found, moments.priors, strict=True)
    ]


def spread(sums: Sums) -> tuple[Tensor, Tensor]:
    """Covariance [G/N, n, n] and mean [G/N, n] of tokens, each counted with the attention it gets.

    Divided by the weight here, not in the metric: the product is the sum of squared errors over all pairs.
    """
    weight = sums.weight.clamp_min(TINY)
    mean = sums.first / weight[:, None]
    return sums.second / weight[:, None, None] - outer(mean), mean


def _shrunk(covariance: Tensor, prior: Tensor, shrinkage: float) -> Tensor:
    """A covariance [G, D, D], part of which is replaced by the prior, scaled to have its trace."""
    own, other = (_trace(x)[:, None, None] for x in (covariance, prior))
    return (1 - shrinkage) * covariance + shrinkage * prior * own / other.clamp_min(TINY)


def _spread_of_both(moments: AttentionMoments) -> tuple[Tensor, Tensor]:
    """Covariance [G/N, 2 * N * D, 2 * N * D] and mean of keys and values side by side, shrunk if asked for."""
    covariance, mean = spread(moments.vectors)
    if not moments.shrinkage:
        return covariance, mean
    # Keys and values have units of their own, so the prior of each is scaled for itself.
    (prior,), scale = moments.priors, torch.empty_like(mean)
    for half in _halves(mean):
        own, other = (_trace(x[:, half, half]) for x in (covariance, prior))
        scale[:, half] = (own / other.clamp_min(TINY)).sqrt().unsqueeze(-1)
    return (1 - moments.shrinkage) * covariance + moments.shrinkage * prior * outer(scale), mean


def _halves(x: Tensor) -> tuple[slice, slice]:
    """Where keys and where values lie in the last dimension."""
    middle = x.shape[-1] // 2
    return slice(0, middle), slice(middle, None)


def _trace(x: Tensor) -> Tensor:
    """[G, D, D] to [G]."""
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)


def outer(x: Tensor) -> Tensor:
    """Vectors [..., D] times themselves: [..., D, D]."""
    return x.unsqueeze(-1) * x.unsqueeze(-2)


def blocks(metric: Tensor, count: int) -> Tensor:
    """Metrics of G heads [G, D, D] as block-diagonal ones of `count` groups of neighbours, [count, N * D, N * D]."""
    return torch.stack([torch.block_diag(*group) for group in metric.unflatten(0, (count, -1))])


def floored(metric: Tensor) -> Tensor:
    """Metrics [G, D, D] without directions that count for nothing."""
    floor = METRIC_FLOOR * metric.diagonal(dim1=-2, dim2=-1).mean(-1)
    # A head that nothing attends to from outside the window has no metric: any will do.
    floor = torch.where(floor > 0, floor, 1.0)
    return metric + floor[:, None, None] * torch.eye(metric.shape[-1], dtype=metric.dtype, device=metric.device)


def best_maps(metric: Tensor, covariance: Tensor, mean: Tensor) -> Basis:
    """Minimise `tr(M (I - E U)^T C (I - E U))` at every rank: [G, D, D] twice and [G, D]."""
    values, vectors = torch.linalg.eigh(metric)
    root = (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.transpose(-1, -2)
    inverse = (vectors / values.clamp_min(TINY).sqrt().unsqueeze(-2)) @ vectors.transpose(-1, -2)
    basis = orthonormal(root @ covariance @ root)
    return Basis(root @ basis.encoder, basis.decoder @ inverse, basis.spectrum, mean)
