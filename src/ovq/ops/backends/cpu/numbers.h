/* Number formats of inputs and outputs; all arithmetic is in float32. */
#pragma once

#include <type_traits>

#include "vector.h"

/* Mirrored by `DTYPES` in kernels.py, except INT8, whose vectors come with a quantization scale. */
enum { FLOAT32, BFLOAT16, FLOAT16, INT8 };

struct Bfloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

typedef uint32_t Words __attribute__((vector_size(VL * 4)));
typedef uint16_t Halves __attribute__((vector_size(VL * 2)));
typedef int16_t ShortVector __attribute__((vector_size(VL * 2)));
typedef int8_t ByteVector __attribute__((vector_size(VL)));

INLINE float float_of(uint32_t bits) {
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE float as_float(float x) { return x; }
INLINE float as_float(int8_t x) { return x; }
INLINE float as_float(Bfloat16 x) { return float_of((uint32_t)x.bits << 16); }

/* Multiplying by 2^112 moves the exponent bias from float16 to float32, for subnormal numbers too. */
INLINE float as_float(Float16 x) {
    const uint32_t size = x.bits & 0x7fffu, sign = (uint32_t)(x.bits & 0x8000u) << 16;
    const uint32_t finite = bits_of(float_of(size << 13) * 0x1p112f);
    return float_of((size < 0x7c00 ? finite : size << 13 | 0x7f800000) | sign);
}

INLINE Words words_of(const void *x) {
    Halves bits;
    memcpy(&bits, x, sizeof(bits));
    return __builtin_convertvector(bits, Words);
}

/* Load VL numbers as float32. */
INLINE Vector load_numbers(const float *x) { return load(x); }
INLINE Vector load_numbers(const Bfloat16 *x) { return (Vector)(words_of(x) << 16); }

INLINE Vector load_numbers(const int8_t *x) {
#if defined(__AVX512F__)
    return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x)));
#elif defined(__AVX2__)
    return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)x)));
#else
    ByteVector bits;
    memcpy(&bits, x, sizeof(bits));
    /* Step by step: GCC has an instruction for each step. */
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(bits, ShortVector), IntVector), Vector);
#endif
}

INLINE Vector load_numbers(const Float16 *x) {
#if defined(__AVX512F__)
    return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x));
#elif defined(__F16C__)
    return (Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x));
#else
    const Words bits = words_of(x), size = bits & 0x7fff, sign = (bits & 0x8000) << 16;
    const Words finite = (Words)((Vector)(size << 13) * 0x1p112f);
    return (Vector)((size < 0x7c00 ? finite : size << 13 | 0x7f800000) | sign);
#endif
}

/* Store a number, rounded to nearest, ties to even; NaN stays NaN. */
INLINE void put(float *out, float x) { *out = x; }

INLINE void put(Bfloat16 *out, float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    out->bits = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

INLINE void put(Float16 *out, float x) {
    const uint32_t bits = bits_of(x), size = bits & 0x7fffffff;
    /* For numbers below 2^-14 (subnormal in float16), adding 1/2 leaves the float16 in the lowest bits. */
    const uint32_t small = bits_of(float_of(size) + 0.5f) - 0x3f000000;
    const uint32_t normal = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
    const uint32_t large = size > 0x7f800000 ? 0x7e00 : 0x7c00;
    const uint32_t rounded = size < 0x38800000 ? small : size < 0x47800000 ? normal : large;
    out->bits = (uint16_t)(rounded | (bits >> 16 & 0x8000));
}

/* Calls `function` with a typed pointer to number `at` of `data`. */
template <typename Function>
INLINE void with_type(int64_t dtype, const void *data, int64_t at, Function function) {
    if (dtype == BFLOAT16) function((const Bfloat16 *)data + at);
    else if (dtype == FLOAT16) function((const Float16 *)data + at);
    else function((const float *)data + at);
}

/* The same for sums of slots in a format, INT8 included. */
template <typename Function>
INLINE void with_format(int64_t format, const void *data, int64_t at, Function function) {
    if (format == INT8) function((const int8_t *)data + at);
    else with_type(format, data, at, function);
}

/* out [ld] = factor * the n numbers from number `at` on, padded with zeros. */
static void read_numbers(int64_t dtype, const void *data, int64_t at, int64_t n, float factor, float *out, int64_t ld) {
    with_type(dtype, data, at, [=](auto *x) {
        int64_t i = 0;
        for (; i + VL <= n; i += VL) store(out + i, factor * load_numbers(x + i));
        for (; i < n; i++) out[i] = factor * as_float(x[i]);
    });
    for (int64_t i = n; i < ld; i++) out[i] = 0;
}

/* Writes factor * n numbers to `data` from number `at` on. */
static void write_numbers(int64_t dtype, void *data, int64_t at, int64_t n, float factor, const float *from) {
    with_type(dtype, data, at, [=](auto *x) {
        auto *out = const_cast<std::remove_const_t<std::remove_reference_t<decltype(*x)>> *>(x);
        for (int64_t i = 0; i < n; i++) put(out + i, factor * from[i]);
    });
}
