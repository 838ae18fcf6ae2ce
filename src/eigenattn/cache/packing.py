"""Codes of 8, 6, 4 and 2 bits, packed in bytes, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# What codes of each width are stored as, upper bits first: parts that fill bytes evenly.
PARTS = {8: (8,), 6: (4, 2), 4: (4,), 2: (2,)}
BITS = tuple(PARTS)


class Widths(NamedTuple):
    """How many channels of a head have codes of 8, of 6, of 4 and of 2 bits. Channels lie in this order."""

    eight: int
    six: int
    four: int
    two: int

    @property
    def channels(self) -> int:
        """Channels in all: the rank."""
        return sum(self)

    @property
    def bytes(self) -> int:
        """Bytes of one head's packed latent; every plane is filled up to whole bytes."""
        return sum(plane_bytes(channels, bits) for channels, parts in self.planes() for bits in parts)

    def planes(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Of each width in turn, how many channels have it and the parts of `PARTS` that their codes lie in."""
        return zip(self, PARTS.values(), strict=True)

    def each(self) -> list[int]:
        """The bits of each channel."""
        return [bits for bits, count in zip(BITS, self, strict=True) for _ in range(count)]


def plane_bytes(channels: int, bits: int) -> int:
    """Bytes that so many parts of codes fill, up to whole ones."""
    return -(-channels * bits // 8)


def pack(codes: Tensor, widths: Widths) -> Tensor:
    """Codes [..., R] in uint8 to bytes [..., widths.bytes]: planes of bytes for each width, one behind the other.

    From its low bits up, byte `j` of a plane of `n` bytes holds the plane's channels `j`, `j + n` and, of 2 bits,
    `j + 2n` and `j + 3n`: unpacking is shifts of whole planes and needs no interleaving. Codes of 6 bits lie in a plane
    of their upper 4 bits, and one of their lower 2 behind it.
    """
    packed = []
    for parts, plane in zip(PARTS.values(), codes.split(widths, dim=-1), strict=True):
        below = sum(parts)
        for bits in parts:
            below -= bits
            packed.append(_pack_plane(plane >> below & 2**bits - 1, bits))
    return torch.cat(packed, dim=-1)


def _pack_plane(parts: Tensor, bits: int) -> Tensor:
    count, size = 8 // bits, plane_bytes(parts.shape[-1], bits)
    shares = F.pad(parts, (0, count * size - parts.shape[-1])).split(max(size, 1), dim=-1)
    packed = shares[0]
    for i, share in enumerate(shares[1:], start=1):
        packed = packed | share << bits * i
    return packed


def unpack(packed: Tensor, widths: Widths) -> Tensor:
    """What `pack` was given."""
    planes = [(count, bits) for count, parts in widths.planes() for bits in parts]
    stored = iter(packed.split([plane_bytes(*plane) for plane in planes], dim=-1))
    codes = []
    for count, parts in widths.planes():
        code = None
        for bits in parts:
            plane = next(stored)
            shares = [plane >> bits * i & 2**bits - 1 for i in range(8 // bits)]
            part = torch.cat(shares, dim=-1)[..., :count]
            code = part if code is None else code << bits | part
        codes.append(code)
    return torch.cat(codes, dim=-1)
