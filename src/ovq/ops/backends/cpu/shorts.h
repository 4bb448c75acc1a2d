/* Products of vectors quantized to int16, with exact int32 sums, on processors that multiply pairs of int16 but not of
   bfloat16: about twice as fast as float32. They are approximate: good enough to find the candidate slots of a key.

   As in pairs.h, a word packs two numbers: of each 2 VL, the i-th and the (i + VL)-th. */
#pragma once

#include "pairs.h"

#if !HAS_PAIRS && (defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__)))
#define HAS_SHORTS 1
#else
#define HAS_SHORTS 0
#endif

/* Largest quantized number for vectors of `dim`: sums of products stay below 2^31. */
INLINE float largest_short(int64_t dim) { return fminf(floorf(sqrtf(2147483000.0f / (float)padded(dim, 2 * VL))), 32767); }

/* Upper bound of the error of a product of two quantized vectors, relative to the product of their lengths. Each number is
   off by at most half a step, and a step is at most the length of the vector over the largest quantized number. The rest
   covers float32 roundings. */
INLINE double short_roughness(int64_t dim) {
    const double of_one = 0.5005 * sqrt((double)dim) / largest_short(dim);
    return 2 * of_one + of_one * of_one + 4 * FLT_EPSILON;
}

/* Products of quantized vectors: integer sums times the scales of row and column. */
struct QuantizedProduct {
    typedef uint32_t Number;
    typedef Words Factor, Sum;
    const float *left_scales, *right_scales; /* Scales of the rows on the left and of the columns on the right. */
    const float *from;
    int64_t ldf;
    float *c;
    int64_t ldc;
    static INLINE_MEMBER Words load_factors(const uint32_t *x) {
        Words y;
        memcpy(&y, x, sizeof(y));
        return y;
    }
    static INLINE_MEMBER Words broadcast(const uint32_t *x) { return *x - Words{}; }
    INLINE_MEMBER void end(int64_t i, int64_t j, Words sum) const {
        const Vector scales = load(right_scales + j) * left_scales[i];
        const Vector more = from ? load(from + i * ldf + j) : Vector{};
        store(c + i * ldc + j, __builtin_convertvector((IntVector)sum, Vector) * scales + more);
    }
};

/* Adding 1.5 * 2^23 rounds to an integer, which is then in the lowest bits. */
#define ROUNDS 12582912.0f

/* Symmetric quantization of a vector. Non-finite numbers become arbitrary integers. */
struct Rounding {
    float per_number, size; /* The inverse scale; the scale. */

    /* Quantized numbers in the lowest bits, above them the bits of ROUNDS. */
    INLINE_MEMBER IntVector bits_of(Vector x) const { return (IntVector)(x * per_number + ROUNDS); }
};

/* Quantization of n numbers to integers of magnitude at most `most`, n a multiple of VL. */
INLINE Rounding rounding_of(const float *x, int64_t n, float most) {
    Vector high = {};
    for (int64_t i = 0; i < n; i += VL) high = higher_of(load(x + i), higher_of(-load(x + i), high));
    const float largest = highest(high), per_number = largest > 0 && std::isfinite(most / largest) ? most / largest : 0;
    return {per_number, per_number > 0 ? largest / most : 0};
}

#if HAS_SHORTS
/* Quantizes n numbers into words, n a multiple of VL; returns the scale. */
static float round_to_shorts(const float *x, int64_t n, float most, uint32_t *words) {
    const Rounding rounding = rounding_of(x, n, most);
    for (int64_t i = 0; i < n; i += 2 * VL, words += VL) {
        const Words low = (Words)rounding.bits_of(load(x + i));
        const Words above = i + VL < n ? (Words)rounding.bits_of(load(x + i + VL)) : Words{};
        const Words both = (low & 0xffff) | above << 16;
        memcpy(words, &both, sizeof(both));
    }
    return rounding.size;
}
#endif

/* sum + the products of int16 pairs, in each 32-bit lane. */
#if defined(__AVX512VNNI__)
INLINE Words add_shorts(Words sum, Words left, Words right) {
    return (Words)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)left, (__m512i)right);
}
#elif defined(__AVX512BW__)
INLINE Words add_shorts(Words sum, Words left, Words right) {
    return sum + (Words)_mm512_madd_epi16((__m512i)left, (__m512i)right);
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
INLINE Words add_shorts(Words sum, Words left, Words right) {
    return sum + (Words)_mm256_madd_epi16((__m256i)left, (__m256i)right);
}
#else
INLINE Words add_shorts(Words sum, Words left, Words right) {
    const IntVector a = (IntVector)left, b = (IntVector)right;
    return sum + (Words)((a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16));
}
#endif

#if HAS_SHORTS
struct Shorts : QuantizedProduct {
    INLINE_MEMBER Words begin(int64_t, int64_t) const { return Words{}; }
    static INLINE_MEMBER Words add(Words sum, Words left, Words right) { return add_shorts(sum, left, right); }
};

/* c [m, n] = from + scales of rows and columns * a b, with a [m, k words] and b [k words, n] quantized. Rows of a are `row`
   words apart; b is in panels, `panel` words apart; `from` is c, a row that is repeated (ldf = 0), or NULL. */
static void shorts_product(int64_t m, int64_t n, int64_t k, const uint32_t *a, int64_t row, const float *left_scales,
                           const uint32_t *b, int64_t panel, const float *right_scales, const float *from, int64_t ldf,
                           float *c, int64_t ldc) {
    multiply(Shorts{{left_scales, right_scales, from, ldf, c, ldc}}, m, n, k, a, row, 1, b, panel, NR);
}
#endif
