"""How the fused kernel reads a latent: in pieces of powers of two channels."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from ...cache.packing import Widths

# A piece of a latent as a kernel sees it: (first channel, size, channels, bits, place of the scale, then of each part
# of a code, upper bits first: first stored element, shift, bits). `size` is a power of two, what lies past the channels
# is not read, 16 bits are no codes, and the place of no scale is -1.
Piece = tuple[int, ...]


@functools.cache
def cut(size: int) -> tuple[int, ...]:
    """Powers of two of at least 16 that hold `size` elements: as little room as possible, then as few as possible."""
    best: tuple[int, ...] = ()
    for exponent in range(4, max(size - 1, 15).bit_length() + 1):
        piece = 2**exponent
        found = (piece,) if piece >= size else tuple(sorted((piece, *cut(size - piece)), reverse=True))
        if not best or (sum(found), len(found)) < (sum(best), len(best)):
            best = found
    return best


def pieces(channels: int, widths: Widths | None = None) -> tuple[Piece, ...]:
    """How a latent of so many channels, or with codes of these widths, is read."""
    found: list[Piece] = []
    if widths is None:
        return tuple(
            (start, size, min(size, channels - start), 16, -1, start, 0, 16) for start, size in _starts(0, channels)
        )
    channel = 0
    scale = widths.of_codes if widths.scaled else -1
    for width, count, planes in widths.planes():
        # Each part's plane holds a share of the channels at each shift: pieces end where a share of any part does.
        ends = {min(plane.size * (i + 1), count) for plane in planes for i in range(8 // plane.bits)}
        begin = 0
        for end in sorted(ends - {0}):
            for start, size in _starts(begin, end):
                where = [x for plane in planes for x in (*plane.at(start), plane.bits)]
                found.append((channel + start, size, min(size, end - start), width, scale, *where))
            begin = end
        channel += count
    return tuple(found)


def _starts(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Where pieces of these channels start, and their sizes."""
    for size in cut(end - begin):
        yield begin, size
        begin += size
