// Latents to packed codes and back, and the rotation of vectors, for texts that are read.

#include "threads.h"
#include "vectors.h"

namespace {

constexpr int PACKED = 64;  // tokens whose codes are found together

// What is known of a channel's codes: their thresholds, or levels, begin at `table`, and up to two parts of them, of
// which one is `code >> down & mask`, lie `shift` bits up in a byte each.
struct Channel {
    int32_t bits, table;
    struct {
        int32_t byte, shift, down, mask;
    } part[2];
};

// Latents [tokens, channels] to the codes of their nearest levels, as many as there are thresholds below them.
void pack(const float *z, int64_t tokens, const Channel *channels, int64_t count, const float *thresholds, int64_t bytes,
          uint8_t *out) {
    thread_local Room<uint8_t> room;
    uint8_t *packed = room.of(bytes * PACKED);
    std::fill(packed, packed + bytes * PACKED, 0);
    for (int64_t c = 0; c < count; c++) {
        const Channel &channel = channels[c];
        const float *at = thresholds + channel.table;
        const int32_t last = (1 << channel.bits) - 1;
        float column[PACKED] = {};
        for (int64_t t = 0; t < tokens; t++) column[t] = z[t * count + c];
        constexpr int V = PACKED / LANES;
        Vector x[V];
        Integers found[V];
        UNROLLED for (int j = 0; j < V; j++) x[j] = load(column + j * LANES), found[j] = Integers{} + last;
        // A comparison that holds is -1. What is no number has the last code, as it has in PyTorch.
        for (int i = 0; i < last; i++)
            UNROLLED for (int j = 0; j < V; j++) found[j] += x[j] <= at[i];
        int32_t code[PACKED];
        std::memcpy(code, found, sizeof(code));
        for (const auto &part : channel.part)
            if (part.mask)
                for (int t = 0; t < PACKED; t++)
                    packed[part.byte * PACKED + t] |= uint8_t((code[t] >> part.down & part.mask) << part.shift);
    }
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < bytes; i++) out[t * bytes + i] = packed[i * PACKED + t];
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
        pack(z + row * count, some, reinterpret_cast<const Channel *>(channels), count, thresholds + list % heads * size,
             bytes, out + row * bytes);
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

// Vectors [batch, heads, tokens, size] with these strides, in fp32, to where cosines and sines [batch, tokens, width] turn
// them, pairs being halves: [batch, tokens, heads, size].
void eigenattn_rotate(const float *x, int64_t batch, int64_t heads, int64_t tokens, int64_t size, int64_t batch_step,
                      int64_t head_step, int64_t step, const float *cosines, const float *sines, int64_t width,
                      int64_t turn_batch_step, int64_t turn_step, int64_t threads, float *out) {
    const int64_t half = width / 2;
    by_blocks(batch, tokens, threads, [&](int64_t b, int64_t first, int64_t some) {
        for (int64_t t = first; t < first + some; t++) {
            const float *c = cosines + b * turn_batch_step + t * turn_step, *s = sines + b * turn_batch_step + t * turn_step;
            for (int64_t h = 0; h < heads; h++) {
                const float *from = x + b * batch_step + h * head_step + t * step;
                float *to = out + ((b * tokens + t) * heads + h) * size;
                for (int64_t i = 0; i < half; i++) {
                    const float one = from[i], other = from[half + i];
                    to[i] = one * c[i] - other * s[i];
                    to[half + i] = other * c[half + i] + one * s[half + i];
                }
                std::copy(from + width, from + size, to + width);
            }
        }
    });
}
}
