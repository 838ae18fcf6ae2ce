"""How the fused kernel's programs are shaped, and how a sequence is split over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .pieces import Piece

LARGEST_BLOCK = 64  # of keys that are turned
SHORTEST_SPLIT = 128  # tokens
MOST_SPLITS = 128  # combined in one tile
LARGEST_DECODER = 2**16  # bytes that stay in shared memory from block to block
RESERVED = 2**13  # bytes of shared memory for what is small


class Programs(NamedTuple):
    """What shape programs have.

    Args:
        block: tokens a block.
        warps, stages: how many, and how many blocks are loaded at a time.
        together: how many a processor runs at a time.
        registers: that a thread may have, where fewer than it would take are faster.
    """

    block: int
    warps: int
    stages: int
    together: int
    registers: int | None = None


def programs_for(
    rotates: bool, key_plan: Sequence[Piece], value_plan: Sequence[Piece], d: int, element_size: int, memory: float
) -> tuple[Programs, bool]:
    """The fastest programs that fit, and whether the decoder of keys stays in shared memory.

    Args:
        rotates: whether keys are decoded, by a decoder of so many ranks and D dimensions.
        memory: bytes of shared memory that a program may have.
    """
    coded = key_plan[0].parts > 0
    rank_k, rank_v = (sum(piece.size for piece in plan) for plan in (key_plan, value_plan))
    kept = element_size == 2 and rank_k * d * element_size <= LARGEST_DECODER
    # Of a decoder that does not stay there are 32 dimensions at a time, or all, which depends on how products are made.
    of_decoder = rank_k * element_size * (d if kept or element_size > 2 else 32) if rotates else 0
    if coded:
        # With few registers more programs wait for memory at a time; keys that are turned need them all.
        best = Programs(64, 4, 2, 2) if rotates else Programs(64, 4, 2, 4, 128)
    else:
        best = Programs(64, 4, 3, 2) if rotates else Programs(32, 4, 3, 4)
    for found in (best, best._replace(block=32, stages=2), best._replace(block=16, stages=2)):
        waiting = found.stages - 1
        far = found.block * element_size * (found.stages * rank_k + waiting * rank_v)
        near = found.block * element_size * 2 * waiting * d
        if max(far + of_decoder * (1 if kept else waiting), near) + RESERVED <= memory:
            break
    return found, kept


def split_sequence(tokens: int, heads: int, together: int, shortest: int = SHORTEST_SPLIT) -> int:
    """How many splits a row's head has: as many as run together, none shorter than `shortest`, and not too many."""
    most = max(-(-tokens // shortest), 1)
    return min(most, max(together // max(heads, 1), 1), MOST_SPLITS)
