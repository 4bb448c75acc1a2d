/* The roof of `ovq bench`: the rate of the loop of all products (product.h) when it does nothing else. */
#pragma once

#include "product.h"
#include "workers.h"

/* A tile of a product whose factors stay in the first-level cache. */
#define ROOF_M (4 * MR)
#define ROOF_N (2 * NR)
#define ROOF_K 128

/* Each thread multiplies its own a [m, k] and b [k, n in panels] into c [m, n], `repeats` times. */
extern "C" void ovq_roof(int64_t num_threads, int64_t repeats, const float *a, const float *b, float *c) {
    parallel_for(num_threads, num_threads, [=](int64_t t) {
        for (int64_t i = 0; i < repeats; i++)
            product(ROOF_M, ROOF_N, ROOF_K, a + t * ROOF_M * ROOF_K, ROOF_K, 1, b + t * ROOF_K * ROOF_N, ROOF_K * NR,
                    NR, nullptr, 0, c + t * ROOF_M * ROOF_N, ROOF_N);
    });
}

/* Sizes of a tile: m, n, k. */
extern "C" void ovq_roof_sizes(int64_t *sizes) {
    sizes[0] = ROOF_M;
    sizes[1] = ROOF_N;
    sizes[2] = ROOF_K;
}
