// Attention of many queries over the exact window, by products of matrices of bf16: query m sees the last `window` keys.

#include <cmath>
#include <limits>

#include "matrices.h"
#include "threads.h"

#if defined(EIGENATTN_MATRICES)

namespace {

constexpr int64_t QUERIES = 256;  // of a task

// What a task works with: keys and values of a head as matrices, and one tile of queries.
class Band {
  public:
    Band(int64_t keys, int64_t size, int64_t size_out, int64_t window)
        : size(size), size_out(size_out), window(window), chunks((size + DEPTH - 1) / DEPTH),
          columns((size_out + ROWS - 1) / ROWS), most((window + ROWS - 2) / DEPTH + 2) {
        thread_local Room<uint16_t> rooms[4];
        thread_local Room<> wide[2];
        blocks = (keys + DEPTH - 1) / DEPTH;
        key_matrices = rooms[0].of(blocks * 2 * chunks * MATRIX);
        value_matrices = rooms[1].of(blocks * columns * MATRIX);
        query_matrices = rooms[2].of(chunks * MATRIX);
        weights = rooms[3].of(most * MATRIX);
        scores = wide[0].of(ROWS * most * DEPTH);
        sums = wide[1].of(ROWS * columns * ROWS);
    }

    void take(const uint16_t *keys, int64_t key_step, const uint16_t *values, int64_t value_step, int64_t count);
    void attend(const uint16_t *queries, int64_t step, int64_t count, int64_t first, int64_t keys, float scale, float *out,
                int64_t out_step, float *lse);

  private:
    const Registers registers{true};
    const int64_t size, size_out, window, chunks, columns, most;  // `most`: blocks of keys that a tile of queries meets
    int64_t blocks;
    uint16_t *key_matrices;    // [blocks, 2, chunks, ROWS, DEPTH]: couples of dimensions by keys
    uint16_t *value_matrices;  // [blocks, columns, ROWS, DEPTH]: couples of keys by dimensions
    uint16_t *query_matrices;  // [chunks, ROWS, DEPTH]
    uint16_t *weights;         // [most, ROWS, DEPTH]
    float *scores;             // [ROWS, most * DEPTH]
    float *sums;               // [ROWS, columns * ROWS]
};

// Keys and values of a head as matrices, with zeros behind.
void Band::take(const uint16_t *keys, int64_t key_step, const uint16_t *values, int64_t value_step, int64_t count) {
    for (int64_t n = 0; n < blocks * DEPTH; n++)
        for (int64_t k = 0; k < chunks; k++) {
            uint32_t own[ROWS] = {};
            const int64_t left = std::min<int64_t>(size - k * DEPTH, DEPTH);
            if (n < count) std::memcpy(own, keys + n * key_step + k * DEPTH, 2 * left);
            uint16_t *to = key_matrices + ((n / ROWS) * chunks + k) * MATRIX + n % ROWS * 2;
            for (int i = 0; i < ROWS; i++) std::memcpy(to + i * DEPTH, own + i, 4);
        }
    for (int64_t n = 0; n < blocks * DEPTH; n += 2)
        for (int64_t d = 0; d < size_out; d += ROWS) {
            const auto of = [&](int64_t key) {
                if (key >= count) return Couples{};
                return (Couples)_mm512_cvtepu16_epi32(
                    _mm256_maskz_loadu_epi16(mask_of(size_out - d), values + key * value_step + d));
            };
            store(value_matrices + (n / DEPTH * columns + d / ROWS) * MATRIX + n % DEPTH / 2 * DEPTH, of(n) | of(n + 1) << 16);
        }
}

// Up to ROWS queries, of which the first is at the key `first`: outputs [count, size_out] and log-sum-exps of scores.
void Band::attend(const uint16_t *queries, int64_t step, int64_t count, int64_t first, int64_t keys, float scale, float *out,
                  int64_t out_step, float *lse) {
    std::fill(query_matrices, query_matrices + chunks * MATRIX, 0);
    for (int64_t m = 0; m < count; m++)
        for (int64_t k = 0; k < chunks; k++)
            std::memcpy(query_matrices + (k * ROWS + m) * DEPTH, queries + m * step + k * DEPTH,
                        2 * std::min<int64_t>(size - k * DEPTH, DEPTH));
    const int64_t low = std::max<int64_t>(first - window + 1, 0) / DEPTH;
    const int64_t high = std::min<int64_t>((first + count - 1) / DEPTH + 1, blocks), met = high - low, row = met * DEPTH;
    settle();
    for (int64_t block = low; block < high; block++) {
        const uint16_t *own = key_matrices + block * 2 * chunks * MATRIX;
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t k = 0; k < chunks; k++) {
            _tile_loadd(4, query_matrices + k * MATRIX, 2 * DEPTH);
            _tile_loadd(5, own + k * MATRIX, 2 * DEPTH);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, own + (chunks + k) * MATRIX, 2 * DEPTH);
            _tile_dpbf16ps(1, 4, 6);
        }
        _tile_stored(0, scores + (block - low) * DEPTH, 4 * row);
        _tile_stored(1, scores + (block - low) * DEPTH + ROWS, 4 * row);
    }
    Integers lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    const float nothing = -std::numeric_limits<float>::infinity();
    float part[ROWS];
    for (int64_t m = 0; m < ROWS; m++) {
        float *own = scores + m * row;
        const int32_t last = int32_t(std::min(first + m, keys - 1) - low * DEPTH);
        const int32_t before = int32_t(first + m - window - low * DEPTH);
        Vector most_of = Vector{} + nothing;
        for (int64_t n = 0; n < row; n += LANES) {
            const Integers at = lane + int32_t(n);
            const Vector score = (at <= last) & (at > before) ? load(own + n) * scale : Vector{} + nothing;
            store(own + n, score);
            most_of = larger(most_of, score);
        }
        const float top = largest(most_of);
        Vector sum_of = {};
        for (int64_t n = 0; n < row; n += DEPTH) {
            const Vector a = exponential(load(own + n) - top), b = exponential(load(own + n + ROWS) - top);
            sum_of += a + b;
            store(weights + (n / DEPTH * ROWS + m) * DEPTH, side_by_side(to_cut(a), to_cut(b)));
        }
        const float total = sum(sum_of);
        part[m] = 1 / total;
        if (m < count) lse[m] = top + std::log(total);
    }
    settle();
    for (int64_t c = 0; c < columns; c++) {
        _tile_zero(0);
        for (int64_t block = low; block < high; block++) {
            _tile_loadd(4, weights + (block - low) * MATRIX, 2 * DEPTH);
            _tile_loadd(5, value_matrices + (block * columns + c) * MATRIX, 2 * DEPTH);
            _tile_dpbf16ps(0, 4, 5);
        }
        _tile_stored(0, sums + c * ROWS, 4 * columns * ROWS);
    }
    for (int64_t m = 0; m < count; m++)
        for (int64_t d = 0; d < size_out; d++) out[m * out_step + d] = sums[m * columns * ROWS + d] * part[m];
}

}  // namespace
#endif

// What it is given; `band.py` packs it, all in 8 bytes. Strides count elements.
struct BandArguments {
    struct {
        char *data;
        int64_t batch, head, token;
    } queries, keys, values, out, lse;  // the first three in bf16, the others in fp32
    int64_t batch, heads, kv_heads, tokens, size, size_out, window;
    int64_t first, empty;  // the key that is the first query's own, and keys in front that are none
    double scale;
    int64_t threads;
};

extern "C" {

// Outputs [batch, heads, tokens, size_out], and log-sum-exps of scores. Needs matrices.
void eigenattn_band([[maybe_unused]] const BandArguments *arguments) {
#if defined(EIGENATTN_MATRICES)
    const BandArguments &a = *arguments;
    const int64_t parts = (a.tokens + QUERIES - 1) / QUERIES, group = a.heads / a.kv_heads;
    in_parallel(a.batch * a.kv_heads * parts, a.threads, [&](int64_t i) {
        const int64_t b = i / (a.kv_heads * parts), g = i / parts % a.kv_heads, start = i % parts * QUERIES;
        const int64_t stop = std::min(start + QUERIES, a.tokens);
        const int64_t low = std::max(a.first + start - a.window + 1, a.empty), count = a.first + stop - low;
        const auto of = [&](const auto &x, int64_t head, int64_t token) {
            return b * x.batch + head * x.head + token * x.token;
        };
        Band band(count, a.size, a.size_out, a.window);
        band.take(reinterpret_cast<const uint16_t *>(a.keys.data) + of(a.keys, g, low), a.keys.token,
                  reinterpret_cast<const uint16_t *>(a.values.data) + of(a.values, g, low), a.values.token, count);
        for (int64_t h = g * group; h < (g + 1) * group; h++)
            for (int64_t m = start; m < stop; m += ROWS) {
                float *lse = reinterpret_cast<float *>(a.lse.data) + of(a.lse, h, m), found[ROWS];
                const int64_t some = std::min<int64_t>(ROWS, stop - m);
                band.attend(reinterpret_cast<const uint16_t *>(a.queries.data) + of(a.queries, h, m), a.queries.token, some,
                            a.first + m - low, count, float(a.scale),
                            reinterpret_cast<float *>(a.out.data) + of(a.out, h, m), a.out.token, found);
                for (int64_t t = 0; t < some; t++) lse[t * a.lse.token] = found[t];
            }
    });
#endif
}
}
