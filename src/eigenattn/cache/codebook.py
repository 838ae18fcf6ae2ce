"""Quantisers: from latents to bytes of codes, and back to the levels that codes stand for.

Levels are the same for all tokens, and count in units of a token's own scale, the norm of its latent: so a token whose
vectors are large in all directions, of which other texts have others, is as good as any.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .packing import Widths, pack, unpack

# Levels are a polynomial of the code of this degree: even steps would serve a few large latents badly or the many small
# ones, and four levels may lie anywhere.
DEGREE = 3


# A scale is a power of two to a multiple of this, and a byte holds which (chosen: a finer one gains nothing).
OCTAVE = 4
UNIT_SCALE = 128


def scale_codes(z: Tensor) -> Tensor:
    """The bytes of the scales of latents [..., R]: the nearest to their norms, [..., 1] in uint8."""
    norm = z.float().norm(dim=-1, keepdim=True)
    return (norm.log2() * OCTAVE + UNIT_SCALE).round().clamp(0, 255).to(torch.uint8)  # of norm 0: log2 is -inf


def scales(codes: Tensor) -> Tensor:
    """What the bytes of scales stand for, in fp32."""
    return torch.exp2((codes.float() - UNIT_SCALE) / OCTAVE)


def middle(bits: int) -> int:
    """The code that levels are counted from."""
    return 2 ** (bits - 1)


def middles(widths: Widths, device: torch.device) -> Tensor:
    """That code of each channel [R]."""
    return torch.tensor([middle(bits) for bits in widths.each()], device=device)


def level_table(levels: Tensor, bits: int) -> Tensor:
    """The levels of all codes of so many bits, of quantisers [..., 4]: [..., 2^bits]."""
    codes = torch.arange(2**bits, device=levels.device, dtype=levels.dtype) - middle(bits)
    return levels @ torch.stack([codes**power for power in range(DEGREE + 1)])


@dataclass(frozen=True)
class Codebook:
    """What codes of a layer's channels stand for: the level of a code is `sum_i levels_i (code - 2^(bits - 1))^i`.

    Arithmetic is in fp32, whatever the dtype of levels and latents.

    Args:
        levels: [G, R, 4], channels sorted by width; levels rise with the code.
        widths: how many channels have which.
        thresholds: halfway between neighbouring levels, [G, channels, 2^bits - 1] of each width.
        of_codes: coefficients of the polynomial in the code itself, [4, G, 1, R].
    """

    levels: Tensor
    widths: Widths
    thresholds: list[Tensor]
    of_codes: Tensor

    @classmethod
    def of(cls, levels: Tensor, widths: Widths) -> Codebook:
        """The codebook of levels [G, R, 4]."""
        tables = [level_table(plane.float(), bits) for bits, plane in widths.split(levels, dim=1)]
        # What rounding in the dtype of levels may have put out of order is in no code's way.
        thresholds = [((table[..., 1:] + table[..., :-1]) / 2).cummax(-1).values for table in tables]
        at = middles(widths, levels.device)
        a, b, c, d = levels.double().unbind(-1)  # what follows nearly cancels
        of_codes = torch.stack([a - at * (b - at * (c - at * d)), b - at * (2 * c - 3 * at * d), c - 3 * at * d, d])
        return cls(levels, widths, thresholds, of_codes.float().unsqueeze(2))

    @functools.cached_property
    def all_thresholds(self) -> Tensor:
        """Those of all channels side by side, [G, sum of 2^bits - 1]."""
        return torch.cat([plane.flatten(1) for plane in self.thresholds], dim=1)

    @functools.cached_property
    def all_levels(self) -> Tensor:
        """What all codes of all channels stand for, side by side, [G, sum of 2^bits]."""
        planes = self.widths.split(self.levels.float(), dim=1)
        return torch.cat([level_table(plane, bits).flatten(1) for bits, plane in planes], dim=1)

    def encode(self, z: Tensor, packed: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Latents [B, G, T, R] to bytes [B, G, T, widths.bytes].

        Args:
            packed: gives the packed codes of latents over their scales; by default PyTorch's operations do.
        """
        packed = packed or (lambda z: pack(self.quantise(z), self.widths))
        if not self.widths.scaled:
            return packed(z)
        scale = scale_codes(z)
        return torch.cat([packed(z / scales(scale)), scale], dim=-1)

    def decode(self, rows: Tensor, levels: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The latents [B, G, T, R] that bytes stand for, in fp32; as `dequantise` has it.

        Args:
            levels: gives the levels of packed codes; by default PyTorch's operations do.
        """
        levels = levels or (lambda codes: self.dequantise(unpack(codes, self.widths)))
        if not self.widths.scaled:
            return levels(rows)
        codes, scale = rows.split([self.widths.of_codes, 1], dim=-1)
        return levels(codes) * scales(scale)

    def quantise(self, z: Tensor) -> Tensor:
        """The codes of the levels nearest to latents [B, G, T, R], in uint8."""
        rows = z.float().permute(1, 3, 0, 2).flatten(2)  # [G, R, B * T]
        planes = zip(self.thresholds, self.widths.split(rows, dim=1), strict=True)
        found = [torch.searchsorted(at, plane.contiguous(), out_int32=True) for at, (_, plane) in planes]
        codes = torch.cat(found, dim=1).to(torch.uint8)
        return codes.unflatten(2, (z.shape[0], z.shape[2])).permute(2, 0, 3, 1)

    def dequantise(self, codes: Tensor) -> Tensor:
        """Levels [B, G, T, R] of codes, in fp32; of one in so many heads, where the others have the same levels."""
        a, b, c, d = self.of_codes[:, :: len(self.levels) // codes.shape[1]]
        codes = codes.float()
        return torch.addcmul(a, codes, torch.addcmul(b, codes, torch.addcmul(c, codes, d)))
