"""The Triton kernels of `eigenattn.kernels.decoding.fused`, which says how they are laid out.

A plan is a tuple of pieces of a latent (`fused.Piece`). Loops over plans are unrolled.
"""

# Constants that a kernel computes with are `constexpr` in its signature, and numbers, tuples and loops in its body.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math

import triton
import triton.language as tl

from ...cache import codebook

LOG2_E = tl.constexpr(math.log2(math.e))
UNIT_SCALE, OCTAVE = tl.constexpr(codebook.UNIT_SCALE), tl.constexpr(codebook.OCTAVE)


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter multiplies the bits of bf16 as if they were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _part(tokens, seen, PLAN: tl.constexpr, i: tl.constexpr, part: tl.constexpr):
    """What is stored of a piece, or of one part of its codes [BLOCK, size]."""
    places = tl.arange(0, PLAN[i][1])
    return tl.load(
        tokens[:, None] + PLAN[i][5 + 3 * part] + places[None, :],
        mask=seen[:, None] & (places < PLAN[i][2])[None, :],
        other=0,
    )


@triton.jit
def _piece(tokens, seen, shape, PLAN: tl.constexpr, i: tl.constexpr, RANK: tl.constexpr, dtype: tl.constexpr):
    """One piece of latents [BLOCK, size], or what a decoder that is folded takes of codes (`Side.fold`)."""
    found = _part(tokens, seen, PLAN, i, 0)
    if PLAN[i][3] < 16:
        code = (found.to(tl.int32) >> PLAN[i][6]) & (2 ** PLAN[i][7] - 1)
        if len(PLAN[i]) > 8:
            lower = (_part(tokens, seen, PLAN, i, 1).to(tl.int32) >> PLAN[i][9]) & (2 ** PLAN[i][10] - 1)
            code = (code << PLAN[i][10]) | lower
        u = (code - 2 ** (PLAN[i][3] - 1)).to(tl.float32)
        places = tl.arange(0, PLAN[i][1])
        known = places < PLAN[i][2]
        of_piece = shape + PLAN[i][0] + places
        a = tl.load(of_piece, mask=known, other=0.0)[None, :]
        b = tl.load(of_piece + RANK, mask=known, other=0.0)[None, :]
        c = tl.load(of_piece + 2 * RANK, mask=known, other=0.0)[None, :]
        d = tl.load(of_piece + 3 * RANK, mask=known, other=0.0)[None, :]
        found = a + u * (b + u * (c + u * d))
        if PLAN[i][4] >= 0:
            scale = tl.load(tokens + PLAN[i][4], mask=seen, other=0).to(tl.float32)
            found *= tl.exp2((scale - UNIT_SCALE) / OCTAVE)[:, None]
    return found.to(dtype)


@triton.jit
def _here(shape, n0):
    """The same pointer, as far as the compiler knows another in every block of tokens.

    Else it keeps the numbers of all pieces in registers from block to block, and spills thousands of bytes a thread.
    """
    return shape + (n0 >> 30)


@triton.jit
def _decoded(
    tokens, seen, shape, decoder, mean, h: tl.constexpr, dims, known,
    PLAN: tl.constexpr, RANK: tl.constexpr, D: tl.constexpr, UPCAST: tl.constexpr, dtype,
):  # fmt: skip
    """Some dimensions of head h's keys [BLOCK, len(dims)] in fp32: decoded, or loaded where there is no decoder."""
    if decoder is None:
        x = tl.load(tokens[:, None] + dims[None, :], mask=seen[:, None] & known[None, :], other=0.0).to(tl.float32)
    else:
        x = tl.zeros([tokens.shape[0], dims.shape[0]], tl.float32)
        of_head = None if shape is None else shape + h * 4 * RANK
        for i in tl.static_range(len(PLAN)):
            z = _piece(tokens, seen, of_head, PLAN, i, RANK, dtype)
            channels = tl.arange(0, PLAN[i][1])
            u = tl.load(
                decoder + (h * RANK + PLAN[i][0] + channels)[:, None] * D + dims[None, :],
                mask=(channels < PLAN[i][2])[:, None] & known[None, :],
                other=0.0,
            )
            x = _dot(z, u, x, UPCAST)
    if mean is not None:
        x += tl.load(mean + h * D + dims, mask=known, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def _own(q, h: tl.constexpr, OF: tl.constexpr, COUNT: tl.constexpr):
    """Queries [n, heads] with zeros for all but the h-th `OF` heads of `COUNT` times so many."""
    if COUNT == 1:
        return q
    return tl.where((tl.arange(0, q.shape[1]) // OF == h)[None, :], q, tl.zeros_like(q))


@triton.jit
def _queries(q, heads, of_group, PLAN: tl.constexpr, SIZE: tl.constexpr):
    """Queries of a group, transposed, in pieces [size, heads]."""
    found = ()
    for i in tl.static_range(len(PLAN)):
        channels = tl.arange(0, PLAN[i][1])
        found += (
            tl.load(
                q + heads[None, :] * SIZE + (PLAN[i][0] + channels)[:, None],
                mask=of_group[None, :] & (channels < PLAN[i][2])[:, None],
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
def _masked(scores, mask, mask_h, n, seen, of_group, MASK: tl.constexpr):
    """Scores [BLOCK, heads] with a mask: 1 is boolean, 2 additive, plus 2 if every head has its own."""
    if MASK > 2:
        places = n.to(tl.int64)[:, None] + (tl.arange(0, scores.shape[1]) * mask_h)[None, :]
        found = tl.load(mask + places, mask=seen[:, None] & of_group[None, :], other=0)
    else:
        found = tl.load(mask + n, mask=seen, other=0)[:, None]
    if MASK % 2:
        return tl.where(found != 0, scores, float("-inf"))
    return scores + tl.maximum(found.to(tl.float32), -1e30) * LOG2_E  # the least number would overflow


@triton.jit
def _attend(
    q, q_small, offset, slope, keys, values, decoder, mean, shape_k, shape_v, inverse, cosines, sines,
    low, high, start, positions, query, distance, scale, scaling, softcap, mask, mask_h, heads, of_group,
    sums_out, sums_stride, top_out, sum_out, next_keys,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, KEY_PLAN: tl.constexpr, VALUE_PLAN: tl.constexpr,
    D: tl.constexpr, SIZE_Q: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
    MASK: tl.constexpr, UPCAST: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr, RANK_V: tl.constexpr,
    SHARED: tl.constexpr, SHARED_K: tl.constexpr, JOINT: tl.constexpr,
):  # fmt: skip
    """Attention over tokens low .. high - 1 of one list: writes sums of values, top score and total by head.

    The list is of `SHARED` KV heads, each of `GROUP` query heads, that have one latent of values, and one of keys for
    every `SHARED_K` of them, the next one `next_keys` elements further on; with `JOINT`, values come from that of keys.
    A score is of one KV head, so what heads have scores of is the sum of products in which the others' queries are 0.
    Blocks begin at `start`, not behind `low`. `positions` points at the position of token 0, `query` is the
    query's, and ALiBi counts n + `distance`. `mask` points at what token 0 finds, if it is not None.
    """
    dtype: tl.constexpr = q.dtype.element_ty
    M: tl.constexpr = heads.shape[0]
    high = tl.where(low < high, high, start)  # a block has a token that is seen, or there is no block
    if PAIRS:
        SIZE: tl.constexpr = triton.next_power_of_2(PAIRS) if PAIRS > 16 else 16
        pairs = tl.arange(0, SIZE)
        paired = pairs < PAIRS
        first = pairs * 2 if INTERLEAVED else pairs
        second = pairs * 2 + 1 if INTERLEAVED else pairs + PAIRS
        frequency = tl.load(inverse + pairs, mask=paired, other=0.0)
        q_a = _dimensions(q, heads, of_group, first, paired, D) * scaling * scaling
        q_b = _dimensions(q, heads, of_group, second, paired, D) * scaling * scaling
        REST: tl.constexpr = D - 2 * PAIRS
        if REST:
            REST_SIZE: tl.constexpr = triton.next_power_of_2(REST) if REST > 16 else 16
            rest = 2 * PAIRS + tl.arange(0, REST_SIZE)
            q_rest = _dimensions(q, heads, of_group, rest, rest < D, D).to(dtype)
    else:
        pieces = _queries(q_small, heads, of_group, KEY_PLAN, SIZE_Q)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = ()
    for i in tl.static_range(len(VALUE_PLAN)):
        sums += (tl.full([VALUE_PLAN[i][1], M], 0.0, tl.float32),)
    for n0 in range(start, high, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        seen = (n >= low) & (n < high)
        scores = tl.zeros([BLOCK, M], tl.float32)
        here_k, here_v = None, None  # Triton before 3.7 has no functions that return None
        if shape_k is not None:
            here_k = _here(shape_k, n0)
        if shape_v is not None:
            here_v = _here(shape_v, n0)
        if PAIRS:
            # The query is turned to where the block begins, and keys by how far they stand behind: where positions
            # are without gaps, by angles from a table that is the same for every block.
            where = tl.load(positions + n, mask=seen, other=2147483647)
            begin = tl.min(where, 0)
            behind = tl.where(seen, where - begin, 0)
            angle = (query - begin).to(tl.float32) * frequency
            cos, sin = tl.cos(angle)[:, None], tl.sin(angle)[:, None]
            q_first, q_second = q_a * cos - q_b * sin, q_b * cos + q_a * sin
            if tl.max(behind, 0) < BLOCK:
                table = behind[:, None] * PAIRS + pairs[None, :]
                key_cos = tl.load(cosines + table, mask=paired[None, :], other=0.0)
                key_sin = tl.load(sines + table, mask=paired[None, :], other=0.0)
            else:
                angles = behind.to(tl.float32)[:, None] * frequency[None, :]
                key_cos, key_sin = tl.cos(angles), tl.sin(angles)
            for h in tl.static_range(SHARED):
                tokens = keys + h // SHARED_K * next_keys + n.to(tl.int64) * KEY_STRIDE
                a = _decoded(tokens, seen, here_k, decoder, mean, h, first, paired, KEY_PLAN, RANK, D, UPCAST, dtype)
                b = _decoded(tokens, seen, here_k, decoder, mean, h, second, paired, KEY_PLAN, RANK, D, UPCAST, dtype)
                x, y = (a * key_cos - b * key_sin).to(dtype), (b * key_cos + a * key_sin).to(dtype)
                scores = _dot(x, _own(q_first, h, GROUP, SHARED).to(dtype), scores, UPCAST)
                scores = _dot(y, _own(q_second, h, GROUP, SHARED).to(dtype), scores, UPCAST)
                if REST:
                    a = _decoded(
                        tokens, seen, here_k, decoder, mean, h, rest, rest < D, KEY_PLAN, RANK, D, UPCAST, dtype
                    )
                    scores = _dot(a.to(dtype), _own(q_rest, h, GROUP, SHARED), scores, UPCAST)
        else:
            LATENTS: tl.constexpr = (SHARED + SHARED_K - 1) // SHARED_K
            for j in tl.static_range(LATENTS):
                tokens = keys + j * next_keys + n.to(tl.int64) * KEY_STRIDE
                for i in tl.static_range(len(KEY_PLAN)):
                    of_latent = None if here_k is None else here_k + j * SHARED_K * 4 * RANK
                    z = _piece(tokens, seen, of_latent, KEY_PLAN, i, RANK, dtype)
                    scores = _dot(z, _own(pieces[i], j, GROUP * SHARED_K, LATENTS), scores, UPCAST)
        if offset is not None:
            scores += offset[None, :]
        if softcap is not None:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1)
            scores = softcap - 2 * softcap / (tl.exp2(scores * (2 * scale * LOG2_E / softcap)) + 1)
            scores *= LOG2_E
        else:
            scores *= scale * LOG2_E
        if slope is not None:
            scores += (n + distance).to(tl.float32)[:, None] * (slope * LOG2_E)[None, :]
        scores = tl.where(seen[:, None], scores, float("-inf"))
        if MASK:
            scores = _masked(scores, mask, mask_h, n, seen, of_group, MASK)
        risen = tl.maximum(top, tl.max(scores, 0))
        against = tl.where(risen == float("-inf"), 0.0, risen)  # nothing was seen so far
        weights = tl.exp2(scores - against[None, :])
        fade = tl.exp2(top - against)
        total = total * fade + tl.sum(weights, 0)
        top = risen
        tokens = (keys if JOINT else values) + n.to(tl.int64) * VALUE_STRIDE
        grown = ()
        for i in tl.static_range(len(VALUE_PLAN)):
            z = _piece(tokens, seen, here_v, VALUE_PLAN, i, RANK_V, dtype)
            grown += (_dot(tl.trans(z), weights.to(dtype), sums[i] * fade[None, :], UPCAST),)
        sums = grown
    for i in tl.static_range(len(VALUE_PLAN)):
        channels = tl.arange(0, VALUE_PLAN[i][1])
        written = of_group[None, :] & (channels < VALUE_PLAN[i][2])[:, None]
        tl.store(
            sums_out + heads[None, :] * sums_stride + (VALUE_PLAN[i][0] + channels)[:, None], sums[i], mask=written
        )
    tl.store(top_out, top, mask=of_group)
    tl.store(sum_out, total, mask=of_group)


@triton.jit(
    do_not_specialize=["splits", "near_tokens", "bucket", "mask_b", "mask_h", "positions_b"]
    + [f"{x}_{y}" for x in ("fk", "fv", "nk", "nv") for y in "bg"]
)
def decode_splits(
    q, q_small, offset, slopes, far_keys, far_values, decoder, mean, key_shape, value_shape, near_keys, near_values,
    firsts, lengths, positions, queries, near_columns, near_stops, inverse, cosines, sines,
    mask, far_sums, near_sums, tops, totals,
    scale, scaling, softcap, splits, near_tokens, bucket, mask_b, mask_h, positions_b,
    fk_b, fk_g, fv_b, fv_g, nk_b, nk_g, nv_b, nv_g,
    FK_VEC: tl.constexpr, FV_VEC: tl.constexpr, NK_VEC: tl.constexpr, NV_VEC: tl.constexpr,
    FK_STRIDE: tl.constexpr, FV_STRIDE: tl.constexpr, NK_STRIDE: tl.constexpr, NV_STRIDE: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, SHARED_K: tl.constexpr, SHARED_V: tl.constexpr,
    D: tl.constexpr, SIZE_Q: tl.constexpr, RANK: tl.constexpr,
    RANK_V: tl.constexpr, KEY_PLAN: tl.constexpr, VALUE_PLAN: tl.constexpr, NEAR_PLAN: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr, UPCAST: tl.constexpr,
    JOINT: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One split of the sequence, or the exact window, of a row and KV head, or of all that share a latent of values."""
    SHARED: tl.constexpr = SHARED_V if TOGETHER else 1
    LISTS: tl.constexpr = G // SHARED
    row, g = tl.program_id(0) // LISTS, tl.program_id(0) % LISTS * SHARED
    split = tl.program_id(1)
    GROUP: tl.constexpr = H // G
    M: tl.constexpr = triton.next_power_of_2(GROUP * SHARED) if GROUP * SHARED > 16 else 16
    member = tl.arange(0, M)
    of_group = member < GROUP * SHARED
    heads = row * H + g * GROUP + member
    first, length = tl.load(firsts + row), tl.load(lengths + row)
    query = 0
    if PAIRS:
        positions += row.to(tl.int64) * positions_b
        query = tl.load(queries + row)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + g * GROUP + member, mask=of_group, other=0.0)
    if MASK:
        mask += row.to(tl.int64) * mask_b + g * GROUP * mask_h
    top_out, sum_out = tops + heads * (splits + 1) + split, totals + heads * (splits + 1) + split
    if split < splits:
        mean_of_head, decoder_of_head, offset_of_head = None, None, None
        shape_k, shape_v = None, None
        if key_shape is not None:
            shape_k = key_shape + g * 4 * RANK
        if value_shape is not None:
            shape_v = value_shape + g * 4 * RANK_V
        if PAIRS:
            if mean is not None:
                mean_of_head = mean + g * D
            if decoder is not None:
                decoder_of_head = decoder + g * RANK * D
        elif offset is not None:
            offset_of_head = tl.load(offset + heads, mask=of_group, other=0.0)
        # What the row holds is shared out evenly, wherever it begins and however much room there is behind it.
        begin = first // BLOCK * BLOCK
        each = tl.cdiv(tl.cdiv(tl.maximum(length - begin, 0), splits), BLOCK) * BLOCK
        start = begin + split * each
        _attend(
            q, q_small, offset_of_head, slope,
            far_keys + (row.to(tl.int64) * fk_b + g // SHARED_K * fk_g) * FK_VEC,
            far_values + (row.to(tl.int64) * fv_b + g // SHARED_V * fv_g) * FV_VEC,
            decoder_of_head, mean_of_head, shape_k, shape_v, inverse, cosines, sines,
            tl.maximum(first, start), tl.minimum(length, start + each), start,
            positions, query, -length, scale, scaling, softcap, mask, mask_h, heads, of_group,
            far_sums + split * RANK_V, splits * RANK_V, top_out, sum_out, fk_g.to(tl.int64) * FK_VEC,
            FK_STRIDE, FV_STRIDE, KEY_PLAN, VALUE_PLAN, D, SIZE_Q, PAIRS, INTERLEAVED, BLOCK,
            MASK, UPCAST, GROUP, RANK, RANK_V, SHARED, SHARED_K, JOINT,
        )  # fmt: skip
    elif near_keys is not None:
        column = tl.load(near_columns + row)
        low = tl.maximum(tl.maximum(first, length) - column, 0)
        if MASK:
            mask += column
        stop = tl.minimum(tl.load(near_stops + row) - column, near_tokens)
        of_one = member < GROUP
        for h in range(SHARED):  # exact values are of each KV head by itself
            of_head, own_mask, own_positions = None, None, None
            if PAIRS:
                own_positions = positions + column
            if slopes is not None:
                of_head = tl.load(slopes + (g + h) * GROUP + member, mask=of_one, other=0.0)
            if MASK:
                own_mask = mask + h * GROUP * mask_h
            first_head = h * GROUP
            _attend(
                q, q, None, of_head,
                near_keys + (row.to(tl.int64) * nk_b + (g + h) * nk_g) * NK_VEC,
                near_values + (row.to(tl.int64) * nv_b + (g + h) * nv_g) * NV_VEC,
                None, None, None, None, inverse, cosines, sines, low, stop, low // BLOCK * BLOCK,
                own_positions, query, column - length, scale, scaling, softcap, own_mask, mask_h, heads + first_head,
                of_one, near_sums, D, top_out + first_head * (splits + 1), sum_out + first_head * (splits + 1), 0,
                NK_STRIDE, NV_STRIDE, NEAR_PLAN, NEAR_PLAN, D, D, PAIRS, INTERLEAVED, BLOCK,
                MASK, UPCAST, GROUP, D, D, 1, 1, False,
            )  # fmt: skip


@triton.jit(do_not_specialize=["splits"])
def combine(
    far_sums, near_sums, tops, totals, decoder, mean, sinks, out, splits,
    H: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr, SIZE_OUT: tl.constexpr, SPLITS: tl.constexpr,
    PARTS: tl.constexpr, OUT: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Join the splits of one head by their log-sum-exp, and decode the sum of its values."""
    head = tl.program_id(0)
    g = head % H // GROUP
    split, dims = tl.arange(0, SPLITS), tl.arange(0, OUT)
    tops_far = tl.load(tops + head * (splits + 1) + split, mask=split < splits, other=float("-inf"))
    sums_of_far = tl.load(totals + head * (splits + 1) + split, mask=split < splits, other=0.0)
    top = tl.max(tops_far, 0)
    if NEAR:
        near_top = tl.load(tops + head * (splits + 1) + splits)
        top = tl.maximum(top, near_top)
    if sinks is not None:
        sink = tl.load(sinks + head % H).to(tl.float32) * LOG2_E
        top = tl.maximum(top, sink)
    top = tl.where(top == float("-inf"), 0.0, top)  # a row that sees nothing
    weights = tl.exp2(tops_far - top)
    far_total = tl.sum(weights * sums_of_far, 0)
    total = far_total
    if NEAR:
        near_weight = tl.exp2(near_top - top)
        total += near_weight * tl.load(totals + head * (splits + 1) + splits)
    if sinks is not None:
        total += tl.exp2(sink - top)
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
        found += far_total * tl.load(mean + g * SIZE_OUT + dims, mask=dims < SIZE_OUT, other=0.0).to(tl.float32)
    if NEAR:
        found += near_weight * tl.load(near_sums + head * SIZE_OUT + dims, mask=dims < SIZE_OUT, other=0.0)
    tl.store(out + head * SIZE_OUT + dims, (found / total).to(out.dtype.element_ty), mask=dims < SIZE_OUT)
