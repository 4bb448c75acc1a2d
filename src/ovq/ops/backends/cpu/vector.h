/* Vectors as wide as the machine's, in the portable notation of GCC and Clang, and what is done with them. */
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

/* Lanes of a vector, and the tile of a product that is held in registers: MR rows by NV vectors. */
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
#define INLINE static inline __attribute__((always_inline))

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

INLINE Vector lower_of(Vector x, Vector y) { return x < y ? x : y; }

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

/* Lanes of two vectors, numbered one after the other. */
template <int... places> INLINE Vector pick(Vector a, Vector b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, places...);
#else
    return __builtin_shuffle(a, b, IntVector{places...});
#endif
}

/* Halving the vector takes fewer steps, one after the other, than going through it. */
INLINE float highest(Vector x) {
    float y[VL];
    store(y, x);
    for (int half = VL / 2; half; half /= 2)
        for (int i = 0; i < half; i++) y[i] = y[i + half] > y[i] ? y[i + half] : y[i];
    return y[0];
}

/* Bit i says whether lane i of x is at least that of y. */
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

INLINE float square_root(float x) { return sqrtf(x); }

INLINE Vector square_root(Vector x) {
    float y[VL];
    store(y, x);
    for (int i = 0; i < VL; i++) y[i] = sqrtf(y[i]);
    return load(y);
}

INLINE float lowest_lane(Vector x) {
    float y[VL];
    store(y, x);
    for (int half = VL / 2; half; half /= 2)
        for (int i = 0; i < half; i++) y[i] = y[i + half] < y[i] ? y[i + half] : y[i];
    return y[0];
}

INLINE int is_any(IntVector x) {
    int64_t y[VL / 2];
    memcpy(y, &x, sizeof(x));
    for (int half = VL / 4; half; half /= 2)
        for (int i = 0; i < half; i++) y[i] |= y[i + half];
    return y[0] != 0;
}

INLINE float total(Vector x) {
    float y[VL];
    store(y, x);
    for (int half = VL / 2; half; half /= 2)
        for (int i = 0; i < half; i++) y[i] += y[i + half];
    return y[0];
}

/* Whether n numbers are finite, n a multiple of VL. */
static int are_finite(const float *x, int64_t n) {
    /* Zero for every finite number, NaN for others. */
    Vector sum = {};
    for (int64_t i = 0; i < n; i += VL) sum += load(x + i) - load(x + i);
    return total(sum) == 0;
}

/* x, of which n ln 2 is taken; ln 2 is in two parts so that n ln 2 is exact in the first. */
INLINE Vector without_powers(Vector x, Vector n) { return (x - n * 0.693359375f) + n * 2.12194440e-4f; }

/* exp of x <= 0, by a polynomial of degree `degree`; exactly 0 below -87, where float32 has no normal numbers left; NaN
   of NaN. */
template <int degree> INLINE Vector exponential_of(Vector x) {
    const Vector low = splat(-87.0f);
    const Vector y = higher_of(low, x);
    /* x = n ln 2 + r with |r| <= ln 2 / 2, n an integer. */
#if defined(__AVX512F__)
    const Vector n = (Vector)_mm512_roundscale_ps((__m512)(y * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    /* Adding 1.5 * 2^23 rounds to an integer. */
    const Vector shift = splat(12582912.0f), shifted = y * 1.44269504f + shift, n = shifted - shift;
#endif
    const Vector r = degree == 7 ? without_powers(y, n) : y - n * 0.693147181f;
    Vector sum = splat(1.0f / 5040);
    if constexpr (degree == 7) {
        sum = sum * r + 1.0f / 720;
        sum = sum * r + 1.0f / 120;
        sum = sum * r + 1.0f / 24;
    } else {
        sum = splat(1.0f / 24);
    }
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
#if defined(__AVX512F__)
    const __mmask16 is_normal = _mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ);
    return (Vector)_mm512_maskz_scalef_ps(is_normal, (__m512)sum, (__m512)n);
#else
    const IntVector power = (__builtin_convertvector(n, IntVector) + 127) << 23;
    return x < low ? Vector{} : sum * (Vector)power;
#endif
}

/* To about an ulp. */
INLINE Vector exponential(Vector x) { return exponential_of<7>(x); }

/* To 2^-14, enough for bfloat16. */
INLINE Vector rough_exponential(Vector x) { return exponential_of<4>(x); }

/* The dot product of K floats in float64. */
static double exact_dot(const float *a, const float *b, int64_t k) {
    EightWide sums = {};
    int64_t i = 0;
    for (; i + 8 <= k; i += 8)
        sums += __builtin_convertvector(*(const Eight *)(a + i), EightWide) *
                __builtin_convertvector(*(const Eight *)(b + i), EightWide);
    double sum = 0;
    for (int j = 0; j < 8; j++) sum += sums[j];
    for (; i < k; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}
