/* Items as points (key, factor * value), for the rules that merge pairs of them: float64 distances, and products of tiles. */
#pragma once

#include "learn.h"

INLINE double token_mass(const Rows *tokens, int64_t t) { return tokens->weights ? tokens->weights[t] : 1; }

typedef double EightDoubles __attribute__((vector_size(64), aligned(8), may_alias));

INLINE EightWide eight(const float *x) { return widened(x); }
INLINE EightWide eight(const double *x) { return *(const EightDoubles *)x; }

template <typename A, typename B>
static double squared_distance(const A *a, const B *b, int64_t n) {
    EightWide sums = {}, more = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const EightWide x = eight(a + i) - eight(b + i), y = eight(a + i + 8) - eight(b + i + 8);
        sums += x * x;
        more += y * y;
    }
    sums += more;
    double sum = 0;
    for (int j = 0; j < 8; j++) sum += sums[j];
    for (; i < n; i++) sum += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
    return sum;
}

INLINE double exact_square(const double *x, int64_t n) {
    double sum = 0;
    for (int64_t j = 0; j < n; j++) sum += x[j] * x[j];
    return sum;
}

/* Points as the left factor of a product, values multiplied by the square of the factor. With `words`, it is approximate. */
struct Left {
    float *keys, *values;
    uint32_t *words;
    float *key_scales, *value_scales; /* Scales of the int8 keys and values. */
};

/* Words per point of the left factor. */
INLINE int64_t left_words(const Call *call) { return HAS_BYTES ? item_bytes(call) : row_words(call); }

/* Approximate products of `count` points with `num` columns, from their words. */
static void multiply_words(const Call *call, const Rows *columns, int64_t num, int64_t count, const Left &left,
                           float *out, int64_t ld) {
    const int64_t own = left_words(call);
#if HAS_BYTES
    const int64_t of_keys = byte_words(call->k.dim), of_values = own - of_keys;
    bytes_product(count, num, of_values, left.words + of_keys, own, left.value_scales, columns->bytes + of_keys * NR,
                  own * NR, columns->of_values, nullptr, out, ld);
    bytes_product(count, num, of_keys, left.words, own, left.key_scales, columns->bytes, own * NR, columns->of_keys, out,
                  out, ld);
#elif HAS_PAIRS
    pairs_product(count, num, own, left.words, own, 1, columns->words, own * NR, NR, nullptr, Finish{}, out, ld);
#endif
}

static void multiply(const Call *call, const Rows *columns, int64_t num, int64_t count, const Left &left, float *out,
                     int64_t ld) {
    if (left.words) return multiply_words(call, columns, num, count, left, out, ld);
    product(count, num, call->v.dim, left.values, value_ld(call), 1, columns->value_panels, call->v.dim * NR, NR, nullptr,
            0, out, ld);
    product(count, num, call->k.dim, left.keys, key_ld(call), 1, columns->key_panels, call->k.dim * NR, NR, out, ld, out,
            ld);
}
