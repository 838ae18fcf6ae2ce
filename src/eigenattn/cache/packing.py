"""Codes of a few bits, packed in bytes, and back."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Widths that a channel may have, widest first, and what codes of each are stored as, upper bits first: parts that fill
# bytes evenly. Another package adds a width here.
PARTS: dict[int, tuple[int, ...]] = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}


class Plane(NamedTuple):
    """Where one part of the codes of some channels lies in a packed latent.

    Args:
        start, size: first byte, and bytes.
        bits: of the part; they are those of the code from bit `below` on.
    """

    start: int
    size: int
    bits: int
    below: int

    def at(self, channel: int) -> tuple[int, int]:
        """The byte that holds a channel's part, of those that share the plane, and the bit it begins at."""
        return self.start + channel % self.size, channel // self.size * self.bits


@dataclass(frozen=True)
class Widths:
    """How many channels of a latent have codes of how many bits. Channels lie widest first.

    Args:
        counts: pairs of bits and channels, widest first, each with at least one channel.
        scaled: whether codes are of a latent over its own scale (`eigenattn.cache.codebook`), kept in a byte behind.
    """

    counts: tuple[tuple[int, int], ...]
    scaled: bool = False

    @classmethod
    def of(cls, counts: Mapping[int, int], scaled: bool = False) -> Widths:
        """From channels by bits.

        Raises:
            ValueError: on a width that is not in `PARTS`, or a count below zero.
        """
        if not all(bits in PARTS and count >= 0 for bits, count in counts.items()):
            raise ValueError(f"no widths: {counts}")
        return cls(tuple((bits, counts[bits]) for bits in sorted(counts, reverse=True) if counts[bits]), scaled)

    @property
    def channels(self) -> int:
        """Channels in all: the rank."""
        return sum(count for _, count in self.counts)

    @functools.cached_property
    def of_codes(self) -> int:
        """Bytes of the codes of one packed latent; every plane is filled up to whole bytes."""
        return sum(plane.size for _, _, planes in self.planes() for plane in planes)

    @property
    def bytes(self) -> int:
        """Bytes of one packed latent."""
        return self.of_codes + self.scaled

    @property
    def scale_at(self) -> int:
        """The byte of a latent's scale, behind its codes; -1 if it has none."""
        return self.of_codes if self.scaled else -1

    def planes(self) -> Iterator[tuple[int, int, list[Plane]]]:
        """Of each width its bits, its channels, and the planes that hold their codes, upper bits first."""
        start = 0
        for bits, count in self.counts:
            found, below = [], bits
            for part in PARTS[bits]:
                below -= part
                found.append(Plane(start, plane_bytes(count, part), part, below))
                start += found[-1].size
            yield bits, count, found

    def each(self) -> list[int]:
        """The bits of each channel."""
        return [bits for bits, count in self.counts for _ in range(count)]

    def split(self, x: Tensor, dim: int = -1) -> Iterator[tuple[int, Tensor]]:
        """Bits, and the channels of x along a dimension that have so many."""
        parts = x.split([count for _, count in self.counts], dim=dim)
        return zip((bits for bits, _ in self.counts), parts, strict=True)

    def to_dict(self) -> dict[str, int]:
        """Channels by bits, as JSON has it."""
        return {str(bits): count for bits, count in self.counts}

    def __str__(self) -> str:
        return ", ".join(f"{count} of {bits}" for bits, count in self.counts)


def plane_bytes(channels: int, bits: int) -> int:
    """Bytes that so many parts of codes fill, up to whole ones."""
    return -(-channels * bits // 8)


def pack(codes: Tensor, widths: Widths) -> Tensor:
    """Codes [..., R] in uint8 to bytes [..., widths.of_codes]: planes of bytes for each width, one behind the other.

    From its low bits up, byte `j` of a plane of `n` bytes holds the plane's channels `j`, `j + n`, `j + 2n` ... :
    unpacking is shifts of whole planes and needs no interleaving. Codes whose bits do not fill bytes evenly lie in a
    plane of their upper bits, and one of the rest behind it.
    """
    packed = []
    for (_, some), (_, _, planes) in zip(widths.split(codes), widths.planes(), strict=True):
        packed += [_pack_plane(some >> plane.below & 2**plane.bits - 1, plane.bits) for plane in planes]
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
    codes = []
    for _, count, planes in widths.planes():
        code = None
        for start, size, part, _ in planes:
            held = packed.narrow(-1, start, size)
            shares = [held >> part * i & 2**part - 1 for i in range(8 // part)]
            found = torch.cat(shares, dim=-1)[..., :count]
            code = found if code is None else code << part | found
        codes.append(code)
    return torch.cat(codes, dim=-1)
