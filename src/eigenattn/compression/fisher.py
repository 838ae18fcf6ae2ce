"""The `fisher` basis: directions, ranks and bits by what errors do to the model's own predictions."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..cache.codebook import scale_codes, scales
from ..calibration.fisher_moments import FisherMoments, LatentMoments
from ..calibration.latent_histograms import Histograms
from . import quantise
from .bases import best_maps, spread
from .basis import TINY, Basis
from .codebooks import fit

# Part of the metric that is taken to be the same in all directions: few tokens carry most of a gradient's second
# moment, and other texts have others (chosen: see docs/decisions.md).
METRIC_SHRINKAGE = 0.5
# What errors in proportion to a latent cost, in units of errors that are independent from token to token: they add up
# in attention's sums (chosen: 1 to 14 in the layers of SmolLM2, and see docs/decisions.md).
COHERENCE = 3.0
# Single channels of other texts reach further, against a token's scale, than those of any calibration text: quantisers
# are fitted to these multiples of what was drawn, with these weights (chosen: see docs/decisions.md).
STRETCHES = ((1.0, 1.0), (1.4, 0.1))


def fisher(moments: FisherMoments) -> tuple[Basis, ...]:
    """The best map of each rank where an error `e` of a token's vector costs the model `(g . e)^2 / 2` nats.

    `g` is the gradient of the loss, whose second moment is the Fisher information. Taking the cost as a product of
    that metric and of the covariance of the vectors, each weighted by its influence, Eckart-Young gives the maps as in
    `eigenattn.compression.bases.attention`. Whatever heads share a latent, and whether keys and values do, the metric
    is of all their dimensions.

    Returns:
        The bases of each kind of latents at full rank, in float64; the spectrum is in nats a token.
    """
    return tuple(
        _basis(latents, sides, heads, moments.tokens)
        for latents, (sides, heads) in zip(moments.latents, moments.kinds, strict=True)
    )


def _basis(moments: LatentMoments, sides: tuple[str, ...], heads: int, tokens: int) -> Basis:
    covariance, mean = spread(moments.vectors)
    found = best_maps(_shrunk(moments.metric, moments.parts), covariance, mean)
    spectrum = found.spectrum * (COHERENCE / (2 * tokens))
    return dataclasses.replace(found, spectrum=spectrum, sides=sides, heads=heads)


def _shrunk(metric: Tensor, parts: tuple[int, ...]) -> Tensor:
    """A metric [G/N, n, n], of which a share is replaced by a multiple of the identity, of each part's own size."""
    found = metric.diagonal(dim1=-2, dim2=-1).split(parts, dim=-1)
    level = torch.cat([each.mean(-1, keepdim=True).expand_as(each) for each in found], dim=-1)
    # A head that reaches no far query has no metric: any will do.
    level = torch.where(level > 0, level, 1.0)
    return (1 - METRIC_SHRINKAGE) * metric + torch.diag_embed(METRIC_SHRINKAGE * level)


def fisher_quantisers(moments: FisherMoments, bases: tuple[Basis, ...]) -> tuple[quantise.Fitted, ...]:
    """Quantisers of each latent at all widths, fitted to the vectors that were drawn, and what they cost in nats.

    A quantiser's error has a part in proportion to the latent, which adds up over tokens as a latent that is cut off
    does, and a rest that is independent from token to token.
    """
    return tuple(_fitted(*each, moments.tokens) for each in zip(moments.latents, bases, strict=True))


def _fitted(moments: LatentMoments, basis: Basis, tokens: int) -> quantise.Fitted:
    mean = 0 if basis.mean is None else basis.mean.unsqueeze(1)
    z = (moments.sample.vectors.double() - mean) @ basis.encoder
    histograms = Histograms.empty(basis.encoder, *z.shape[::2])
    scale, weights = scales(scale_codes(z)).double(), moments.sample.estimates
    for stretch, share in STRETCHES:
        histograms.add((stretch * z / scale).unsqueeze(0), (share * weights * scale.squeeze(-1).square()).unsqueeze(0))
    found = fit(histograms, quantise.ALLOTTED[1:]).in_units(basis.unit)
    total = weights.sum(-1, keepdim=True) * sum(share for _, share in STRETCHES)  # [G/N, 1]
    unit = total.clamp_min(TINY).reciprocal() / (2 * tokens)
    costs = quantise.costs_in_part_coherent(found, COHERENCE * found.energy * unit, unit)
    return quantise.Fitted(found, costs.cpu())
