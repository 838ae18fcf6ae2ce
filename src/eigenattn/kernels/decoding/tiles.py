"""Tiles of queries, keys and latents as `eigenattn.kernels.decoding.fused_kernels` loads and turns them.

A plan is a tuple of pieces of a latent (`eigenattn.kernels.decoding.pieces.Piece`). Loops over plans are unrolled.
"""

# Constants that a kernel computes with are `constexpr` in its signature, and numbers, tuples and loops in its body.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math

import triton
import triton.language as tl

from ...cache import codebook

INVERSE_TURN = tl.constexpr(1 / math.tau)
# tau = 201 / 32 + 126 / 2^16 + the rest
TURN_HIGH, TURN_MIDDLE = tl.constexpr(201 / 32), tl.constexpr(126 / 2**16)
TURN_LOW = tl.constexpr(math.tau - 201 / 32 - 126 / 2**16)
UNIT_SCALE, OCTAVE = tl.constexpr(codebook.UNIT_SCALE), tl.constexpr(codebook.OCTAVE)


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
def _part(tokens, PLAN: tl.constexpr, i: tl.constexpr, part: tl.constexpr):
    """One part of the codes of a piece [BLOCK, size], where it belongs in them."""
    START: tl.constexpr = PLAN[i][6 + 4 * part]
    SIZE: tl.constexpr = PLAN[i][7 + 4 * part]
    BITS: tl.constexpr = PLAN[i][8 + 4 * part]
    channels = PLAN[i][5] + tl.minimum(tl.arange(0, PLAN[i][1]), PLAN[i][2] - 1)
    # Neighbours in a warp shall load from one token: the compiler does so where it takes bytes for contiguous, and as
    # it knows nothing of their alignment, it still loads single ones.
    places = tl.max_contiguous(START + channels % SIZE, 2)
    found = tl.load(tokens[:, None] + places[None, :])
    return ((found.to(tl.int32) >> (channels // SIZE * BITS)[None, :]) & (2**BITS - 1)) << PLAN[i][9 + 4 * part]


@triton.jit
def piece(tokens, shape, PLAN: tl.constexpr, i: tl.constexpr, RANK: tl.constexpr, dtype: tl.constexpr):
    """One piece of latents [BLOCK, size], or what a decoder that is folded takes of codes (`Side.fold`)."""
    places = tl.arange(0, PLAN[i][1])
    known = places < PLAN[i][2]
    if PLAN[i][3] == 16:
        found = tl.load(tokens[:, None] + (PLAN[i][0] + places)[None, :], mask=known[None, :], other=0.0)
    else:
        code = _part(tokens, PLAN, i, 0)
        if len(PLAN[i]) > 10:
            code |= _part(tokens, PLAN, i, 1)
        u = (code - 2 ** (PLAN[i][3] - 1)).to(tl.float32)
        of_piece = shape + PLAN[i][0] + places
        a = tl.load(of_piece, mask=known, other=0.0)[None, :]
        b = tl.load(of_piece + RANK, mask=known, other=0.0)[None, :]
        c = tl.load(of_piece + 2 * RANK, mask=known, other=0.0)[None, :]
        d = tl.load(of_piece + 3 * RANK, mask=known, other=0.0)[None, :]
        found = a + u * (b + u * (c + u * d))
    return found.to(dtype)


@triton.jit
def scales(tokens, PLAN: tl.constexpr):
    """The scales of tokens [BLOCK], of a plan that has them."""
    found = tl.load(tokens + PLAN[0][4]).to(tl.float32)
    return tl.exp2((found - UNIT_SCALE) / OCTAVE)


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
def keys(
    latents, tokens, scales, decoder, mean, dims, known,
    PLAN: tl.constexpr, D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Some dimensions of keys [BLOCK, len(dims)] in fp32: decoded, or loaded where there is no decoder."""
    if decoder is None:
        x = tl.load(tokens[:, None] + dims[None, :], mask=known[None, :], other=0.0).to(tl.float32)
    else:
        x = tl.zeros([tokens.shape[0], dims.shape[0]], tl.float32)
        for i in tl.static_range(len(PLAN)):
            channels = tl.arange(0, PLAN[i][1])
            u = tl.load(
                decoder + (PLAN[i][0] + channels)[:, None] * D + dims[None, :],
                mask=(channels < PLAN[i][2])[:, None] & known[None, :],
                other=0.0,
            )
            x = dot(latents[i], u, x, UPCAST)
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
