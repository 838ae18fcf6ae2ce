"""Decoding as one Triton kernel over splits of the sequence, and one that combines them.

A program takes one row's KV head, all its query heads, and one stretch of the sequence; the last program of each KV
head takes the exact window. For a block of tokens it loads latents once; with rotary positions it decodes keys, rotates
them and scores them in registers; values are summed as latents, and decoded once by the second kernel. The layout:

- `R_(n0 + i) = R_n0 R_i`: a table of `R_i`, the same for every block, turns keys. The query is turned back by `n0`,
  once a program from cosines, then from block to block by `R_BLOCK`, some dozens of roundings in fp32. The cosines of a
  key's own position would be D numbers to read or to compute, more than its latent holds.
- Scores are `[BLOCK, heads]` and sums of values `[R_v, heads]`: decoded keys, and latents transposed, are the first
  operand of their products, which tensor cores take from registers, and heads the second, padded to 16.
- Ranks are cut in pieces of powers of two (80 = 64 + 16), at least 16, for tensor cores want no less.
- Packed codes enter the products as small integers; `Side.folded` has the quantiser in decoder and mean.
- Strides are passed in units of the widest vector they allow: the compiler cannot see by itself that 72 is a multiple
  of 8.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
from torch import Tensor

from ...cache.packing import BITS, Widths
from .arguments import Problem
from .fused_kernels import combine, decode_splits

INTERPRETED = triton.knobs.runtime.interpret
LARGEST_BLOCK = 16 if INTERPRETED else 128

# A piece of a latent as a kernel sees it: (first stored element, first channel, size, stored elements, channels, bits,
# shift). `size` is a power of two, what lies past the stored elements is not read, and 16 bits are no codes.
Piece = tuple[int, int, int, int, int, int, int]


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
        start = 0
        for size in cut(channels):
            used = min(size, channels - start)
            found.append((start, start, size, used, used, 16, 0))
            start += used
        return tuple(found)
    stored = channel = 0
    for bits, count in zip(BITS, widths, strict=True):
        plane = -(-count * bits // 8)
        for share in range(8 // bits):
            held, start = min(plane, count - share * plane), 0
            for size in cut(plane) if held > 0 else ():
                used = min(size, plane - start)
                if held > start:
                    known = min(used, held - start)
                    found.append((stored + start, channel + start, size, used, known, bits, bits * share))
                start += used
            channel += max(held, 0)
        stored += plane
    return tuple(found)


def _configurations() -> list[triton.Config]:
    """What is tried, once for each shape; the interpreter has nothing to choose."""
    if INTERPRETED:
        return [triton.Config({"BLOCK": LARGEST_BLOCK})]
    return [
        triton.Config({"BLOCK": block}, num_warps=warps, num_stages=stages)
        for block, warps, stages in (
            (32, 4, 3),
            (64, 4, 2),
            (64, 4, 3),
            (64, 8, 3),
            (128, 4, 2),
            (128, 8, 2),
            (128, 8, 3),
        )
    ]


SHAPE = ["H", "G", "D", "KEY_PLAN", "VALUE_PLAN", "PAIRS", "INTERLEAVED", "bucket"]
_tuned = triton.autotune(_configurations(), key=SHAPE, cache_results=not INTERPRETED)(decode_splits)


def _layout(x: Tensor) -> tuple[int, int, int, int]:
    """Strides of rows and of KV heads in units of the widest vector they allow, that vector, and the tokens' stride."""
    row, head, token, element = x.stride()
    assert element == 1
    widest = max(16 // x.element_size(), 1)
    vector = math.gcd(row, head, token, widest)
    return row // vector, head // vector, vector, token


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def split_sequence(tokens: int, programs: int, processors: int) -> tuple[int, int]:
    """How many splits, and tokens in each: a multiple of the largest block, some four programs a processor."""
    blocks = max(-(-tokens // LARGEST_BLOCK), 1)
    wanted = max(4 * processors // max(programs, 1), 1)
    each = max(-(-blocks // wanted), 1)
    return -(-blocks // each), each * LARGEST_BLOCK


def decode(problem: Problem) -> Tensor:
    """See `eigenattn.kernels.decoding.decode`."""
    q = problem.q.contiguous()
    b, h, d = q.shape
    g, far = problem.kv_heads, problem.far_keys.shape[2]
    rotary, near = problem.rotary, problem.near
    key_decoder, key_mean = problem.keys.folded
    value_decoder, value_mean = problem.values.folded
    rank_v = problem.far_values.shape[-1] if problem.values.widths is None else problem.values.widths.channels
    q_small, offset = q, None
    if rotary is None:
        grouped = q.view(b, g, h // g, d)
        if key_decoder is not None:
            q_small = (grouped @ key_decoder.transpose(-1, -2)).flatten(1, 2)
        if key_mean is not None:
            offset = (grouped.float() @ key_mean.float().unsqueeze(-1)).flatten(1)
    far_keys, far_values = _rows(problem.far_keys), _rows(problem.far_values)
    splits, split_tokens = split_sequence(far, b * g, _processors(q.device))
    partial = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    far_sums, near_sums = partial(b, h, splits, rank_v), partial(b, h, d if near else 0)
    tops, masses = partial(b, h, splits + 1), partial(b, h, splits + 1)
    cosines, sines = (None, None) if rotary is None else rotary.table(LARGEST_BLOCK + 1)
    near_keys, near_values = (None, None) if near is None else (_rows(near.keys), _rows(near.values))
    layouts = [(0, 0, 1, 0) if x is None else _layout(x) for x in (far_keys, far_values, near_keys, near_values)]
    rank_k = q_small.shape[-1] if rotary is None else (d if key_decoder is None else key_decoder.shape[1])
    _tuned[(b * g, splits + (near is not None))](
        q,
        q_small,
        offset,
        problem.slopes,
        far_keys,
        far_values,
        None if key_decoder is None else key_decoder.contiguous(),
        None if key_mean is None else key_mean.contiguous(),
        near_keys,
        near_values,
        *_integers(problem.first, problem.length, problem.position),
        *((None, None) if near is None else _integers(near.column, near.stop)),
        None if rotary is None else rotary.inverse_frequencies.float().contiguous(),
        cosines,
        sines,
        far_sums,
        near_sums,
        tops,
        masses,
        problem.scale,
        1.0 if rotary is None else rotary.scaling,
        splits,
        split_tokens,
        0 if near is None else near.keys.shape[2],
        max(far - 1, 0).bit_length(),
        *(stride for layout in layouts for stride in layout[:2]),
        *(layout[2] for layout in layouts),
        *(layout[3] for layout in layouts),
        H=h,
        G=g,
        M=max(triton.next_power_of_2(h // g), 16),
        D=d,
        SIZE_Q=q_small.shape[-1],
        RANK=rank_k,
        RANK_V=rank_v,
        KEY_PLAN=pieces(rank_k, problem.keys.widths),
        VALUE_PLAN=pieces(rank_v, problem.values.widths),
        NEAR_PLAN=pieces(d),
        PAIRS=0 if rotary is None else rotary.width // 2,
        INTERLEAVED=rotary is not None and rotary.interleaved,
        UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
    )
    out = torch.empty(b, h, problem.size_out, dtype=q.dtype, device=q.device)
    combine[(b * h,)](
        far_sums,
        near_sums,
        tops,
        masses,
        None if value_decoder is None else value_decoder.contiguous(),
        None if value_mean is None else value_mean.contiguous(),
        out,
        splits,
        H=h,
        GROUP=h // g,
        RANK=rank_v,
        SIZE_OUT=problem.size_out,
        SPLITS=triton.next_power_of_2(splits),
        PARTS=16,
        OUT=triton.next_power_of_2(problem.size_out),
        NEAR=near is not None,
    )
    return out


def _rows(x: Tensor) -> Tensor:
    """The tensor itself if a token's elements lie together, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _integers(*numbers: Tensor) -> list[Tensor]:
    return [x.to(torch.int32).contiguous() for x in numbers]
