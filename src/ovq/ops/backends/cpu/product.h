/* Matrix products of small blocks that lie in the cache, at the rate of the machine's multiply-add units. */
#pragma once

#include "vector.h"

/* c [mr, nv vectors] = from + a [mr, k] b [k, nv vectors], the whole of c in registers.
   `from` is c itself to accumulate, a row that is repeated (ldf = 0), or NULL for zero. */
template <int mr, int nv>
INLINE void product_tile(int64_t k, const float *a, int64_t row, int64_t col, const float *b, int64_t ldb,
                         const float *from, int64_t ldf, float *c, int64_t ldc) {
    Vector sum[mr][nv];
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < nv; j++) sum[i][j] = from ? load(from + i * ldf + j * VL) : Vector{};
    for (int64_t p = 0; p < k; p++) {
        Vector right[nv];
        for (int j = 0; j < nv; j++) right[j] = load(b + p * ldb + j * VL);
        for (int i = 0; i < mr; i++) {
            const float left = a[i * row + p * col];
            for (int j = 0; j < nv; j++) sum[i][j] += right[j] * left;
        }
    }
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < nv; j++) store(c + i * ldc + j * VL, sum[i][j]);
}

/* The same for as many rows, at most mr. */
template <int mr, int nv, typename... Rest>
INLINE void product_rows(int64_t num, Rest... rest) {
    if (num == mr) product_tile<mr, nv>(rest...);
    else if constexpr (mr > 1) product_rows<mr - 1, nv>(num, rest...);
}

/* c [m, n] = from + a [m, k] b [k, n], n a multiple of VL.
   a has strides `row` and `col`. b is cut into panels of NR columns, `panel` floats apart, each with rows `ldb`
   floats apart: a matrix stored by rows has panel = NR. */
static void product(int64_t m, int64_t n, int64_t k, const float *a, int64_t row, int64_t col, const float *b,
                    int64_t panel, int64_t ldb, const float *from, int64_t ldf, float *c, int64_t ldc) {
    for (int64_t j = 0; j < n; j += NR, b += panel) {
        for (int64_t i = 0; i < m; i += MR) {
            const float *left = a + i * row, *start = from ? from + i * ldf + j : nullptr;
            float *out = c + i * ldc + j;
            const int64_t num = least(MR, m - i);
            if (n - j >= NR) product_rows<MR, NV>(num, k, left, row, col, b, ldb, start, ldf, out, ldc);
            else product_rows<MR, 1>(num, k, left, row, col, b, ldb, start, ldf, out, ldc);
        }
    }
}

/* Put row x [k] into column j of a matrix cut into panels of NR columns. */
INLINE void put_column(float *panels, int64_t k, int64_t j, const float *x) {
    float *out = panels + j / NR * k * NR + j % NR;
    for (int64_t i = 0; i < k; i++) out[i * NR] = x[i];
}
