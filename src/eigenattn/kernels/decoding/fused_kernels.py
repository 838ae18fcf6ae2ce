"""The Triton kernels of `eigenattn.kernels.decoding.fused`, which says how they are laid out.

A plan is a tuple of pieces of a latent (`eigenattn.kernels.decoding.pieces.Piece`). Loops over plans are unrolled.
"""

# Constants that a kernel computes with are `constexpr` in its signature, and numbers, tuples and loops in its body.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math

import triton
import triton.language as tl

from . import tiles, unpacking

LOG2_E = tl.constexpr(math.log2(math.e))
NOWHERE = tl.constexpr(-(2**31))  # no position


@triton.jit
def _masked(scores, mask, mask_h, n, seen, member, of_group, MASK: tl.constexpr):
    """Scores [heads, BLOCK] with a mask: 1 is boolean, 2 additive, plus 2 if every head has its own."""
    if MASK > 2:
        places = n.to(tl.int64)[None, :] + (member * mask_h)[:, None]
        found = tl.load(mask + places, mask=seen[None, :] & of_group[:, None], other=0)
    else:
        found = tl.load(mask + n, mask=seen, other=0)[None, :]
    if MASK % 2:
        return tl.where(found != 0, scores, float("-inf"))
    return scores + tl.maximum(found.to(tl.float32), -1e30) * LOG2_E  # the least number would overflow


@triton.jit
def _attend(
    q, q_small, offset, slope, keys, values, decoder, mean, codes_k, numbers_k, codes_v, numbers_v,
    inverse, cosines, sines, row_of_pair, room,
    low, high, start, positions, queries, distance, scale, scaling, softcap, mask, mask_h, first_head, member, of_group,
    sums_out, sums_stride, top_out, sum_out,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, KEY_PLAN: tl.constexpr, VALUE_PLAN: tl.constexpr,
    KEY_SCALE: tl.constexpr, VALUE_SCALE: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, SIZE_Q: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
    MASK: tl.constexpr, UPCAST: tl.constexpr, RANK: tl.constexpr, RANK_V: tl.constexpr, KEEP: tl.constexpr,
    JOINT: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Attention over tokens low .. high - 1 of one KV head: writes sums of values, top score and total by query head.

    Blocks begin at `start`, not behind `low`. `positions` points at the position of token 0 and `queries` at the
    query's, `ROWS` of either, and ALiBi counts n + `distance`. `mask` points at what token 0 finds, if it is not None.
    There is room for so many tokens behind `keys` and `values`, of which packed ones that are not seen may be read.
    """
    dtype: tl.constexpr = q.dtype.element_ty
    M: tl.constexpr = member.shape[0]
    heads = first_head + member
    high = tl.where(low < high, high, start)  # a block has a token that is seen, or there is no block
    places = tl.arange(0, BLOCK)
    couples_k = unpacking.couples(codes_k, numbers_k, KEY_PLAN, RANK, dtype, PACKED)
    couples_v = unpacking.couples(codes_v, numbers_v, VALUE_PLAN, RANK_V, dtype, PACKED)
    if PAIRS:
        SIZE: tl.constexpr = triton.next_power_of_2(PAIRS) if PAIRS > 16 else 16
        PART: tl.constexpr = SIZE if SIZE < 64 else 64  # pairs at a time: more would not fit in registers
        # Each query is turned once, and is as many rows of a product as there are rows for it.
        ONCE: tl.constexpr = triton.next_power_of_2(GROUP)
        alone = tl.arange(0, ONCE)
        turned, advance, behind, kept = (), (), (), ()
        for i in tl.static_range(SIZE // PART):
            pairs, paired, first, second = tiles.pairs(i * PART, PART, PAIRS, INTERLEAVED)
            turned += (tl.zeros([ONCE, PART], tl.float32), tl.zeros([ONCE, PART], tl.float32))
            advance += tiles.angle(-BLOCK * tl.load(inverse + pairs, mask=paired, other=0.0))
            table = places[:, None] * PAIRS + pairs[None, :]
            behind += (
                tl.load(cosines + table, mask=paired[None, :], other=0.0),
                tl.load(sines + table, mask=paired[None, :], other=0.0),
            )
            if KEEP:
                kept += (
                    tiles.decoders(decoder, first, paired, KEY_PLAN, D),
                    tiles.decoders(decoder, second, paired, KEY_PLAN, D),
                )
        expected, query = tl.full([], NOWHERE, tl.int32), tl.load(queries).to(tl.int32)
        REST: tl.constexpr = D - 2 * PAIRS
        if REST:
            REST_SIZE: tl.constexpr = triton.next_power_of_2(REST) if REST > 16 else 16
            rest = 2 * PAIRS + tl.arange(0, REST_SIZE)
            q_rest = tiles.dimensions(q, heads, of_group, rest, rest < D, D).to(dtype)
            u_rest = ()
            if KEEP:
                u_rest = tiles.decoders(decoder, rest, rest < D, KEY_PLAN, D)
    else:
        pieces = tiles.queries(q_small, heads, of_group, KEY_PLAN, SIZE_Q)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = ()
    for i in tl.static_range(len(VALUE_PLAN)):
        sums += (tl.full([M, VALUE_PLAN[i][1]], 0.0, tl.float32),)
    for n0 in range(start, high, BLOCK):
        # Blocks of packed latents lie in the cache as a whole, so that a code is as far from the first byte in all of
        # them. Of other latents, what is not seen is loaded from the nearest token that is, for it may be no number.
        # Neither needs masks, which would be more instructions.
        base = n0
        if KEY_PLAN[0][3] or VALUE_PLAN[0][3]:
            base = tl.minimum(n0, room - BLOCK)
        n = base + places
        seen = (n >= tl.maximum(low, n0)) & (n < high)
        there = tl.minimum(tl.maximum(n, low), high - 1).to(tl.int64)
        tokens = unpacking.rows(keys, base, places, there, KEY_STRIDE, KEY_PLAN)
        scales = None
        if KEY_SCALE >= 0:
            scales = unpacking.scales(tokens, KEY_SCALE)
        latents = ()
        if decoder is not None or not PAIRS:
            for i in tl.static_range(len(KEY_PLAN)):
                latents += (unpacking.piece(tokens, couples_k, KEY_PLAN, i, dtype, PACKED),)
        if PAIRS:
            # Queries are turned back to the position of the block's place 0, and keys from there to their own: where
            # positions are without gaps, by angles that are the same in every block.
            begins = tl.load(positions + there * ROWS).to(tl.int32) - places
            begin = tl.min(tl.where(seen, begins, 2147483647), 0)
            even = tl.max(tl.where(seen, begins, NOWHERE), 0) == begin
            further = tl.where(seen, begins - begin, 0).to(tl.float32)[:, None]
            for row in tl.static_range(1, ROWS):  # a block of an image's tokens is one with gaps
                others = tl.load(positions + there * ROWS + row).to(tl.int32) - places
                even = even and (tl.max(tl.where(seen & (others != begin), 1, 0), 0) == 0)
            before = turned
            turned = ()
            # Decoded keys are the first operand, which tensor cores take from registers.
            found = tl.zeros([BLOCK, M], tl.float32)
            for i in tl.static_range(SIZE // PART):
                pairs, paired, first, second = tiles.pairs(i * PART, PART, PAIRS, INTERLEAVED)
                if begin == expected:
                    q_a, q_b = tiles.turn(
                        before[2 * i], before[2 * i + 1], advance[2 * i][None, :], advance[2 * i + 1][None, :]
                    )
                else:
                    frequency = tl.load(inverse + pairs, mask=paired, other=0.0)
                    away = query - begin
                    if ROWS > 1:
                        rows = tl.load(row_of_pair + pairs, mask=paired, other=0)
                        away = tl.load(queries + rows).to(tl.int32) - begin
                    q_cos, q_sin = tiles.angle(away.to(tl.float32) * frequency)
                    q_a = tiles.dimensions(q, first_head + alone, alone < GROUP, first, paired, D) * scaling * scaling
                    q_b = tiles.dimensions(q, first_head + alone, alone < GROUP, second, paired, D) * scaling * scaling
                    q_a, q_b = tiles.turn(q_a, q_b, q_cos[None, :], q_sin[None, :])
                turned += (q_a, q_b)
                u_a, u_b = (), ()
                if KEEP:
                    u_a, u_b = kept[2 * i], kept[2 * i + 1]
                elif decoder is not None:
                    u_a = tiles.decoders(tiles.here(decoder, n0), first, paired, KEY_PLAN, D)
                    u_b = tiles.decoders(tiles.here(decoder, n0), second, paired, KEY_PLAN, D)
                a = tiles.keys(latents, tokens, scales, u_a, mean, first, paired, UPCAST)
                b = tiles.keys(latents, tokens, scales, u_b, mean, second, paired, UPCAST)
                a, b = tiles.turn(a, b, behind[2 * i].to(tl.float32), behind[2 * i + 1].to(tl.float32))
                if not even:
                    frequency = tl.load(inverse + pairs, mask=paired, other=0.0)
                    beyond = further
                    if ROWS > 1:
                        rows = tl.load(row_of_pair + pairs, mask=paired, other=0)
                        own = tl.load(positions + (there * ROWS)[:, None] + rows[None, :]).to(tl.int32)
                        beyond = tl.where(seen[:, None], own - (places + begin)[:, None], 0).to(tl.float32)
                    cos, sin = tiles.angle(beyond * frequency[None, :])
                    a, b = tiles.turn(a, b, cos, sin)
                found = tiles.dot(a.to(dtype), tl.trans(tiles.repeated(q_a.to(dtype), M)), found, UPCAST)
                found = tiles.dot(b.to(dtype), tl.trans(tiles.repeated(q_b.to(dtype), M)), found, UPCAST)
            if REST:
                u_c = u_rest
                if decoder is not None and not KEEP:
                    u_c = tiles.decoders(tiles.here(decoder, n0), rest, rest < D, KEY_PLAN, D)
                c = tiles.keys(latents, tokens, scales, u_c, mean, rest, rest < D, UPCAST)
                found = tiles.dot(c.to(dtype), tl.trans(q_rest), found, UPCAST)
            expected = begin + BLOCK
            scores = tl.trans(found)
        else:
            scores = tl.zeros([M, BLOCK], tl.float32)
            for i in tl.static_range(len(KEY_PLAN)):
                scores = tiles.dot(pieces[i], tl.trans(latents[i]), scores, UPCAST)
            if scales is not None:
                scores *= scales[None, :]
        if offset is not None:
            scores += offset[:, None]
        if softcap is not None:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1)
            scores = softcap - 2 * softcap / (tl.exp2(scores * (2 * scale * LOG2_E / softcap)) + 1)
            scores *= LOG2_E
        else:
            scores *= scale * LOG2_E
        if slope is not None:
            scores += (n + distance).to(tl.float32)[None, :] * (slope * LOG2_E)[:, None]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        if MASK:
            scores = _masked(scores, mask, mask_h, n, seen, member, of_group, MASK)
        risen = tl.maximum(top, tl.max(scores, 1))
        against = tl.where(risen == float("-inf"), 0.0, risen)  # nothing was seen so far
        weights = tl.exp2(scores - against[:, None])
        fade = tl.exp2(top - against)
        total = total * fade + tl.sum(weights, 1)
        top = risen
        tokens = unpacking.rows(values, base, places, there, VALUE_STRIDE, VALUE_PLAN)
        if VALUE_SCALE >= 0:
            weights *= unpacking.scales(tokens, VALUE_SCALE)[None, :]
        grown = ()
        for i in tl.static_range(len(VALUE_PLAN)):
            z = latents[i] if JOINT else unpacking.piece(tokens, couples_v, VALUE_PLAN, i, dtype, PACKED)
            grown += (tiles.dot(weights.to(dtype), z, sums[i] * fade[:, None], UPCAST),)
        sums = grown
    for i in tl.static_range(len(VALUE_PLAN)):
        channels = tl.arange(0, VALUE_PLAN[i][1])
        written = of_group[:, None] & (channels < VALUE_PLAN[i][2])[None, :]
        tl.store(
            sums_out + heads[:, None] * sums_stride + (VALUE_PLAN[i][0] + channels)[None, :], sums[i], mask=written
        )
    tl.store(top_out, top, mask=of_group)
    tl.store(sum_out, total, mask=of_group)


@triton.jit(
    do_not_specialize=["splits", "far_tokens", "near_tokens", "mask_b", "mask_h", "positions_b"]
    + [f"{x}_{y}" for x in ("fk", "fv", "nk", "nv") for y in "bg"]
)
def decode_splits(
    q, q_small, slopes, far_keys, far_values, decoder, mean, key_codes, key_numbers, value_codes, value_numbers,
    near_keys, near_values,
    firsts, lengths, positions, queries, near_columns, near_stops, inverse, cosines, sines, row_of_pair,
    mask, far_sums, near_sums, tops, totals,
    scale, scaling, softcap, splits, far_tokens, near_tokens, mask_b, mask_h, positions_b,
    fk_b, fk_g, fv_b, fv_g, nk_b, nk_g, nv_b, nv_g,
    FK_VEC: tl.constexpr, FV_VEC: tl.constexpr, NK_VEC: tl.constexpr, NV_VEC: tl.constexpr,
    FK_STRIDE: tl.constexpr, FV_STRIDE: tl.constexpr, NK_STRIDE: tl.constexpr, NV_STRIDE: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, SHARED_K: tl.constexpr, SHARED_V: tl.constexpr,
    D: tl.constexpr, SIZE_Q: tl.constexpr, RANK: tl.constexpr,
    RANK_V: tl.constexpr, KEY_PLAN: tl.constexpr, VALUE_PLAN: tl.constexpr, NEAR_PLAN: tl.constexpr,
    KEY_SCALE: tl.constexpr, VALUE_SCALE: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr, UPCAST: tl.constexpr,
    JOINT: tl.constexpr, KEEP: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One split of the sequence, or the exact window, of a row and KV head."""
    row, g = tl.program_id(0) // G, tl.program_id(0) % G
    split = tl.program_id(1)
    GROUP: tl.constexpr = H // G
    M: tl.constexpr = triton.next_power_of_2(GROUP) if GROUP > 16 else 16
    COPIES: tl.constexpr = M // triton.next_power_of_2(GROUP)  # of each query head, of which the first counts
    member = tl.arange(0, M) // COPIES
    of_group = (member < GROUP) & (tl.arange(0, M) % COPIES == 0)
    first_head = row * H + g * GROUP
    heads = first_head + member
    first, length = tl.load(firsts + row), tl.load(lengths + row)
    if PAIRS:
        positions += row.to(tl.int64) * positions_b
        queries += row * ROWS
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + g * GROUP + member, mask=of_group, other=0.0)
    if MASK:
        mask += row.to(tl.int64) * mask_b + g * GROUP * mask_h
    top_out, sum_out = tops + heads * (splits + 1) + split, totals + heads * (splits + 1) + split
    if split < splits:
        mean_of_head, decoder_of_head, offset = None, None, None
        numbers_k, numbers_v = None, None
        if key_numbers is not None:
            numbers_k = key_numbers + g * 6 * RANK
        if value_numbers is not None:
            numbers_v = value_numbers + g * 6 * RANK_V
        if PAIRS:
            if mean is not None:
                mean_of_head = mean + g * D
            if decoder is not None:
                decoder_of_head = decoder + g * RANK * D
        elif mean is not None:
            # What the mean adds to scores is the same for all tokens.
            SIZE: tl.constexpr = triton.next_power_of_2(D)
            dims = tl.arange(0, SIZE)
            of_mean = tl.load(mean + g * D + dims, mask=dims < D, other=0.0).to(tl.float32)
            offset = tl.sum(tiles.dimensions(q, heads, of_group, dims, dims < D, D) * of_mean[None, :], 1)
        # What the row holds is shared out evenly, wherever it begins and however much room there is behind it.
        begin = first // BLOCK * BLOCK
        each = tl.cdiv(tl.cdiv(tl.maximum(length - begin, 0), splits), BLOCK) * BLOCK
        start = begin + split * each
        keys = far_keys + (row.to(tl.int64) * fk_b + g // SHARED_K * fk_g) * FK_VEC
        values = keys
        if not JOINT:
            values = far_values + (row.to(tl.int64) * fv_b + g // SHARED_V * fv_g) * FV_VEC
        _attend(
            q, q_small, offset, slope, keys, values,
            decoder_of_head, mean_of_head, key_codes, numbers_k, value_codes, numbers_v,
            inverse, cosines, sines, row_of_pair, far_tokens,
            tl.maximum(first, start), tl.minimum(length, start + each), start,
            positions, queries, -length, scale, scaling, softcap, mask, mask_h, first_head, member, of_group,
            far_sums + split * RANK_V, splits * RANK_V, top_out, sum_out,
            FK_STRIDE, FV_STRIDE, KEY_PLAN, VALUE_PLAN, KEY_SCALE, VALUE_SCALE, GROUP, D, SIZE_Q, PAIRS,
            INTERLEAVED, BLOCK, MASK, UPCAST, RANK, RANK_V, KEEP, JOINT, PACKED, ROWS,
        )  # fmt: skip
    elif near_keys is not None:
        column = tl.load(near_columns + row)
        low = tl.maximum(tl.maximum(first, length) - column, 0)
        if PAIRS:
            positions += column * ROWS
        if MASK:
            mask += column
        stop = tl.minimum(tl.load(near_stops + row) - column, near_tokens)
        _attend(
            q, q, None, slope,
            near_keys + (row.to(tl.int64) * nk_b + g * nk_g) * NK_VEC,
            near_values + (row.to(tl.int64) * nv_b + g * nv_g) * NV_VEC,
            None, None, None, None, None, None, inverse, cosines, sines, row_of_pair, near_tokens,
            low, stop, low // BLOCK * BLOCK,
            positions, queries, column - length, scale, scaling, softcap, mask, mask_h, first_head, member,
            of_group, near_sums, D, top_out, sum_out,
            NK_STRIDE, NV_STRIDE, NEAR_PLAN, NEAR_PLAN, -1, -1, GROUP, D, D, PAIRS, INTERLEAVED, BLOCK,
            MASK, UPCAST, D, D, False, False, False, ROWS,
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
        for start in tl.static_range(0, RANK, PARTS):  # what is loaded does not wait for what is summed
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
