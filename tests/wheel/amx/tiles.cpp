/* Products of bfloat16 pairs on AMX (tiles.h), compared with float64, without an operating system. What it finds goes to
   the port that Bochs prints; the last line is "passed" or "failed". */
#define ARE_TILES_ALLOWED 1
#include "pairs.h"

static_assert(HAS_TILES, "expected a compiler that is told of AMX");

extern "C" void *memcpy(void *to, const void *from, size_t n) {
    for (size_t i = 0; i < n; i++) ((volatile char *)to)[i] = ((const char *)from)[i];
    return to;
}

extern "C" void *memset(void *to, int x, size_t n) {
    for (size_t i = 0; i < n; i++) ((volatile char *)to)[i] = (char)x;
    return to;
}

static void put_byte(uint16_t port, uint8_t x) { __asm__ volatile("outb %0, %1" ::"a"(x), "Nd"(port)); }

static void print(const char *text) {
    while (*text) put_byte(0xe9, (uint8_t)*text++);
}

static void print(int64_t x) {
    char digits[24], *end = digits + 23;
    *end = 0;
    do *--end = (char)('0' + x % 10);
    while (x /= 10);
    print(end);
}

/* A few significant bits, of both signs and many sizes, so that an order of sums matters. */
static uint32_t random_bits;

static float random_number() {
    random_bits = random_bits * 1664525 + 1013904223;
    const uint32_t x = random_bits >> 8;
    return (float)((int)(x & 255) - 128) * float_of((120 + (x >> 8 & 7)) << 23);
}

#define MOST 160
static float left[MOST][2 * MOST], right[2 * MOST][MOST], sums[MOST][MOST + 32], start[MOST][MOST + 32], bias[MOST];
static uint32_t words[MOST * MOST], panels[MOST * MOST];

static uint32_t pair(float low, float high) { return bits_of(low) >> 16 | (bits_of(high) & 0xffff0000); }

/* Whether m x n sums of k words are right, with nothing written beyond them. */
static bool is_right(int64_t m, int64_t n, int64_t k, bool is_turned, bool has_start, bool has_bias) {
    const int64_t ldc = MOST + 32;
    for (int64_t i = 0; i < m; i++)
        for (int64_t p = 0; p < 2 * k; p++) left[i][p] = random_number();
    for (int64_t p = 0; p < 2 * k; p++)
        for (int64_t j = 0; j < n; j++) right[p][j] = random_number();
    for (int64_t i = 0; i < MOST; i++)
        for (int64_t j = 0; j < ldc; j++) start[i][j] = sums[i][j] = random_number();
    for (int64_t j = 0; j < MOST; j++) bias[j] = random_number();
    for (int64_t i = 0; i < m; i++)
        for (int64_t p = 0; p < k; p++)
            words[is_turned ? p * MOST + i : i * k + p] = pair(left[i][2 * p], left[i][2 * p + 1]);
    for (int64_t j = 0; j < n; j++)
        for (int64_t p = 0; p < k; p++)
            panels[j / NR * k * NR + p * NR + j % NR] = pair(right[2 * p][j], right[2 * p + 1][j]);
    const Finish finish = has_bias ? Finish{bias, 0.5f} : Finish{};
    pairs_product(m, n, k, words, is_turned ? 1 : k, is_turned ? MOST : 1, panels, k * NR, NR,
                  has_start ? &sums[0][0] : nullptr, finish, &sums[0][0], ldc);
    for (int64_t i = 0; i < MOST; i++)
        for (int64_t j = 0; j < ldc; j++) {
            double sum = has_start ? start[i][j] : 0, size = fabs(sum);
            if (i >= m || j >= n) {
                if (sums[i][j] != start[i][j]) return false;
                continue;
            }
            for (int64_t p = 0; p < 2 * k; p++) {
                sum += (double)left[i][p] * right[p][j];
                size += fabs((double)left[i][p] * right[p][j]);
            }
            if (has_bias) sum = 0.5 * sum + bias[j], size += fabs(bias[j]);
            if (!(fabs(sums[i][j] - sum) <= (double)(k + 4) * FLT_EPSILON * size)) return false;
        }
    return true;
}

extern "C" void run() {
    const int64_t rows[] = {1, 5, 16, 17, 31, 32, 33, 64, 80}, columns[] = {16, 32, 48, 128}, depths[] = {16, 20, 48};
    int64_t num = 0, num_wrong = 0;
    for (int64_t m : rows)
        for (int64_t n : columns)
            for (int64_t k : depths)
                for (int kind = 0; kind < 8; kind++) {
                    num++;
                    if (is_right(m, n, k, kind & 1, kind & 2, kind & 4)) continue;
                    print("wrong: rows, columns, words, kind ");
                    print(m), print(" "), print(n), print(" "), print(k), print(" "), print(kind), print("\n");
                    num_wrong++;
                }
    print(num), print(" products, wrong: "), print(num_wrong), print("\n");
    print(num_wrong ? "failed\n" : "passed\n");
    /* Bochs ends at this word. */
    for (const char *x = "Shutdown"; *x; x++) put_byte(0x8900, (uint8_t)*x);
}
