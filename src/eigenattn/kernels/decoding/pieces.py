"""How the fused kernel reads a latent: in pieces of powers of two channels."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from ...cache.packing import Widths

# A piece of a latent as a kernel sees it: (first channel, size, channels, bits, place of the scale, number of the first
# among those of its width, then of each part of its codes, upper bits first, what `Plane` says). `size` is a power of
# two, what lies past the channels is not read, 16 bits are no codes, and the place of no scale is -1.
Piece = tuple[int, ...]


@functools.cache
def cut(size: int) -> tuple[int, ...]:
    """Powers of two that hold `size` elements: as little room as possible, then as few as possible.

    They are at least 32, so that four warps share out the columns of a product, or 16 where one of them holds all.
    """
    if size <= 16:
        return (16,)
    best: tuple[int, ...] = ()
    for exponent in range(5, max(size - 1, 31).bit_length() + 1):
        piece = 2**exponent
        rest = () if piece >= size else tuple(max(each, 32) for each in cut(size - piece))
        found = tuple(sorted((piece, *rest), reverse=True))
        if not best or (sum(found), len(found)) < (sum(best), len(best)):
            best = found
    return best


def pieces(channels: int, widths: Widths | None = None) -> tuple[Piece, ...]:
    """How a latent of so many channels, or with codes of these widths, is read."""
    if widths is None:
        return tuple((start, size, held, 16, -1, start) for start, size, held in _starts(channels))
    scale = widths.of_codes if widths.scaled else -1
    found: list[Piece] = []
    first = 0
    for width, count, planes in widths.planes():
        parts = [x for plane in planes for x in plane]
        found += [(first + start, size, held, width, scale, start, *parts) for start, size, held in _starts(count)]
        first += count
    return tuple(found)


def _starts(channels: int) -> Iterator[tuple[int, int, int]]:
    """Where pieces of so many channels start, their sizes, and the channels they hold."""
    start = 0
    for size in cut(channels):
        yield start, size, min(size, channels - start)
        start += size
