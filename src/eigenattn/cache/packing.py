"""Quantised latents: from channels to codes of 8, 4 or 2 bits, packed in bytes, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BITS = (8, 4, 2)


class Widths(NamedTuple):
    """How many channels of a head have codes of 8, of 4 and of 2 bits. Channels lie in this order."""

    eight: int
    four: int
    two: int

    @property
    def channels(self) -> int:
        """Channels in all: the rank."""
        return sum(self)

    @property
    def bytes(self) -> int:
        """Bytes of one head's packed latent; each width's codes are filled up to whole bytes."""
        return sum(_plane_bytes(count, bits) for bits, count in zip(BITS, self, strict=True))


def _plane_bytes(channels: int, bits: int) -> int:
    return -(-channels * bits // 8)


def quantise(z: Tensor, offset: Tensor, step: Tensor, widths: Widths) -> Tensor:
    """The nearest codes of latents, `(z - offset) / step` rounded and held to what their width can say.

    Arithmetic is in fp32, whatever the dtype of the latents.

    Args:
        z: [..., R], channels sorted by width.
        offset, step: value of code 0 and distance of codes; they broadcast against `z`.

    Returns:
        Codes [..., R] in uint8.
    """
    codes = ((z.float() - offset.float()) / step.float()).round()
    planes = codes.split(widths, dim=-1)
    held = [plane.clamp(0, 2**bits - 1) for bits, plane in zip(BITS, planes, strict=True)]
    return torch.cat(held, dim=-1).to(torch.uint8)


def dequantise(codes: Tensor, offset: Tensor, step: Tensor) -> Tensor:
    """Latents `offset + code * step` [..., R], in fp32."""
    return offset.float() + codes.float() * step.float()


def pack(codes: Tensor, widths: Widths) -> Tensor:
    """Codes [..., R] in uint8 to bytes [..., widths.bytes]: a plane of bytes for each width, one behind the other.

    From its low bits up, byte `j` of a plane of `n` bytes holds the plane's channels `j`, `j + n` and, of 2 bits,
    `j + 2n` and `j + 3n`: unpacking is shifts of whole planes and needs no interleaving.
    """
    planes = []
    for bits, plane in zip(BITS, codes.split(widths, dim=-1), strict=True):
        count, size = 8 // bits, _plane_bytes(plane.shape[-1], bits)
        shares = F.pad(plane, (0, count * size - plane.shape[-1])).split(max(size, 1), dim=-1)
        packed = shares[0]
        for i, share in enumerate(shares[1:], start=1):
            packed = packed | share << bits * i
        planes.append(packed)
    return torch.cat(planes, dim=-1)


def unpack(packed: Tensor, widths: Widths) -> Tensor:
    """What `pack` was given."""
    sizes = [_plane_bytes(count, bits) for bits, count in zip(BITS, widths, strict=True)]
    parts = []
    for bits, count, plane in zip(BITS, widths, packed.split(sizes, dim=-1), strict=True):
        shares = [plane >> bits * i & 2**bits - 1 for i in range(8 // bits)]
        parts.append(torch.cat(shares, dim=-1)[..., :count])
    return torch.cat(parts, dim=-1)
