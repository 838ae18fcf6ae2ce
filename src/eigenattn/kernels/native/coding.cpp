// Vectors to latents, latents to packed codes and back, and the rotation of vectors.

#include <cmath>

#include "matrices.h"
#include "scales.h"
#include "threads.h"

namespace {

constexpr int PACKED = 64;  // tokens whose codes are found together
constexpr int FILLED = 32;  // channels that an encoder is filled up to whole times of

// What is known of a channel's codes: their thresholds, or levels, begin at `table`, and up to two parts of them, of
// which one is `code >> down & mask`, lie `shift` bits up in a byte each.
struct Channel {
    int32_t bits, table;
    struct {
        int32_t byte, shift, down, mask;
    } part[2];
};

// Codes that are bytes, in halves of 16 bits: shifts move nothing from one to another.
constexpr int ACROSS = 4 * LANES;
typedef uint16_t Halves __attribute__((vector_size(ACROSS)));

// How many of 2^bits - 1 thresholds, which rise, lie below each; all of them below what is no number, as in PyTorch.
template <int V> inline void count_below(const Vector *x, const float *at, int bits, Integers *found) {
    const int last = (1 << bits) - 1;
#if defined(EIGENATTN_AVX512)
    // By halves from four bits on: among thresholds in registers, or the last sixteen of many by their addresses.
    const auto search = [&](int half, const auto &probes) {
        for (; half; half /= 2)
            UNROLLED for (int j = 0; j < V; j++) {
                const Vector probe = probes(found[j] + (half - 1), j);
                const __mmask16 above = _mm512_cmp_ps_mask((__m512)x[j], (__m512)probe, _CMP_NLE_UQ);
                found[j] = (Integers)_mm512_mask_add_epi32((__m512i)found[j], above, (__m512i)found[j],
                                                           _mm512_set1_epi32(half));
            }
    };
    const auto table = [&](int i) { return (__m512)load_part(at + i * LANES, last - i * LANES); };
    if (bits == 4) {
        const __m512 all = table(0);
        UNROLLED for (int j = 0; j < V; j++) found[j] = Integers{};
        return search(8, [&](Integers i, int) { return (Vector)_mm512_permutexvar_ps((__m512i)i, all); });
    }
    if (bits == 5 || bits == 6) {
        const __m512 a = table(0), b = table(1), c = table(bits == 6 ? 2 : 0), d = table(bits == 6 ? 3 : 1);
        __mmask16 upper[V];
        UNROLLED for (int j = 0; j < V; j++) {
            upper[j] = bits == 6 ? _mm512_cmp_ps_mask((__m512)x[j], _mm512_set1_ps(at[31]), _CMP_NLE_UQ) : __mmask16(0);
            found[j] = Integers{};
        }
        search(16, [&](Integers i, int j) {
            const __m512 low = _mm512_permutex2var_ps(a, (__m512i)i, b), high = _mm512_permutex2var_ps(c, (__m512i)i, d);
            return (Vector)_mm512_mask_blend_ps(upper[j], low, high);
        });
        UNROLLED for (int j = 0; j < V; j++)
            found[j] = (Integers)_mm512_mask_add_epi32((__m512i)found[j], upper[j], (__m512i)found[j], _mm512_set1_epi32(32));
        return;
    }
    if (bits > 6) {
        UNROLLED for (int j = 0; j < V; j++) found[j] = Integers{} + (last - 15);
        for (int i = 15; i < last; i += 16)
            UNROLLED for (int j = 0; j < V; j++) found[j] += (x[j] <= at[i]) & -16;
        return search(8, [&](Integers i, int) { return (Vector)_mm512_i32gather_ps((__m512i)i, at, 4); });
    }
#endif
    UNROLLED for (int j = 0; j < V; j++) found[j] = Integers{} + last;
    for (int i = 0; i < last; i++)
        UNROLLED for (int j = 0; j < V; j++) found[j] += x[j] <= at[i];  // a comparison that holds is -1
}

// Up to V vectors of latents [tokens, row] to the codes of their nearest levels, as many as there are thresholds below
// them, in rows of `step` bytes.
template <int V>
void pack_some(const float *z, int64_t row, int64_t tokens, const Channel *channels, int64_t count,
               const float *thresholds, int64_t bytes, uint8_t *out, int64_t step) {
    constexpr int MOST = V * LANES, WHOLE = (MOST + ACROSS - 1) / ACROSS * ACROSS;
    thread_local Room<uint8_t> room;
    uint8_t *packed = room.of(bytes * WHOLE);
    std::fill(packed, packed + bytes * WHOLE, 0);
    Vector columns[LANES][V];  // of so many channels
    for (int64_t c = 0; c < count; c++) {
        if (c % LANES == 0)
            for (int j = 0; j < V; j++) {
                Vector some[LANES];
                UNROLLED for (int t = 0; t < LANES; t++)
                    some[t] = j * LANES + t < tokens ? load_part(z + (j * LANES + t) * row + c, count - c) : Vector{};
                transpose(some);
                UNROLLED for (int i = 0; i < LANES; i++) columns[i][j] = some[i];
            }
        const Channel &channel = channels[c];
        Integers found[V];
        count_below<V>(columns[c % LANES], thresholds + channel.table, channel.bits, found);
        alignas(64) uint8_t code[WHOLE] = {};
        for (int j = 0; j < V; j++) {
            typedef uint8_t Bytes __attribute__((vector_size(LANES)));
            const Bytes some = __builtin_convertvector(found[j], Bytes);
            std::memcpy(code + j * LANES, &some, LANES);
        }
        for (const auto &part : channel.part)
            if (part.mask)
                for (int i = 0; i < WHOLE; i += ACROSS) {
                    Halves some, held;
                    uint8_t *own = packed + part.byte * WHOLE + i;
                    std::memcpy(&some, code + i, ACROSS);
                    std::memcpy(&held, own, ACROSS);
                    held |= (some >> uint16_t(part.down) & uint16_t(part.mask * 0x101)) << uint16_t(part.shift);
                    std::memcpy(own, &held, ACROSS);
                }
    }
    int64_t i = 0;
    for (; i + 4 <= bytes; i += 4) {
        uint32_t four[MOST];
        const uint8_t *from = packed + i * WHOLE;
        for (int t = 0; t < MOST; t++)
            four[t] = from[t] | from[WHOLE + t] << 8 | from[2 * WHOLE + t] << 16 | uint32_t(from[3 * WHOLE + t]) << 24;
        for (int64_t t = 0; t < tokens; t++) std::memcpy(out + t * step + i, four + t, 4);
    }
    for (; i < bytes; i++)
        for (int64_t t = 0; t < tokens; t++) out[t * step + i] = packed[i * WHOLE + t];
}

// Few tokens, of a step of decoding, or as many as are packed together.
void pack(const float *z, int64_t row, int64_t tokens, const Channel *channels, int64_t count, const float *thresholds,
          int64_t bytes, uint8_t *out, int64_t step) {
    const auto some = tokens <= LANES ? pack_some<1> : pack_some<PACKED / LANES>;
    some(z, row, tokens, channels, count, thresholds, bytes, out, step);
}

// Vectors of some heads [batch, heads, tokens, size] with these strides, bf16 or fp32, and their part in a latent.
struct Source {
    const char *data;
    int64_t batch, head, token, bf16;
    const float *mean;     // [latents, heads of a latent * size], or null
    const float *encoder;  // [latents, heads of a latent * size, channels filled up]
    // The same for matrices, or null: so many parts of bf16 that encoders are the sums of, which `multiply` takes, and
    // what the mean comes to [latents, channels filled up].
    const uint16_t *matrices;
    int64_t parts;
    const float *of_mean;

    int64_t at(int64_t b, int64_t h, int64_t t) const { return b * batch + h * head + t * token; }
};

// Add P vectors [size] times an encoder [size, row] to latents, P rows of theirs.
template <int P> void add_encoded(const float *x, int64_t size, const float *encoder, int64_t row, float *z) {
    for (int64_t r = 0; r < row; r += LANES) {
        Vector total[P];
        UNROLLED for (int p = 0; p < P; p++) total[p] = load(z + p * row + r);
        for (int64_t d = 0; d < size; d++) {
            const Vector of_dimension = load(encoder + d * row + r);
            UNROLLED for (int p = 0; p < P; p++) total[p] += x[p * size + d] * of_dimension;
        }
        UNROLLED for (int p = 0; p < P; p++) store(z + p * row + r, total[p]);
    }
}

// Some tokens' part in latents [tokens, row] of the l-th kind, each of `shared` heads.
void encode(const Source &source, int64_t b, int64_t l, int64_t first, int64_t tokens, int64_t shared, int64_t size,
            int64_t row, float *z) {
    thread_local Room<> room;
    const int64_t width = shared * size;
    float *x = room.of(tokens * width);
    const float *mean = source.mean ? source.mean + l * width : nullptr;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < shared; h++) {
            const int64_t at = source.at(b, l * shared + h, first + t);
            float *own = x + t * width + h * size;
            if (source.bf16)
                for (int64_t d = 0; d < size; d++) own[d] = number(reinterpret_cast<const uint16_t *>(source.data)[at + d]);
            else
                std::copy_n(reinterpret_cast<const float *>(source.data) + at, size, own);
            if (mean)
                for (int64_t d = 0; d < size; d++) own[d] -= mean[h * size + d];
        }
    const float *encoder = source.encoder + l * width * row;
    int64_t t = 0;
    for (; t + 8 <= tokens; t += 8) add_encoded<8>(x + t * width, width, encoder, row, z + t * row);
    for (; t < tokens; t++) add_encoded<1>(x + t * width, width, encoder, row, z + t * row);
}

#if defined(EIGENATTN_MATRICES)
// The same of vectors in bf16, by matrices, whose registers are the caller's.
void encode_by_matrices(const Source &source, int64_t b, int64_t l, int64_t first, int64_t tokens, int64_t shared,
                        int64_t size, int64_t row, float *z) {
    thread_local Room<uint16_t> room;
    thread_local Room<> wide;
    const int64_t depth = (shared * size + DEPTH - 1) / DEPTH * DEPTH;
    uint16_t *x = room.of(BLOCK * depth);
    float *product = wide.of(BLOCK * row);
    std::fill(x, x + BLOCK * depth, 0);
    for (int64_t start = 0; start < tokens; start += BLOCK) {
        const int64_t some = std::min<int64_t>(tokens - start, BLOCK);
        for (int64_t t = 0; t < some; t++)
            for (int64_t h = 0; h < shared; h++) {
                const int64_t at = source.at(b, l * shared + h, first + start + t);
                std::memcpy(x + t * depth + h * size, reinterpret_cast<const uint16_t *>(source.data) + at, 2 * size);
            }
        multiply(x, 1, source.matrices + l * source.parts * depth * row, source.parts, depth, row, product);
        settle();
        for (int64_t t = 0; t < some; t++)
            for (int64_t r = 0; r < row; r += LANES) {
                float *own = z + (start + t) * row + r;
                const Vector found = load(own) + load(product + t * row + r);
                store(own, source.of_mean ? found - load(source.of_mean + l * row + r) : found);
            }
    }
}
#endif

// Take a latent over its scale, of which the byte is given; channels are filled up with zeros.
uint8_t over_scale(float *z, int64_t row) {
    Vector squares = {};
    for (int64_t i = 0; i < row; i += LANES) squares += load(z + i) * load(z + i);
    const float code = std::nearbyint(std::log2(std::sqrt(sum(squares))) * OCTAVE + UNIT_SCALE);
    const uint8_t scale = code > 255 ? 255 : code > 0 ? uint8_t(code) : 0;
    for (int64_t i = 0; i < row; i += LANES) store(z + i, load(z + i) / SCALES.of[scale]);
    return scale;
}

// Codes [tokens, bytes], a row each so many bytes, to the levels that they stand for, [tokens, channels].
void unpack(const uint8_t *codes, int64_t step, int64_t bytes, int64_t tokens, const Channel *channels, int64_t count,
            const float *levels, float *out) {
    thread_local Room<uint8_t> room;
    uint8_t *packed = room.of(bytes * PACKED);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < bytes; i++) packed[i * PACKED + t] = codes[t * step + i];
    for (int64_t c = 0; c < count; c++) {
        const Channel &channel = channels[c];
        const float *at = levels + channel.table;
        int32_t code[PACKED] = {};
        for (const auto &part : channel.part)
            if (part.mask)
                for (int t = 0; t < PACKED; t++)
                    code[t] |= (packed[part.byte * PACKED + t] >> part.shift & part.mask) << part.down;
        for (int64_t t = 0; t < tokens; t++) out[t * count + c] = at[code[t]];
    }
}

inline float number(float x) { return x; }
inline void put(float x, float *out) { *out = x; }
inline void put(float x, uint16_t *out) { *out = rounded(x); }
inline void put(Vector x, float *out) { store(out, x); }
inline void put(Vector x, uint16_t *out) { store_rounded(out, x); }

inline float to_bf16(float x) { return number(rounded(x)); }
inline Vector to_bf16(Vector x) {
    uint16_t found[LANES];
    store_rounded(found, x);
    return load_part(found, LANES);
}

// Turn one vector, of which dimensions from `width` on stay. By angles in bf16 products are rounded too, as models have
// it whose arithmetic is in bf16.
template <class T, class A>
void turn(const T *from, const A *c, const A *s, int64_t width, int64_t size, T *to) {
    const auto times = [](auto x, auto y) {
        if constexpr (sizeof(A) == 2)
            return to_bf16(x * y);
        else
            return x * y;
    };
    const int64_t half = width / 2;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const auto of = [&](const auto *p) { return load_part(p + i, LANES); };
        const Vector one = of(from), other = of(from + half);
        put(times(one, of(c)) - times(other, of(s)), to + i);
        put(times(other, of(c + half)) + times(one, of(s + half)), to + half + i);
    }
    for (; i < half; i++) {
        const float one = number(from[i]), other = number(from[half + i]);
        put(times(one, number(c[i])) - times(other, number(s[i])), to + i);
        put(times(other, number(c[half + i])) + times(one, number(s[half + i])), to + half + i);
    }
    std::copy(from + width, from + size, to + width);
}

// Call with a list of a batch's heads, and with which tokens of it.
template <class Function>
void by_blocks(int64_t lists, int64_t tokens, int64_t threads, Function function) {
    const int64_t blocks = (tokens + PACKED - 1) / PACKED;
    in_parallel(lists * blocks, threads, [&](int64_t i) {
        const int64_t first = i % blocks * PACKED;
        function(i / blocks, first, std::min<int64_t>(PACKED, tokens - first));
    });
}

}  // namespace

extern "C" {

// Latents [batch, heads, tokens, count] in fp32 to codes [batch, heads, tokens, bytes]; `size` thresholds a head.
void eigenattn_pack(const float *z, int64_t batch, int64_t heads, int64_t tokens, int64_t count, const int32_t *channels,
                    const float *thresholds, int64_t size, int64_t bytes, int64_t threads, uint8_t *out) {
    by_blocks(batch * heads, tokens, threads, [&](int64_t list, int64_t first, int64_t some) {
        const int64_t row = list * tokens + first;
        pack(z + row * count, count, some, reinterpret_cast<const Channel *>(channels), count,
             thresholds + list % heads * size, bytes, out + row * bytes, bytes);
    });
}

// Vectors, of so many sources, `heads` latents of `shared` heads of theirs with `count` channels, to codes [batch, heads,
// tokens, bytes], and if they are over scales the byte of one behind each.
void eigenattn_encode(const char *sources, int64_t parts, int64_t batch, int64_t heads, int64_t tokens, int64_t shared,
                      int64_t length, int64_t count, const int32_t *channels, const float *thresholds, int64_t size,
                      int64_t bytes, int64_t scaled, int64_t threads, uint8_t *out) {
    const int64_t row = (count + FILLED - 1) / FILLED * FILLED, step = bytes + scaled;
    by_blocks(batch * heads, tokens, threads, [&](int64_t list, int64_t first, int64_t some) {
        thread_local Room<> room;
        float *z = room.of(PACKED * row);
        std::fill(z, z + some * row, 0.0f);
        const Source *each = reinterpret_cast<const Source *>(sources);
#if defined(EIGENATTN_MATRICES)
        const Registers registers{std::any_of(each, each + parts, [](const Source &x) { return x.matrices; })};
#endif
        for (int64_t i = 0; i < parts; i++) {
#if defined(EIGENATTN_MATRICES)
            if (each[i].matrices) {
                encode_by_matrices(each[i], list / heads, list % heads, first, some, shared, length, row, z);
                continue;
            }
#endif
            encode(each[i], list / heads, list % heads, first, some, shared, length, row, z);
        }
        uint8_t *own = out + (list * tokens + first) * step;
        if (scaled)
            for (int64_t t = 0; t < some; t++) own[t * step + bytes] = over_scale(z + t * row, row);
        pack(z, row, some, reinterpret_cast<const Channel *>(channels), count, thresholds + list % heads * size, bytes, own,
             step);
    });
}

// The way back, of rows with these strides in bytes; `size` levels a head.
void eigenattn_unpack(const uint8_t *codes, int64_t batch, int64_t heads, int64_t tokens, int64_t bytes,
                      int64_t batch_step, int64_t head_step, int64_t step, const int32_t *channels, int64_t count,
                      const float *levels, int64_t size, int64_t threads, float *out) {
    by_blocks(batch * heads, tokens, threads, [&](int64_t list, int64_t first, int64_t some) {
        unpack(codes + list / heads * batch_step + list % heads * head_step + first * step, step, bytes, some,
               reinterpret_cast<const Channel *>(channels), count, levels + list % heads * size,
               out + (list * tokens + first) * count);
    });
}

// Vectors [batch, heads, tokens, size] with these strides, in fp32 or bf16, to where cosines and sines [batch, tokens,
// width] turn them, in fp32 or, of vectors in bf16, in bf16; pairs are halves: [batch, tokens, heads, size].
void eigenattn_rotate(const void *x, int64_t batch, int64_t heads, int64_t tokens, int64_t size, int64_t batch_step,
                      int64_t head_step, int64_t step, int64_t bf16, const void *cosines, const void *sines,
                      int64_t width, int64_t turn_batch_step, int64_t turn_step, int64_t turn_bf16, int64_t threads,
                      void *out) {
    const auto all = [&](auto *x, auto *cosines, auto *sines, auto *out) {
        by_blocks(batch, tokens, threads, [&](int64_t b, int64_t first, int64_t some) {
            for (int64_t t = first; t < first + some; t++)
                for (int64_t h = 0; h < heads; h++) {
                    const int64_t turn_at = b * turn_batch_step + t * turn_step;
                    turn(x + b * batch_step + h * head_step + t * step, cosines + turn_at, sines + turn_at, width, size,
                         out + ((b * tokens + t) * heads + h) * size);
                }
        });
    };
    typedef const uint16_t *Halves;
    typedef const float *Floats;
    if (!bf16)
        all(Floats(x), Floats(cosines), Floats(sines), static_cast<float *>(out));
    else if (turn_bf16)
        all(Halves(x), Halves(cosines), Halves(sines), static_cast<uint16_t *>(out));
    else
        all(Halves(x), Floats(cosines), Floats(sines), static_cast<uint16_t *>(out));
}
}
