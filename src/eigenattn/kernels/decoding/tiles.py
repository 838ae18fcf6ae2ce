"""Tiles of queries and keys as `eigenattn.kernels.decoding.fused_kernels` loads and turns them.

A plan is a tuple of pieces of a latent (`eigenattn.kernels.decoding.pieces.Piece`). Loops over plans are unrolled.
"""

# Constants that a kernel computes with are `constexpr` in its signature, and numbers, tuples and loops in its body.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math

import triton
import triton.language as tl

INVERSE_TURN = tl.constexpr(1 / math.tau)
# tau = 201 / 32 + 126 / 2^16 + the rest
TURN_HIGH, TURN_MIDDLE = tl.constexpr(201 / 32), tl.constexpr(126 / 2**16)
TURN_LOW = tl.constexpr(math.tau - 201 / 32 - 126 / 2**16)


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    """`a @ b + acc`, with sums in fp32."""
    if UPCAST:  # the interpreter multiplies the bits of bf16 as if they were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def angle(angle):
    """Cosine and sine of radians, without the slow ways and the memory of those of libraries: to some 2e-7."""
    turns = tl.floor(angle * INVERSE_TURN + 0.5)
    # What is left of whole turns, of which the first part is exact in a product.
    half = (((angle - turns * TURN_HIGH) - turns * TURN_MIDDLE) - turns * TURN_LOW) * 0.5
    square = half * half
    sin = 1 / 362880 - square * (1 / 39916800)
    sin = half * (1 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * sin))))
    cos = -1 / 3628800 + square * (1 / 479001600)
    cos = 1 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320 + square * cos))))
    return 1 - 2 * sin * sin, 2 * sin * cos


@triton.jit
def here(pointer, n0):
    """The same pointer, as far as the compiler knows another in every block of tokens: it reads anew what is there."""
    return pointer + (n0 >> 30)


@triton.jit
def pairs(start: tl.constexpr, SIZE: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Some pairs of dimensions that positions turn: which, whether they are, and both dimensions of each."""
    pairs = start + tl.arange(0, SIZE)
    first = pairs * 2 if INTERLEAVED else pairs
    second = pairs * 2 + 1 if INTERLEAVED else pairs + PAIRS
    return pairs, pairs < PAIRS, first, second


@triton.jit
def decoders(decoder, dims, known, PLAN: tl.constexpr, D: tl.constexpr):
    """What some dimensions of keys [len(dims)] are decoded with, in pieces [size, len(dims)]."""
    found = ()
    for i in tl.static_range(len(PLAN)):
        channels = tl.arange(0, PLAN[i][1])
        found += (
            tl.load(
                decoder + (PLAN[i][0] + channels)[:, None] * D + dims[None, :],
                mask=(channels < PLAN[i][2])[:, None] & known[None, :],
                other=0.0,
            ),
        )
    return found


@triton.jit
def keys(latents, tokens, scales, decoders, mean, dims, known, UPCAST: tl.constexpr):
    """Some dimensions of keys [BLOCK, len(dims)] in fp32: decoded, or loaded where there is no decoder."""
    if len(latents) == 0:
        x = tl.load((tokens[0] + tokens[1])[:, None] + dims[None, :], mask=known[None, :], other=0.0).to(tl.float32)
    else:
        x = tl.zeros([tokens[1].shape[0], dims.shape[0]], tl.float32)
        for i in tl.static_range(len(latents)):
            x = dot(latents[i], decoders[i], x, UPCAST)
    if scales is not None:
        x *= scales[:, None]
    if mean is not None:
        x += tl.load(mean + dims, mask=known, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def turn(a, b, cos, sin):
    """Pairs of dimensions, turned."""
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def repeated(x, M: tl.constexpr):
    """Rows of x [rows, n], as often one behind the other as makes M."""
    ROWS: tl.constexpr = x.shape[0]
    SIZE: tl.constexpr = x.shape[1]
    return tl.reshape(tl.broadcast_to(x[:, None, :], [ROWS, M // ROWS, SIZE]), [M, SIZE])


@triton.jit
def queries(q, heads, of_group, PLAN: tl.constexpr, SIZE: tl.constexpr):
    """Queries of a group, in pieces [heads, size]."""
    found = ()
    for i in tl.static_range(len(PLAN)):
        channels = tl.arange(0, PLAN[i][1])
        found += (
            tl.load(
                q + heads[:, None] * SIZE + (PLAN[i][0] + channels)[None, :],
                mask=of_group[:, None] & (channels < PLAN[i][2])[None, :],
                other=0.0,
            ),
        )
    return found


@triton.jit
def dimensions(q, heads, of_group, dims, known, D: tl.constexpr):
    """Some dimensions of the queries of a group [heads, len(dims)], in fp32."""
    mask = of_group[:, None] & known[None, :]
    return tl.load(q + heads[:, None] * D + dims[None, :], mask=mask, other=0.0).to(tl.float32)
