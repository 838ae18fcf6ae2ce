"""From moments to bases: which subspace of each head keys and values are kept in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache.layout import Latent
from ..cache.packing import Widths
from ..calibration.attention_moments import AttentionMoments
from ..calibration.statistics import LayerMoments, Moments


@dataclass(frozen=True)
class Quantiser:
    """Static quantisers of the channels of one layer's latents, for keys or for values.

    Args:
        levels: [G, R, 4], what codes stand for (`eigenattn.cache.codebook.Codebook`).
        widths: how many channels have codes of 8, 6, 4 and 2 bits, the same for all heads; channels lie in this order.
    """

    levels: Tensor
    widths: Widths


@dataclass(frozen=True)
class Basis:
    """Encoder, decoder, mean and spectrum of each KV head of one layer, for keys or for values.

    Where N KV heads share a latent, they count as one of G/N heads of N * D dimensions. A basis of both sides is of keys
    and values side by side, twice as many. Below G counts latents, and D what each is made of.

    Args:
        encoder: [G, D, R]; `z = (x - mean) @ encoder`.
        decoder: [G, R, D]; `x_hat = mean + z @ decoder`.
        spectrum: [G, D], descending: what each direction carries, in the units of the basis (for `eigen`, squared
            singular values). Not shortened by `truncate`.
        mean: [G, D], or None for a basis through the origin.
        quantiser: of the latents, or None for latents in the model's dtype.
        sides: whose vectors it is of: `("key",)`, `("value",)` or both.
        heads: KV heads that share a latent, N.
        key_share: of a basis of both sides the part of each direction's cost that is due to keys, [G, D]; None for
            others.
    """

    encoder: Tensor
    decoder: Tensor
    spectrum: Tensor
    mean: Tensor | None = None
    quantiser: Quantiser | None = None
    sides: tuple[str, ...] = ("key",)
    heads: int = 1
    key_share: Tensor | None = None

    @property
    def rank(self) -> int:
        """Directions that it has, R."""
        return self.encoder.shape[-1]

    @property
    def full_rank(self) -> int:
        """Dimensions of what it is a basis of."""
        return self.encoder.shape[-2]

    @property
    def latent(self) -> Latent:
        """What the cache then holds."""
        widths = None if self.quantiser is None else self.quantiser.widths
        return Latent(self.sides, self.heads, self.rank, self.full_rank // (len(self.sides) * self.heads), widths)

    def truncate(self, rank: int) -> Basis | None:
        """The basis of the first `rank` directions; None at full rank, where there is nothing to gain from a basis."""
        if rank == self.encoder.shape[-2]:
            return None
        encoder, decoder = self.encoder[..., :rank], self.decoder[:, :rank]
        return dataclasses.replace(self, encoder=encoder, decoder=decoder)


# Of keys and of values, for each layer.
Bases = list[tuple[Basis, Basis]]


def truncated(bases: Bases, ranks: Sequence[tuple[int, int]]) -> list[tuple[Basis | None, Basis | None]]:
    """The bases of chosen ranks `(R_k, R_v)`, as `Basis.truncate` gives them."""
    return [
        (keys.truncate(rank_k), values.truncate(rank_v))
        for (keys, values), (rank_k, rank_v) in zip(bases, ranks, strict=True)
    ]


def _orthonormal(moment: Tensor) -> Basis:
    """All eigenvectors of second moments [G, D, D], by descending eigenvalue."""
    values, vectors = torch.linalg.eigh(moment.double())
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
    # An eigenvector's sign is free: fixing it (largest entry positive) makes results the same on every machine.
    largest = vectors.abs().argmax(dim=-2, keepdim=True)
    vectors = vectors * vectors.gather(-2, largest).sign()
    return Basis(vectors, vectors.transpose(-1, -2), values)


def eigen(moments: LayerMoments) -> tuple[Basis, Basis]:
    """The paper's bases (arXiv 2408.05646, section 4.1): left singular vectors of stacked `[K; Q]` and of `V`.

    Keys and queries are taken before rotation, and the queries of a group stand in the stack of their KV head.

    Returns:
        The bases of keys and of values at full rank, in float64.
    """
    return _orthonormal(moments.key + moments.query), _orthonormal(moments.value)


def attention(moments: AttentionMoments) -> tuple[Basis, Basis]:
    """The best map of each rank under the error that matters: that of scores and of attention outputs.

    A key's error meets the queries that attend to it, a value's error the output projection. Taking either error as a
    product of a metric M and a covariance C, Eckart-Young gives the best rank-R map: with W the leading eigenvectors of
    `M^(1/2) C M^(1/2)`, the encoder is `M^(1/2) W` and the decoder `W^T M^(-1/2)`. Where heads share a latent, C is of
    all their vectors together, and M has a block for each. See docs/mathematics.md.

    Returns:
        The bases of keys and of values at full rank, in float64; the spectrum is in units of the error itself.
    """
    key_covariance, key_mean = covariance_under_attention(moments)
    key_covariance = _shrunk(key_covariance, moments.key_prior, moments.shrinkage)
    keys = best_maps(floored(blocks(moments.key_metric, len(key_mean))), key_covariance, key_mean)
    share = moments.output_weight.clamp_min(TINY)
    value_mean = moments.output_first / share[:, None]
    value_covariance = moments.output_second - outer(value_mean) * share[:, None, None]
    value_covariance = _shrunk(value_covariance, moments.value_prior, moments.shrinkage)
    values = best_maps(floored(blocks(moments.value_metric, len(share))), value_covariance, value_mean)
    return keys, values


def covariance_under_attention(moments: AttentionMoments) -> tuple[Tensor, Tensor]:
    """Covariance [G, D, D] and mean [G, D] of tokens, each counted with the attention it gets.

    Divided by the weight here, not in the metric: the product is the sum of squared errors over all pairs.
    """
    weight = moments.key_weight.clamp_min(TINY)
    mean = moments.key_first / weight[:, None]
    return moments.key_second / weight[:, None, None] - outer(mean), mean


def trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)


def _shrunk(covariance: Tensor, prior: Tensor | None, shrinkage: float) -> Tensor:
    """A covariance [G, D, D], part of which is replaced by the prior, scaled to have its trace."""
    if not shrinkage:
        return covariance
    own, other = (trace(x)[:, None, None] for x in (covariance, prior))
    return (1 - shrinkage) * covariance + shrinkage * prior * own / other.clamp_min(TINY)


TINY = torch.finfo(torch.float64).tiny
# A metric's smallest eigenvalues are raised by this share of their mean, for no calibration text shows every query
# (chosen: small, so that it decides only among directions that hardly matter).
METRIC_FLOOR = 1e-4


def outer(x: Tensor) -> Tensor:
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
    basis = _orthonormal(root @ covariance @ root)
    return Basis(root @ basis.encoder, basis.decoder @ inverse, basis.spectrum, mean)


@dataclass(frozen=True)
class BasisMethod:
    """A kind of basis: what makes its empty moments, and what it makes of moments.

    Args:
        moments: `of(attention, window, sharing=ALONE, shrinkage=0.0, joint=False)`.
    """

    moments: Callable[..., Moments]
    build: Callable[[Any], tuple[Basis, Basis]]


BASES: dict[str, BasisMethod] = {
    "eigen": BasisMethod(LayerMoments.of, eigen),
    "attention": BasisMethod(AttentionMoments.of, attention),
}
