// What all ways of decoding have in common: a task, its blocks, and the softmax.
//
// A task is one row's KV head with all query heads that share it, over one stretch of the sequence. It goes through
// blocks of tokens: keys to scores, scores to weights, and values summed as latents, so that of a block nothing leaves
// the first cache. `R_(n0 + i) = R_n0 R_i`: one small table of `R_i` turns the keys of every block, and the query is
// turned back by the position at which the block begins; where positions have gaps in it, each key is turned by its own
// way from the middle of them. Each pair of dimensions is padded to lie in two vectors side by side, whatever pairs are
// (`order`), and dimensions that do not rotate are pairs that turn by 0. Values are taken to the output's dimensions once
// a query, not once a token.

#pragma once

#include <cmath>
#include <numeric>

#include "arguments.h"
#include "scales.h"
#include "threads.h"
#include "vectors.h"

namespace {

constexpr int HEADS = 16;   // that matrices take at once
constexpr int SPAN = 256;  // tokens whose weights are held at most

// A list of tokens: those that are latents, or the exact window.
struct List {
    const Side *keys, *values;
    int64_t low, high;      // which of its tokens are seen
    int64_t column;         // of its token 0
    const float *queries;   // [heads, width of keys], without rotary positions
    const float *offsets;   // what the keys' mean adds to scores, or null
    const float *mean;      // of rotary keys, as pairs lie, or null
    const Pages *pages;     // that its tokens lie in, if its `table` is not null
    int64_t total, sums;    // where in a partial result what weights add up to lies, and sums of values
    bool window;

    bool same() const { return keys->rows.data == values->rows.data; }
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
    Task(const Arguments &arguments, int64_t b, int64_t g, int span)
        : a(arguments), b(b), g(g), group(a.heads / a.kv_heads), width(2 * a.pairs), span(span) {
        prepare();
    }
    virtual ~Task() = default;
    Task(const Task &) = delete;
    Task &operator=(const Task &) = delete;

    // Attend to latents low .. high - 1 and, if asked, to the window.
    void run(int64_t low, int64_t high, bool with_window, float *results);

  protected:
    // Of a span, whose rows lie at `keys_at` and `values_at`: scores to `weights`; and values, weighted, to sums. Where
    // keys are values, a span is a block.
    virtual void begin(const List &) {}
    virtual void score(const List &list) = 0;
    virtual void add_values(const List &list) = 0;
    virtual void fade(int64_t p, float by);
    virtual void finish(const List &) {}

    void turn_to(const List &list, int block);
    // How a pair of a token is turned from the middle. `table` points at the pair's cosines by distance, `step` apart, and
    // sines lie so far behind.
    void turn_of(int64_t pair, int t, const float *table, int64_t step, int64_t behind, float *cosine, float *sine) const {
        const int64_t distance = away[a.row_of_pair ? a.row_of_pair[pair] : 0][t], size = std::abs(distance);
        if (size < BLOCK) {
            *cosine = table[size * step];
            *sine = distance < 0 ? -table[size * step + behind] : table[size * step + behind];
        } else {
            *cosine = float(std::cos(double(distance) * a.frequencies[pair]));
            *sine = float(std::sin(double(distance) * a.frequencies[pair]));
        }
    }
    int tokens_of(int block) const { return std::min(BLOCK, held - block * BLOCK); }
    void fetch(const Strip &strip, int64_t low, int64_t high);

    const Arguments &a;
    const int64_t b, g, group, width;
    const Partial partial{a};
    const int span;               // tokens whose scores are found before their weights
    int64_t n0 = 0;               // the span's first token
    int held = 0, blocks = 0;     // its tokens, and their blocks
    int64_t away[MOST_ROWS][SPAN];  // of its tokens, in each row: positions, or where these have gaps the way from the middle
    bool gaps[SPAN / BLOCK];      // whether positions in a block do not follow each other
    Strip keys_at, values_at;
    float *results = nullptr;     // [heads, partial.size]
    float *weights = nullptr;     // [heads, SPAN]: scores, and then weights
    float *turned = nullptr;      // [heads, width]: queries as pairs lie, turned to where a block begins, or its middle
    float *small = nullptr;       // [heads, padded rank]: in the keys' space

  private:
    void prepare();
    void attend(const List &list);
    void weigh(const List &list);
    Strip strip_of(const Side &side, const Pages &pages) const;

    float *query = nullptr;       // [heads, size] in fp32, scaled
    float *in_pairs = nullptr;    // [heads, width]: the same as pairs lie
    float *offsets = nullptr;     // [heads]
    double *cosines = nullptr, *sines = nullptr;  // [pairs]: of the way from there to the query
    bool standing = false;        // whether these are of a block, and where it began
    int64_t begun[MOST_ROWS] = {};
};

void Task::prepare() {
    thread_local Room<> rooms[6];
    thread_local Room<double> turning;
    const int64_t rank = padded(a.keys.rank), d = padded(a.size);
    query = rooms[0].of(group * d);
    in_pairs = rooms[1].of(group * width);
    turned = rooms[2].of(group * width);
    weights = rooms[3].of(group * SPAN);
    small = rooms[4].of(group * rank);
    offsets = rooms[5].of(group);
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

// Turn the query to where a block of the span begins; where positions have gaps, to the middle of them.
void Task::turn_to(const List &list, int block) {
    const int count = tokens_of(block);
    int64_t now[MOST_ROWS];
    bool follows = standing, stays = standing;
    gaps[block] = false;
    for (int64_t r = 0; r < a.rows; r++) {
        int64_t *own = away[r] + block * BLOCK;
        const int64_t first = b * a.positions_batch + r * a.positions_row;
        const int64_t at = first + (list.column + n0 + block * BLOCK) * a.positions.stride;
        for (int t = 0; t < count; t++) {
            own[t] = number_at(a.positions, at + t * a.positions.stride);
            gaps[block] |= own[t] != own[0] + t;
        }
    }
    for (int64_t r = 0; r < a.rows; r++) {
        int64_t *own = away[r] + block * BLOCK;
        now[r] = own[0];
        if (gaps[block]) {
            const auto [low, high] = std::minmax_element(own, own + count);
            now[r] = *low + (*high - *low) / 2;
            for (int t = 0; t < count; t++) own[t] -= now[r];
        }
        follows &= now[r] == begun[r] + BLOCK;
        stays &= now[r] == begun[r];
    }
    if (follows) {
        const double *x = a.frequencies + a.pairs, *y = x + a.pairs;
        for (int64_t i = 0; i < a.pairs; i++) {
            const double c = cosines[i], s = sines[i];
            cosines[i] = c * x[i] + s * y[i];
            sines[i] = s * x[i] - c * y[i];
        }
    } else if (!stays) {
        double distance[MOST_ROWS];
        for (int64_t r = 0; r < a.rows; r++)
            distance[r] = double(number_at(a.position, b * a.position.stride + r * a.position_row) - now[r]);
        for (int64_t i = 0; i < a.pairs; i++) {
            const double angle = distance[a.row_of_pair ? a.row_of_pair[i] : 0] * a.frequencies[i];
            cosines[i] = std::cos(angle);
            sines[i] = std::sin(angle);
        }
    }
    standing = true;
    std::copy(now, now + a.rows, begun);
    for (int64_t i = 0; i < a.pairs; i += LANES) {
        float narrow[2 * LANES];
        for (int j = 0; j < LANES; j++) narrow[j] = float(cosines[i + j]), narrow[LANES + j] = float(sines[i + j]);
        const Vector c = load(narrow), s = load(narrow + LANES);
        for (int64_t p = 0; p < group; p++) {
            const float *q = in_pairs + p * width + 2 * i;
            const Vector x = load(q), y = load(q + LANES);
            store(turned + p * width + 2 * i, x * c - y * s);
            store(turned + p * width + 2 * i + LANES, y * c + x * s);
        }
    }
}

// Scores to weights; what was summed before fades as the top score rises.
void Task::weigh(const List &list) {
    const int filled = blocks * BLOCK;
    Integers lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    const int64_t column = list.column + n0, distance = column - number_of(a.length, b);
    for (int64_t p = 0; p < group; p++) {
        const int64_t head = g * group + p;
        float *own = weights + p * SPAN;
        for (int i = 0; i < filled; i += LANES) {
            Vector score = load(own + i);
            if (list.offsets) score += list.offsets[p];
            if (a.softcap > 0) {
                // tanh(x) = 1 - 2 / (exp(2 x) + 1), with x within the bounds of exp
                const Vector x = score * float(2 / a.softcap);
                const Vector bounded = x > 80.0f ? Vector{} + 80.0f : x;
                score = float(a.softcap) - float(2 * a.softcap) / (exponential(bounded) + 1.0f);
            }
            if (a.slopes) score += __builtin_convertvector(lane + int32_t(distance + i), Vector) * a.slopes[head];
            store(own + i, lane + i < held ? score : Vector{} + NOTHING);
        }
        if (a.mask) {
            const int64_t at = b * a.mask_batch + head * a.mask_head + column;
            for (int t = 0; t < held; t++)
                if (a.mask_kind == 2)
                    own[t] += reinterpret_cast<const float *>(a.mask)[at + t];
                else if (!a.mask[at + t])
                    own[t] = NOTHING;
        }
        Vector most = load(own);
        for (int i = LANES; i < filled; i += LANES) most = larger(most, load(own + i));
        float *result = results + p * partial.size;
        const float risen = std::max(result[0], largest(most));
        if (risen == NOTHING) {
            std::fill(own, own + filled, 0.0f);
            continue;
        }
        if (risen > result[0]) {
            fade(p, std::exp(result[0] - risen));
            result[0] = risen;
        }
        Vector total = {};
        for (int i = 0; i < filled; i += LANES) {
            const Vector weight = exponential(load(own + i) - risen);
            store(own + i, weight);
            total += weight;
        }
        result[list.total] += sum(total);
    }
}

void Task::fade(int64_t p, float by) {
    float *result = results + p * partial.size;
    for (int64_t i = 0; i < partial.size; i++) result[i] *= by;
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
void Task::fetch(const Strip &strip, int64_t low, int64_t high) {
    if (low >= high) return;
    const char *row = strip.at(low);  // of those that are asked for together, few lie in another page
    if (strip.step < strip.size + 64)  // one behind the other
        for (const char *end = row + (high - low) * strip.step; row < end; row += 64) __builtin_prefetch(row);
    else
        for (int64_t n = low; n < high; n++, row += strip.step)
            for (int64_t i = 0; i < strip.size; i += 64) __builtin_prefetch(row + i);
}

void Task::attend(const List &list) {
    keys_at = strip_of(*list.keys, *list.pages), values_at = strip_of(*list.values, *list.pages);
    begin(list);
    const int tokens = list.same() ? BLOCK : span;
    for (n0 = list.low; n0 < list.high; n0 += tokens) {
        held = int(std::min<int64_t>(tokens, list.high - n0));
        blocks = (held + BLOCK - 1) / BLOCK;
        score(list);
        weigh(list);
        add_values(list);
    }
    finish(list);
}

void Task::run(int64_t low, int64_t high, bool with_window, float *into) {
    results = into;
    std::fill(results, results + group * partial.size, 0.0f);
    for (int64_t p = 0; p < group; p++) results[p * partial.size] = NOTHING;
    const float *mean = a.pairs && a.keys.mean ? a.keys.mean + g * width : nullptr;
    const float *plain = a.pairs ? nullptr : offsets;
    attend({&a.keys, &a.values, low, high, 0, small, plain, mean, &a.far_pages, 1, partial.far, false});
    if (!with_window) return;
    Side near_keys{}, near_values{};
    near_keys.rows = a.near_keys, near_keys.rank = a.size;
    near_values.rows = a.near_values, near_values.rank = a.size_out;
    near_keys.scale = near_values.scale = -1;
    const int64_t column = number_of(a.column, b), seen = std::max(number_of(a.first, b), number_of(a.length, b));
    const int64_t from = std::max<int64_t>(seen - column, 0), to = std::min(number_of(a.stop, b) - column, a.slots);
    attend({&near_keys, &near_values, from, to, column, query, nullptr, nullptr, &a.near_pages, 2, partial.near, true});
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
