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
import triton.language as tl
from torch import Tensor

from ...cache.packing import BITS, Widths
from .arguments import Problem

INTERPRETED = triton.knobs.runtime.interpret
LOG2_E = tl.constexpr(math.log2(math.e))
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


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter multiplies the bits of bf16 as if they were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _piece(tokens, seen, PLAN: tl.constexpr, i: tl.constexpr, dtype: tl.constexpr):
    """One piece of latents [BLOCK, size], codes counted from the middle of their range."""
    places = tl.arange(0, PLAN[i][2])
    found = tl.load(
        tokens[:, None] + PLAN[i][0] + places[None, :], mask=seen[:, None] & (places < PLAN[i][3])[None, :], other=0
    )
    if PLAN[i][5] < 16:
        found = ((found.to(tl.int32) >> PLAN[i][6]) & (2 ** PLAN[i][5] - 1)) - 2 ** (PLAN[i][5] - 1)
    return found.to(dtype)


@triton.jit
def _decoded(
    tokens, seen, decoder, mean, dims, known, PLAN: tl.constexpr, D: tl.constexpr, UPCAST: tl.constexpr, dtype
):
    """Some dimensions of keys [BLOCK, len(dims)] in fp32: decoded, or loaded where there is no decoder."""
    if decoder is None:
        x = tl.load(tokens[:, None] + dims[None, :], mask=seen[:, None] & known[None, :], other=0.0).to(tl.float32)
    else:
        x = tl.zeros([tokens.shape[0], dims.shape[0]], tl.float32)
        for i in tl.static_range(len(PLAN)):
            z = _piece(tokens, seen, PLAN, i, dtype)
            channels = tl.arange(0, PLAN[i][2])
            u = tl.load(
                decoder + (PLAN[i][1] + channels)[:, None] * D + dims[None, :],
                mask=(channels < PLAN[i][4])[:, None] & known[None, :],
                other=0.0,
            )
            x = _dot(z, u, x, UPCAST)
    if mean is not None:
        x += tl.load(mean + dims, mask=known, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def _scores_in_small_space(tokens, seen, q, PLAN: tl.constexpr, UPCAST: tl.constexpr):
    """`q . z` [BLOCK, heads] from queries in pieces [size, heads]."""
    scores = tl.zeros([tokens.shape[0], q[0].shape[1]], tl.float32)
    for i in tl.static_range(len(PLAN)):
        scores = _dot(_piece(tokens, seen, PLAN, i, q[0].dtype), q[i], scores, UPCAST)
    return scores


@triton.jit
def _queries(q, heads, of_group, PLAN: tl.constexpr, SIZE: tl.constexpr):
    """Queries of a group, transposed, in pieces [size, heads]."""
    found = ()
    for i in tl.static_range(len(PLAN)):
        channels = tl.arange(0, PLAN[i][2])
        found += (
            tl.load(
                q + heads[None, :] * SIZE + (PLAN[i][1] + channels)[:, None],
                mask=of_group[None, :] & (channels < PLAN[i][4])[:, None],
                other=0.0,
            ),
        )
    return found


@triton.jit
def _dimensions(q, heads, of_group, dims, known, D: tl.constexpr):
    """Some dimensions of the queries of a group, transposed [len(dims), heads], in fp32."""
    mask = of_group[None, :] & known[:, None]
    return tl.load(q + heads[None, :] * D + dims[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _attend(
    q, q_small, offset, slope, keys, values, decoder, mean, inverse, cosines, sines,
    low, high, position, distance, scale, scaling, heads, of_group, sums_out, sums_stride, top_out, mass_out,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, KEY_PLAN: tl.constexpr, VALUE_PLAN: tl.constexpr,
    D: tl.constexpr, SIZE_Q: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Attention over tokens low .. high - 1 of one list: writes sums of values, top score and mass by head.

    Token n stands at position n + `position`, and n + `distance` from where ALiBi counts.
    """
    dtype: tl.constexpr = q.dtype.element_ty
    M: tl.constexpr = heads.shape[0]
    start = low // BLOCK * BLOCK
    high = tl.where(low < high, high, start)  # a block has a token that is seen, or there is no block
    if PAIRS:
        SIZE: tl.constexpr = triton.next_power_of_2(PAIRS) if PAIRS > 16 else 16
        pairs = tl.arange(0, SIZE)
        paired = pairs < PAIRS
        first = pairs * 2 if INTERLEAVED else pairs
        second = pairs * 2 + 1 if INTERLEAVED else pairs + PAIRS
        frequency = tl.load(inverse + pairs, mask=paired, other=0.0)
        angle = (start + position).to(tl.float32) * frequency
        cos, sin = tl.cos(angle)[:, None] * scaling, tl.sin(angle)[:, None] * scaling
        q_a = _dimensions(q, heads, of_group, first, paired, D)
        q_b = _dimensions(q, heads, of_group, second, paired, D)
        q_first, q_second = q_a * cos + q_b * sin, q_b * cos - q_a * sin
        step_cos = tl.load(cosines + BLOCK * PAIRS + pairs, mask=paired, other=0.0)[:, None]
        step_sin = tl.load(sines + BLOCK * PAIRS + pairs, mask=paired, other=0.0)[:, None]
        table = tl.arange(0, BLOCK)[:, None] * PAIRS + pairs[None, :]
        REST: tl.constexpr = D - 2 * PAIRS
        if REST:
            REST_SIZE: tl.constexpr = triton.next_power_of_2(REST) if REST > 16 else 16
            rest = 2 * PAIRS + tl.arange(0, REST_SIZE)
            q_rest = _dimensions(q, heads, of_group, rest, rest < D, D).to(dtype)
    else:
        pieces = _queries(q_small, heads, of_group, KEY_PLAN, SIZE_Q)
    top = tl.full([M], float("-inf"), tl.float32)
    mass = tl.zeros([M], tl.float32)
    sums = ()
    for i in tl.static_range(len(VALUE_PLAN)):
        sums += (tl.full([VALUE_PLAN[i][2], M], 0.0, tl.float32),)
    for n0 in range(start, high, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        seen = (n >= low) & (n < high)
        tokens = keys + n.to(tl.int64) * KEY_STRIDE
        if PAIRS:
            turned = tl.load(cosines + table, mask=paired[None, :], other=0.0)
            sideways = tl.load(sines + table, mask=paired[None, :], other=0.0)
            a = _decoded(tokens, seen, decoder, mean, first, paired, KEY_PLAN, D, UPCAST, dtype)
            b = _decoded(tokens, seen, decoder, mean, second, paired, KEY_PLAN, D, UPCAST, dtype)
            scores = tl.zeros([BLOCK, M], tl.float32)
            scores = _dot((a * turned - b * sideways).to(dtype), q_first.to(dtype), scores, UPCAST)
            scores = _dot((b * turned + a * sideways).to(dtype), q_second.to(dtype), scores, UPCAST)
            if REST:
                a = _decoded(tokens, seen, decoder, mean, rest, rest < D, KEY_PLAN, D, UPCAST, dtype)
                scores = _dot(a.to(dtype), q_rest, scores, UPCAST)
            ahead = q_first * step_cos + q_second * step_sin
            q_second = q_second * step_cos - q_first * step_sin
            q_first = ahead
        else:
            scores = _scores_in_small_space(tokens, seen, pieces, KEY_PLAN, UPCAST)
        if offset is not None:
            scores += offset[None, :]
        scores *= scale * LOG2_E
        if slope is not None:
            scores += (n + distance).to(tl.float32)[:, None] * (slope * LOG2_E)[None, :]
        scores = tl.where(seen[:, None], scores, float("-inf"))
        risen = tl.maximum(top, tl.max(scores, 0))  # finite, for a token is seen
        weights = tl.exp2(scores - risen[None, :])
        fade = tl.exp2(top - risen)
        mass = mass * fade + tl.sum(weights, 0)
        top = risen
        tokens = values + n.to(tl.int64) * VALUE_STRIDE
        grown = ()
        for i in tl.static_range(len(VALUE_PLAN)):
            z = _piece(tokens, seen, VALUE_PLAN, i, dtype)
            grown += (_dot(tl.trans(z), weights.to(dtype), sums[i] * fade[None, :], UPCAST),)
        sums = grown
    for i in tl.static_range(len(VALUE_PLAN)):
        channels = tl.arange(0, VALUE_PLAN[i][2])
        written = of_group[None, :] & (channels < VALUE_PLAN[i][4])[:, None]
        tl.store(
            sums_out + heads[None, :] * sums_stride + (VALUE_PLAN[i][1] + channels)[:, None], sums[i], mask=written
        )
    tl.store(top_out, top, mask=of_group)
    tl.store(mass_out, mass, mask=of_group)


@triton.jit
def _decode_splits(
    q, q_small, offset, slopes, far_keys, far_values, decoder, mean, near_keys, near_values,
    firsts, lengths, positions, near_columns, near_stops, inverse, cosines, sines,
    far_sums, near_sums, tops, masses,
    scale, scaling, splits, split_tokens, near_tokens, bucket,
    fk_b, fk_g, fv_b, fv_g, nk_b, nk_g, nv_b, nv_g,
    FK_VEC: tl.constexpr, FV_VEC: tl.constexpr, NK_VEC: tl.constexpr, NV_VEC: tl.constexpr,
    FK_STRIDE: tl.constexpr, FV_STRIDE: tl.constexpr, NK_STRIDE: tl.constexpr, NV_STRIDE: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, M: tl.constexpr, D: tl.constexpr, SIZE_Q: tl.constexpr, RANK: tl.constexpr,
    RANK_V: tl.constexpr, KEY_PLAN: tl.constexpr, VALUE_PLAN: tl.constexpr, NEAR_PLAN: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row, g = tl.program_id(0) // G, tl.program_id(0) % G
    split = tl.program_id(1)
    GROUP: tl.constexpr = H // G
    member = tl.arange(0, M)
    of_group = member < GROUP
    heads = row * H + g * GROUP + member
    first, length, position = tl.load(firsts + row), tl.load(lengths + row), tl.load(positions + row)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + g * GROUP + member, mask=of_group, other=0.0)
    top_out, mass_out = tops + heads * (splits + 1) + split, masses + heads * (splits + 1) + split
    if split < splits:
        mean_of_head, decoder_of_head, offset_of_head = None, None, None
        if PAIRS:
            if mean is not None:
                mean_of_head = mean + g * D
            if decoder is not None:
                decoder_of_head = decoder + g * RANK * D
        elif offset is not None:
            offset_of_head = tl.load(offset + heads, mask=of_group, other=0.0)
        _attend(
            q, q_small, offset_of_head, slope,
            far_keys + (row.to(tl.int64) * fk_b + g * fk_g) * FK_VEC,
            far_values + (row.to(tl.int64) * fv_b + g * fv_g) * FV_VEC,
            decoder_of_head, mean_of_head, inverse, cosines, sines,
            tl.maximum(first, split * split_tokens), tl.minimum(length, (split + 1) * split_tokens),
            position, -length, scale, scaling, heads, of_group,
            far_sums + split * RANK_V, splits * RANK_V, top_out, mass_out,
            FK_STRIDE, FV_STRIDE, KEY_PLAN, VALUE_PLAN, D, SIZE_Q, PAIRS, INTERLEAVED, BLOCK, UPCAST,
        )  # fmt: skip
    elif near_keys is not None:
        column = tl.load(near_columns + row)
        _attend(
            q, q, None, slope,
            near_keys + (row.to(tl.int64) * nk_b + g * nk_g) * NK_VEC,
            near_values + (row.to(tl.int64) * nv_b + g * nv_g) * NV_VEC,
            None, None, inverse, cosines, sines,
            tl.maximum(tl.maximum(first, length) - column, 0),
            tl.minimum(tl.load(near_stops + row) - column, near_tokens),
            column + position, column - length, scale, scaling, heads, of_group,
            near_sums, D, top_out, mass_out,
            NK_STRIDE, NV_STRIDE, NEAR_PLAN, NEAR_PLAN, D, D, PAIRS, INTERLEAVED, BLOCK, UPCAST,
        )  # fmt: skip


@triton.jit
def _combine(
    far_sums, near_sums, tops, masses, decoder, mean, out, splits,
    H: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr, SIZE_OUT: tl.constexpr, SPLITS: tl.constexpr,
    PARTS: tl.constexpr, OUT: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Join the splits of one head by their log-sum-exp, and decode the sum of its values."""
    head = tl.program_id(0)
    g = head % H // GROUP
    split, dims = tl.arange(0, SPLITS), tl.arange(0, OUT)
    tops_far = tl.load(tops + head * (splits + 1) + split, mask=split < splits, other=float("-inf"))
    masses_far = tl.load(masses + head * (splits + 1) + split, mask=split < splits, other=0.0)
    top = tl.max(tops_far, 0)
    if NEAR:
        near_top = tl.load(tops + head * (splits + 1) + splits)
        top = tl.maximum(top, near_top)
    top = tl.where(top == float("-inf"), 0.0, top)  # a row that sees nothing
    weights = tl.exp2(tops_far - top)
    far_mass = tl.sum(weights * masses_far, 0)
    total = far_mass
    if NEAR:
        near_weight = tl.exp2(near_top - top)
        total += near_weight * tl.load(masses + head * (splits + 1) + splits)
    total = tl.where(total == 0.0, 1.0, total)
    found = tl.zeros([OUT], tl.float32)
    partial = far_sums + head.to(tl.int64) * splits * RANK
    if decoder is None:
        summed = tl.load(
            partial + split[:, None] * RANK + dims[None, :],
            mask=(split < splits)[:, None] & (dims < SIZE_OUT)[None, :],
            other=0.0,
        )
        found += tl.sum(summed * weights[:, None], 0)
    else:
        for start in range(0, RANK, PARTS):
            channels = start + tl.arange(0, PARTS)
            summed = tl.load(
                partial + split[:, None] * RANK + channels[None, :],
                mask=(split < splits)[:, None] & (channels < RANK)[None, :],
                other=0.0,
            )
            latent = tl.sum(summed * weights[:, None], 0)
            u = tl.load(
                decoder + (g * RANK + channels)[:, None] * SIZE_OUT + dims[None, :],
                mask=(channels < RANK)[:, None] & (dims < SIZE_OUT)[None, :],
                other=0.0,
            )
            found += tl.sum(latent[:, None] * u.to(tl.float32), 0)
    if mean is not None:
        found += far_mass * tl.load(mean + g * SIZE_OUT + dims, mask=dims < SIZE_OUT, other=0.0).to(tl.float32)
    if NEAR:
        found += near_weight * tl.load(near_sums + head * SIZE_OUT + dims, mask=dims < SIZE_OUT, other=0.0)
    tl.store(out + head * SIZE_OUT + dims, (found / total).to(out.dtype.element_ty), mask=dims < SIZE_OUT)


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
_tuned = triton.autotune(_configurations(), key=SHAPE, cache_results=not INTERPRETED)(_decode_splits)


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
    _combine[(b * h,)](
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
