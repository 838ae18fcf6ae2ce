// Decoding by vectors.
//
// Keys are decoded in tiles that stay in registers, are rotated there, and scored by all heads. A score's partial sums
// are a vector: as many as a vector has lanes are transposed and added up at once. Keys of large heads are decoded a block
// at a time by products of matrices of bf16, where a processor has them: a number is two of bf16 then, its rounding and
// what that leaves, and of their products all count but the smallest.

#pragma once

#include "matrices.h"
#include "task.h"

namespace {

constexpr int TILE = 4;  // tokens whose keys are in registers together
constexpr int PAIRS = LANES == 8 ? 1 : 2;  // vectors of pairs in a tile: AVX2 has half as many registers

// How the codes of one vector of channels are found in a row.
struct Codes {
    // Lanes have the place of their code's lower part, and 16 bits up that of the upper, helded from `base`; what the
    // two bytes are shifted by; and which bits of what comes of it held.
    Codes(const int32_t *plan, int64_t bytes)
        : place(load(plan)), down(load(plan + LANES)), lower(load(plan + 2 * LANES)), down_upper(load(plan + 3 * LANES)),
          upper(load(plan + 4 * LANES)), base(plan[5 * LANES]), near(plan[5 * LANES + 1]), whole(plan[5 * LANES + 2]),
          left(bytes - base) {}

    // With `PERMUTED`, of at most 64 bytes at once; with `WHOLE`, of codes that have no upper parts.
    template <bool PERMUTED, bool WHOLE> Integers of(const uint8_t *row) const {
        Integers found;
#if defined(__AVX512VBMI__)
        if constexpr (PERMUTED) {
            const __mmask64 there = left >= 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
            const __m512i held = _mm512_maskz_loadu_epi8(there, row + base);
            found = (Integers)_mm512_maskz_permutexvar_epi8(~__mmask64(0), (__m512i)place, held);
        } else
#endif
            for (int i = 0; i < LANES; i++)
                found[i] = row[base + (place[i] & 0xffff)] | row[base + (place[i] >> 16)] << 16;
        const Integers below = found >> down & lower;
        return WHOLE ? below : below | (found >> down_upper & upper);
    }

    const Integers place, down, lower, down_upper, upper;
    const int32_t base, near, whole;  // `near`: all within 64 bytes
    const int64_t left;
};

// Call with so many of a group's heads at a time, from the first on.
template <class Function> inline void by_heads(int64_t heads, Function function) {
    int64_t p = 0;
    for (; p + 4 <= heads; p += 4) function(std::integral_constant<int, 4>{}, p);
    if (heads - p == 3) function(std::integral_constant<int, 3>{}, p);
    if (heads - p == 2) function(std::integral_constant<int, 2>{}, p);
    if (heads - p == 1) function(std::integral_constant<int, 1>{}, p);
}

class ByVectors final : public Task {
  public:
    ByVectors(const Arguments &arguments, int64_t b, int64_t g) : Task(arguments, b, g, BLOCK) {
        thread_local Room<> rooms[5];
        thread_local Room<uint16_t> rounding;
        const int64_t widest =
            std::max({padded(a.keys.rank), padded(a.size), width, padded(a.values.rank), padded(a.size_out)});
        parts = rooms[0].of(group * BLOCK * LANES);
        key_room = rooms[1].of(BLOCK * widest);
        value_room = rooms[2].of(BLOCK * widest);
        pair_room = rooms[3].of(BLOCK * width);
        turn_room = rooms[4].of(BLOCK * width);
        halves = rounding.of(2 * BLOCK * (padded(a.keys.rank) + LANES));
    }

  private:
    void score(const List &list) override;
    void add_values(const List &list) override;
    const float *turns_of(int t, float *own) const;
    template <int V> void score_tile(const List &list, int t0, int64_t pair);
    template <int P> void score_small(const List &list, int t0, int64_t p0);
    template <int P> void add_some(const List &list, int64_t p0);
    void rows_of(const Side &side, const Strip &strip, float *room, const float **rows);
    void to_pairs();
    void decode_block(const Side &side);

    bool multiplies = a.pairs && a.keys.matrices;  // whether matrices decode keys
#if defined(EIGENATTN_MATRICES)
    const Registers registers{multiplies};
#endif
    uint16_t *halves;                // [2, BLOCK, padded rank]: a block's latents in bf16, and what that leaves of them
    const float *decoder = nullptr;  // of the list's keys, where vectors decode them
    float *parts;                    // [heads, BLOCK, LANES]: partial sums of scores
    float *key_room, *value_room, *pair_room, *turn_room;
    const float *keys[BLOCK], *values[BLOCK], *turns[BLOCK];
};

// The rotations of a token where positions have gaps.
const float *ByVectors::turns_of(int t, float *own) const {
    for (int64_t i = 0; i < a.pairs; i++) {
        const int64_t at = i / LANES * 2 * LANES + i % LANES;
        turn_of(i, t, a.table + at, width, LANES, own + at, own + at + LANES);
    }
    return own;
}

// Where the rows of a block's tokens lie in fp32: unpacked, with zeros behind, if they are anything else.
void ByVectors::rows_of(const Side &side, const Strip &strip, float *room, const float **rows) {
    const int64_t size = padded(side.rank);
    const int tokens = held;
    const char *stored[BLOCK];
    strip.find(n0, tokens, stored);
    for (int t = 0; t < tokens; t++)
        rows[t] = side.rows.kind == FP32 ? reinterpret_cast<const float *>(stored[t]) : room + t * size;
    if (side.rows.kind == BF16)
        for (int t = 0; t < tokens; t++) {
            const uint16_t *row = reinterpret_cast<const uint16_t *>(stored[t]);
            for (int64_t i = 0; i < size; i += LANES) store(room + t * size + i, load_part(row + i, side.rank - i));
        }
    if (side.rows.kind != CODES) return;
    float scales[BLOCK];
    for (int t = 0; t < tokens; t++)
        scales[t] = side.scale < 0 ? 1.0f : SCALES.of[uint8_t(stored[t][side.scale])];
    for (int64_t i = 0; i < size; i += LANES) {
        const Codes codes(side.plan + 6 * i, side.bytes);
        const float *levels = side.levels + g * 4 * size + i;
        const Vector a = load(levels), b = load(levels + size), c = load(levels + 2 * size), d = load(levels + 3 * size);
        const auto unpack = [&](auto permuted, auto whole) {
            float *out = room + i;
            for (int t = 0; t < tokens; t++, out += size) {
                const uint8_t *row = reinterpret_cast<const uint8_t *>(stored[t]);
                const Integers code = codes.of<permuted.value, whole.value>(row);
                const Vector u = __builtin_convertvector(code, Vector);
                store(out, scales[t] * (a + u * (b + u * (c + u * d))));
            }
        };
        const std::true_type yes;
        const std::false_type no;
        if (codes.near && codes.whole)
            unpack(yes, yes);
        else if (codes.near)
            unpack(yes, no);
        else
            unpack(no, no);
    }
}

// Keys that have no decoder, as pairs lie.
void ByVectors::to_pairs() {
    for (int t = 0; t < held; t++) {
        float *own = pair_room + t * width;
        for (int64_t i = 0; i < width; i++) own[i] = a.order[i] < 0 ? 0.0f : keys[t][a.order[i]];
        keys[t] = own;
    }
}

// Keys of a block decoded at once, as pairs lie.
void ByVectors::decode_block([[maybe_unused]] const Side &side) {
#if defined(EIGENATTN_MATRICES)
    const int64_t rank = side.rank, depth = (rank + DEPTH - 1) / DEPTH * DEPTH, decoders = side.matrices;
    for (int t = 0; t < held; t++)
        for (int64_t i = 0; i < depth; i += DEPTH) {
            Vector x[2];
            UNROLLED for (int j = 0; j < 2; j++) {
                const int64_t at = i + j * LANES, left = rank - at;
                x[j] = left >= LANES ? load(keys[t] + at) : left > 0 ? load_part(keys[t] + at, left) : Vector{};
            }
            uint16_t *own = halves + t * depth + i;
            split<2>(x[0], x[1], [&](int part, Couples first, Couples second) {
                store(own + part * BLOCK * depth, side_by_side(first, second));
            });
        }
    const uint16_t *u = reinterpret_cast<const uint16_t *>(side.decoder) + g * decoders * depth * width;
    multiply(halves, side.rows.kind == BF16 ? 1 : 2, u, decoders, depth, width, pair_room);
#endif
    for (int t = 0; t < held; t++) keys[t] = pair_room + t * width;
}

// Decode, rotate and score some tokens in V vectors of pairs: partial sums are added to what other pairs gave.
template <int V> void ByVectors::score_tile(const List &list, int t0, int64_t pair) {
    Vector x[TILE][2 * V];
    const float *rows[TILE], *turn[TILE];
    const int64_t at = 2 * pair;
    UNROLLED for (int t = 0; t < TILE; t++) {
        const int n = std::min(t0 + t, held - 1);  // behind the block's end the last token again
        rows[t] = keys[n];
        turn[t] = turns[n] + at;
    }
    UNROLLED for (int t = 0; t < TILE; t++)
        UNROLLED for (int j = 0; j < 2 * V; j++) x[t][j] = list.mean ? load(list.mean + at + j * LANES) : Vector{};
    if (decoder) {
        const float *u = decoder + at;
        for (int64_t r = 0; r < list.keys->rank; r++, u += width) {
            Vector of_channel[2 * V];
            UNROLLED for (int j = 0; j < 2 * V; j++) of_channel[j] = load(u + j * LANES);
            UNROLLED for (int t = 0; t < TILE; t++)
                UNROLLED for (int j = 0; j < 2 * V; j++) x[t][j] += rows[t][r] * of_channel[j];
        }
    } else {
        UNROLLED for (int t = 0; t < TILE; t++)
            UNROLLED for (int j = 0; j < 2 * V; j++) x[t][j] += load(rows[t] + at + j * LANES);
    }
    UNROLLED for (int t = 0; t < TILE; t++)
        UNROLLED for (int j = 0; j < V; j++) {
            const Vector c = load(turn[t] + 2 * j * LANES), s = load(turn[t] + 2 * j * LANES + LANES);
            const Vector first = x[t][2 * j], second = x[t][2 * j + 1];
            x[t][2 * j] = first * c - second * s;
            x[t][2 * j + 1] = second * c + first * s;
        }
    for (int64_t p = 0; p < group; p++) {
        const float *q = turned + p * width + at;
        float *part = parts + (p * BLOCK + t0) * LANES;
        Vector own[2 * V];
        UNROLLED for (int j = 0; j < 2 * V; j++) own[j] = load(q + j * LANES);
        UNROLLED for (int t = 0; t < TILE; t++) {
            Vector total = pair ? load(part + t * LANES) : Vector{};
            UNROLLED for (int j = 0; j < 2 * V; j++) total += x[t][j] * own[j];
            store(part + t * LANES, total);
        }
    }
}

// Scores of P heads in the keys' own space, where nothing rotates.
template <int P> void ByVectors::score_small(const List &list, int t0, int64_t p0) {
    const int64_t rank = list.keys->rank, size = padded(rank);
    Vector total[TILE][P];
    const float *rows[TILE], *q = list.queries + p0 * size;
    UNROLLED for (int t = 0; t < TILE; t++) {
        rows[t] = keys[std::min(t0 + t, held - 1)];
        UNROLLED for (int p = 0; p < P; p++) total[t][p] = Vector{};
    }
    int64_t i = 0;
    for (; i + LANES <= rank; i += LANES)
        UNROLLED for (int t = 0; t < TILE; t++)
            UNROLLED for (int p = 0; p < P; p++) total[t][p] += load(rows[t] + i) * load(q + p * size + i);
    if (i < rank)
        UNROLLED for (int t = 0; t < TILE; t++)
            UNROLLED for (int p = 0; p < P; p++) total[t][p] += load_part(rows[t] + i, rank - i) * load(q + p * size + i);
    UNROLLED for (int t = 0; t < TILE; t++)
        UNROLLED for (int p = 0; p < P; p++) store(parts + ((p0 + p) * BLOCK + t0 + t) * LANES, total[t][p]);
}

void ByVectors::score(const List &list) {
    rows_of(*list.keys, keys_at, key_room, keys);
    if (list.same())
        std::copy(keys, keys + held, values);
    else
        rows_of(*list.values, values_at, value_room, values);
    const bool decodes = a.pairs && list.keys->decoder;
    decoder = decodes && !multiplies ? list.keys->decoder + g * list.keys->rank * width : nullptr;
    if (a.pairs) {
        turn_to(list, 0);
        for (int t = 0; t < held; t++) turns[t] = a.table + t * width;
        if (gaps[0])
            for (int t = 0; t < held; t++) turns[t] = turns_of(t, turn_room + t * width);
        if (!decodes)
            to_pairs();
        else if (multiplies)
            decode_block(*list.keys);
    }
    for (int t0 = 0; t0 < held; t0 += TILE) {
        const int64_t later = n0 + BLOCK + t0, end = std::min(later + TILE, list.high);
        fetch(keys_at, later, end);
        if (!list.same()) fetch(values_at, later, end);
        if (a.pairs) {
            int64_t pair = 0;
            for (; pair + PAIRS * LANES <= a.pairs; pair += PAIRS * LANES) score_tile<PAIRS>(list, t0, pair);
            for (; pair < a.pairs; pair += LANES) score_tile<1>(list, t0, pair);
        } else {
            by_heads(group, [&](auto some, int64_t p) { score_small<decltype(some)::value>(list, t0, p); });
        }
    }
    for (int64_t p = 0; p < group; p++)
        for (int i = 0; i < BLOCK; i += LANES)
            store(weights + p * SPAN + i, sums_of<LANES / 2>(parts + (p * BLOCK + i) * LANES));
}

void ByVectors::add_values(const List &list) {
    by_heads(group, [&](auto some, int64_t p) { add_some<decltype(some)::value>(list, p); });
}

// Values of a block, for P heads from the p0-th on, four vectors at a time.
template <int P> void ByVectors::add_some(const List &list, int64_t p0) {
    const int64_t rank = list.values->rank;
    float *sums = results + p0 * partial.size + list.sums;
    const float *weight = weights + p0 * SPAN;
    const auto some = [&](auto vectors, int64_t i) {
        constexpr int V = decltype(vectors)::value;
        Vector total[P][V];
        UNROLLED for (int p = 0; p < P; p++)
            UNROLLED for (int j = 0; j < V; j++) total[p][j] = load(sums + p * partial.size + i + j * LANES);
        const int64_t left = rank - (i + (V - 1) * LANES);  // channels of the last vector
        for (int t = 0; t < held; t++) {
            Vector x[V];
            UNROLLED for (int j = 0; j < V - 1; j++) x[j] = load(values[t] + i + j * LANES);
            const float *last = values[t] + i + (V - 1) * LANES;
            x[V - 1] = left >= LANES ? load(last) : load_part(last, left);
            UNROLLED for (int p = 0; p < P; p++)
                UNROLLED for (int j = 0; j < V; j++) total[p][j] += weight[p * SPAN + t] * x[j];
        }
        UNROLLED for (int p = 0; p < P; p++)
            UNROLLED for (int j = 0; j < V; j++) store(sums + p * partial.size + i + j * LANES, total[p][j]);
    };
    int64_t i = 0;
    for (; i + 3 * LANES < rank; i += 4 * LANES) some(std::integral_constant<int, 4>{}, i);
    for (; i + LANES < rank; i += 2 * LANES) some(std::integral_constant<int, 2>{}, i);
    for (; i < rank; i += LANES) some(std::integral_constant<int, 1>{}, i);
}

}  // namespace
