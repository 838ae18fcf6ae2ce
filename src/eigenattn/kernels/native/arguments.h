// What a decoding step is given; `decoding/native.py` packs it.

#pragma once

#include <cstdint>

#include "vectors.h"

namespace {

constexpr int BLOCK = 32;  // tokens; the table of rotations stays in the first cache

enum Kind : int64_t { FP32, BF16, CODES };

constexpr int MOST_ROWS = 4;  // of positions

// `native.py` packs what follows, in this order, and all of it in 8 bytes. Strides count elements.
struct Rows {
    const char *data;
    int64_t batch, head, token, kind, shared;  // `shared`: KV heads that have one of the rows' heads
};

struct Side {
    Rows rows;
    int64_t rank;
    // Levels are coefficients of a polynomial in the code, [G, 4, padded rank]; of matrices tables of bf16, [G, of_levels].
    const float *decoder, *mean, *levels;
    int64_t matrices;     // so many of bf16 are the decoder, or 0
    int64_t of_levels;    // numbers of a head's
    int64_t bytes;        // of a row of codes
    const int32_t *plan;  // [vectors, 6, LANES]; see `Codes`. Of matrices a `Channel` each
    int64_t scale;        // where a row of codes has the byte of its scale, or -1
};

// Of a paged cache: row b has the pages `table[b * stride]` and on, of so many tokens each; a list's `batch` is then
// the way from page to page.
struct Pages {
    const int32_t *table;
    int64_t stride, tokens;
};

struct Count {
    const void *data;  // of each row, or null: `value` of all
    int64_t stride, bytes, value;
};

struct Arguments {
    int64_t batch, heads, kv_heads, size, size_out, tokens, threads;
    Rows query, near_keys, near_values;
    Side keys, values;
    int64_t slots;
    Count first, length, column, stop, position, positions;
    int64_t positions_batch;
    // Rotary positions: `pairs` with padding, 0 without any; the place in D of each dimension as pairs lie, or -1.
    int64_t pairs;
    const int32_t *order;
    const float *table;         // [BLOCK, pairs / LANES, 2, LANES]: cosines and sines; of matrices [pairs, 2, BLOCK]
    const double *frequencies;  // [3, pairs]: radians a token, and cosines and sines of a block's length
    int64_t by_matrices;
    const uint16_t *identity;   // a decoder, in matrices, of keys that have none
    double scaling, scale, softcap;
    const float *slopes, *sinks;  // of each head; sinks are logits that the softmax is taken with
    const char *mask;
    int64_t mask_batch, mask_head, mask_kind;  // 1: boolean, 2: fp32
    char *out;
    int64_t out_kind;
    Pages far_pages, near_pages;
    // Of positions in rows: which one each pair turns by, or null; how many there are, and the ways from one to the next.
    const int32_t *row_of_pair;
    int64_t rows, positions_row, position_row;
};

inline int64_t number_at(const Count &count, int64_t at) {
    return count.bytes == 8 ? static_cast<const int64_t *>(count.data)[at] : static_cast<const int32_t *>(count.data)[at];
}

inline int64_t number_of(const Count &count, int64_t row) {
    return count.data ? number_at(count, row * count.stride) : count.value;
}

inline int64_t bytes_of(const Rows &rows) { return rows.kind == FP32 ? 4 : rows.kind == BF16 ? 2 : 1; }

inline const char *row_of(const Rows &rows, int64_t b, int64_t g) {
    return rows.data + (b * rows.batch + g / rows.shared * rows.head) * bytes_of(rows);
}

}  // namespace
