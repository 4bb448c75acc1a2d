/* Rough products, twice as fast as those in float32, on processors that multiply pairs of bfloat16.

   A vector is kept as words of two numbers: of each 2 VL numbers, the i-th and the (i + VL)-th share a word. */
#pragma once

#include "product.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

/* How far a product of two rough vectors is off at most, over the product of their lengths: two roundings to 8 bits. */
#define ROUGHNESS 0.003915f

typedef uint32_t Words __attribute__((vector_size(VL * 4)));

INLINE int64_t num_words(int64_t n) { return padded(n, 2 * VL) / 2; }

/* Round finite numbers to bfloat16, to the nearest, ties to even; each in the upper half of its word. */
INLINE Words rounded(Vector x) {
    const Words bits = (Words)x;
    return (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
}

/* Round `n` numbers, n a multiple of VL, to words. */
static void round_row(const float *x, int64_t n, uint32_t *words) {
    for (int64_t i = 0; i < n; i += 2 * VL, words += VL) {
        const Words low = rounded(load(x + i)) >> 16, high = i + VL < n ? rounded(load(x + i + VL)) : Words{};
        const Words both = low | high;
        memcpy(words, &both, sizeof(both));
    }
}

/* Put words [n] into column j of a matrix cut into panels of NR columns. */
INLINE void put_words(uint32_t *panels, int64_t n, int64_t j, const uint32_t *words) {
    uint32_t *out = panels + j / NR * n * NR + j % NR;
    for (int64_t i = 0; i < n; i++) out[i * NR] = words[i];
}

#if HAS_PAIRS
/* c [mr, NV vectors] = from + a b, as `product_tile`. */
template <int mr>
INLINE void pairs_tile(int64_t k, const uint32_t *a, int64_t lda, const uint32_t *b, const float *from, float *c,
                       int64_t ldc) {
    __m512 sum[mr][NV];
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < NV; j++) sum[i][j] = from ? (__m512)load(from + i * ldc + j * VL) : __m512{};
    for (int64_t p = 0; p < k; p++) {
        __m512bh right[NV];
        for (int j = 0; j < NV; j++) right[j] = (__m512bh)_mm512_loadu_si512(b + p * NR + j * VL);
        for (int i = 0; i < mr; i++) {
            const __m512bh left = (__m512bh)_mm512_set1_epi32((int)a[i * lda + p]);
            for (int j = 0; j < NV; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
        }
    }
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < NV; j++) store(c + i * ldc + j * VL, (Vector)sum[i][j]);
}

template <int mr, typename... Rest>
INLINE void pairs_rows(int64_t num, Rest... rest) {
    if (num == mr) pairs_tile<mr>(rest...);
    else if constexpr (mr > 1) pairs_rows<mr - 1>(num, rest...);
}

/* c [m, n] = from + a [m, k words] b, n a multiple of NR; b in panels of NR columns, `panel` words apart; `from` is c
   or NULL. */
static void pairs_product(int64_t m, int64_t n, int64_t k, const uint32_t *a, int64_t lda, const uint32_t *b,
                          int64_t panel, const float *from, float *c, int64_t ldc) {
    for (int64_t j = 0; j < n; j += NR, b += panel)
        for (int64_t i = 0; i < m; i += MR)
            pairs_rows<MR>(least(MR, m - i), k, a + i * lda, lda, b, from ? from + i * ldc + j : nullptr,
                           c + i * ldc + j, ldc);
}
#endif
