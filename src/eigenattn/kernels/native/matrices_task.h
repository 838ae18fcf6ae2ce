// Decoding by products of matrices of bf16, where a processor has registers for them (AMX, on Linux).
//
// All of a block is a product: keys are decoders times latents, scores are queries times keys, and sums are values times
// weights. Tokens are columns all along, so that a channel's codes of all tokens are one vector, in which their levels
// are looked up, and rotations are of vectors of tokens.

#pragma once

#include "matrices.h"
#include "task.h"

#if defined(EIGENATTN_MATRICES)

namespace {

constexpr int AT_ONCE = 4 * ROWS;  // channels of values that are summed in registers together
constexpr int BLOCKS = SPAN / BLOCK;
static_assert(HEADS == ROWS && BLOCK == DEPTH, "matrices of as many heads, and of as many tokens");

// Numbers of bf16 in so many tables of 32, by couples of indices.
template <int TABLES> inline Couples look_up(Couples index, const uint16_t *table) {
    const __m512i i = (__m512i)index;
    const auto some = [&](int n) { return _mm512_loadu_si512(table + 32 * n); };
    if constexpr (TABLES == 1) return (Couples)_mm512_permutexvar_epi16(i, some(0));
    const auto two = [&](int n) { return _mm512_permutex2var_epi16(some(n), i, some(n + 1)); };
    if constexpr (TABLES == 2) return (Couples)two(0);
    const __mmask32 odd = _mm512_test_epi16_mask(i, _mm512_set1_epi16(64));
    const __mmask32 upper = _mm512_test_epi16_mask(i, _mm512_set1_epi16(128));
    return (Couples)_mm512_mask_blend_epi16(upper, _mm512_mask_blend_epi16(odd, two(0), two(2)),
                                            _mm512_mask_blend_epi16(odd, two(4), two(6)));
}

// How the codes of a channel are found in rows of codes, and what stands for them.
struct Channel {
    // Of up to two parts: which two bytes hold it, and, in both halves of 32 bits, how far these are turned right and
    // which bits count then.
    struct {
        int32_t column;
        uint32_t turn, mask;
        Couples of(const uint16_t *columns) const {
            const __m512i x = (__m512i)load(columns + column * BLOCK);
            return (Couples)_mm512_shrdv_epi16(x, x, _mm512_set1_epi32(int(turn))) & (Couples{} + mask);
        }
    } part[2];
    int32_t table, tables;  // its first table in its head's, and how many of 32 numbers it has
    int32_t alike;          // channels from this one on that have as many parts and tables

    // The levels of these, from the columns of their codes: BLOCK of each channel.
    template <int TABLES, bool TWO>
    void look_up_alike(const uint16_t *columns, const uint16_t *levels, uint16_t *out) const {
        for (const Channel *c = this, *end = c + alike; c < end; c++, out += BLOCK) {
            Couples index = c->part[0].of(columns);
            if (TWO) index |= c->part[1].of(columns);
            store(out, look_up<TABLES>(index, levels + 32 * c->table));
        }
    }
};

// Rows of so many bytes to columns of two, couples of tokens: [2 bytes of a row, BLOCK], and zeros behind.
inline void transpose(const char *const *rows, int64_t bytes, uint16_t *columns) {
    using Each = std::make_index_sequence<LANES>;
    for (int64_t i = 0; i < bytes; i += 32, columns += 16 * BLOCK) {
        const __mmask32 there = bytes - i >= 32 ? ~__mmask32(0) : (__mmask32(1) << (bytes - i)) - 1;
        Couples x[2][8];
        UNROLLED for (int half = 0; half < 2; half++) {
            const char *const *some = rows + half * ROWS;
            UNROLLED for (int t = 0; t < 8; t++) {
                const __m256i a = _mm256_maskz_loadu_epi8(there, some[t] + i);
                const __m256i b = _mm256_maskz_loadu_epi8(there, some[t + 8] + i);
                x[half][t] = (Couples)_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
            }
            exchange<1, 8>(x[half], Each{}), exchange<2, 8>(x[half], Each{}), exchange<4, 8>(x[half], Each{});
        }
        UNROLLED for (int t = 0; t < 8; t++) {
            store(columns + 2 * t * BLOCK, lowers(x[0][t], x[1][t]));
            store(columns + (2 * t + 1) * BLOCK, uppers(x[0][t], x[1][t]));
        }
    }
}

// Sums [AT_ONCE, HEADS].
inline void to_registers(const float *sums) {
    _tile_loadd(0, sums, 4 * HEADS);
    _tile_loadd(1, sums + ROWS * HEADS, 4 * HEADS);
    _tile_loadd(2, sums + 2 * ROWS * HEADS, 4 * HEADS);
    _tile_loadd(3, sums + 3 * ROWS * HEADS, 4 * HEADS);
}

inline void from_registers(float *sums) {
    _tile_stored(0, sums, 4 * HEADS);
    _tile_stored(1, sums + ROWS * HEADS, 4 * HEADS);
    _tile_stored(2, sums + 2 * ROWS * HEADS, 4 * HEADS);
    _tile_stored(3, sums + 3 * ROWS * HEADS, 4 * HEADS);
}

class ByMatrices final : public Task {
  public:
    ByMatrices(const Arguments &arguments, int64_t b, int64_t g);

  private:
    void begin(const List &list) override;
    void score(const List &list) override;
    void add_values(const List &list) override;
    void fade(int64_t p, float by) override;
    void finish(const List &list) override;

    void unpack(const Side &side, const Strip &strip, int64_t high, int block, uint16_t *words, float *scales);
    void bring(const float *query, int64_t step, int64_t chunks, uint16_t *queries);
    void unpack_keys(const List &list, int block);
    void unpack_values(const List &list, int block);
    void decode(const List &list, int block);
    void rotate(const List &list, int block);
    const float *rotations(int block);
    void multiply(const uint16_t *keys, const uint16_t *queries, int64_t chunks, int block);
    void weights_to_columns(const float *scales, int block);
    void sum_up(int block, int64_t fold, int64_t c);
    uint16_t *couples_of(int64_t block, int64_t c) const {
        return couples + (block * chunks + c / DEPTH) * 2 * MATRIX + c % DEPTH * ROWS;
    }
    static int64_t chunks_of(int64_t channels) { return (channels + DEPTH - 1) / DEPTH; }

    const Registers registers{true};
    const int64_t folds = (group + HEADS - 1) / HEADS;  // of heads that a matrix takes
    int64_t chunks = 0, deep = 0;  // of a list's keys, chunks of channels; of its values, channels with zeros behind
    uint16_t *columns;   // [bytes of a row / 2, BLOCK]
    uint16_t *words;     // of every other block: [deep, BLOCK]: latents of values, couples of tokens
    uint16_t *couples;   // of each block: [chunks, 2, MATRIX]: latents of keys, couples of channels
    uint16_t *keys;      // [pairs / ROWS, 2, MATRIX]: rotated keys, couples are pairs
    uint16_t *queries;   // of each block, if keys rotate: [folds, chunks or pairs / ROWS, MATRIX]
    uint16_t *columns_of_weights;  // of each block: [folds, MATRIX]: couples of tokens by heads
    float *sums;         // [folds, deep, HEADS]
    float *fading;       // [folds, HEADS]
    float *decoded;      // [width, BLOCK]: keys before they rotate
    float *scores;       // [HEADS, BLOCK]
    float *turn_room;    // [pairs, 2, BLOCK]
    float *nothing;      // [width]: the mean of keys that have none
    float key_scales[SPAN], value_scales[SPAN];
    bool faded = false;
};

ByMatrices::ByMatrices(const Arguments &arguments, int64_t b, int64_t g) : Task(arguments, b, g, SPAN) {
    thread_local Room<uint16_t> words_of[6];
    thread_local Room<> rooms[6];
    const int64_t widest = std::max({a.keys.rank, a.values.rank, a.size, a.size_out});
    const int64_t most = chunks_of(widest) + 1, across = std::max(most, width / DEPTH) * MATRIX;
    words = words_of[0].of(4 * across);
    couples = words_of[1].of(2 * BLOCKS * across);
    keys = words_of[2].of(2 * across);
    queries = words_of[3].of(BLOCKS * folds * across);
    columns_of_weights = words_of[4].of(BLOCKS * folds * MATRIX);
    columns = words_of[5].of((widest + 8) * 2 * BLOCK);
    sums = rooms[0].of(folds * most * DEPTH * HEADS);
    fading = rooms[1].of(folds * HEADS);
    decoded = rooms[2].of(width * BLOCK);
    turn_room = rooms[3].of(width * BLOCK);
    nothing = rooms[4].of(width);
    scores = rooms[5].of(HEADS * BLOCK);
    std::fill(nothing, nothing + width, 0.0f);
}

void ByMatrices::begin(const List &list) {
    chunks = chunks_of(list.keys->rank);
    deep = (list.values->rank + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
    // Channels behind the last one; keys of odd ranks end in a couple.
    for (int64_t block = 0; block < BLOCKS; block++)
        for (int64_t c = list.keys->rank + list.keys->rank % 2; c < chunks * DEPTH; c += 2)
            for (int half = 0; half < 2; half++)
                store(couples_of(block, c) + half * MATRIX, Couples{});
    for (int of = 0; of < 2; of++)
        std::fill(words + (of * deep + list.values->rank) * BLOCK, words + (of + 1) * deep * BLOCK, 0);
    std::fill(sums, sums + folds * deep * HEADS, 0.0f);
    std::fill(fading, fading + folds * HEADS, 1.0f);
    faded = false;
    if (!a.pairs) bring(list.queries, padded(list.keys->rank), chunks, queries);
}

// Latents of a block of tokens, of which the last is `high - 1`: BLOCK of each channel; and tokens' scales.
void ByMatrices::unpack(const Side &side, const Strip &strip, int64_t high, int block, uint16_t *words, float *scales) {
    const int64_t later = n0 + (block + 1) * BLOCK;
    fetch(strip, later, std::min(later + BLOCK, high));
    const char *rows[BLOCK];
    const int count = tokens_of(block);
    strip.find(n0 + block * BLOCK, count, rows);
    std::fill(rows + count, rows + BLOCK, rows[count - 1]);  // what stands there for no token weighs nothing
    const bool coded = side.rows.kind == CODES;
    transpose(rows, !coded ? strip.size : side.scale < 0 ? side.bytes : side.scale, columns);
    for (int t = 0; t < BLOCK; t++) scales[block * BLOCK + t] = side.scale < 0 ? 1.0f : SCALES.of[uint8_t(rows[t][side.scale])];
    if (coded) {
        const Channel *channel = reinterpret_cast<const Channel *>(side.plan), *end = channel + side.rank;
        const uint16_t *levels = reinterpret_cast<const uint16_t *>(side.levels) + g * side.of_levels;
        for (; channel < end; words += channel->alike * BLOCK, channel += channel->alike) {
            const bool two = channel->part[1].mask;
            if (channel->tables == 1 && !two)
                channel->look_up_alike<1, false>(columns, levels, words);
            else if (channel->tables == 1)
                channel->look_up_alike<1, true>(columns, levels, words);
            else if (channel->tables == 2)
                channel->look_up_alike<2, true>(columns, levels, words);
            else
                channel->look_up_alike<8, false>(columns, levels, words);
        }
    } else {
        std::copy(columns, columns + side.rank * BLOCK, words);
    }
}

// Queries [heads, step] in fp32 as matrices, in so many chunks of channels; of pairs, the first ones lie before the second.
void ByMatrices::bring(const float *query, int64_t step, int64_t chunks, uint16_t *queries) {
    for (int64_t p = 0; p < group; p++)
        for (int64_t k = 0; k < chunks; k++) {
            const float *from = query + p * step + k * DEPTH;
            uint16_t *to = queries + (p / HEADS * chunks + k) * MATRIX + p % HEADS * DEPTH;
            Vector first, second;
            if (a.pairs) {
                first = load(from), second = load(from + LANES);
            } else {
                for (int i = 0; i < LANES; i++) {
                    first[i] = k * DEPTH + 2 * i < step ? from[2 * i] : 0.0f;
                    second[i] = k * DEPTH + 2 * i + 1 < step ? from[2 * i + 1] : 0.0f;
                }
            }
            store(to, rounded(first, second));
        }
}

void ByMatrices::unpack_keys(const List &list, int block) {
    uint16_t *latents = list.same() ? words : keys;  // which hold nothing yet
    unpack(*list.keys, keys_at, list.high, block, latents, key_scales);
    const int64_t rank = list.keys->rank;
    for (int64_t c = 0; c < rank; c += 2, latents += 2 * BLOCK) {
        const Couples even = load(latents), odd = c + 1 < rank ? load(latents + BLOCK) : Couples{};
        uint16_t *to = couples_of(block, c);
        store(to, lowers(even, odd));
        store(to + MATRIX, uppers(even, odd));
    }
}

void ByMatrices::unpack_values(const List &list, int block) {
    unpack(*list.values, values_at, list.high, block, words + block % 2 * deep * BLOCK, value_scales);
}

void ByMatrices::score(const List &list) {
    const int64_t across = width / DEPTH, size = folds * across * MATRIX;
    // In passes, for what each needs is to stay in the first cache. What matrices read was written some time before,
    // since it has to arrive in memory first: while a block is decoded, the one before is rotated.
    for (int block = 0; block < blocks; block++) {
        unpack_keys(list, block);
        if (!a.pairs) continue;
        turn_to(list, block);
        bring(turned, width, across, queries + block * size);
    }
    if (a.pairs) {
        for (int step = 0; step < blocks + 2; step++) {
            if (step >= 2) multiply(keys, queries + (step - 2) * size, across, step - 2);
            if (step >= 1 && step < blocks + 1) rotate(list, step - 1);
            if (step < blocks) decode(list, step);
        }
        return;
    }
    for (int block = 0; block < blocks; block++)
        multiply(couples + block * chunks * 2 * MATRIX, queries, chunks, block);
    if (list.keys->scale < 0) return;
    for (int64_t p = 0; p < group; p++)
        for (int t = 0; t < blocks * BLOCK; t += LANES) {
            float *own = weights + p * SPAN + t;
            store(own, load(own) * load(key_scales + t));
        }
}

// Cosines and sines of a block's tokens by pair: the table's, or their own.
const float *ByMatrices::rotations(int block) {
    if (!gaps[block]) return a.table;
    const int64_t *own_positions = position + block * BLOCK;
    const int count = tokens_of(block);
    for (int t = 0; t < BLOCK; t++) {
        const int64_t distance = own_positions[std::min(t, count - 1)] - own_positions[0];
        for (int64_t i = 0; i < a.pairs; i++) {
            float *own = turn_room + 2 * i * BLOCK + t;
            const float *same = a.table + 2 * i * BLOCK + distance;
            const bool there = distance >= 0 && distance < BLOCK;
            own[0] = there ? same[0] : float(std::cos(double(distance) * a.frequencies[i]));
            own[BLOCK] = there ? same[BLOCK] : float(std::sin(double(distance) * a.frequencies[i]));
        }
    }
    return turn_room;
}

// A block's keys, from latents. Those without a decoder are brought to pairs by one.
void ByMatrices::decode(const List &list, int block) {
    const int64_t columns = width / ROWS;
    const uint16_t *u = a.identity;
    if (list.keys->decoder) u = reinterpret_cast<const uint16_t *>(list.keys->decoder) + g * columns * chunks * MATRIX;
    settle();
    for (int64_t n = 0; n < columns; n += 2) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < chunks; k++) {
            const uint16_t *first = u + (n * chunks + k) * MATRIX, *second = first + chunks * MATRIX;
            const uint16_t *z = couples + (block * chunks + k) * 2 * MATRIX;
            _tile_loadd(4, first, 2 * DEPTH);
            _tile_loadd(6, z, 2 * DEPTH);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, z + MATRIX, 2 * DEPTH);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, second, 2 * DEPTH);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        float *to = decoded + n * ROWS * BLOCK;
        _tile_stored(0, to, 4 * BLOCK);
        _tile_stored(1, to + ROWS, 4 * BLOCK);
        _tile_stored(2, to + ROWS * BLOCK, 4 * BLOCK);
        _tile_stored(3, to + ROWS * BLOCK + ROWS, 4 * BLOCK);
    }
}

// Decoded keys to where their positions turn them.
void ByMatrices::rotate(const List &list, int block) {
    const float *turn = rotations(block), *mean = list.mean ? list.mean : nothing;
    const Vector scales[2] = {load(key_scales + block * BLOCK), load(key_scales + block * BLOCK + ROWS)};
    for (int64_t n = 0; n < a.pairs; n += ROWS)
        for (int i = 0; i < ROWS; i++) {
            const float first_mean = mean[2 * n + i], second_mean = mean[2 * n + ROWS + i];
            const float *x = decoded + (2 * n + i) * BLOCK, *y = x + ROWS * BLOCK;
            const float *c = turn + 2 * (n + i) * BLOCK, *s = c + BLOCK;
            uint16_t *to = keys + n / ROWS * 2 * MATRIX + i * DEPTH;
            UNROLLED for (int half = 0; half < 2; half++) {
                const int t = half * ROWS;
                const Vector first = load(x + t) * scales[half] + first_mean;
                const Vector second = load(y + t) * scales[half] + second_mean;
                const Vector cosine = load(c + t), sine = load(s + t);
                store(to + half * MATRIX, rounded(first * cosine - second * sine, second * cosine + first * sine));
            }
        }
}

// Scores of a block, of keys in so many chunks.
void ByMatrices::multiply(const uint16_t *keys, const uint16_t *queries, int64_t chunks, int block) {
    settle();
    for (int64_t fold = 0; fold < folds; fold++) {
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t k = 0; k < chunks; k++) {
            const uint16_t *of = keys + k * 2 * MATRIX;
            _tile_loadd(4, queries + (fold * chunks + k) * MATRIX, 2 * DEPTH);
            _tile_loadd(6, of, 2 * DEPTH);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, of + MATRIX, 2 * DEPTH);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, scores, 4 * BLOCK);
        _tile_stored(1, scores + ROWS, 4 * BLOCK);
        for (int64_t p = fold * HEADS; p < std::min(group, (fold + 1) * HEADS); p++)
            for (int t = 0; t < BLOCK; t += LANES)
                store(weights + p * SPAN + block * BLOCK + t, load(scores + p % HEADS * BLOCK + t));
    }
}

void ByMatrices::fade(int64_t p, float by) {
    Task::fade(p, by);
    fading[p] *= by;
    faded = true;
}

void ByMatrices::add_values(const List &list) {
    if (faded) {
        for (int64_t fold = 0; fold < folds; fold++)
            for (int64_t c = 0; c < deep; c++) {
                float *own = sums + (fold * deep + c) * HEADS;
                store(own, load(own) * load(fading + fold * HEADS));
            }
        std::fill(fading, fading + folds * HEADS, 1.0f);
        faded = false;
    }
    const bool same = list.same(), stay = folds == 1 && deep == AT_ONCE;
    const auto sums_of = [&](int64_t fold, int64_t c) { return sums + (fold * deep + c) * HEADS; };
    settle();
    if (stay) to_registers(sums);
    for (int step = 0; step < blocks + 1; step++) {
        if (step < blocks) {
            if (!same) unpack_values(list, step);
            weights_to_columns(same ? key_scales : value_scales, step);
        }
        if (step == 0) continue;
        settle();
        for (int64_t fold = 0; fold < folds; fold++)
            for (int64_t c = 0; c < deep; c += AT_ONCE) {
                if (!stay) to_registers(sums_of(fold, c));
                sum_up(step - 1, fold, c);
                if (!stay) from_registers(sums_of(fold, c));
            }
    }
    if (stay) from_registers(sums);
}

// A block's weights, over which the scales of values are taken too.
void ByMatrices::weights_to_columns(const float *scales, int block) {
    const __m512i rows = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                            _mm512_set1_epi32(HEADS));
    scales += block * BLOCK;
    for (int64_t p = 0; p < group; p++) {
        const float *own = weights + p * SPAN + block * BLOCK;
        uint16_t *to = columns_of_weights + (block * folds + p / HEADS) * MATRIX + 2 * (p % HEADS);
        const Couples found = rounded(load(own) * load(scales), load(own + ROWS) * load(scales + ROWS));
        _mm512_i32scatter_epi32(to, rows, (__m512i)found, 4);
    }
}

// Add a block's values, weighted, of some heads, and of channels from the c-th on.
void ByMatrices::sum_up(int block, int64_t fold, int64_t c) {
    const uint16_t *z = words + (block % 2 * deep + c) * BLOCK;
    _tile_loadd(6, columns_of_weights + (block * folds + fold) * MATRIX, 2 * DEPTH);
    _tile_loadd(4, z, 2 * BLOCK);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, z + MATRIX, 2 * BLOCK);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(4, z + 2 * MATRIX, 2 * BLOCK);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, z + 3 * MATRIX, 2 * BLOCK);
    _tile_dpbf16ps(3, 5, 6);
}

void ByMatrices::finish(const List &list) {
    for (int64_t p = 0; p < group; p++) {
        float *own = results + p * partial.size + list.sums;
        for (int64_t c = 0; c < list.values->rank; c++)
            own[c] = sums[(p / HEADS * deep + c) * HEADS + p % HEADS] * fading[p];
    }
}

}  // namespace
#endif
