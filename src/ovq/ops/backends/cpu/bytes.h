/* Products of vectors quantized to int8, with exact int32 sums, on processors that multiply many bytes at once. They are less
   precise than bfloat16 pairs, but each vector's rounding error is measured when it is quantized, which leaves few candidates
   for the nearest item undecided.

   A word packs four neighbours. Processors want unsigned numbers on one side: those on the left have BYTE_ZERO added, and
   sums begin with the correction for it (`begin` of the right side). */
#pragma once

#include "shorts.h"

#if (defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))) && !HAS_TILES
#define HAS_BYTES 1
#else
#define HAS_BYTES 0
#endif

/* Whether there are approximate products, of int8 or bfloat16, that take half the time. */
#define HAS_ROUGH (HAS_BYTES || HAS_PAIRS)

/* Largest quantized number. Without VNNI, sums of four products must fit in 16 bits. */
#if defined(__AVX512VNNI__)
#define LARGEST_BYTE 127
#else
#define LARGEST_BYTE 63
#endif
#define BYTE_ZERO (LARGEST_BYTE + 1)

/* Quantization parameters of M vectors: the scale; for int8 also the norm of the rounding error and the initial accumulator
   (the zero-point correction). */
struct Scales {
    float *size, *error;
    int32_t *begin;
};

INLINE void copy_scale(const Scales &from, int64_t i, const Scales &to, int64_t j) {
    to.size[j] = from.size[i];
    to.begin[j] = from.begin[i];
}

#if HAS_BYTES
INLINE int64_t byte_words(int64_t n) { return padded(n, VL) / 4; }

/* Quantizes n numbers into words of four, n a multiple of VL, as vector i of `scales`. Non-finite numbers become arbitrary. */
static void round_to_bytes(const float *x, int64_t n, uint32_t *words, const Scales &scales, int64_t i) {
    const Rounding rounding = rounding_of(x, n, LARGEST_BYTE);
    Vector total_number = {}, total_error = {};
    for (int64_t j = 0; j < n; j += VL) {
        const IntVector bits = rounding.bits_of(load(x + j));
        const Vector number = (Vector)bits - splat(ROUNDS), error = load(x + j) - number * rounding.size;
        total_number += number;
        total_error += error * error;
        const ByteVector bytes = __builtin_convertvector(bits, ByteVector);
        memcpy(words + j / 4, &bytes, sizeof(bytes));
    }
    scales.size[i] = rounding.size;
    /* A thousandth more covers the float32 roundings of this sum. */
    scales.error[i] = sqrtf(total(total_error)) * 1.001f;
    scales.begin[i] = -BYTE_ZERO * whole_total(total_number);
}

/* Words [n] of column j of a matrix cut into panels, made unsigned for the left side of a product. */
INLINE void take_left(const uint32_t *panels, int64_t n, int64_t j, uint32_t *words) {
    const uint32_t each = 0x01010101;
    take_words(panels, n, j, words);
    for (int64_t i = 0; i < n; i++) words[i] = (words[i] & each * (2 * BYTE_ZERO - 1)) ^ each * BYTE_ZERO;
}

/* sum + the products of BYTE_WORDS words of int8, unsigned on the left. */
#if defined(__AVX512VNNI__)
#define BYTE_WORDS 1
#define BYTE_ROWS MR
INLINE Words add_bytes(Words sum, const Words *left, const Words *right) {
    return (Words)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)*left, (__m512i)*right);
}
#else
#define BYTE_WORDS 2
#define BYTE_ROWS 4
INLINE Words add_bytes(Words sum, const Words *left, const Words *right) {
#if defined(__AVX512F__)
    const __m512i both = _mm512_add_epi16(_mm512_maddubs_epi16((__m512i)left[0], (__m512i)right[0]),
                                          _mm512_maddubs_epi16((__m512i)left[1], (__m512i)right[1]));
#else
    const __m256i both = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)left[0], (__m256i)right[0]),
                                          _mm256_maddubs_epi16((__m256i)left[1], (__m256i)right[1]));
#endif
    return add_shorts(sum, (Words)both, 0x00010001 - Words{});
}
#endif

struct Bytes : QuantizedProduct {
    struct Factor {
        Words words[BYTE_WORDS];
    };
    const int32_t *first;

    INLINE_MEMBER Words begin(int64_t, int64_t j) const { return QuantizedProduct::load_factors((const uint32_t *)first + j); }
    static INLINE_MEMBER Factor load_factors(const uint32_t *x) {
        Factor y;
        for (int i = 0; i < BYTE_WORDS; i++) y.words[i] = QuantizedProduct::load_factors(x + i * NR);
        return y;
    }
    static INLINE_MEMBER Factor broadcast(const uint32_t *x) {
        Factor y;
        for (int i = 0; i < BYTE_WORDS; i++) y.words[i] = QuantizedProduct::broadcast(x + i);
        return y;
    }
    static INLINE_MEMBER Words add(Words sum, const Factor &left, const Factor &right) {
        return add_bytes(sum, left.words, right.words);
    }
};

/* c [m, n] = from + scales of rows and columns * a b, with a [m, k words] and b [k words, n] quantized. Rows of a, whose
   numbers have BYTE_ZERO added, are `row` words apart; b is in panels, `panel` words apart; `from` is c or NULL. */
static void bytes_product(int64_t m, int64_t n, int64_t k, const uint32_t *a, int64_t row, const float *left_size,
                          const uint32_t *b, int64_t panel, const Scales &right, const float *from, float *c,
                          int64_t ldc) {
    multiply<BYTE_ROWS>(Bytes{{left_size, right.size, from, ldc, c, ldc}, right.begin}, m, n, k / BYTE_WORDS, a, row, BYTE_WORDS, b,
             panel, BYTE_WORDS * NR);
}
#endif
