/* Products of vectors rounded to whole numbers of a byte, summed exactly in int32, on processors that multiply four pairs
   of those at once: twice as fast as pairs of bfloat16. They are rougher; how far each vector is off is measured as it is
   rounded, which leaves few doubts about what is nearest.

   A word has four neighbours. Processors want numbers without a sign on one side: those on the left have 128 added, which
   sums on the right begin without. */
#pragma once

#include "shorts.h"

#if defined(__AVX512VNNI__) && !HAS_TILES
#define HAS_BYTES 1
#else
#define HAS_BYTES 0
#endif

/* Of vectors rounded to whole steps, [M]: how long a step is; in bytes, also the length of what rounding left over, and the
   sum that products begin with. */
struct Steps {
    float *size, *error;
    int32_t *begin;
};

#if HAS_BYTES
INLINE int64_t byte_words(int64_t n) { return padded(n, VL) / 4; }

/* Round n numbers to words of four, n a multiple of VL, as vector i of those with `steps`. What is not finite becomes
   anything. */
static void round_to_bytes(const float *x, int64_t n, uint32_t *words, const Steps &steps, int64_t i) {
    const float most = 127;
    Vector high = {}, total_number = {}, total_error = {};
    for (int64_t j = 0; j < n; j += VL) high = higher_of(load(x + j), higher_of(-load(x + j), high));
    const float largest = highest(high), per_number = largest > 0 && std::isfinite(most / largest) ? most / largest : 0;
    const float size = per_number > 0 ? largest / most : 0;
    /* Adding 1.5 * 2^23 rounds to an integer, in the lowest bits. */
    const Vector shift = splat(12582912.0f);
    for (int64_t j = 0; j < n; j += VL) {
        const Vector shifted = load(x + j) * per_number + shift, number = shifted - shift;
        const Vector error = load(x + j) - number * size;
        total_number += number;
        total_error += error * error;
        const ByteVector bytes = __builtin_convertvector((IntVector)shifted, ByteVector);
        memcpy(words + j / 4, &bytes, sizeof(bytes));
    }
    steps.size[i] = size;
    /* A thousandth for the roundings of float32 in it. */
    steps.error[i] = sqrtf(total(total_error)) * 1.001f;
    steps.begin[i] = -128 * (int32_t)total(total_number);
}

struct Bytes : InSteps {
    const int32_t *first;
    INLINE_MEMBER Words begin(int64_t, int64_t j) const {
        Words y;
        memcpy(&y, first + j, sizeof(y));
        return y;
    }
    static INLINE_MEMBER Words add(Words sum, Words left, Words right) {
        return (Words)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)left, (__m512i)right);
    }
};

/* c [m, n] = from + steps of rows and columns, times a [m, k words] b [k words, n] in steps. Rows of a, whose numbers have
   128 added, are `row` words apart; b is in panels, `panel` words apart; `from` is c or NULL. */
static void bytes_product(int64_t m, int64_t n, int64_t k, const uint32_t *a, int64_t row, const float *left_size,
                          const uint32_t *b, int64_t panel, const Steps &right, const float *from, float *c,
                          int64_t ldc) {
    multiply(Bytes{{left_size, right.size, from, ldc, c, ldc}, right.begin}, m, n, k, a, row, 1, b, panel, NR);
}
#endif
