// One step of decoding over latents on a CPU; `arguments.h` says what it is given, and `Step` in Python what it means.
//
// A task is one row's KV head with all query heads that share it, over one stretch of the sequence. It goes through
// blocks of tokens: keys to scores, scores to weights, and values summed as latents, so that of a block nothing leaves
// the first cache. What makes it fast:
//
// - `R_(n0 + i) = R_n0 R_i`: one small table of `R_i` turns the keys of every block, and the query is turned back by
//   the position at which the block begins, where positions have no gap in it.
// - Keys are decoded in tiles that stay in registers, are rotated there, and scored by all heads. Each pair of
//   dimensions is padded to lie in two vectors side by side, whatever pairs are (`order`), and dimensions that do not
//   rotate are pairs that turn by 0.
// - Where a processor multiplies matrices of bf16 (AMX), it decodes a block at a time: a number in fp32 is two of bf16,
//   its rounding and what that leaves, and of their products all count but the smallest.
// - A score's partial sums are a vector. As many as a vector has lanes are transposed and added up at once.
// - Values are taken to the output's dimensions once a query, not once a token.

#include <cmath>
#include <limits>
#include <numeric>

#include "arguments.h"
#include "matrices.h"
#include "threads.h"
#include "vectors.h"

namespace {

constexpr int TILE = 4;  // tokens whose keys are in registers together
constexpr int PAIRS = LANES == 8 ? 1 : 2;  // vectors of pairs in a tile: AVX2 has half as many registers
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// What the bytes of scales stand for: see codebook.py.
struct Scales {
    Scales() {
        for (int i = 0; i < 256; i++) of[i] = std::exp2(float(i - 128) / 4);
    }
    float of[256];
};
const Scales SCALES;

// How the codes of one vector of channels are found in a row.
struct Codes {
    // Lanes have the place of their code's lower part, and 16 bits up that of the upper, counted from `base`; what the
    // two bytes are shifted by; and which bits of what comes of it count.
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

// A list of tokens: those that are latents, or the exact window.
struct List {
    const Side *keys, *values;
    int64_t low, high;      // which of its tokens are seen
    int64_t column;         // of its token 0
    const float *queries;   // [heads, width of keys], without rotary positions
    const float *offsets;   // what the keys' mean adds to scores, or null
    const float *decoder, *mean;  // of rotary keys
    const Pages *pages;           // that its tokens lie in, if its `table` is not null
    int64_t total, sums;    // where in a partial result what weights add up to lies, and sums of values
};

// A head's rows, in bytes: one behind the other, or in pages.
struct Strip {
    const char *first;
    int64_t step, size;
    const int32_t *table;  // of the pages, or null
    int64_t tokens, page;  // of a page, and from page to page

    const char *page_at(int64_t i) const { return first + table[i] * page; }
    const char *at(int64_t n) const { return table ? page_at(n / tokens) + n % tokens * step : first + n * step; }
    // Where `count` rows from the n-th on lie.
    void find(int64_t n, int count, const char **rows) const {
        const char *row = at(n);
        for (int64_t t = 0, i = table ? n / tokens : 0, left = table ? tokens - n % tokens : count; t < count; t++) {
            if (!left--) row = page_at(++i), left = tokens - 1;
            rows[t] = row;
            row += step;
        }
    }
};

// What a task leaves of each head: the top score, what weights on latents and on the window add up to against it, and
// sums of latents and of exact values.
struct Partial {
    explicit Partial(const Arguments &a)
        : far(LANES), near(far + padded(a.values.rank)), size(near + (a.slots ? padded(a.size_out) : 0)) {}
    const int64_t far, near, size;
};

class Task {
  public:
    Task(const Arguments &arguments, int64_t b, int64_t g)
        : a(arguments), b(b), g(g), group(a.heads / a.kv_heads), width(2 * a.pairs) {
        prepare();
    }

    // Attend to latents low .. high - 1 and, if asked, to the window.
    void run(int64_t low, int64_t high, bool with_window, float *results);

  private:
    void prepare();
    void attend(const List &list);
    void turn_to(const List &list, int64_t n0);
    const float *turn_by(int64_t distance, float *own);
    template <int V> void score_tile(const List &list, int t0, int64_t pair);
    template <int P> void score_small(const List &list, int t0, int64_t p0);
    void weigh(const List &list, int64_t n0);
    template <int P> void add_values(const List &list, int64_t p0);
    void rows_of(const Side &side, const Strip &strip, int64_t n0, float *room, const float **rows);
    Strip strip_of(const Side &side, const Pages &pages) const;
    void to_pairs();
    void decode_block(const List &list);
    void fetch(const Strip &strip, int64_t n0, int64_t n1);

    const Arguments &a;
    const int64_t b, g, group, width;
    bool multiplies = false;      // whether matrices decode keys
    int count = 0;                // tokens of the block
    const Partial partial{a};
    float *results = nullptr;     // [heads, partial.size]
    float *query = nullptr;       // [heads, size] in fp32, scaled
    float *in_pairs = nullptr;    // [heads, width]: the same as pairs lie
    float *turned = nullptr;      // [heads, width]: turned to where the block begins
    float *parts = nullptr;       // [heads, BLOCK, LANES]: partial sums of scores
    float *weights = nullptr;     // [heads, BLOCK]
    float *small = nullptr;       // [heads, padded rank]: in the keys' space
    float *offsets = nullptr;     // [heads]
    float *key_room = nullptr, *value_room = nullptr, *pair_room = nullptr, *turn_room = nullptr;
    uint16_t *halves = nullptr;   // [2, BLOCK, padded rank]: a block's latents in bf16, and what that leaves of them
    double *cosines = nullptr, *sines = nullptr;  // [pairs]: of the way from the block's begin to the query
    bool standing = false;        // whether these are of a block, which began at `begin`
    int64_t begin = 0;
    const float *keys[BLOCK], *values[BLOCK], *turns[BLOCK];
};

void Task::prepare() {
    thread_local Room<> rooms[11];
    thread_local Room<double> turning;
    thread_local Room<uint16_t> rounding;
    const int64_t rank = padded(a.keys.rank), d = padded(a.size);
    const int64_t widest = std::max({rank, d, width, padded(a.values.rank), padded(a.size_out)});
    query = rooms[0].of(group * d);
    in_pairs = rooms[1].of(group * width);
    turned = rooms[2].of(group * width);
    parts = rooms[3].of(group * BLOCK * LANES);
    weights = rooms[4].of(group * BLOCK);
    small = rooms[5].of(group * rank);
    offsets = rooms[6].of(group);
    key_room = rooms[7].of(BLOCK * widest);
    value_room = rooms[8].of(BLOCK * widest);
    pair_room = rooms[9].of(BLOCK * width);
    turn_room = rooms[10].of(BLOCK * width);
    multiplies = a.pairs && a.keys.matrices;
    if (multiplies) halves = rounding.of(2 * BLOCK * (rank + LANES));
    cosines = turning.of(2 * a.pairs);
    sines = cosines + a.pairs;
    for (int64_t p = 0; p < group; p++) {
        const char *q = row_of(a.query, b, g * group + p);
        float *own = query + p * d;
        for (int64_t i = 0; i < d; i++) {
            const float x = i >= a.size              ? 0.0f
                            : a.query.kind == FP32 ? reinterpret_cast<const float *>(q)[i]
                                                   : number(reinterpret_cast<const uint16_t *>(q)[i]);
            own[i] = x * float(a.scale);
        }
        if (a.pairs) {
            for (int64_t i = 0; i < width; i++) {
                const bool rotates = a.frequencies[i / (2 * LANES) * LANES + i % LANES] != 0;
                const double scaling = rotates ? a.scaling * a.scaling : 1.0;
                in_pairs[p * width + i] = a.order[i] < 0 ? 0.0f : float(own[a.order[i]] * scaling);
            }
            continue;
        }
        const float *mean = a.keys.mean ? a.keys.mean + g * a.size : nullptr;
        offsets[p] = mean ? std::inner_product(mean, mean + a.size, own, 0.0f) : 0.0f;
        if (!a.keys.decoder) {
            std::copy(own, own + rank, small + p * rank);
            continue;
        }
        const float *decoder = a.keys.decoder + g * a.size * rank;
        for (int64_t r = 0; r < rank; r += LANES) {
            Vector total = {};
            for (int64_t i = 0; i < a.size; i++) total += own[i] * load(decoder + i * rank + r);
            store(small + p * rank + r, total);
        }
    }
}

// Turn the query to where a block begins, and find the rotation of each of its tokens.
void Task::turn_to(const List &list, int64_t n0) {
    int64_t position[BLOCK], gaps = 0;
    const int64_t at = b * a.positions_batch + (list.column + n0) * a.positions.stride;
    for (int t = 0; t < count; t++)
        position[t] = a.positions.bytes == 8 ? static_cast<const int64_t *>(a.positions.data)[at + t * a.positions.stride]
                                             : static_cast<const int32_t *>(a.positions.data)[at + t * a.positions.stride];
    const int64_t now = position[0];
    for (int t = 0; t < count; t++) gaps |= position[t] - now - t;
    if (standing && now == begin + BLOCK) {
        const double *x = a.frequencies + a.pairs, *y = x + a.pairs;
        for (int64_t i = 0; i < a.pairs; i++) {
            const double c = cosines[i], s = sines[i];
            cosines[i] = c * x[i] + s * y[i];
            sines[i] = s * x[i] - c * y[i];
        }
    } else if (!standing || now != begin) {
        const double distance = double(number_of(a.position, b) - now);
        for (int64_t i = 0; i < a.pairs; i++) {
            cosines[i] = std::cos(distance * a.frequencies[i]);
            sines[i] = std::sin(distance * a.frequencies[i]);
        }
    }
    standing = true;
    begin = now;
    for (int64_t i = 0; i < a.pairs; i += LANES) {
        Vector c, s;
        for (int j = 0; j < LANES; j++) c[j] = float(cosines[i + j]), s[j] = float(sines[i + j]);
        for (int64_t p = 0; p < group; p++) {
            const float *q = in_pairs + p * width + 2 * i;
            const Vector x = load(q), y = load(q + LANES);
            store(turned + p * width + 2 * i, x * c - y * s);
            store(turned + p * width + 2 * i + LANES, y * c + x * s);
        }
    }
    for (int t = 0; t < count; t++) turns[t] = a.table + t * width;
    if (gaps)
        for (int t = 0; t < count; t++) turns[t] = turn_by(position[t] - now, turn_room + t * width);
}

// The rotation by a distance: the table's, or one of its own.
const float *Task::turn_by(int64_t distance, float *own) {
    if (distance >= 0 && distance < BLOCK) return a.table + distance * width;
    for (int64_t i = 0; i < a.pairs; i++) {
        float *pair = own + i / LANES * 2 * LANES + i % LANES;
        pair[0] = float(std::cos(double(distance) * a.frequencies[i]));
        pair[LANES] = float(std::sin(double(distance) * a.frequencies[i]));
    }
    return own;
}

// Where the rows of a block's tokens lie in fp32: unpacked, with zeros behind, if they are anything else.
void Task::rows_of(const Side &side, const Strip &strip, int64_t n0, float *room, const float **rows) {
    const int64_t size = padded(side.rank);
    const int tokens = count;
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
void Task::to_pairs() {
    for (int t = 0; t < count; t++) {
        float *own = pair_room + t * width;
        for (int64_t i = 0; i < width; i++) own[i] = a.order[i] < 0 ? 0.0f : keys[t][a.order[i]];
        keys[t] = own;
    }
}

// Keys of a block decoded at once, as pairs lie.
void Task::decode_block([[maybe_unused]] const List &list) {
#if defined(EIGENATTN_MATRICES)
    const int64_t rank = list.keys->rank, depth = (rank + DEPTH - 1) / DEPTH * DEPTH, decoders = list.keys->matrices;
    const int parts = list.keys->rows.kind == BF16 ? 1 : 2;
    for (int t = 0; t < count; t++)
        for (int64_t i = 0; i < depth; i += DEPTH) {
            Vector x[2];
            UNROLLED for (int j = 0; j < 2; j++) {
                const int64_t at = i + j * LANES, left = rank - at;
                x[j] = left >= LANES ? load(keys[t] + at) : left > 0 ? load_part(keys[t] + at, left) : Vector{};
            }
            uint16_t *own = halves + t * depth + i;
            split(x[0], x[1], own, own + BLOCK * depth);
        }
    const uint16_t *u = reinterpret_cast<const uint16_t *>(list.keys->decoder) + g * decoders * depth * width;
    Matrices::multiply(halves, parts, u, decoders, depth, width, pair_room);
#endif
    for (int t = 0; t < count; t++) keys[t] = pair_room + t * width;
}

// Decode, rotate and score some tokens in V vectors of pairs: partial sums are added to what other pairs gave.
template <int V> void Task::score_tile(const List &list, int t0, int64_t pair) {
    Vector x[TILE][2 * V];
    const float *rows[TILE], *turn[TILE];
    const int64_t at = 2 * pair;
    UNROLLED for (int t = 0; t < TILE; t++) {
        const int n = std::min(t0 + t, count - 1);  // behind the block's end the last token again
        rows[t] = keys[n];
        turn[t] = turns[n] + at;
    }
    UNROLLED for (int t = 0; t < TILE; t++)
        UNROLLED for (int j = 0; j < 2 * V; j++) x[t][j] = list.mean ? load(list.mean + at + j * LANES) : Vector{};
    if (list.decoder && !multiplies) {
        const float *u = list.decoder + at;
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
template <int P> void Task::score_small(const List &list, int t0, int64_t p0) {
    const int64_t rank = list.keys->rank, size = padded(rank);
    Vector total[TILE][P];
    const float *rows[TILE], *q = list.queries + p0 * size;
    UNROLLED for (int t = 0; t < TILE; t++) {
        rows[t] = keys[std::min(t0 + t, count - 1)];
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

// Partial sums to scores, and scores to weights; what was summed before fades as the top score rises.
void Task::weigh(const List &list, int64_t n0) {
    Integers lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    const int64_t column = list.column + n0, distance = column - number_of(a.length, b);
    for (int64_t p = 0; p < group; p++) {
        const int64_t head = g * group + p;
        const float *part = parts + p * BLOCK * LANES;
        float *own = weights + p * BLOCK;
        for (int i = 0; i < BLOCK; i += LANES) {
            Vector score = sums_of<LANES / 2>(part + i * LANES);
            if (list.offsets) score += list.offsets[p];
            if (a.softcap > 0) {
                // tanh(x) = 1 - 2 / (exp(2 x) + 1), with x within the bounds of exp
                const Vector x = score * float(2 / a.softcap);
                const Vector bounded = x > 80.0f ? Vector{} + 80.0f : x;
                score = float(a.softcap) - float(2 * a.softcap) / (exponential(bounded) + 1.0f);
            }
            if (a.slopes) score += __builtin_convertvector(lane + int32_t(distance + i), Vector) * a.slopes[head];
            store(own + i, lane + i < count ? score : Vector{} + NOTHING);
        }
        if (a.mask) {
            const int64_t at = b * a.mask_batch + head * a.mask_head + column;
            for (int t = 0; t < count; t++)
                if (a.mask_kind == 2)
                    own[t] += reinterpret_cast<const float *>(a.mask)[at + t];
                else if (!a.mask[at + t])
                    own[t] = NOTHING;
        }
        Vector most = load(own);
        for (int i = LANES; i < BLOCK; i += LANES) most = larger(most, load(own + i));
        float *result = results + p * partial.size;
        const float risen = std::max(result[0], largest(most));
        if (risen == NOTHING) {
            std::fill(own, own + BLOCK, 0.0f);
            continue;
        }
        if (risen > result[0]) {
            const float fade = std::exp(result[0] - risen);
            for (int64_t i = 0; i < partial.size; i++) result[i] *= fade;
            result[0] = risen;
        }
        Vector total = {};
        for (int i = 0; i < BLOCK; i += LANES) {
            const Vector weight = exponential(load(own + i) - risen);
            store(own + i, weight);
            total += weight;
        }
        result[list.total] += sum(total);
    }
}

// Values of a block, for P heads from the p0-th on, four vectors at a time.
template <int P> void Task::add_values(const List &list, int64_t p0) {
    const int64_t rank = list.values->rank;
    float *sums = results + p0 * partial.size + list.sums;
    const float *weight = weights + p0 * BLOCK;
    const auto some = [&](auto vectors, int64_t i) {
        constexpr int V = decltype(vectors)::value;
        Vector total[P][V];
        UNROLLED for (int p = 0; p < P; p++)
            UNROLLED for (int j = 0; j < V; j++) total[p][j] = load(sums + p * partial.size + i + j * LANES);
        const int64_t left = rank - (i + (V - 1) * LANES);  // channels of the last vector
        for (int t = 0; t < count; t++) {
            Vector x[V];
            UNROLLED for (int j = 0; j < V - 1; j++) x[j] = load(values[t] + i + j * LANES);
            const float *last = values[t] + i + (V - 1) * LANES;
            x[V - 1] = left >= LANES ? load(last) : load_part(last, left);
            UNROLLED for (int p = 0; p < P; p++)
                UNROLLED for (int j = 0; j < V; j++) total[p][j] += weight[p * BLOCK + t] * x[j];
        }
        UNROLLED for (int p = 0; p < P; p++)
            UNROLLED for (int j = 0; j < V; j++) store(sums + p * partial.size + i + j * LANES, total[p][j]);
    };
    int64_t i = 0;
    for (; i + 3 * LANES < rank; i += 4 * LANES) some(std::integral_constant<int, 4>{}, i);
    for (; i + LANES < rank; i += 2 * LANES) some(std::integral_constant<int, 2>{}, i);
    for (; i < rank; i += LANES) some(std::integral_constant<int, 1>{}, i);
}

// Call with so many of a group's heads at a time, from the first on.
template <class Function> inline void by_heads(int64_t heads, Function function) {
    int64_t p = 0;
    for (; p + 4 <= heads; p += 4) function(std::integral_constant<int, 4>{}, p);
    if (heads - p == 3) function(std::integral_constant<int, 3>{}, p);
    if (heads - p == 2) function(std::integral_constant<int, 2>{}, p);
    if (heads - p == 1) function(std::integral_constant<int, 1>{}, p);
}

Strip Task::strip_of(const Side &side, const Pages &pages) const {
    const int64_t size = bytes_of(side.rows);
    return {row_of(side.rows, pages.table ? 0 : b, g),
            side.rows.token * size,
            side.rows.kind == CODES ? side.bytes : side.rank * size,
            pages.table ? pages.table + b * pages.stride : nullptr,
            pages.tokens,
            side.rows.batch * size};
}

// Ask for rows that a later block will need: the processor by itself asks too late for two lists at once.
void Task::fetch(const Strip &strip, int64_t n0, int64_t n1) {
    if (n0 >= n1) return;
    const char *row = strip.at(n0);  // of those that are asked for together, few lie in another page
    if (strip.step < strip.size + 64)  // one behind the other
        for (const char *end = row + (n1 - n0) * strip.step; row < end; row += 64) __builtin_prefetch(row);
    else
        for (int64_t n = n0; n < n1; n++, row += strip.step)
            for (int64_t i = 0; i < strip.size; i += 64) __builtin_prefetch(row + i);
}

void Task::attend(const List &list) {
    const bool same = list.keys->rows.data == list.values->rows.data;
    const Strip keys_at = strip_of(*list.keys, *list.pages), values_at = strip_of(*list.values, *list.pages);
    for (int64_t n0 = list.low; n0 < list.high; n0 += BLOCK) {
        count = int(std::min<int64_t>(BLOCK, list.high - n0));
        rows_of(*list.keys, keys_at, n0, key_room, keys);
        if (same)
            std::copy(keys, keys + count, values);
        else
            rows_of(*list.values, values_at, n0, value_room, values);
        if (a.pairs) turn_to(list, n0);
        if (a.pairs && !list.decoder)
            to_pairs();
        else if (multiplies)
            decode_block(list);
        for (int t0 = 0; t0 < count; t0 += TILE) {
            const int64_t later = n0 + BLOCK + t0, end = std::min(later + TILE, list.high);
            fetch(keys_at, later, end);
            if (!same) fetch(values_at, later, end);
            if (a.pairs) {
                int64_t pair = 0;
                for (; pair + PAIRS * LANES <= a.pairs; pair += PAIRS * LANES) score_tile<PAIRS>(list, t0, pair);
                for (; pair < a.pairs; pair += LANES) score_tile<1>(list, t0, pair);
            } else {
                by_heads(group, [&](auto some, int64_t p) { score_small<decltype(some)::value>(list, t0, p); });
            }
        }
        weigh(list, n0);
        by_heads(group, [&](auto some, int64_t p) { add_values<decltype(some)::value>(list, p); });
    }
}

void Task::run(int64_t low, int64_t high, bool with_window, float *into) {
    results = into;
#if defined(EIGENATTN_MATRICES)
    const Matrices registers(multiplies);
#endif
    std::fill(results, results + group * partial.size, 0.0f);
    for (int64_t p = 0; p < group; p++) results[p * partial.size] = NOTHING;
    const float *decoder = a.pairs && a.keys.decoder ? a.keys.decoder + g * a.keys.rank * width : nullptr;
    const float *mean = a.pairs && a.keys.mean ? a.keys.mean + g * width : nullptr;
    const float *plain = a.pairs ? nullptr : offsets;
    attend({&a.keys, &a.values, low, high, 0, small, plain, decoder, mean, &a.far_pages, 1, partial.far});
    if (!with_window) return;
    Side near_keys{}, near_values{};
    near_keys.rows = a.near_keys, near_keys.rank = a.size;
    near_values.rows = a.near_values, near_values.rank = a.size_out;
    const int64_t column = number_of(a.column, b), seen = std::max(number_of(a.first, b), number_of(a.length, b));
    const int64_t from = std::max<int64_t>(seen - column, 0), to = std::min(number_of(a.stop, b) - column, a.slots);
    attend({&near_keys, &near_values, from, to, column, query, nullptr, nullptr, nullptr, &a.near_pages, 2, partial.near});
}

// One head's output: of partial results, of which each counts by its top score.
void combine(const Arguments &a, int64_t b, int64_t h, const float *results, int64_t parts, int64_t stride) {
    const Partial partial(a);
    const int64_t group = a.heads / a.kv_heads, g = h / group;
    thread_local Room<> rooms[2];
    float *sums = rooms[0].of(partial.size), *out = rooms[1].of(a.size_out);
    std::fill(sums, sums + partial.size, 0.0f);
    const float sink = a.sinks ? a.sinks[h] : NOTHING;
    float top = sink;
    for (int64_t i = 0; i < parts; i++) top = std::max(top, results[i * stride]);
    for (int64_t i = 0; i < parts; i++) {
        const float *result = results + i * stride;
        if (result[0] == NOTHING) continue;
        const float share = std::exp(result[0] - top);
        for (int64_t j = 1; j < partial.size; j++) sums[j] += share * result[j];
    }
    const float total = sums[1] + sums[2] + (a.sinks ? std::exp(sink - top) : 0.0f), scale = total > 0 ? 1 / total : 0.0f;
    for (int64_t d = 0; d < a.size_out; d++)
        out[d] = (a.slots ? sums[partial.near + d] : 0.0f) + (a.values.mean ? sums[1] * a.values.mean[g * a.size_out + d] : 0.0f);
    if (a.values.decoder) {
        const float *u = a.values.decoder + g * a.values.rank * a.size_out;
        for (int64_t r = 0; r < a.values.rank; r++, u += a.size_out)
            for (int64_t d = 0; d < a.size_out; d++) out[d] += sums[partial.far + r] * u[d];
    } else {
        for (int64_t d = 0; d < a.size_out; d++) out[d] += sums[partial.far + d];
    }
    const int64_t at = (b * a.heads + h) * a.size_out;
    for (int64_t d = 0; d < a.size_out; d++)
        if (a.out_kind == FP32)
            reinterpret_cast<float *>(a.out)[at + d] = out[d] * scale;
        else
            reinterpret_cast<uint16_t *>(a.out)[at + d] = rounded(out[d] * scale);
}

}  // namespace

extern "C" {

int eigenattn_lanes() { return LANES; }
int eigenattn_block() { return BLOCK; }
// Whether decoders are to be matrices of bf16.
int eigenattn_matrices() {
#if defined(EIGENATTN_MATRICES)
    static const bool found = granted();
    return found;
#else
    return 0;
#endif
}
int64_t eigenattn_size() { return sizeof(Arguments); }

void eigenattn_decode(const Arguments *arguments) {
    const Arguments &a = *arguments;
    const Partial partial(a);
    const int64_t group = a.heads / a.kv_heads, lists = a.batch * a.kv_heads, size = group * partial.size;
    // Few lists are split, so that all threads have work, and none of less than some blocks.
    const int64_t wanted = a.threads > 1 ? (2 * a.threads + lists - 1) / lists : 1;
    const int64_t splits = std::max<int64_t>(std::min(wanted, a.tokens / (8 * BLOCK)), 1);
    thread_local Room<> room;
    float *results = room.of(lists * splits * size);
    in_parallel(lists * splits, a.threads, [&](int64_t i) {
        const int64_t list = i / splits, split = i % splits, b = list / a.kv_heads;
        const int64_t first = std::max<int64_t>(number_of(a.first, b), 0);
        const int64_t stop = std::max(std::min(number_of(a.length, b), a.tokens), first);
        const int64_t each = (stop - first + splits * BLOCK - 1) / (splits * BLOCK) * BLOCK;
        const int64_t low = std::min(first + split * each, stop);
        Task task(a, b, list % a.kv_heads);
        task.run(low, std::min(low + each, stop), split == splits - 1 && a.slots, results + i * size);
    });
    in_parallel(a.batch * a.heads, a.threads > 4 ? a.threads : 1, [&](int64_t i) {
        const int64_t list = i / group;
        combine(a, i / a.heads, i % a.heads, results + list * splits * size + i % group * partial.size, splits, size);
    });
}
}
