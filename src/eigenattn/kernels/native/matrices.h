// Products of matrices of bf16, where a processor has registers for them (AMX, on Linux).

#pragma once

#include "arguments.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define EIGENATTN_MATRICES
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int ROWS = 16, DEPTH = 32;  // of a matrix that the processor takes: tokens, or pairs of channels; and channels
static_assert(LANES == ROWS && BLOCK == 2 * ROWS, "a block is two matrices of tokens");

// Programs have to ask for the registers, of 8 kB a thread.
bool granted() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// Two vectors to bf16, and what that leaves of them to bf16 too; halves are rounded up, which costs nothing that counts.
inline void split(Vector a, Vector b, uint16_t *high, uint16_t *low) {
    const Integers half = Integers{} + 0x8000, kept = Integers{} + int32_t(0xffff0000);
    Integers odd;  // which 16 bits count: the upper ones of all of both
    for (int i = 0; i < LANES; i++) odd[i] = (4 * i + 1) | (4 * i + 3) << 16;
    const Integers a_high = (Integers(a) + half) & kept, b_high = (Integers(b) + half) & kept;
    const Integers a_low = Integers(a - Vector(a_high)) + half, b_low = Integers(b - Vector(b_high)) + half;
    _mm512_storeu_si512(high, _mm512_permutex2var_epi16((__m512i)a_high, (__m512i)odd, (__m512i)b_high));
    _mm512_storeu_si512(low, _mm512_permutex2var_epi16((__m512i)a_low, (__m512i)odd, (__m512i)b_low));
}

// A thread's registers of matrices, all of 16 rows of 64 bytes, as long as this lives.
class Matrices {
  public:
    explicit Matrices(bool wanted) : wanted(wanted) {
        if (!wanted) return;
        struct {
            uint8_t palette = 1, row = 0, nothing[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, ROWS};
        } shapes;
        _tile_loadconfig(&shapes);
    }
    ~Matrices() {
        if (wanted) _tile_release();
    }
    Matrices(const Matrices &) = delete;
    Matrices &operator=(const Matrices &) = delete;

    // Add up a block's latents [parts, BLOCK, depth] times decoders [decoders, depth / DEPTH, width / ROWS, ROWS, DEPTH]:
    // [BLOCK, width].
    static void multiply(const uint16_t *z, int parts, const uint16_t *u, int64_t decoders, int64_t depth, int64_t width,
                         float *out) {
        const int64_t stride = 2 * depth, chunks = depth / DEPTH, columns = width / ROWS;
        for (int64_t n = 0; n < columns; n += 2) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t i = 0; i < decoders; i++)
                for (int64_t k = 0; k < chunks; k++) {
                    const uint16_t *some = u + ((i * chunks + k) * columns + n) * ROWS * DEPTH;
                    _tile_loadd(6, some, 2 * DEPTH);
                    _tile_loadd(7, some + ROWS * DEPTH, 2 * DEPTH);
                    for (int64_t j = 0; i + j < std::max<int64_t>(parts, decoders) && j < parts; j++) {
                        const uint16_t *rows = z + j * BLOCK * depth + k * DEPTH;
                        _tile_loadd(4, rows, stride);
                        _tile_loadd(5, rows + ROWS * depth, stride);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_dpbf16ps(1, 4, 7);
                        _tile_dpbf16ps(2, 5, 6);
                        _tile_dpbf16ps(3, 5, 7);
                    }
                }
            float *at = out + n * ROWS;
            _tile_stored(0, at, 4 * width);
            _tile_stored(1, at + ROWS, 4 * width);
            _tile_stored(2, at + ROWS * width, 4 * width);
            _tile_stored(3, at + ROWS * width + ROWS, 4 * width);
        }
    }

  private:
    const bool wanted;
};

}  // namespace
#endif
