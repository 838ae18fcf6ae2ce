"""How the fused kernel reads a latent: in pieces of powers of two channels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ...cache.codebook import middle
from ...cache.packing import Plane, Widths


class Piece(NamedTuple):
    """Some channels of a latent as a kernel sees it.

    Args:
        start: the first.
        size: a power of two.
        held: how many there are; the rest of `size` is nothing.
        parts: of the codes of its channels: 1 or 2, or 0 for channels that are numbers.
    """

    start: int
    size: int
    held: int
    parts: int


@functools.cache
def cut(size: int) -> tuple[int, ...]:
    """Powers of two that hold `size` elements: as little room as possible, then as few as possible.

    They are at least 32, so that four warps share out the couples of a product, or 16 where one of them holds all.
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


def pieces(channels: int) -> tuple[Piece, ...]:
    """How a latent of so many channels is read."""
    return tuple(Piece(start, size, min(size, channels - start), 0) for start, size in _starts(cut(channels)))


def pieces_of(couples: Sequence[Couple]) -> tuple[Piece, ...]:
    """How a latent of packed couples is read: with as few channels as can be in pieces of two parts."""
    of_two = 2 * sum(couple.weight > 0 for couple in couples)
    sizes = cut(2 * len(couples))
    orders = (
        tuple(Piece(start, size, size, 1 + (start < of_two)) for start, size in _starts(order))
        for order in (sizes, sizes[::-1])
    )
    return min(orders, key=lambda plan: sum(piece.size * piece.parts for piece in plan))


def _starts(sizes: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    return zip(itertools.accumulate(sizes, initial=0), sizes, strict=False)


PART_BITS = 4  # at most, so that parts are the last bits of numbers in 16 bits


class Part(NamedTuple):
    """Where the codes of a couple, or parts of them, lie.

    Args:
        byte: that holds them.
        factor: that moves them to bits 8 and 24 of a word.
        mask: of both, in the halves of a word, from bit 0.
    """

    byte: int = 0
    factor: int = 0
    mask: int = 0


class Couple(NamedTuple):
    """Channels of a packed latent whose codes lie in the same bytes: two, or a last one that is alone.

    Args:
        channels: which.
        upper, lower: parts of their codes, of 4 bits at most; those that are in one part have no upper one.
        weight: of the upper part: codes are `weight upper + lower`.
        middle: what codes are counted from.
    """

    channels: tuple[int, ...]
    upper: Part
    lower: Part
    weight: int
    middle: int


@functools.cache
def couples_of(widths: Widths) -> tuple[Couple, ...]:
    """How a kernel reads packed latents of these widths: couples of two parts come first."""
    found: list[Couple] = []
    first = 0
    for width, count, planes in widths.planes():
        by_byte: dict[tuple[int, ...], list[int]] = {}
        for i in range(count):
            by_byte.setdefault(tuple(plane.at(i)[0] for plane in planes), []).append(i)
        for together in by_byte.values():
            for start in range(0, len(together), 2):
                some = together[start : start + 2]
                parts = [part for plane in planes for part in _parts(plane, some)]
                upper, lower = [Part()] * (2 - len(parts)) + parts
                weight = 2 ** min(planes[-1].bits, PART_BITS) if len(parts) > 1 else 0
                found.append(Couple(tuple(first + i for i in some), upper, lower, weight, middle(width)))
        first += count
    return tuple(sorted(found, key=lambda couple: couple.weight == 0))


def _parts(plane: Plane, channels: Sequence[int]) -> Iterator[Part]:
    """The parts of at most 4 bits in which a plane holds the codes of one byte's channels, upper bits first."""
    bits = min(plane.bits, PART_BITS)
    for offset in range(plane.bits - bits, -1, -bits):
        factor = mask = 0
        for half, channel in enumerate(channels):
            factor += 1 << 8 - plane.at(channel)[1] - offset + 16 * half
            mask += 2**bits - 1 << 16 * half
        yield Part(plane.at(channels[0])[0], factor, mask)
