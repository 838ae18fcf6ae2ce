"""From moments to bases: which subspace of each head keys and values are kept in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.statistics import LayerMoments


@dataclass(frozen=True)
class Basis:
    """Encoder, decoder, mean and spectrum of each KV head of one layer, for keys or for values.

    Args:
        encoder: [G, D, R]; `z = (x - mean) @ encoder`.
        decoder: [G, R, D]; `x_hat = mean + z @ decoder`.
        spectrum: [G, D], descending: what each direction carries, in the units of the basis (for `eigen`, squared
            singular values). Not shortened by `truncate`.
        mean: [G, D], or None for a basis through the origin.
    """

    encoder: Tensor
    decoder: Tensor
    spectrum: Tensor
    mean: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.encoder.shape[-1]

    def truncate(self, rank: int) -> Basis | None:
        """The basis of the first `rank` directions; None at full rank, where there is nothing to gain from a basis."""
        if rank == self.encoder.shape[-2]:
            return None
        return Basis(self.encoder[..., :rank], self.decoder[:, :rank], self.spectrum, self.mean)


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


BASES: dict[str, Callable[[LayerMoments], tuple[Basis, Basis]]] = {"eigen": eigen}
