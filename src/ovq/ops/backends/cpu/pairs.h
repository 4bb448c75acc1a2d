/* Products of bfloat16 numbers with float32 sums, on processors that multiply pairs of them: twice as fast as float32. They
   are as good for bfloat16 inputs, and approximate for others.

   A vector is packed in words of two numbers: of each 2 VL numbers, the i-th and the (i + VL)-th share a word. */
#pragma once

#include "numbers.h"
#include "product.h"
#include "tiles.h"

#ifdef __AVX512BF16__
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

/* Upper bound of the error of a product of two vectors rounded to bfloat16, relative to the product of their lengths: two
   roundings to 8 bits. */
#define ROUGHNESS 0.003915f

INLINE int64_t num_words(int64_t n) { return padded(n, 2 * VL) / 2; }

#if HAS_PAIRS
/* Packs 2 VL bfloat16 numbers: word i has number i of the lower and of the upper half. */
INLINE Words words_of_halves(__m512i x) {
    typedef uint16_t Places __attribute__((vector_size(64)));
    const Places places = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (Words)_mm512_permutexvar_epi16((__m512i)places, x);
}

/* Packs n bfloat16 numbers into words. */
INLINE void arrange_row(const uint16_t *x, int64_t n, uint32_t *words) {
    for (int64_t i = 0; i < n; i += 2 * VL, words += VL) {
        const int64_t left = n - i;
        const __m512i some = _mm512_maskz_loadu_epi16(left < 2 * VL ? (1u << left) - 1 : ~0u, x + i);
        _mm512_storeu_si512(words, (__m512i)words_of_halves(some));
    }
}
#endif

/* Rounds finite numbers to bfloat16, ties to even: word i has lane i of `low` and, in its upper half, of `high`. */
INLINE Words words_from(Vector low, Vector high) {
#if HAS_PAIRS
    return words_of_halves((__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
    const Words a = (Words)low, b = (Words)high;
    return (a + 0x7fff + (a >> 16 & 1)) >> 16 | ((b + 0x7fff + (b >> 16 & 1)) & 0xffff0000);
#endif
}

/* Round `n` numbers to bfloat16 words, n a multiple of VL. */
static void round_row(const float *x, int64_t n, uint32_t *words) {
    for (int64_t i = 0; i < n; i += 2 * VL, words += VL) {
        const Words both = words_from(load(x + i), i + VL < n ? load(x + i + VL) : Vector{});
        memcpy(words, &both, sizeof(both));
    }
}

/* Put words [n] into column j of a matrix cut into panels of NR columns, or take them out. */
INLINE void put_words(uint32_t *panels, int64_t n, int64_t j, const uint32_t *words) {
    uint32_t *out = panels + j / NR * n * NR + j % NR;
    for (int64_t i = 0; i < n; i++) out[i * NR] = words[i];
}

INLINE void take_words(const uint32_t *panels, int64_t n, int64_t j, uint32_t *words) {
    const uint32_t *from = panels + j / NR * n * NR + j % NR;
    for (int64_t i = 0; i < n; i++) words[i] = from[i * NR];
}

/* Round row i [n] to bfloat16 in a matrix of row pairs: rows 2 j and 2 j + 1 share words. */
INLINE void put_pair(uint32_t *pairs, int64_t n, int64_t i, const float *x) {
    uint32_t *out = pairs + i / 2 * n;
    for (int64_t j = 0; j < n; j += VL, x += VL, out += VL) {
        Words both;
        memcpy(&both, out, sizeof(both));
        const uint32_t kept = i % 2 ? 0xffff : 0xffff0000;
        both = (both & kept) | (words_from(load(x), load(x)) & ~kept);
        memcpy(out, &both, sizeof(both));
    }
}

/* Round `num` rows to bfloat16 row pairs; zeros stand in for a missing last row. */
INLINE void put_rows(uint32_t *pairs, int64_t num, int64_t ld, const float *rows) {
    for (int64_t t = 0; t < num; t += 2)
        for (int64_t j = 0; j < ld; j += VL) {
            const Vector low = load(rows + t * ld + j), high = t + 1 < num ? load(rows + (t + 1) * ld + j) : Vector{};
            const Words both = words_from(low, high);
            memcpy(pairs + t / 2 * ld + j, &both, sizeof(both));
        }
}

/* Last step of a product: factor * sum + bias, a row; or the sum itself, if `bias` is NULL. */
struct Finish {
    const float *bias;
    float factor;
};

#if HAS_PAIRS
struct Pairs {
    typedef uint32_t Number;
    typedef __m512bh Factor;
    typedef __m512 Sum;
    const float *from;
    Finish finish;
    float *c;
    int64_t ldc;
    INLINE_MEMBER Sum begin(int64_t i, int64_t j) const { return from ? (Sum)load(from + i * ldc + j) : Sum{}; }
    static INLINE_MEMBER Factor load_factors(const uint32_t *x) { return (Factor)_mm512_loadu_si512(x); }
    static INLINE_MEMBER Factor broadcast(const uint32_t *x) { return (Factor)_mm512_set1_epi32((int)*x); }
    static INLINE_MEMBER Sum add(Sum sum, Factor left, Factor right) { return _mm512_dpbf16_ps(sum, left, right); }
    INLINE_MEMBER void end(int64_t i, int64_t j, Sum sum) const {
        store(c + i * ldc + j, finish.bias ? (Vector)sum * finish.factor + load(finish.bias + j) : (Vector)sum);
    }
};

/* c [m, n] = from + a [m, k words] b [k words, n], n a multiple of VL. a has strides `row` and `col`; b is in panels of
   NR columns, `panel` words apart, each with rows `ldb` words apart; `from` is c or NULL. */
static void pairs_product(int64_t m, int64_t n, int64_t k, const uint32_t *a, int64_t row, int64_t col,
                          const uint32_t *b, int64_t panel, int64_t ldb, const float *from, Finish finish, float *c, int64_t ldc) {
#if HAS_TILES
    if (are_tiles_allowed && k % TILE == 0) {
        tiles_product(m, n, k, a, row, col, b, panel, ldb, from, c, ldc);
        for (int64_t i = 0; finish.bias && i < m; i++)
            for (int64_t j = 0; j < n; j += VL)
                store(c + i * ldc + j, load(c + i * ldc + j) * finish.factor + load(finish.bias + j));
        return;
    }
#endif
    multiply(Pairs{from, finish, c, ldc}, m, n, k, a, row, col, b, panel, ldb);
}

/* Round 2 VL numbers to bfloat16 words of neighbours. */
INLINE void put_neighbours(uint32_t *words, Vector low, Vector high) {
    _mm512_storeu_si512(words, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}
#endif
