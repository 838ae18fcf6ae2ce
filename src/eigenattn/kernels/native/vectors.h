// Vectors as wide as the machine's, by the compiler's own extension, so that one source serves AVX-512, AVX2 and NEON.
// Intrinsics stand where there is no other way to say it.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define EIGENATTN_AVX512
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr float NOTHING = -std::numeric_limits<float>::infinity();
// Arrays of vectors are registers only if loops over them are no loops before the compiler looks for such arrays.
#define UNROLLED _Pragma("GCC unroll 16")

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t UnalignedIntegers __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Vector load(const float *p) { return *reinterpret_cast<const Unaligned *>(p); }
inline void store(float *p, Vector x) { *reinterpret_cast<Unaligned *>(p) = x; }
inline Integers load(const int32_t *p) { return *reinterpret_cast<const UnalignedIntegers *>(p); }
inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

inline float number(uint16_t bf16) {
    uint32_t wide = uint32_t(bf16) << 16;
    float found;
    std::memcpy(&found, &wide, 4);
    return found;
}

inline uint16_t rounded(float x) {
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    if ((wide & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // not a number
    return uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

// To bf16, to the nearest and halves to even.
inline void store_rounded(uint16_t *p, Vector x) {
    typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
    typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
    const Bits wide = Bits(x), near = (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
    const Halves found = __builtin_convertvector(x == x ? near : Bits{} + 0x7fc0, Halves);
    std::memcpy(p, &found, sizeof(found));
}

// One step of transposing: of N vectors, lanes whose number has bit S go to where the others of the vector S on were.
template <int S, int N, class T, size_t... I> inline void exchange(T *x, std::index_sequence<I...>) {
    UNROLLED for (int i = 0; i < N; i++) {
        if (i & S) continue;
        const T a = x[i], b = x[i + S];
        x[i] = __builtin_shufflevector(a, b, (I & S ? LANES + I - S : I)...);
        x[i + S] = __builtin_shufflevector(a, b, (I & S ? LANES + I : I + S)...);
    }
}

// Rows to columns, of LANES vectors.
template <class T, int S = 1> inline void transpose(T *x) {
    if constexpr (S < LANES) {
        exchange<S, LANES>(x, std::make_index_sequence<LANES>{});
        transpose<T, 2 * S>(x);
    }
}

#if defined(EIGENATTN_AVX512)
inline __mmask16 mask_of(int64_t n) { return __mmask16(n >= LANES ? 0xffff : (1u << n) - 1); }
#endif

// The first n elements, and zeros: what lies behind a row may be another's NaN, or not be there.
inline Vector load_part(const float *p, int64_t n) {
#if defined(EIGENATTN_AVX512)
    return (Vector)_mm512_maskz_loadu_ps(mask_of(n), p);
#else
    float x[LANES] = {};
    for (int i = 0; i < std::min<int64_t>(n, LANES); i++) x[i] = p[i];
    return load(x);
#endif
}

inline Vector load_part(const uint16_t *p, int64_t n) {  // of bf16
#if defined(EIGENATTN_AVX512)
    const __m256i found = _mm256_maskz_loadu_epi16(mask_of(n), p);
    return (Vector)((Integers)_mm512_maskz_cvtepu16_epi32(0xffff, found) << 16);
#else
    float x[LANES] = {};
    for (int i = 0; i < std::min<int64_t>(n, LANES); i++) x[i] = number(p[i]);
    return load(x);
#endif
}

template <int S, size_t... I>
inline Vector fold(Vector a, Vector b, std::index_sequence<I...>) {
    // Lanes of `a` and, where their number has bit S, of `b`: each plus its neighbour S lanes away.
    return __builtin_shufflevector(a, b, (I & S ? LANES + I : I)...) +
           __builtin_shufflevector(a, b, (I & S ? LANES + (I ^ S) : (I ^ S))...);
}

template <int S>
inline Vector sums_of(const float *x) {  // of 2 S vectors, in lanes 0 .. 2 S - 1
    using Each = std::make_index_sequence<LANES>;
    if constexpr (S == 0)
        return load(x);
    else
        return fold<S>(sums_of<S / 2>(x), sums_of<S / 2>(x + S * LANES), Each{});
}

template <int S, size_t... I> inline Vector exchanged(Vector x, std::index_sequence<I...>) {
    return __builtin_shufflevector(x, x, (I ^ S)...);
}

template <int S = LANES / 2> inline float sum(Vector x) {
    if constexpr (S == 0)
        return x[0];
    else
        return sum<S / 2>(x + exchanged<S>(x, std::make_index_sequence<LANES>{}));
}

template <int S = LANES / 2> inline float largest(Vector x) {
    if constexpr (S == 0)
        return x[0];
    else
        return largest<S / 2>(larger(x, exchanged<S>(x, std::make_index_sequence<LANES>{})));
}

// e^x to an fp32's last digits, for x <= 88; 0 far below, and so of minus infinity.
inline Vector exponential(Vector x) {
    const float magic = 12582912;  // 1.5 * 2^23: adding it leaves no digits behind the point
    Vector shifted = x * 1.44269504f + magic;
    Vector n = shifted - magic;
    Vector f = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vector y = f * 1.98756915e-4f + 1.39819995e-3f;
    y = y * f + 8.33345190e-3f;
    y = y * f + 4.16657960e-2f;
    y = y * f + 1.66666655e-1f;
    y = y * f + 5.00000012e-1f;
    y = y * f * f + f + 1.0f;
    Vector scaled = Vector(Integers(y) + (Integers(shifted) << 23));
    return x > -87.0f ? scaled : Vector{};
}

}  // namespace
