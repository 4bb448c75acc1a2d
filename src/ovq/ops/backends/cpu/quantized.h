/* Quantized weights, and their products with a few tokens, whose inputs are quantized too.

   ABREAST rows are interleaved: four columns of the first row, the same four of the second, and so on, then the next four
   columns. So each lane sums one row, and scales apply to all rows at once. Integer sums are exact, and so the same on all
   processors. */
#pragma once

#include "shorts.h"

/* Mirrored in weights.py: rows per tile, and columns per quantization group; matrices are padded to both. */
#define ABREAST 16
#define GROUP 64
#define QUADS (GROUP / 4)

/* The four bytes of x, in every lane. */
INLINE IntVector four_bytes(const void *x) {
    int32_t bytes;
    memcpy(&bytes, x, sizeof(bytes));
    return bytes - IntVector{};
}

/* int16 inputs of four columns, in the layout that the processor multiplies fastest, and sums of their products with weights,
   four bytes in each lane. */
#if defined(__AVX512VNNI__)
struct Quad {
    int8_t high[4], low[4];

    void put(int i, int16_t x) {
        low[i] = (int8_t)x;
        high[i] = (int8_t)((x - low[i]) >> 8);
    }
};

struct QuadSums {
    IntVector high, low;

    INLINE_MEMBER void add(IntVector weights, const Quad *x) {
        high = (IntVector)_mm512_dpbusd_epi32((__m512i)high, (__m512i)weights, (__m512i)four_bytes(x->high));
        low = (IntVector)_mm512_dpbusd_epi32((__m512i)low, (__m512i)weights, (__m512i)four_bytes(x->low));
    }
    INLINE_MEMBER IntVector all() const { return (high << 8) + low; }
};
#else
struct Quad {
    int16_t even[2], odd[2];

    void put(int i, int16_t x) { (i % 2 ? odd : even)[i / 2] = x; }
};

struct QuadSums {
    Words sum;

    INLINE_MEMBER void add(IntVector weights, const Quad *x) {
        sum = add_shorts(sum, (Words)(weights & 0xff00ff), (Words)four_bytes(x->even));
        sum = add_shorts(sum, (Words)(weights >> 8 & 0xff00ff), (Words)four_bytes(x->odd));
    }
    INLINE_MEMBER IntVector all() const { return (IntVector)sum; }
};
#endif

/* int16 inputs, for generated tokens. */
struct Exact {
    typedef ::Quad Quad;
    typedef QuadSums Sums;
    /* The largest number whose high byte fits, as the low byte is signed. */
    static constexpr float most = 32639;
    /* Tokens that are multiplied with a tile while its sums are in registers. */
    static constexpr int tokens = VL == 16 ? 4 : 2;

    static void put(Quad *to, int i, IntVector numbers) {
        for (int j = 0; j < VL; j++) to[(i + j) / 4].put((i + j) % 4, (int16_t)numbers[j]);
    }
};

/* int8 inputs, for prompts: half the time on processors that multiply bytes. */
#if defined(__AVX512VNNI__)
struct Rough {
    typedef int8_t Quad[4];
    struct Sums {
        IntVector sum;

        INLINE_MEMBER void add(IntVector weights, const Quad *x) {
            sum = (IntVector)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)four_bytes(x));
        }
        INLINE_MEMBER IntVector all() const { return sum; }
    };
    static constexpr float most = 127;
    static constexpr int tokens = 8;

    static void put(Quad *to, int i, IntVector numbers) {
        const ByteVector bytes = __builtin_convertvector(numbers, ByteVector);
        memcpy(to + i / 4, &bytes, sizeof(bytes));
    }
};
#else
struct Rough : Exact {
    static constexpr float most = 127;
};
#endif

/* Quantized inputs [num, groups]; for each half group, the scale and the sum of the integers. */
template <class Format> struct QuantizedInputs {
    int64_t groups;
    typename Format::Quad (*quads)[QUADS];
    float (*scales)[2];
    int32_t (*sums)[2];
};

template <class Format>
static void round_inputs(const QuantizedInputs<Format> *in, int64_t num, int64_t dim, const float *x) {
    for (int64_t at = 0; at < num * in->groups; at++) {
        const int64_t t = at / in->groups, first = at % in->groups * GROUP;
        float own[GROUP] = {};
        memcpy(own, x + t * dim + first, sizeof(float) * least(GROUP, dim - first));
        for (int half = 0; half < 2; half++) {
            const int begin = half * GROUP / 2, end = begin + GROUP / 2;
            const Rounding rounding = rounding_of(own + begin, GROUP / 2, Format::most);
            Vector non_finite = {}, sum = {};
            for (int i = begin; i < end; i += VL) {
                const Vector one = load(own + i);
                /* NaN if a number is not finite. */
                non_finite += one - one;
                const IntVector numbers = rounding.bits_of(one) - (IntVector)splat(ROUNDS);
                sum += __builtin_convertvector(numbers, Vector);
                Format::put(in->quads[at], i, numbers);
            }
            in->scales[at][half] = rounding.size + total(non_finite);
            in->sums[at][half] = whole_total(sum);
        }
    }
}

/* A tile of a matrix. INT8: a group has 16 times 4 unsigned bytes per row, zero point 128, and a float32 scale per row.
   UINT4: a group has 8 times 4 bytes per row, with the first half of the group in the low bits and the second in the high
   bits; each half has a float16 scale and minimum per row. */
template <typename Factor, class Format> struct QuantizedTile {
    const uint8_t *weights;
    const Factor *factors;
    const QuantizedInputs<Format> *in;

    static constexpr bool is_int8 = std::is_same_v<Factor, float>;
    static constexpr int rows = ABREAST, tokens = Format::tokens, parts = ABREAST / VL;
    /* Per group. */
    static constexpr int num_bytes = GROUP * ABREAST / (is_int8 ? 1 : 2), num_factors = ABREAST * (is_int8 ? 1 : 4);

    /* The products of `num` tokens from t0 on, y [num, ABREAST]. */
    template <int num> INLINE_MEMBER void dots(int64_t t0, float *y) const {
        Vector sums[num][parts] = {};
        for (int64_t g = 0; g < in->groups; g++) {
            typename Format::Sums own[num][2][parts] = {};
            const uint8_t *from = weights + g * num_bytes;
            const typename Format::Quad *x[num];
            for (int t = 0; t < num; t++) x[t] = in->quads[(t0 + t) * in->groups + g];
            /* In order of memory, which is read fastest. */
#pragma GCC unroll 2
            for (int first = 0; first < num_bytes; first += GROUP * ABREAST / 2)
#pragma GCC unroll 4
                for (int q = 0; q < QUADS / 2; q++)
                    for (int part = 0; part < parts; part++) {
                        IntVector all;
                        memcpy(&all, from + first + (q * ABREAST + part * VL) * 4, sizeof(all));
#pragma GCC unroll 2
                        for (int half = 0; half < 2; half++) {
                            if (is_int8 && half != (first > 0)) continue;
                            const IntVector some = is_int8 ? all : all >> 4 * half & 0x0f0f0f0f;
                            for (int t = 0; t < num; t++)
                                own[t][half][part].add(some, x[t] + half * (QUADS / 2) + q);
                        }
                    }
            const Factor *factor = factors + g * num_factors;
            for (int t = 0; t < num; t++) {
                const int64_t at = (t0 + t) * in->groups + g;
                for (int part = 0; part < parts; part++) {
                    Vector all = {};
                    for (int half = 0; half < 2; half++) {
                        const float scale = in->scales[at][half];
                        const int32_t sum = in->sums[at][half], zeros = is_int8 ? 128 * sum : 0;
                        const Vector product = __builtin_convertvector(own[t][half][part].all() - zeros, Vector) * scale;
                        const Factor *scales = factor + half * 2 * ABREAST + part * VL;
                        if (is_int8) all += product;
                        else all += product * load_numbers(scales) + load_numbers(scales + ABREAST) * (sum * scale);
                    }
                    sums[t][part] += is_int8 ? all * load_numbers(factor + part * VL) : all;
                }
            }
        }
        for (int t = 0; t < num; t++)
            for (int part = 0; part < parts; part++) store(y + t * ABREAST + part * VL, sums[t][part]);
    }
};
