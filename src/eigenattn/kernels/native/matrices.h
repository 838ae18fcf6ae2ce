// Products of matrices of bf16, where a processor has registers for them (AMX, on Linux).

#pragma once

#include "arguments.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512VBMI2__) && defined(__linux__)
#define EIGENATTN_MATRICES
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int ROWS = 16, DEPTH = 32;  // of a matrix in a register
constexpr int MATRIX = ROWS * DEPTH;  // its numbers
static_assert(LANES == ROWS && BLOCK == 2 * ROWS, "a block is two matrices of tokens");

// Programs have to ask for the registers, of 8 kB a thread.
inline bool granted() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// What was written is in memory: compilers do not know that registers of matrices are loaded from there.
inline void settle() { asm volatile("" ::: "memory"); }

// Two numbers of bf16 a lane: of one token in two channels, or of two tokens, 16 apart, in one.
typedef uint32_t Couples __attribute__((vector_size(64)));

inline Couples load(const uint16_t *p) { return (Couples)_mm512_loadu_si512(p); }
inline void store(uint16_t *p, Couples x) { _mm512_storeu_si512(p, (__m512i)x); }

// Of two couples each, what lies below and what lies above.
inline Couples lowers(Couples a, Couples b) { return (a & 0xffffu) | b << 16; }
inline Couples uppers(Couples a, Couples b) { return a >> 16 | (b & 0xffff0000u); }

// What is to be cut off behind the upper 16 bits; halves are rounded up, which costs nothing that counts.
inline Couples to_cut(Vector x) { return Couples(x) + 0x8000u; }

// Two vectors to bf16: in a lane what both have there.
inline Couples rounded(Vector lower, Vector upper) { return uppers(to_cut(lower), to_cut(upper)); }

// The upper 16 bits of two vectors, side by side.
inline Couples side_by_side(Couples a, Couples b) {
    Integers odd;
    for (int i = 0; i < LANES; i++) odd[i] = (4 * i + 1) | (4 * i + 3) << 16;
    return (Couples)_mm512_permutex2var_epi16((__m512i)a, (__m512i)odd, (__m512i)b);
}

// Call with two vectors that are to be cut to bf16, with what that leaves of them, and so on.
template <int PARTS, class Take> inline void split(Vector a, Vector b, Take take) {
    const uint32_t kept = 0xffff0000;
    UNROLLED for (int i = 0; i < PARTS; i++) {
        const Couples first = to_cut(a), second = to_cut(b);
        take(i, first, second);
        a -= Vector(first & kept), b -= Vector(second & kept);
    }
}

// A thread's registers of matrices, all of 16 rows of 64 bytes, as long as this lives.
class Registers {
  public:
    explicit Registers(bool wanted) : wanted(wanted) {
        if (!wanted) return;
        struct {
            uint8_t palette = 1, row = 0, nothing[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, ROWS};
        } shapes;
        _tile_loadconfig(&shapes);
    }
    ~Registers() {
        if (wanted) _tile_release();
    }
    Registers(const Registers &) = delete;
    Registers &operator=(const Registers &) = delete;

  private:
    const bool wanted;
};

// Add up a block's latents [parts, BLOCK, depth] times decoders [decoders, depth / DEPTH, width / ROWS, ROWS, DEPTH]:
// [BLOCK, width].
inline void multiply(const uint16_t *z, int parts, const uint16_t *u, int64_t decoders, int64_t depth, int64_t width,
                     float *out) {
    settle();
    const int64_t stride = 2 * depth, chunks = depth / DEPTH, columns = width / ROWS;
    for (int64_t n = 0; n < columns; n += 2) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t i = 0; i < decoders; i++)
            for (int64_t k = 0; k < chunks; k++) {
                const uint16_t *some = u + ((i * chunks + k) * columns + n) * MATRIX;
                _tile_loadd(6, some, 2 * DEPTH);
                _tile_loadd(7, some + MATRIX, 2 * DEPTH);
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

}  // namespace
#endif
