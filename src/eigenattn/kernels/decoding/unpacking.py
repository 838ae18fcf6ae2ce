"""Latents of a block of tokens, as `eigenattn.kernels.decoding.fused_kernels` loads and unpacks them.

A plan is a tuple of pieces of a latent (`eigenattn.kernels.decoding.pieces.Piece`). Loops over plans are unrolled.
"""

# Constants that a kernel computes with are `constexpr` in its signature, and numbers, tuples and loops in its body.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from ...cache import codebook

UNIT_SCALE, OCTAVE = tl.constexpr(codebook.UNIT_SCALE), tl.constexpr(codebook.OCTAVE)


def _ptx(kind: str, one: str, magic: str, parts: int) -> tl.constexpr:
    """What `_in_pairs` has computed: of codes, centres, a, b, c and d, and of two parts the upper ones and weights."""
    fma = f"fma.rn.{kind}x2"
    lines = [".reg .b32 u, t, one, magic", f"mov.b32 one, {one}", f"mov.b32 magic, {magic}", f"{fma} u, $1, one, $2"]
    if parts > 1:
        lines += [f"{fma} t, $7, one, magic", f"{fma} u, t, $8, u"]
    lines += [f"{fma} t, u, $6, $5", f"{fma} t, u, t, $4", f"{fma} $0, u, t, $3"]
    return tl.constexpr("{ " + "; ".join(lines) + "; }")


# Integers of few bits are the last ones of a number of the right exponent: 128 in bf16, 1,024 in fp16.
BF16_ONE, BF16_TWO = (_ptx("bf16", "0x3F803F80", "0xC300C300", parts) for parts in (1, 2))
FP16_ONE, FP16_TWO = (_ptx("f16", "0x3C003C00", "0xE400E400", parts) for parts in (1, 2))


@triton.jit
def rows(pointer, base, places, there, STRIDE: tl.constexpr, PLAN: tl.constexpr):
    """Where the latents of a block's tokens begin [BLOCK]: of packed ones at `base` and behind, of others `there`."""
    if PLAN[0][3]:
        return pointer + base.to(tl.int64) * STRIDE, places.to(tl.int64) * STRIDE
    else:
        return pointer, there * STRIDE


@triton.jit
def _number(numbers, row: tl.constexpr, at, COUPLES: tl.constexpr, dtype: tl.constexpr, PACKED: tl.constexpr):
    """A number of both channels of couples: in the halves of words [1, couples], or in two tensors [1, couples].

    In words there is, instead of middles, what is added to codes that have become numbers.
    """
    first = tl.load(numbers + row * COUPLES + at)[None, :]
    second = tl.load(numbers + (6 + row) * COUPLES + at)[None, :]
    if PACKED:
        if row == 0:
            MAGIC: tl.constexpr = 128 if dtype == tl.bfloat16 else 1024
            first, second = -(first + MAGIC), -(second + MAGIC)
        first = first.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return first | second.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        return first, second


@triton.jit
def couples(codes, numbers, PLAN: tl.constexpr, CHANNELS: tl.constexpr, dtype: tl.constexpr, PACKED: tl.constexpr):
    """What each piece of a packed latent needs to know of its couples (`Folded.codes`, `Folded.numbers`)."""
    COUPLES: tl.constexpr = CHANNELS // 2
    found = ()
    if codes is not None:
        for i in tl.static_range(len(PLAN)):
            at = PLAN[i][0] // 2 + tl.arange(0, PLAN[i][1] // 2)
            facts = ()
            for row in tl.static_range(6 - 3 * PLAN[i][3], 6):
                facts += (tl.load(codes + row * COUPLES + at)[None, :],)
            for row in tl.static_range(6):
                facts += (_number(numbers, row, at, COUPLES, dtype, PACKED),)
            found += (facts,)
    return found


@triton.jit
def _codes(tokens, couples, part: tl.constexpr):
    """A part of the codes of couples, in the halves of words [BLOCK, couples]."""
    # Neighbours in a warp shall load from one token: the compiler does so where it takes bytes for contiguous, and as
    # it knows nothing of their alignment, it still loads single ones.
    places = tl.max_contiguous((tokens[0] + couples[3 * part]) + tokens[1][:, None], [1, 4])
    return (tl.load(places).to(tl.int32) * couples[3 * part + 1] >> 8) & couples[3 * part + 2]


@triton.jit
def _of_half(codes, couples, half: tl.constexpr, PARTS: tl.constexpr):
    """What the codes of one half of words stand for, in fp32."""
    A: tl.constexpr = 3 * PARTS
    u = (codes[PARTS - 1] >> 16 * half & 0xFFFF).to(tl.float32) - couples[A][half]
    if PARTS > 1:
        u += (codes[0] >> 16 * half & 0xFFFF).to(tl.float32) * couples[A + 1][half]
    return couples[A + 2][half] + u * (couples[A + 3][half] + u * (couples[A + 4][half] + u * couples[A + 5][half]))


@triton.jit
def _in_pairs(codes, couples, PARTS: tl.constexpr, dtype: tl.constexpr):
    """`_of_half` of both, at once and in this dtype of 16 bits."""
    A: tl.constexpr = 3 * PARTS
    BF16: tl.constexpr = dtype == tl.bfloat16
    MAGIC: tl.constexpr = 0x43004300 if BF16 else 0x64006400
    lower, centre = codes[PARTS - 1] | MAGIC, couples[A]
    a, b, c, d = couples[A + 2], couples[A + 3], couples[A + 4], couples[A + 5]
    ONE: tl.constexpr = BF16_ONE if BF16 else FP16_ONE
    TWO: tl.constexpr = BF16_TWO if BF16 else FP16_TWO
    # Not pure: else the compiler would do all this in another layout, where a thread has many couples and no registers.
    if PARTS > 1:
        upper, weight = codes[0] | MAGIC, couples[A + 1]
        words = tl.inline_asm_elementwise(
            TWO, "=r" + ",r" * 8, [lower, centre, a, b, c, d, upper, weight], tl.int32, False, 1
        )
    else:
        words = tl.inline_asm_elementwise(ONE, "=r" + ",r" * 6, [lower, centre, a, b, c, d], tl.int32, False, 1)
    first = (words & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    return first, (words >> 16).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def piece(tokens, couples, PLAN: tl.constexpr, i: tl.constexpr, dtype: tl.constexpr, PACKED: tl.constexpr):
    """One piece of latents [BLOCK, size], or what a decoder that is folded takes of codes (`Folded`)."""
    PARTS: tl.constexpr = PLAN[i][3]
    if PARTS == 0:
        places = tl.arange(0, PLAN[i][1])
        known = (places < PLAN[i][2])[None, :]
        found = tl.load((tokens[0] + tokens[1])[:, None] + (PLAN[i][0] + places)[None, :], mask=known, other=0.0)
    else:
        codes = (_codes(tokens, couples[i], 0),)
        if PARTS > 1:
            codes += (_codes(tokens, couples[i], 1),)
        if PACKED:
            first, second = _in_pairs(codes, couples[i], PARTS, dtype)
        else:
            first, second = _of_half(codes, couples[i], 0, PARTS), _of_half(codes, couples[i], 1, PARTS)
        found = tl.reshape(tl.join(first, second), [first.shape[0], PLAN[i][1]])
    return found.to(dtype)


@triton.jit
def scales(tokens, place: tl.constexpr):
    """What tokens' bytes of scales [BLOCK] stand for."""
    return tl.exp2((tl.load(tokens[0] + tokens[1] + place).to(tl.float32) - UNIT_SCALE) / OCTAVE)
