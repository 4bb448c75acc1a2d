/* Matrix products of small blocks that lie in the cache, at the rate of the machine's multiply-add units. */
#pragma once

#include "vector.h"

/* One tile of a product, of the rows from i0 and the columns from j0 on: sums [mr, nv vectors], all in registers. `Kind`
   defines the number format, the initial sums and what is done with the final ones. */
template <int mr, int nv, class Kind>
INLINE void product_tile(const Kind &kind, int64_t i0, int64_t j0, int64_t k, const typename Kind::Number *a, int64_t row,
                         int64_t col, const typename Kind::Number *b, int64_t ldb) {
    typename Kind::Sum sum[mr][nv];
    /* Unrolled, so that the sums stay in registers. */
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < nv; j++) sum[i][j] = kind.begin(i0 + i, j0 + j * VL);
    for (int64_t p = 0; p < k; p++) {
        typename Kind::Factor right[nv];
        for (int j = 0; j < nv; j++) right[j] = Kind::load_factors(b + p * ldb + j * VL);
        for (int i = 0; i < mr; i++) {
            const auto left = Kind::broadcast(a + i * row + p * col);
            for (int j = 0; j < nv; j++) sum[i][j] = Kind::add(sum[i][j], left, right[j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < nv; j++) kind.end(i0 + i, j0 + j * VL, sum[i][j]);
}

/* `product_tile` of `num` rows, at most mr. */
template <int mr, int nv, class Kind, typename... Rest>
INLINE void product_rows(int64_t num, const Kind &kind, Rest... rest) {
    if (num == mr) product_tile<mr, nv>(kind, rest...);
    else if constexpr (mr > 1) product_rows<mr - 1, nv>(num, kind, rest...);
}

/* a [m, k] b [k, n], n a multiple of VL. a has strides `row` and `col`. b is cut into panels of NR columns, `panel` numbers
   apart, each with rows `ldb` numbers apart: a matrix stored by rows has panel = NR. */
template <int rows = MR, class Kind>
INLINE void multiply(const Kind &kind, int64_t m, int64_t n, int64_t k, const typename Kind::Number *a, int64_t row,
                     int64_t col, const typename Kind::Number *b, int64_t panel, int64_t ldb) {
    for (int64_t j = 0; j < n; j += NR, b += panel) {
        for (int64_t i = 0; i < m; i += rows) {
            const typename Kind::Number *left = a + i * row;
            const int64_t num = least(rows, m - i);
            if (n - j >= NR) product_rows<rows, NV>(num, kind, i, j, k, left, row, col, b, ldb);
            else product_rows<rows, 1>(num, kind, i, j, k, left, row, col, b, ldb);
        }
    }
}

struct Floats {
    typedef float Number;
    typedef Vector Factor, Sum;
    const float *from;
    int64_t ldf;
    float *c;
    int64_t ldc;
    INLINE_MEMBER Vector begin(int64_t i, int64_t j) const { return from ? load(from + i * ldf + j) : Vector{}; }
    static INLINE_MEMBER Vector load_factors(const float *x) { return load(x); }
    static INLINE_MEMBER float broadcast(const float *x) { return *x; }
    static INLINE_MEMBER Vector add(Vector sum, float left, Vector right) { return sum + right * left; }
    INLINE_MEMBER void end(int64_t i, int64_t j, Vector sum) const { store(c + i * ldc + j, sum); }
};

/* c [m, n] = from + a b. `from` is c itself to accumulate, a row that is repeated (ldf = 0), or NULL for zero. */
static void product(int64_t m, int64_t n, int64_t k, const float *a, int64_t row, int64_t col, const float *b,
                    int64_t panel, int64_t ldb, const float *from, int64_t ldf, float *c, int64_t ldc) {
    multiply(Floats{from, ldf, c, ldc}, m, n, k, a, row, col, b, panel, ldb);
}

/* Put row x [k] into column j of a matrix cut into panels of NR columns. */
INLINE void put_column(float *panels, int64_t k, int64_t j, const float *x) {
    float *out = panels + j / NR * k * NR + j % NR;
    for (int64_t i = 0; i < k; i++) out[i * NR] = x[i];
}
