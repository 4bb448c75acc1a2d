/* SIMD vectors of the machine's width, in the portable notation of GCC and Clang, and their operations. */
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#endif

/* Lanes of a vector (VL), and the tile of a product that is held in registers: MR rows by NV vectors. */
#if defined(__AVX512F__)
#define VL 16
#define MR 8
#elif defined(__AVX__)
#define VL 8
#define MR 6
#else
#define VL 4
#define MR 6
#endif
#define NV 2
#define NR (VL * NV)
#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER

typedef float Vector __attribute__((vector_size(VL * 4)));
typedef float AnyVector __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t IntVector __attribute__((vector_size(VL * 4)));
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef double EightWide __attribute__((vector_size(64)));

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE Vector load(const float *x) { return *(const AnyVector *)x; }
INLINE void store(float *x, Vector y) { *(AnyVector *)x = y; }
INLINE Vector splat(float x) { return x - Vector{}; }

/* x < y ? x : y, in one instruction. */
INLINE Vector lower_of(Vector x, Vector y) {
#if defined(__AVX512F__)
    return (Vector)_mm512_min_ps((__m512)x, (__m512)y);
#elif defined(__AVX__)
    return (Vector)_mm256_min_ps((__m256)x, (__m256)y);
#else
    return x < y ? x : y;
#endif
}

/* x > y ? x : y, in one instruction. */
INLINE Vector higher_of(Vector x, Vector y) {
#if defined(__AVX512F__)
    return (Vector)_mm512_max_ps((__m512)x, (__m512)y);
#elif defined(__AVX__)
    return (Vector)_mm256_max_ps((__m256)x, (__m256)y);
#else
    return x > y ? x : y;
#endif
}

/* Shuffle of the lanes of two vectors; those of b are numbered from VL on. */
template <int... places> INLINE Vector pick(Vector a, Vector b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, places...);
#else
    return __builtin_shuffle(a, b, IntVector{places...});
#endif
}

template <int by, int... lane> INLINE Vector rotated(Vector x, std::integer_sequence<int, lane...>) {
    return pick<(lane + by) % VL...>(x, x);
}

/* Reduces the lanes of a vector by a binary function. Halving takes fewer dependent steps than going lane by lane. */
template <int half = VL / 2, class Function> INLINE float folded(Vector x, Function function) {
    const Vector y = function(rotated<half>(x, std::make_integer_sequence<int, VL>()), x);
    if constexpr (half > 1) return folded<half / 2>(y, function);
    return y[0];
}

INLINE float highest(Vector x) { return folded(x, [](Vector a, Vector b) { return higher_of(a, b); }); }
INLINE float total(Vector x) { return folded(x, [](Vector a, Vector b) { return a + b; }); }

/* The sum of whole numbers; 0 if they are not all finite. */
INLINE int32_t whole_total(Vector x) {
    const float sum = total(x);
    return std::isfinite(sum) ? (int32_t)sum : 0;
}

/* Bit i is set if lane i of x is at least that of y. */
INLINE uint32_t lanes_at_least(Vector x, Vector y) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_GE_OQ);
#elif defined(__AVX__)
    return (uint32_t)_mm256_movemask_ps((__m256)(x >= y));
#else
    const IntVector holds = x >= y;
    uint32_t bits = 0;
    for (int i = 0; i < VL; i++) bits |= (uint32_t)(holds[i] & 1) << i;
    return bits;
#endif
}

/* Whether n numbers are finite, n a multiple of VL. */
static int are_finite(const float *x, int64_t n) {
    /* x - x is 0 for finite x, else NaN. */
    Vector sum = {};
    for (int64_t i = 0; i < n; i += VL) sum += load(x + i) - load(x + i);
    return total(sum) == 0;
}

/* Splits x >= 0 into a significand in [1, 2), or 0 for 0, and the exponent of 2, `power`. */
INLINE Vector significand(Vector x, Vector *power) {
    /* Subnormal numbers are scaled to normal ones first. */
    const IntVector is_small = x < FLT_MIN;
    const IntVector bits = (IntVector)(is_small ? x * 0x1p64f : x);
    *power = __builtin_convertvector((bits >> 23) - (is_small ? IntVector{} + 191 : IntVector{} + 127), Vector);
    return x > 0.0f ? (Vector)((bits & 0x7fffff) | 0x3f800000) : x;
}

#define LOG2_E 1.44269504f
#define LN_2 0.693147181f

/* Minimax polynomials for 2^r, |r| <= 1/2: least relative error among those that are 1 at r = 0. */
template <int degree> INLINE Vector power_series(Vector r) {
    if constexpr (degree == 6) {
        const Vector sum = (splat(1.53458124e-4f) * r + 1.33999309e-3f) * r + 9.61848907e-3f;
        return (((sum * r + 5.55032864e-2f) * r + 2.40226462e-1f) * r + 6.93147182e-1f) * r + 1.0f;
    }
    return ((splat(5.50090596e-2f) * r + 2.42210969e-1f) * r + 6.93282902e-1f) * r + 1.0f;
}

/* 2^x for x up to about 0; exactly 0 below -126, where float32 has no normal numbers left; NaN for NaN. */
template <int degree> INLINE Vector power_of_2(Vector x) {
    const Vector low = splat(-126.0f);
#if defined(__AVX512F__)
    const Vector n = (Vector)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __mmask16 is_normal = _mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ);
    return (Vector)_mm512_maskz_scalef_ps(is_normal, (__m512)power_series<degree>(x - n), (__m512)n);
#else
    /* Adding 1.5 * 2^23 rounds to an integer. */
    const Vector y = higher_of(low, x), shift = splat(12582912.0f), n = (y + shift) - shift;
    const IntVector power = (__builtin_convertvector(n, IntVector) + 127) << 23;
    return x < low ? Vector{} : power_series<degree>(y - n) * (Vector)power;
#endif
}

/* exp(x - y) for x up to about y, exact to an ulp except for the rounding of `bits`, which is y LOG2_E. */
INLINE Vector exponential(Vector x, Vector bits) { return power_of_2<6>(x * LOG2_E - bits); }
INLINE Vector exponential(Vector x) { return exponential(x, Vector{}); }

/* `exponential` with a relative error of 2^-13, enough for bfloat16. */
INLINE Vector rough_exponential(Vector x, Vector bits) { return power_of_2<3>(x * LOG2_E - bits); }

/* Above this, the rounding error of y LOG2_E is no longer small against 1; for larger y it exceeds any exponent. */
#define VAST 1e6f

/* The `bits` of y for n numbers x, n a multiple of VL. If |y| is at least VAST, subtracts y from x in place instead and
   returns 0; the differences are capped at 0, as rounding of x may lift them above it. NaN stays NaN. */
INLINE Vector bits_of(float y, float *x, int64_t n) {
    if (fabsf(y) < VAST) return splat(y * LOG2_E);
    for (int64_t i = 0; i < n; i += VL) store(x + i, lower_of(Vector{}, load(x + i) - y));
    return Vector{};
}

INLINE EightWide widened(const float *x) {
#if defined(__AVX512F__)
    return (EightWide)_mm512_cvtps_pd(_mm256_loadu_ps(x));
#else
    return __builtin_convertvector(*(const Eight *)x, EightWide);
#endif
}

/* Dot product of k floats, in float64. */
static double exact_dot(const float *a, const float *b, int64_t k) {
    EightWide sums = {}, more = {};
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) {
        sums += widened(a + i) * widened(b + i);
        more += widened(a + i + 8) * widened(b + i + 8);
    }
    sums += more;
    double sum = ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
    for (; i < k; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}
