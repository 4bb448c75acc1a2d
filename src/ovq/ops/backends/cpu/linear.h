/* Products of large matrices: activations with weights and, for gradients of weights, activations with activations.

   c [m, n] = a [m, k] b [k, n]. DEPTH rows of b at a time are copied into panels of NR columns. A panel is read from front to
   back and stays in the L2 or L1 cache while all rows of a are multiplied with it. The order in which each number of c is
   summed depends on k alone. */
#pragma once

#include <utility>

#include "product.h"
#include "workers.h"

#define DEPTH (16 * NR)
/* Terms of a partial sum: rounding errors grow with the root of this number, not of k. */
#define TERMS 128
/* Rows of a that one thread multiplies with all panels. */
#define ROWS (16 * MR)

/* Lane i of a shuffle: two vectors exchange blocks of `width` lanes, each odd block of the first for the even one of the
   second. */
template <int width> constexpr int swapped(int i, int is_high) {
    return i & width ? VL + i - (is_high ? 0 : width) : i + (is_high ? width : 0);
}

template <int width, int... i> INLINE void swap_blocks(Vector *a, Vector *b, std::integer_sequence<int, i...>) {
    const Vector low = pick<swapped<width>(i, 0)...>(*a, *b);
    *b = pick<swapped<width>(i, 1)...>(*a, *b);
    *a = low;
}

/* Transpose the VL x VL numbers of x. */
template <int width = VL / 2> INLINE void transpose(Vector *x) {
    for (int i = 0; i < VL; i++)
        if (!(i & width)) swap_blocks<width>(x + i, x + i + width, std::make_integer_sequence<int, VL>());
    if constexpr (width > 1) transpose<width / 2>(x);
}

/* Copies [k, n] of a matrix, n at most NR, into a panel. `row` or `col`, the strides of rows and columns, is 1. */
static void copy_panel(const float *b, int64_t row, int64_t col, int64_t k, int64_t n, float *panel) {
    int64_t p = 0;
    if (n == NR && col == 1)
        for (; p < k; p++)
            for (int j = 0; j < NR; j += VL) store(panel + p * NR + j, load(b + p * row + j));
    if (n == NR && row == 1)
        for (; p + VL <= k; p += VL)
            for (int j = 0; j < NR; j += VL) {
                Vector block[VL];
                for (int i = 0; i < VL; i++) block[i] = load(b + (j + i) * col + p);
                transpose(block);
                for (int i = 0; i < VL; i++) store(panel + (p + i) * NR + j, block[i]);
            }
    for (; p < k; p++)
        for (int64_t j = 0; j < NR; j++) panel[p * NR + j] = j < n ? b[p * row + j * col] : 0;
}

/* Copies the transpose of [k, m], rows `ld` apart, in groups of MR columns. */
static void copy_columns(const float *a, int64_t ld, int64_t k, int64_t m, float *out) {
    for (int64_t i = 0; i < m; i += MR, a += MR)
        for (int64_t p = 0; p < k; p++, out += MR) {
            if (m - i >= MR) memcpy(out, a + p * ld, sizeof(float) * MR);
            else
                for (int64_t r = 0; r < m - i; r++) out[r] = a[p * ld + r];
        }
}

/* c [mr, NR] = a [mr, k] times a panel, or c plus that if it `is_added`. */
template <int mr>
INLINE void large_tile(int64_t k, const float *a, int64_t row, int64_t col, const float *panel, int is_added, float *c,
                       int64_t ldc) {
    /* Prefetch c while the sums are computed, so as not to wait for it afterwards. */
    for (int64_t i = 0; i < mr; i++)
        for (int64_t j = 0; j < NR; j += VL) __builtin_prefetch(c + i * ldc + j, 1);
    Vector total[mr][NV] = {};
    for (int64_t first = 0; first < k; first += TERMS) {
        Vector sum[mr][NV] = {};
        for (int64_t p = first; p < least(k, first + TERMS); p++) {
            Vector right[NV];
            for (int j = 0; j < NV; j++) right[j] = load(panel + p * NR + j * VL);
            for (int i = 0; i < mr; i++) {
                const float left = a[i * row + p * col];
                for (int j = 0; j < NV; j++) sum[i][j] += right[j] * left;
            }
        }
        for (int i = 0; i < mr; i++)
            for (int j = 0; j < NV; j++) total[i][j] += sum[i][j];
    }
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < NV; j++) {
            float *to = c + i * ldc + j * VL;
            store(to, is_added ? load(to) + total[i][j] : total[i][j]);
        }
}

template <int mr, typename... Rest> INLINE void large_rows(int64_t num, Rest... rest) {
    if (num == mr) large_tile<mr>(rest...);
    else if constexpr (mr > 1) large_rows<mr - 1>(num, rest...);
}

/* `large_tile` for `num` rows of a, at most MR, and the `n` columns that c has left. */
static void large_block(int64_t num, int64_t n, int64_t k, const float *a, int64_t row, int64_t col, const float *panel,
                        int is_added, float *c, int64_t ldc) {
    if (n >= NR) return large_rows<MR>(num, k, a, row, col, panel, is_added, c, ldc);
    float whole[MR * NR];
    large_rows<MR>(num, k, a, row, col, panel, 0, whole, (int64_t)NR);
    for (int64_t i = 0; i < num; i++)
        for (int64_t j = 0; j < n; j++) c[i * ldc + j] = whole[i * NR + j] + (is_added ? c[i * ldc + j] : 0);
}

/* Floats of scratch that a product needs. */
extern "C" int64_t ovq_matmul_scratch(int64_t num_threads, int64_t n) {
    return DEPTH * (padded(n, NR) + num_threads * ROWS);
}

/* c [m, n] = a [m, k] b [k, n], or c + a b if it `is_added`. One of the strides of a is 1, and one of b's; c is dense. */
extern "C" void ovq_matmul(int64_t num_threads, int64_t m, int64_t n, int64_t k, const float *a, int64_t a_row,
                           int64_t a_col, const float *b, int64_t b_row, int64_t b_col, int64_t is_added, float *c,
                           float *scratch) {
    /* With more threads than blocks of rows, columns are split as well. */
    const int64_t blocks = (m + ROWS - 1) / ROWS, parts = num_threads > 1 ? (2 * num_threads + blocks - 1) / blocks : 1;
    const int64_t width = padded((n + parts - 1) / parts, NR);
    int64_t next = 0;
    parallel(num_threads, [&](Worker worker) {
        float *columns = scratch + DEPTH * (padded(n, NR) + worker.rank * ROWS);
        for (int64_t p = 0; p < k; p += DEPTH) {
            const int64_t depth = least(DEPTH, k - p);
            worker.share((n + NR - 1) / NR, [=](int64_t panel) {
                const int64_t j = panel * NR;
                copy_panel(b + p * b_row + j * b_col, b_row, b_col, depth, least(NR, n - j), scratch + j * depth);
            });
            if (worker.rank == 0) next = 0;
            worker.wait();
            worker.take(blocks * parts, &next, [=](int64_t share) {
                const int64_t i = share / parts * ROWS, start = share % parts * width, end = least(n, start + width);
                if (start >= end) return;
                const float *left = a + i * a_row + p * a_col;
                int64_t row = a_row, col = a_col, step = MR * a_row;
                const int64_t num = least(ROWS, m - i);
                if (col != 1) {
                    copy_columns(left, a_col, depth, num, columns);
                    left = columns, row = 1, col = MR, step = MR * depth;
                }
                for (int64_t j = start; j < end; j += NR)
                    for (int64_t r = 0; r < num; r += MR)
                        large_block(least(MR, num - r), n - j, depth, left + r / MR * step, row, col,
                                    scratch + j * depth, is_added || p, c + (i + r) * n + j, n);
            });
            worker.wait();
        }
    });
}
