/* Products of quantized vectors, with exact int32 sums. */
#pragma once

#include "pairs.h"

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
