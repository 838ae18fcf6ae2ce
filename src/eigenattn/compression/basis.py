"""A basis: what takes one layer's keys, values or both to latents, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.layout import Latent
from ..cache.packing import Widths

# Below it float64 has no more than few digits: what is divided by is at least this.
TINY = torch.finfo(torch.float64).tiny
# Of the largest, what a direction of a spectrum counts at least where latents are brought to units.
LEAST_SHARE = 1e-12


@dataclass(frozen=True)
class Quantiser:
    """Static quantisers of the channels of one latent.

    Args:
        levels: [G, R, 4], what codes stand for (`eigenattn.cache.codebook.Codebook`).
        widths: how many channels have codes of how many bits, the same for all heads; channels lie in this order.
    """

    levels: Tensor
    widths: Widths


@dataclass(frozen=True)
class Basis:
    """Encoder, decoder, mean and spectrum of each KV head of one layer, for keys or for values.

    Where N KV heads share a latent, they count as one of G/N heads of N * D dimensions. A basis of both sides is of
    keys and values side by side, twice as many. Below G counts latents, and D what each is made of.

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
        """Dimensions of what it is a basis of, D."""
        return self.encoder.shape[-2]

    @property
    def unit(self) -> Tensor:
        """The unit [G, D] of each channel of a coded latent: the root of its deviation, 1 for the largest.

        A token's scale is the norm of its latent: with units of 1 the first few channels would decide it, and with
        whole deviations the last ones, which hardly matter and which other texts have more of (chosen).
        """
        share = self.spectrum.clamp_min(0) / self.spectrum.amax(-1, keepdim=True).clamp_min(TINY)
        return share.clamp_min(LEAST_SHARE).pow(0.25)

    def balanced(self) -> Basis:
        """The same basis with its channels in these units."""
        unit = self.unit
        encoder, decoder = self.encoder / unit.unsqueeze(-2), self.decoder * unit.unsqueeze(-1)
        return dataclasses.replace(self, encoder=encoder, decoder=decoder)

    @property
    def latent(self) -> Latent:
        """What the cache then holds."""
        widths = None if self.quantiser is None else self.quantiser.widths
        return Latent(self.sides, self.heads, self.rank, self.full_rank // (len(self.sides) * self.heads), widths)

    def truncate(self, rank: int) -> Basis:
        """The basis of the first `rank` directions."""
        return dataclasses.replace(self, encoder=self.encoder[..., :rank], decoder=self.decoder[:, :rank])


# Of the latents of each layer: keys and values, or one of both. A side in none of them is stored as it is.
Bases = list[tuple[Basis, ...]]


def truncated(bases: Sequence[tuple[Basis, ...]], ranks: Sequence[tuple[int, ...]]) -> Bases:
    """The bases of chosen ranks, without those at full rank, where there is nothing to gain from a basis."""
    return [
        tuple(basis.truncate(rank) for basis, rank in zip(layer, chosen, strict=True) if rank < basis.full_rank)
        for layer, chosen in zip(bases, ranks, strict=True)
    ]


def orthonormal(moment: Tensor) -> Basis:
    """All eigenvectors of second moments [G, D, D], by descending eigenvalue."""
    values, vectors = torch.linalg.eigh(moment.double())
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
    # An eigenvector's sign is free: fixing it (largest entry positive) makes results the same on every machine.
    largest = vectors.abs().argmax(dim=-2, keepdim=True)
    vectors = vectors * vectors.gather(-2, largest).sign()
    return Basis(vectors, vectors.transpose(-1, -2), values)
