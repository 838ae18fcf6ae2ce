"""How rivals code vectors: what comes back of them, and the bits that takes. Elements are rounded, and not packed.

Norms, scales, zero points and means are rounded to 16 bits, and counted so.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import EigenAttnError

# Bits of a norm, a scale, a zero point, or an element of the original.
STORED = 16
LARGEST_HALF = 65504.0
# Elements that share a scale and a zero point (transformers' own default), and of symmetric codes (llama.cpp's).
GROUP, SYMMETRIC_GROUP = 64, 32
# Points of the grid that densities are integrated on, and most steps of Lloyd's iteration (chosen: levels are right to
# four digits at 4 bits).
GRID, STEPS = 2**16, 2000
# Dimensions of the lattice, and how long its steps may be at 2 bits, for elements of variance 1; each bit more halves
# them (chosen: the least error on Gaussian vectors at 2, 3 and 4 bits).
LATTICE = 8
STEPS_OF_LATTICE = (0.8, 1.05, 1.32, 1.95)


@dataclass(frozen=True)
class Code(ABC):
    """A way to code vectors.

    Args:
        bits: of an element, nothing that is stored beside it counted.
    """

    bits: int

    @abstractmethod
    def bits_per_element(self, head_dim: int) -> float:
        """Bits an element takes, all that is stored beside it included."""

    @abstractmethod
    def rounded(self, x: Tensor) -> Tensor:
        """What comes back of vectors [B, G, S, D] in fp32."""

    def rounded_keys(self, keys: Tensor) -> Tensor:
        """The same of keys, for codes that treat them apart."""
        return self.rounded(keys)

    def check(self, head_dim: int) -> None:
        """Raise an `EigenAttnError` if vectors of that size have no such code."""
        return


@dataclass(frozen=True)
class ChannelCode(Code):
    """Keys channel by channel, in groups of 64 tokens, and values token by token: KIVI, KVQuant.

    KIVI (arXiv 2402.02750) does so behind rotary positions, KVQuant (arXiv 2401.18079) before. The last group of a
    channel may have fewer tokens, which favours it a little: KIVI keeps those in 16 bits.
    """

    def bits_per_element(self, head_dim: int) -> float:
        """Scale and zero point of a group at 16 bits included."""
        return self.bits + STORED / GROUP + STORED / min(GROUP, head_dim)

    def rounded(self, x: Tensor) -> Tensor:
        """Token by token."""
        return rounded_in_groups(x, self.bits)

    def rounded_keys(self, keys: Tensor) -> Tensor:
        """Channel by channel."""
        return rounded_in_groups(keys.transpose(-1, -2), self.bits).transpose(-1, -2)


@dataclass(frozen=True)
class HadamardCode(Code):
    """A Hadamard rotation, and integers in groups of its elements, as in llama.cpp and QuaRot (arXiv 2404.00456).

    Args:
        symmetric: whether a group of 32 has a scale alone, as llama.cpp's `q4_0`, or a group of 64 a zero point too.
    """

    symmetric: bool = False

    def bits_per_element(self, head_dim: int) -> float:
        """Scales, and zero points if there are any, included."""
        if self.symmetric:
            return self.bits + STORED / min(SYMMETRIC_GROUP, head_dim)
        return self.bits + 2 * STORED / min(GROUP, head_dim)

    def rounded(self, x: Tensor) -> Tensor:
        """Rotated, rounded, and rotated back."""
        rounded = symmetric_in_groups if self.symmetric else rounded_in_groups
        return hadamard(rounded(hadamard(x), self.bits))


@dataclass(frozen=True)
class SphereCode(Code):
    """TurboQuant's variant for the mean squared error (arXiv 2504.19874, algorithm 1).

    Vectors are divided by their norms and rotated at random; what is known of each coordinate is then its density on
    the sphere, and Lloyd-Max levels of that are right for every text. The paper's norms have the precision of the
    original; here they have 16 bits.

    Args:
        corrected: whether vectors come back with the length that they had, as vLLM's `turboquant_4bit_nc`: what is
            stored is the norm over that of the levels. Else they come back shorter, which is the least error.
    """

    corrected: bool = False

    def bits_per_element(self, head_dim: int) -> float:
        """A norm a vector included."""
        return self.bits + STORED / head_dim

    def rounded(self, x: Tensor) -> Tensor:
        """Each coordinate at its nearest level."""
        rotation, levels = random_rotation(x.shape[-1]).to(x), sphere_levels(x.shape[-1], self.bits).to(x)
        norms = half(x.norm(dim=-1, keepdim=True))
        unit = (x / norms.clamp_min(1e-12)) @ rotation
        coded = levels[torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)]
        if self.corrected:
            norms = half(x.norm(dim=-1, keepdim=True) / coded.norm(dim=-1, keepdim=True))
        return (coded @ rotation.T) * norms


@dataclass(frozen=True)
class LatticeCode(Code):
    """Eights of a rotated vector at points of the lattice E8, as in NestQuant (arXiv 2502.09720).

    Of a point its class modulo `2 ** bits` times the lattice is stored, which is `bits` an element, and comes back as
    the smallest point of the class. A vector has a norm, and each eight of it one of four steps.
    """

    def bits_per_element(self, head_dim: int) -> float:
        """A norm a vector, and the choice of a step for each eight, included."""
        return self.bits + math.log2(len(STEPS_OF_LATTICE)) / LATTICE + STORED / head_dim

    def check(self, head_dim: int) -> None:
        """Raise an `EigenAttnError` if vectors have no whole number of eights."""
        if head_dim % LATTICE:
            raise EigenAttnError(f"vectors of {head_dim} elements cannot be cut into eights.")

    def rounded(self, x: Tensor) -> Tensor:
        """By whichever step leaves the smallest error."""
        size = x.shape[-1]
        rotation = random_rotation(size).to(x)
        scale = half(x.norm(dim=-1, keepdim=True)) / math.sqrt(size)
        eights = ((x / scale.clamp_min(1e-12)) @ rotation).unflatten(-1, (-1, LATTICE))
        best, least = torch.zeros_like(eights), torch.full_like(eights[..., :1], torch.inf)
        for longest in STEPS_OF_LATTICE:
            step = longest * 2.0 ** (2 - self.bits)
            found = from_class(class_of(eights / step, 2**self.bits), 2**self.bits) * step
            error = (found - eights).square().sum(-1, keepdim=True)
            best, least = torch.where(error < least, found, best), torch.minimum(error, least)
        return (best.flatten(-2) @ rotation.T) * scale


def half(x: Tensor) -> Tensor:
    """As 16 bits hold it."""
    return x.clamp(-LARGEST_HALF, LARGEST_HALF).half().to(x.dtype)


def rounded_in_groups(x: Tensor, bits: int) -> Tensor:
    """Vectors [..., n] quantised uniformly from the least to the greatest of each group along the last dimension."""
    pieces = []
    for piece in x.split(GROUP, dim=-1):
        low, high = half(piece.amin(-1, keepdim=True)), piece.amax(-1, keepdim=True)
        step = half((high - low) / (2**bits - 1)).clamp_min(1e-7)
        pieces.append(low + ((piece - low) / step).round().clamp(0, 2**bits - 1) * step)
    return torch.cat(pieces, dim=-1)


def symmetric_in_groups(x: Tensor, bits: int) -> Tensor:
    """The same with a scale alone: what is largest in a group, whatever its sign, is the code that has no opposite."""
    pieces, most = [], 2 ** (bits - 1)
    for piece in x.split(SYMMETRIC_GROUP, dim=-1):
        step = half(piece.gather(-1, piece.abs().argmax(-1, keepdim=True)) / -most)
        codes = torch.where(step == 0, 0, piece / torch.where(step == 0, 1, step)).round().clamp(-most, most - 1)
        pieces.append(codes * step)
    return torch.cat(pieces, dim=-1)


def hadamard(x: Tensor) -> Tensor:
    """Vectors [..., D] times an orthogonal Hadamard matrix, which is its own inverse.

    Where D is no power of two, pieces of the largest power of two that divides it are rotated by themselves.
    """
    size = x.shape[-1]
    matrix, piece = torch.ones(1, 1, dtype=x.dtype, device=x.device), size & -size
    while len(matrix) < piece:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / math.sqrt(2)
    return (x.unflatten(-1, (-1, piece)) @ matrix).flatten(-2)


@functools.cache
def random_rotation(size: int) -> Tensor:
    """An orthogonal matrix [size, size], the same one for the same size."""
    gaussian = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q.float()


@functools.cache
def sphere_levels(size: int, bits: int) -> Tensor:
    """Lloyd-Max levels, rising, of a coordinate of vectors that are spread evenly over the unit sphere.

    Its density is that of a Beta variable, `(1 - x ** 2) ** ((size - 3) / 2)`.
    """
    grid = (torch.arange(GRID, dtype=torch.float64) + 0.5) * (2 / GRID) - 1
    density = (1 - grid.square()) ** ((size - 3) / 2)
    # The mass, and the first moment, left of each edge of the grid.
    mass, moment = (torch.cat([x.new_zeros(1), x.cumsum(0)]) for x in (density, density * grid))
    quantiles = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits * mass[-1]
    levels = grid[torch.searchsorted(mass[1:], quantiles)]
    for _ in range(STEPS):
        edges = torch.searchsorted(grid, (levels[1:] + levels[:-1]) / 2)
        edges = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), GRID)])
        before, levels = levels, moment[edges].diff() / mass[edges].diff()
        if torch.equal(before, levels):
            break
    return levels.float()


def nearest_point(x: Tensor) -> Tensor:
    """The point of E8 nearest to each of [..., 8] (Conway and Sloane 1982).

    The lattice is D8, all whole numbers of an even sum, and D8 moved by a half in every coordinate.
    """
    whole, half = _nearest_even(x), _nearest_even(x - 0.5) + 0.5
    nearer = (x - whole).square().sum(-1, keepdim=True) <= (x - half).square().sum(-1, keepdim=True)
    return torch.where(nearer, whole, half)


def _nearest_even(x: Tensor) -> Tensor:
    """The nearest whole numbers of an even sum: where it is odd, the worst rounded one goes the other way."""
    found = x.round()
    worst = (x - found).abs().argmax(-1, keepdim=True)
    apart = (x - found).gather(-1, worst)
    step = torch.where(apart < 0, -1.0, 1.0) * (found.sum(-1, keepdim=True) % 2)
    return found.scatter_add(-1, worst, step.to(x.dtype))


@functools.cache
def _generator() -> Tensor:
    """Rows that generate E8, [8, 8]."""
    rows = torch.zeros(LATTICE, LATTICE)
    rows[0, 0] = 2
    for i in range(1, LATTICE - 1):
        rows[i, i - 1], rows[i, i] = -1, 1
    rows[-1] = 0.5
    return rows


def class_of(x: Tensor, modulus: int) -> Tensor:
    """What is stored of [..., 8]: the nearest point's coordinates in the lattice, whole numbers below the modulus."""
    inverse = torch.linalg.inv(_generator().double()).to(x)
    return (nearest_point(x) @ inverse).round() % modulus


def from_class(codes: Tensor, modulus: int) -> Tensor:
    """What comes back: the smallest point [..., 8] with these coordinates, up to multiples of the modulus."""
    point = codes @ _generator().to(codes)
    return point - modulus * nearest_point(point / modulus)
