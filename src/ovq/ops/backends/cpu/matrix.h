/* Matrices of weights in the formats that decoding reads, and their products with a few tokens. */
#pragma once

#include "dictionary.h"
#include "numbers.h"

/* Vectors that a row of weights is multiplied with while it lies in registers. */
#define TOKENS (VL == 16 ? 4 : 2)

/* The format of weights that those of numbers.h lack. Mirrored by `FORMATS` in weights.py. */
enum { UINT4 = INT8 + 1 };
/* Whole numbers of a row meet inputs that are whole numbers as well, of 16 bits, so many of which have one scale. Rows
   are filled up to a multiple of them. Mirrored by `_GROUP` in weights.py. */
#define GROUP 64

/* Mirrored by `_Matrix` in weights.py: dense rows of weights. INT8: a float32 factor for each GROUP, [rows, groups].
   UINT4: the bytes of a GROUP are its first half, in their low bits, and its second; each half is multiplied by a
   float16 step, to which its lowest weight is added, [rows, 2, 2 groups]. */
struct Matrix {
    const void *weight, *factors;
    const float *bias; /* [rows], or NULL. */
    int64_t format;
};

static Matrix plain_matrix(const float *weight) { return {weight, nullptr, nullptr, FLOAT32}; }

/* A row [dim] of numbers, for products with x [num, dim]. */
template <typename T> struct NumberRow {
    const T *row;
    const float *x;
    int64_t dim;

    /* The products of `num` tokens from t on, by sums that do not wait for each other. */
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

/* Whole numbers of 16 bits, 2 VL of them. */
typedef int16_t WholeVector __attribute__((vector_size(VL * 4)));
typedef uint8_t ManyBytes __attribute__((vector_size(VL * 2)));
typedef int8_t ManySignedBytes __attribute__((vector_size(VL * 2)));

/* sum + a b, two neighbours in one lane. */
INLINE IntVector add_products(IntVector sum, WholeVector a, WholeVector b) {
#if defined(__AVX512VNNI__)
    return (IntVector)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return sum + (IntVector)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return sum + (IntVector)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    ShortVector x[2], y[2];
    memcpy(x, &a, sizeof(a));
    memcpy(y, &b, sizeof(b));
    for (int i = 0; i < 2; i++)
        sum += __builtin_convertvector(x[i], IntVector) * __builtin_convertvector(y[i], IntVector);
    return sum;
#endif
}

INLINE WholeVector load_whole(const int16_t *x) {
    WholeVector y;
    memcpy(&y, x, sizeof(y));
    return y;
}

INLINE WholeVector load_whole(const int8_t *x) {
    ManySignedBytes y;
    memcpy(&y, x, sizeof(y));
    return __builtin_convertvector(y, WholeVector);
}

INLINE WholeVector load_whole(const uint8_t *x) {
    ManyBytes y;
    memcpy(&y, x, sizeof(y));
    return __builtin_convertvector(y, WholeVector);
}

/* Inputs x [num, dim] as whole numbers [num, groups GROUP], the length of their steps [num, groups], and the sums of
   half a GROUP each [num, ld]. */
struct WholeInputs {
    int64_t groups, ld;
    int16_t *numbers;
    float *steps, *sums;
};

static void round_inputs(const WholeInputs *in, int64_t num, int64_t dim, const float *x) {
    /* Adding 1.5 * 2^23 rounds to an integer, in the lowest bits. */
    const Vector shift = splat(12582912.0f);
    const float most = 32767;
    memset(in->sums, 0, sizeof(float) * num * in->ld);
    for (int64_t t = 0; t < num; t++)
        for (int64_t g = 0; g < in->groups; g++) {
            float own[GROUP] = {};
            memcpy(own, x + t * dim + g * GROUP, sizeof(float) * least(GROUP, dim - g * GROUP));
            Vector high = {}, sums[2] = {};
            for (int i = 0; i < GROUP; i += VL) {
                const Vector one = load(own + i);
                high = higher_of(one, higher_of(-one, high));
                sums[i / (GROUP / 2)] += one;
            }
            for (int half = 0; half < 2; half++) in->sums[t * in->ld + 2 * g + half] = total(sums[half]);
            const float largest = highest(high), sum = total(sums[0] + sums[1]);
            const float per_number = largest > 0 && std::isfinite(most / largest) ? most / largest : 0;
            /* What is not finite does not become numbers. */
            in->steps[t * in->groups + g] = std::isfinite(sum) ? (per_number > 0 ? largest / most : 0) : NAN;
            int16_t *out = in->numbers + (t * in->groups + g) * GROUP;
            for (int i = 0; i < GROUP; i += VL) {
                const ShortVector one = __builtin_convertvector((IntVector)(load(own + i) * per_number + shift), ShortVector);
                memcpy(out + i, &one, sizeof(one));
            }
        }
}

/* A row of whole numbers, its factors, and of UINT4 the lowest weights, [ld] of them, zero at the end. */
template <typename T> struct WholeRow {
    const T *row;
    const float *factors, *lows;
    const WholeInputs *in;

    static constexpr int is_halved = std::is_same_v<T, uint8_t>;

    template <int num> INLINE_MEMBER void dots(int64_t t0, float *y) const {
        const int64_t groups = in->groups;
        const int16_t *x = in->numbers + t0 * groups * GROUP;
        Vector sums[num][2] = {};
        for (int64_t g = 0; g < groups; g++, x += GROUP) {
            IntVector own[num][2] = {};
            if constexpr (is_halved)
                for (int64_t j = 0; j < GROUP / 2; j += 2 * VL) {
                    const WholeVector both = load_whole(row + g * (GROUP / 2) + j), low = both & 15, high = both >> 4;
                    for (int t = 0; t < num; t++) {
                        const int16_t *from = x + t * groups * GROUP + j;
                        own[t][0] = add_products(own[t][0], low, load_whole(from));
                        own[t][1] = add_products(own[t][1], high, load_whole(from + GROUP / 2));
                    }
                }
            else
                for (int64_t j = 0; j < GROUP; j += 2 * VL) {
                    const WholeVector weight = load_whole(row + g * GROUP + j);
                    for (int t = 0; t < num; t++)
                        own[t][0] = add_products(own[t][0], weight, load_whole(x + t * groups * GROUP + j));
                }
            for (int t = 0; t < num; t++) {
                const float step = in->steps[(t0 + t) * groups + g];
                for (int i = 0; i <= is_halved; i++)
                    sums[t][i] += __builtin_convertvector(own[t][i], Vector) * (factors[(1 + is_halved) * g + i] * step);
            }
        }
        for (int t = 0; t < num; t++) {
            for (int64_t i = 0; is_halved && i < in->ld; i += VL)
                sums[t][0] += load(lows + i) * load(in->sums + (t0 + t) * in->ld + i);
            y[t] = total(sums[t][0] + sums[t][1]);
        }
    }
};

/* The products of a row with `num` tokens from t on, at most `most`. */
template <int most, class Row> INLINE void some_dots(const Row &row, int64_t num, int64_t t, float *y) {
    if (num == most) row.template dots<most>(t, y);
    else if constexpr (most > 1) some_dots<most - 1>(row, num, t, y);
}

/* Products of x [num, dim] with the rows first..end-1 of a matrix, plus `added` if there is any, into y [num, ldy].
   `row_of` gives a row; they are read one by one and from front to back, which memory does fastest: four at a time took
   twice as long. */
template <typename RowOf>
static void multiply_rows(const Matrix *matrix, int64_t first, int64_t end, int64_t num, const float *added, float *y,
                          int64_t ldy, RowOf row_of) {
    for (int64_t r = first; r < end; r++) {
        const auto row = row_of(r);
        const float bias = matrix->bias ? matrix->bias[r] : 0;
        for (int64_t start = 0; start < num; start += TOKENS) {
            const int64_t last = least(num, start + TOKENS);
            float sums[TOKENS];
            some_dots<TOKENS>(row, last - start, start, sums);
            for (int64_t t = start; t < last; t++) {
                const float sum = sums[t - start] + bias;
                y[t * ldy + r] = added ? added[t * ldy + r] + sum : sum;
            }
        }
    }
}

static void multiply_whole(const Matrix *matrix, int64_t first, int64_t end, int64_t num, int64_t dim, const float *x,
                           const float *added, float *y, int64_t ldy) {
    const int64_t groups = (dim + GROUP - 1) / GROUP, ld = padded(2 * groups, VL);
    int16_t numbers[num * groups * GROUP];
    float steps[num * groups], sums[num * ld], factors[ld], lows[ld];
    const WholeInputs in = {groups, ld, numbers, steps, sums};
    round_inputs(&in, num, dim, x);
    if (matrix->format == INT8)
        multiply_rows(matrix, first, end, num, added, y, ldy, [&](int64_t r) {
            const int8_t *row = (const int8_t *)matrix->weight + r * groups * GROUP;
            return WholeRow<int8_t>{row, (const float *)matrix->factors + r * groups, nullptr, &in};
        });
    else
        multiply_rows(matrix, first, end, num, added, y, ldy, [&](int64_t r) {
            const int64_t at = r * 4 * groups;
            const Float16 *from = (const Float16 *)matrix->factors + at;
            for (int64_t i = 0; i < ld; i += VL) {
                store(factors + i, load_numbers(from + i));
                store(lows + i, load_numbers(from + 2 * groups + i));
            }
            const uint8_t *row = (const uint8_t *)matrix->weight + r * groups * (GROUP / 2);
            return WholeRow<uint8_t>{row, factors, lows, &in};
        });
}

static void multiply_part(const Matrix *matrix, int64_t first, int64_t end, int64_t num, int64_t dim, const float *x,
                          const float *added, float *y, int64_t ldy) {
    if (matrix->format >= INT8) return multiply_whole(matrix, first, end, num, dim, x, added, y, ldy);
    with_type(matrix->format, matrix->weight, 0, [=](auto *weight) {
        typedef std::remove_const_t<std::remove_reference_t<decltype(*weight)>> T;
        multiply_rows(matrix, first, end, num, added, y, ldy,
                      [=](int64_t r) { return NumberRow<T>{weight + r * dim, x, dim}; });
    });
}
