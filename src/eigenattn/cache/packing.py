"""Codes of a few bits, packed in bytes, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Widths that a channel may have, widest first, and what codes of each are stored as, upper bits first: parts that fill
# bytes evenly. Another package adds a width here.
PARTS: dict[int, tuple[int, ...]] = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}


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

    @property
    def of_codes(self) -> int:
        """Bytes of the codes of one packed latent; every plane is filled up to whole bytes."""
        return sum(plane_bytes(count, part) for bits, count in self.counts for part in PARTS[bits])

    @property
    def bytes(self) -> int:
        """Bytes of one packed latent."""
        return self.of_codes + self.scaled

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
    for bits, plane in widths.split(codes):
        below = bits
        for part in PARTS[bits]:
            below -= part
            packed.append(_pack_plane(plane >> below & 2**part - 1, part))
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
    planes = [(count, part) for bits, count in widths.counts for part in PARTS[bits]]
    stored = iter(packed.split([plane_bytes(*plane) for plane in planes], dim=-1))
    codes = []
    for bits, count in widths.counts:
        code = None
        for part in PARTS[bits]:
            plane = next(stored)
            shares = [plane >> part * i & 2**part - 1 for i in range(8 // part)]
            found = torch.cat(shares, dim=-1)[..., :count]
            code = found if code is None else code << part | found
        codes.append(code)
    return torch.cat(codes, dim=-1)
