// Attention of many queries over a stretch of keys, by products of matrices of bf16, joined to what they found elsewhere.
//
// 32 queries meet 128 keys at a time, whose scores stay in the first cache. Queries are lanes all along, so that nothing
// is added up across a vector: scores are keys times queries, and sums are values times weights. Weights are powers of
// two against a score that is exceeded by little, and sums fade where another one is.
//
// A number in fp32 is three of bf16, of whose products six count: what comes out is as exact as fp32 has it.

#include <cmath>

#include "matrices.h"
#include "threads.h"

#if defined(EIGENATTN_MATRICES)

namespace {

constexpr int64_t QUERIES = 256;                  // of a task
constexpr int64_t AT_ONCE = 256 << 10;            // bytes of keys and values in matrices, which stay in the second cache
constexpr int FOLDS = 2, TILE = FOLDS * ROWS;     // queries at once
constexpr int BLOCKS = 4, KEYS = BLOCKS * DEPTH;  // keys whose scores are held
constexpr float OCTAVES = 1.44269504f;  // of e
constexpr float ROOM = 8;               // octaves by which a score may exceed what weights are against

// What queries see of keys: query i the last `window` of those up to `first + i`, and of those below `by_all`, but none
// in front of `from`.
struct Sight {
    int64_t first, window, by_all, from, keys;
    int64_t low(int64_t i) const { return std::max(first + i - window + 1, from); }
    int64_t high(int64_t i) const { return std::min(std::max(first + i + 1, by_all), keys); }
};

// How many numbers of bf16 an element is.
template <class T> constexpr int PARTS_OF = sizeof(T) == 2 ? 1 : 3;

// 2^x by fits to the least relative error: to more digits than bf16 has (7.5e-5), or to those of fp32 (7.5e-8). 0 of
// minus infinity.
template <class T> inline Vector power_of_two(Vector x) {
    const Vector f = (Vector)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
    Vector y;
    if constexpr (PARTS_OF<T> == 1)
        y = ((f * 0.0780245f + 0.22606719f) * f + 0.69583353f) * f + 0.99992522f;
    else
        y = ((((f * 0.00187758f + 0.00898934f) * f + 0.05582632f) * f + 0.24015362f) * f + 0.69315307f) * f + 0.99999993f;
    return (Vector)_mm512_scalef_ps((__m512)y, (__m512)x);
}

// The first numbers of a row, at most DEPTH, and zeros: in bf16, or as parts of bf16.
template <int PARTS> inline void load_row(const uint16_t *row, int64_t count, Couples *parts) {
    parts[0] = (Couples)_mm512_maskz_loadu_epi16(count >= DEPTH ? ~__mmask32(0) : (__mmask32(1) << count) - 1, row);
}
template <int PARTS> inline void load_row(const float *row, int64_t count, Couples *parts) {
    const Vector a = load_part(row, count), b = count > LANES ? load_part(row + LANES, count - LANES) : Vector{};
    split<PARTS>(a, b, [&](int i, Couples first, Couples second) { parts[i] = side_by_side(first, second); });
}

// Keys and values of a head as matrices, and TILE queries of one of its query heads.
template <class T> class Stretch {
  public:
    Stretch(int64_t size, int64_t size_out)
        : size(size), size_out(size_out), chunks((size + DEPTH - 1) / DEPTH),
          wide((size_out + DEPTH - 1) / DEPTH * DEPTH),
          most(std::max<int64_t>(AT_ONCE / (2 * PARTS * (chunks * DEPTH + wide)) / KEYS, 1) * KEYS) {
        thread_local Room<uint16_t> rooms[4];
        thread_local Room<> others[2];
        const int64_t blocks = most / DEPTH;
        key_matrices = rooms[0].of(blocks * 2 * PARTS * chunks * MATRIX);
        value_matrices = rooms[1].of(blocks * DEPTH * PARTS * wide);
        query_matrices = rooms[2].of(FOLDS * PARTS * chunks * MATRIX);
        weights = rooms[3].of(FOLDS * PARTS * BLOCKS * MATRIX);
        scores = others[0].of(FOLDS * KEYS * ROWS);
        sums = others[1].of(FOLDS * wide * ROWS);
    }

    int64_t capacity() const { return most; }
    void take(const T *keys, int64_t key_step, const T *values, int64_t value_step, int64_t count);
    void attend(const T *queries, int64_t step, int64_t count, const Sight &sight, int64_t first, float scale,
                float *out, int64_t out_step, float *lse, int64_t lse_step);

  private:
    static constexpr int PARTS = PARTS_OF<T>;
    void begin(const T *queries, int64_t step, int64_t count, const float *lse, int64_t lse_step);
    void score(int64_t start, int64_t count);
    void hide(const Sight &sight, int64_t first, int64_t start, int64_t count);
    void weigh(int fold, int64_t keys, float scale);
    bool raise(int fold, Vector most);
    void add_values(int64_t start, int64_t count);
    void finish(int64_t count, float *out, int64_t out_step, float *lse, int64_t lse_step) const;

    const Registers registers{true};
    const int64_t size, size_out, chunks, wide, most;  // `wide`: of values, filled up; `most`: keys
    uint16_t *key_matrices;    // [blocks, 2, PARTS, chunks, ROWS, DEPTH]: keys by dimensions
    uint16_t *value_matrices;  // [blocks, wide / DEPTH, PARTS, DEPTH, DEPTH]: dimensions by keys
    uint16_t *query_matrices;  // [FOLDS, PARTS, chunks, ROWS, DEPTH]: couples of dimensions by queries
    uint16_t *weights;         // [BLOCKS, PARTS, FOLDS, ROWS, DEPTH]: couples of keys by queries
    float *scores;             // [FOLDS, KEYS, ROWS]
    float *sums;               // [FOLDS, wide, ROWS]
    // Of each query: what weights are against, in octaves, what they add up to, and what was found elsewhere counts.
    Vector tops[FOLDS], totals[FOLDS], held[FOLDS];
};

// Keys and values of a head as matrices, with zeros behind.
template <class T>
void Stretch<T>::take(const T *keys, int64_t key_step, const T *values, int64_t value_step, int64_t count) {
    const int64_t blocks = (count + DEPTH - 1) / DEPTH;
    for (int64_t n = 0; n < blocks * DEPTH; n++)
        for (int64_t k = 0; k < chunks; k++) {
            Couples x[PARTS] = {};
            if (n < count) load_row<PARTS>(keys + n * key_step + k * DEPTH, size - k * DEPTH, x);
            uint16_t *to = key_matrices + ((n / ROWS * PARTS * chunks + k) * ROWS + n % ROWS) * DEPTH;
            for (int i = 0; i < PARTS; i++) store(to + i * chunks * MATRIX, x[i]);
        }
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t d = 0; d < wide; d += DEPTH) {
            Couples lower[PARTS][ROWS], upper[PARTS][ROWS];  // the first 16 dimensions, couples of keys, and the others
            UNROLLED for (int r = 0; r < ROWS; r++) {
                const int64_t n = block * DEPTH + 2 * r;
                Couples a[PARTS] = {}, b[PARTS] = {};
                if (n < count) load_row<PARTS>(values + n * value_step + d, size_out - d, a);
                if (n + 1 < count) load_row<PARTS>(values + (n + 1) * value_step + d, size_out - d, b);
                const auto half_of = [](Couples x, int half) {
                    const __m512i all = (__m512i)x;
                    return (Couples)_mm512_cvtepu16_epi32(half ? _mm512_extracti64x4_epi64(all, 1)
                                                               : _mm512_castsi512_si256(all));
                };
                UNROLLED for (int i = 0; i < PARTS; i++) {
                    lower[i][r] = half_of(a[i], 0) | half_of(b[i], 0) << 16;
                    upper[i][r] = half_of(a[i], 1) | half_of(b[i], 1) << 16;
                }
            }
            UNROLLED for (int i = 0; i < PARTS; i++) {
                transpose(lower[i]);
                transpose(upper[i]);
                uint16_t *to = value_matrices + ((block * wide + d) * PARTS + i * DEPTH) * DEPTH;
                UNROLLED for (int r = 0; r < ROWS; r++) {
                    store(to + r * DEPTH, lower[i][r]);
                    store(to + MATRIX + r * DEPTH, upper[i][r]);
                }
            }
        }
}

// Up to TILE queries, of which the first sees what `sight` says of the `first`-th.
template <class T>
void Stretch<T>::attend(const T *queries, int64_t step, int64_t count, const Sight &sight, int64_t first, float scale,
                        float *out, int64_t out_step, float *lse, int64_t lse_step) {
    const int64_t high = sight.high(first + count - 1);
    int64_t start = sight.low(first) / DEPTH * DEPTH;
    if (start >= high) return;
    begin(queries, step, count, lse, lse_step);
    const auto blocks_from = [&](int64_t key) { return std::min<int64_t>((high - key + DEPTH - 1) / DEPTH, BLOCKS); };
    score(start / DEPTH, blocks_from(start));
    for (; start < high; start += KEYS) {
        const int64_t some = blocks_from(start);
        hide(sight, first, start, some);
        for (int fold = 0; fold < FOLDS; fold++) weigh(fold, some * DEPTH, scale * OCTAVES);
        // In between weights arrive in memory, where matrices are loaded from.
        if (start + KEYS < high) score((start + KEYS) / DEPTH, blocks_from(start + KEYS));
        add_values(start / DEPTH, some);
    }
    finish(count, out, out_step, lse, lse_step);
}

template <class T>
void Stretch<T>::begin(const T *queries, int64_t step, int64_t count, const float *lse, int64_t lse_step) {
    for (int fold = 0; fold < FOLDS; fold++) {
        for (int64_t k = 0; k < chunks; k++) {
            Couples x[PARTS][ROWS];
            UNROLLED for (int r = 0; r < ROWS; r++) {
                const int64_t m = fold * ROWS + r;
                Couples own[PARTS] = {};
                if (m < count) load_row<PARTS>(queries + m * step + k * DEPTH, size - k * DEPTH, own);
                UNROLLED for (int i = 0; i < PARTS; i++) x[i][r] = own[i];
            }
            UNROLLED for (int i = 0; i < PARTS; i++) {
                transpose(x[i]);
                uint16_t *to = query_matrices + ((fold * PARTS + i) * chunks + k) * MATRIX;
                UNROLLED for (int r = 0; r < ROWS; r++) store(to + r * DEPTH, x[i][r]);
            }
        }
        float found[ROWS];
        for (int i = 0; i < ROWS; i++) found[i] = fold * ROWS + i < count ? lse[(fold * ROWS + i) * lse_step] : NOTHING;
        tops[fold] = load(found) * OCTAVES;
        held[fold] = tops[fold] > NOTHING ? Vector{} + 1.0f : Vector{};
        totals[fold] = Vector{};
    }
    std::fill(sums, sums + FOLDS * wide * ROWS, 0.0f);
}

// Scores of the queries and of so many blocks of keys.
template <class T> void Stretch<T>::score(int64_t start, int64_t count) {
    settle();
    const int64_t part = chunks * MATRIX;
    for (int64_t block = 0; block < count; block++) {
        const uint16_t *own = key_matrices + (start + block) * 2 * PARTS * part;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int i = 0; i < PARTS; i++)
            for (int64_t k = 0; k < chunks; k++) {
                const uint16_t *keys = own + i * part + k * MATRIX;
                _tile_loadd(4, keys, 2 * DEPTH);
                _tile_loadd(5, keys + PARTS * part, 2 * DEPTH);
                for (int j = 0; i + j < PARTS; j++) {
                    const uint16_t *queries = query_matrices + j * part + k * MATRIX;
                    _tile_loadd(6, queries, 2 * DEPTH);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_loadd(7, queries + PARTS * part, 2 * DEPTH);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
        float *to = scores + block * DEPTH * ROWS;
        _tile_stored(0, to, 4 * ROWS);
        _tile_stored(1, to + KEYS * ROWS, 4 * ROWS);
        _tile_stored(2, to + ROWS * ROWS, 4 * ROWS);
        _tile_stored(3, to + (KEYS + ROWS) * ROWS, 4 * ROWS);
    }
    settle();
}

// Take from queries what they do not see of blocks that others see more of.
template <class T> void Stretch<T>::hide(const Sight &sight, int64_t first, int64_t start, int64_t count) {
    for (int fold = 0; fold < FOLDS; fold++) {
        const int64_t from = first + fold * ROWS, all_from = sight.low(from + ROWS - 1), all_to = sight.high(from);
        Integers low, high;
        for (int i = 0; i < ROWS; i++) {
            low[i] = int32_t(sight.low(from + i) - start);
            high[i] = int32_t(sight.high(from + i) - start);
        }
        for (int64_t n = 0; n < count * DEPTH; n += ROWS) {
            if (start + n >= all_from && start + n + ROWS <= all_to) continue;
            float *own = scores + (fold * KEYS + n) * ROWS;
            for (int i = 0; i < ROWS; i++) {
                const Integers at = Integers{} + int32_t(n + i);
                store(own + i * ROWS, (at >= low) & (at < high) ? load(own + i * ROWS) : Vector{} + NOTHING);
            }
        }
    }
}

// Weights of so many keys.
template <class T> void Stretch<T>::weigh(int fold, int64_t keys, float scale) {
    const float *own = scores + fold * KEYS * ROWS;
    if (_mm512_cmpeq_epi32_mask((__m512i)tops[fold], (__m512i)(Vector{} + NOTHING))) {
        Vector most = load(own);
        for (int64_t n = 1; n < keys; n++) most = larger(most, load(own + n * ROWS));
        raise(fold, most * scale);
    }
    for (;;) {
        const Vector against = tops[fold] > NOTHING ? tops[fold] : Vector{};
        Vector most = Vector{} + NOTHING, total = {}, other = {};
        for (int64_t n = 0; n < keys; n += 2) {
            uint16_t *to = weights + (n / DEPTH * PARTS * FOLDS + fold) * MATRIX + n % DEPTH * ROWS;
            const Vector x = load(own + n * ROWS), y = load(own + (n + 1) * ROWS);
            const Vector a = power_of_two<T>(x * scale - against), b = power_of_two<T>(y * scale - against);
            most = larger(most, larger(x, y));
            total += a;
            other += b;
            split<PARTS>(a, b, [&](int i, Couples lower, Couples upper) {
                store(to + i * FOLDS * MATRIX, uppers(lower, upper));
            });
        }
        if (raise(fold, most * scale)) continue;
        totals[fold] += total + other;
        return;
    }
}

// Have weights be against higher scores where the highest so far are too high for them; whether there were any.
template <class T> bool Stretch<T>::raise(int fold, Vector most) {
    const auto above = most > tops[fold] + ROOM;
    if (!_mm512_movepi32_mask((__m512i)above)) return false;
    const Vector top = above ? most : tops[fold], by = above ? power_of_two<T>(tops[fold] - top) : Vector{} + 1.0f;
    tops[fold] = top;
    totals[fold] *= by;
    held[fold] *= by;
    for (int64_t d = 0; d < wide; d++) {
        float *own = sums + (fold * wide + d) * ROWS;
        store(own, load(own) * by);
    }
    return true;
}

// Add values of so many blocks of keys, weighted.
template <class T> void Stretch<T>::add_values(int64_t start, int64_t count) {
    settle();
    for (int64_t d = 0; d < wide; d += DEPTH) {
        float *to = sums + d * ROWS, *behind = to + wide * ROWS;
        _tile_loadd(0, to, 4 * ROWS);
        _tile_loadd(1, behind, 4 * ROWS);
        _tile_loadd(2, to + ROWS * ROWS, 4 * ROWS);
        _tile_loadd(3, behind + ROWS * ROWS, 4 * ROWS);
        for (int64_t block = 0; block < count; block++)
            for (int i = 0; i < PARTS; i++) {
                const uint16_t *own = value_matrices + (((start + block) * wide + d) * PARTS + i * DEPTH) * DEPTH;
                _tile_loadd(4, own, 2 * DEPTH);
                _tile_loadd(5, own + MATRIX, 2 * DEPTH);
                for (int j = 0; i + j < PARTS; j++) {
                    const uint16_t *on = weights + (block * PARTS + j) * FOLDS * MATRIX;
                    _tile_loadd(6, on, 2 * DEPTH);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_loadd(7, on + MATRIX, 2 * DEPTH);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
        _tile_stored(0, to, 4 * ROWS);
        _tile_stored(1, behind, 4 * ROWS);
        _tile_stored(2, to + ROWS * ROWS, 4 * ROWS);
        _tile_stored(3, behind + ROWS * ROWS, 4 * ROWS);
    }
    settle();
}

// Join to what was found elsewhere.
template <class T>
void Stretch<T>::finish(int64_t count, float *out, int64_t out_step, float *lse, int64_t lse_step) const {
    for (int fold = 0; fold < FOLDS; fold++) {
        const int64_t some = std::min<int64_t>(count - fold * ROWS, ROWS);
        const Vector all = totals[fold] + held[fold], part = all > 0 ? 1 / all : Vector{}, before = held[fold] * part;
        for (int64_t d = 0; d < size_out; d += ROWS) {
            Couples x[ROWS];
            UNROLLED for (int i = 0; i < ROWS; i++) x[i] = (Couples)(load(sums + (fold * wide + d + i) * ROWS) * part);
            transpose(x);
            const __mmask16 there = mask_of(size_out - d);
            for (int64_t m = 0; m < some; m++) {
                float *to = out + (fold * ROWS + m) * out_step + d;
                const Vector found = (Vector)_mm512_maskz_loadu_ps(there, to) * before[m] + (Vector)x[m];
                _mm512_mask_storeu_ps(to, there, (__m512)found);
            }
        }
        for (int64_t m = 0; m < some; m++)
            if (all[m] > 0) lse[(fold * ROWS + m) * lse_step] = (tops[fold][m] + std::log2(all[m])) / OCTAVES;
    }
}

}  // namespace
#endif

// What it is given; `prompt.py` packs it, all in 8 bytes. Strides count elements.
struct PromptArguments {
    struct {
        char *data;
        int64_t batch, head, token;
    } queries, keys, values, out, lse;  // the first three of one dtype, the others in fp32
    int64_t batch, heads, kv_heads, tokens, length, size, size_out;
    int64_t first, window, by_all;  // as `Sight` has them, of the first query
    const int64_t *hidden;          // of each row, or null: keys in front that it does not see,
    int64_t column;                 // counted from so many before the first
    int64_t bf16;                   // or fp32
    double scale;
    int64_t threads;
};

#if defined(EIGENATTN_MATRICES)
namespace {

template <class T> void join(const PromptArguments &a) {
    const int64_t parts = (a.tokens + QUERIES - 1) / QUERIES, group = a.heads / a.kv_heads;
    in_parallel(a.batch * a.kv_heads * parts, a.threads, [&](int64_t i) {
        const int64_t b = i / (a.kv_heads * parts), g = i / parts % a.kv_heads, start = i % parts * QUERIES;
        const int64_t stop = std::min(start + QUERIES, a.tokens);
        const auto of = [&](const auto &x, int64_t head, int64_t token) {
            return b * x.batch + head * x.head + token * x.token;
        };
        Stretch<T> stretch(a.size, a.size_out);
        const Sight sight{a.first, a.window, a.by_all, a.hidden ? std::max<int64_t>(a.hidden[b] - a.column, 0) : 0, a.length};
        const int64_t high = sight.high(stop - 1);
        for (int64_t low = sight.low(start); low < high; low += stretch.capacity()) {
            const int64_t count = std::min(high - low, stretch.capacity());
            const Sight seen{a.first + start - low, a.window, a.by_all - low, std::max<int64_t>(sight.from - low, 0), count};
            stretch.take(reinterpret_cast<const T *>(a.keys.data) + of(a.keys, g, low), a.keys.token,
                         reinterpret_cast<const T *>(a.values.data) + of(a.values, g, low), a.values.token, count);
            for (int64_t h = g * group; h < (g + 1) * group; h++)
                for (int64_t m = start; m < stop; m += TILE)
                    stretch.attend(reinterpret_cast<const T *>(a.queries.data) + of(a.queries, h, m), a.queries.token,
                                   std::min<int64_t>(TILE, stop - m), seen, m - start, float(a.scale),
                                   reinterpret_cast<float *>(a.out.data) + of(a.out, h, m), a.out.token,
                                   reinterpret_cast<float *>(a.lse.data) + of(a.lse, h, m), a.lse.token);
        }
    });
}

}  // namespace
#endif

extern "C" {

// Outputs [batch, heads, tokens, size_out] and log-sum-exps of scores, to which attention over keys [batch, kv_heads,
// length, size] is joined. Needs matrices.
void eigenattn_join([[maybe_unused]] const PromptArguments *arguments) {
#if defined(EIGENATTN_MATRICES)
    arguments->bf16 ? join<uint16_t>(*arguments) : join<float>(*arguments);
#endif
}
}
