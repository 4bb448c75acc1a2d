/* Weight matrices in the formats of the decoding kernels, and their products with a few tokens. */
#pragma once

#include "dictionary.h"
#include "numbers.h"
#include "quantized.h"

/* Weight formats that numbers.h lacks. ROUGH_ formats are the same weights, multiplied with int8 in place of int16 inputs.
   Mirrored by `FORMATS` in weights.py. */
enum { UINT4 = INT8 + 1, ROUGH_INT8, ROUGH_UINT4 };

/* Mirrored by mirrors.py: rows of numbers, or quantized weights in the layout of quantized.h. */
struct Matrix {
    const void *weight, *factors;
    const float *bias; /* [rows], or NULL. */
    int64_t format;
};

/* A row [dim] of numbers, for products with x [num, dim]. */
template <typename T> struct NumberRow {
    const T *row;
    const float *x;
    int64_t dim;

    /* Tokens that are multiplied with a row while it is in registers. */
    static constexpr int rows = 1, tokens = VL == 16 ? 4 : 2;

    /* The products of `num` tokens from t0 on, as independent partial sums. */
    template <int num> INLINE_MEMBER void dots(int64_t t0, float *y) const {
        const float *from = x + t0 * dim;
        Vector sums[num][4] = {};
        int64_t i = 0;
        for (; i + 4 * VL <= dim; i += 4 * VL)
            for (int j = 0; j < 4; j++) {
                const Vector weight = load_numbers(row + i + j * VL);
                for (int t = 0; t < num; t++) sums[t][j] += load(from + t * dim + i + j * VL) * weight;
            }
        for (; i + VL <= dim; i += VL)
            for (int t = 0; t < num; t++) sums[t][0] += load(from + t * dim + i) * load_numbers(row + i);
        for (int t = 0; t < num; t++) {
            y[t] = total((sums[t][0] + sums[t][1]) + (sums[t][2] + sums[t][3]));
            for (int64_t rest = i; rest < dim; rest++) y[t] += from[t * dim + rest] * as_float(row[rest]);
        }
    }
};

INLINE float long_dot(const float *a, const float *b, int64_t dim) {
    float y;
    NumberRow<float>{b, a, dim}.dots<1>(0, &y);
    return y;
}

/* The products of a tile of rows with `num` tokens from t on, at most `most`: y [num, rows]. */
template <int most, class Tile> INLINE void some_dots(const Tile &tile, int64_t num, int64_t t, float *y) {
    if (num == most) tile.template dots<most>(t, y);
    else if constexpr (most > 1) some_dots<most - 1>(tile, num, t, y);
}

/* Products of num tokens with the rows first..end-1 of a matrix, plus `added` if there is any, into y [num, ldy]. `tile_of`
   makes the tile that begins at a row; tiles are read in order of memory, which is fastest. */
template <typename TileOf>
static void multiply_row_tiles(const Matrix *matrix, int64_t first, int64_t end, int64_t num, const float *added,
                               float *y, int64_t ldy, TileOf tile_of) {
    typedef decltype(tile_of(first)) Tile;
    constexpr int rows = Tile::rows, tokens = Tile::tokens;
    for (int64_t r0 = first; r0 < end; r0 += rows) {
        const Tile tile = tile_of(r0);
        for (int64_t start = 0; start < num; start += tokens) {
            const int64_t last = least(num, start + tokens);
            float sums[tokens * rows];
            some_dots<tokens>(tile, last - start, start, sums);
            for (int64_t t = start; t < last; t++)
                for (int64_t r = r0; r < least(end, r0 + rows); r++) {
                    const float bias = matrix->bias ? matrix->bias[r] : 0;
                    const float sum = sums[(t - start) * rows + r - r0] + bias;
                    y[t * ldy + r] = added ? added[t * ldy + r] + sum : sum;
                }
        }
    }
}

/* Inputs that are rounded at a time, at most: some 2.25 bytes each on the stack, of which threads may have 4 MiB alone. */
enum { MOST_ROUNDED = 1 << 20 };

template <typename Factor, class Format>
static void multiply_quantized(const Matrix *matrix, int64_t first, int64_t end, int64_t num, int64_t dim, const float *x,
                           const float *added, float *y, int64_t ldy) {
    typedef QuantizedTile<Factor, Format> Tile;
    if (num > 1 && num * dim > MOST_ROUNDED) {
        const int64_t half = num / 2, place = half * ldy;
        multiply_quantized<Factor, Format>(matrix, first, end, half, dim, x, added, y, ldy);
        return multiply_quantized<Factor, Format>(matrix, first, end, num - half, dim, x + half * dim,
                                                  added ? added + place : nullptr, y + place, ldy);
    }
    const int64_t groups = (dim + GROUP - 1) / GROUP;
    typename Format::Quad quads[num * groups][QUADS];
    float scales[num * groups][2];
    int32_t sums[num * groups][2];
    const QuantizedInputs<Format> in = {groups, quads, scales, sums};
    round_inputs(&in, num, dim, x);
    multiply_row_tiles(matrix, first, end, num, added, y, ldy, [&](int64_t r) {
        const int64_t at = r / ABREAST * groups;
        return Tile{(const uint8_t *)matrix->weight + at * Tile::num_bytes,
                    (const Factor *)matrix->factors + at * Tile::num_factors, &in};
    });
}

/* `multiply_row_tiles` by the matrix's format; `first` is a multiple of ABREAST. */
static void multiply_part(const Matrix *matrix, int64_t first, int64_t end, int64_t num, int64_t dim, const float *x,
                          const float *added, float *y, int64_t ldy) {
    auto products = [=](auto *multiply) { multiply(matrix, first, end, num, dim, x, added, y, ldy); };
    if (matrix->format == INT8) return products(multiply_quantized<float, Exact>);
    if (matrix->format == UINT4) return products(multiply_quantized<Float16, Exact>);
    if (matrix->format == ROUGH_INT8) return products(multiply_quantized<float, Rough>);
    if (matrix->format == ROUGH_UINT4) return products(multiply_quantized<Float16, Rough>);
    with_type(matrix->format, matrix->weight, 0, [=](auto *weight) {
        typedef std::remove_const_t<std::remove_reference_t<decltype(*weight)>> T;
        multiply_row_tiles(matrix, first, end, num, added, y, ldy,
                           [=](int64_t r) { return NumberRow<T>{weight + r * dim, x, dim}; });
    });
}
