/* Products of bfloat16 pairs on AMX, whose registers are tiles of 16 rows of 16 words (32 bits). */
#pragma once

#include "product.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define HAS_TILES 1
#else
#define HAS_TILES 0
#endif

#if HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>

#define TILE 16

/* In the processor's own layout. */
struct TileShapes {
    uint8_t palette, first_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t num_rows[16];
};

/* Linux lets a process use tiles on request, as they take 8 KB more memory per thread. Tests may set this themselves. */
#ifndef ARE_TILES_ALLOWED
#define ARE_TILES_ALLOWED (!syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */))
#endif
static const int are_tiles_allowed = ARE_TILES_ALLOWED;

/* A compiler barrier: not every compiler knows that the intrinsics read and write memory. */
#define MEMORY_IS_USED __asm__ volatile("" ::: "memory")

/* Rows of this thread's tiles, 0 if released. Kept because configuring tiles takes as long as a small product. */
static thread_local int64_t tile_rows;

/* Registers 0 to 3 are the sums, of two tiles of rows by two of columns; 4 and 5 the left factor; 6 and 7 the right one. */
static void shape_tiles(int64_t num_rows) {
    if (tile_rows == num_rows) return;
    tile_rows = num_rows;
    const uint8_t first = (uint8_t)least(TILE, num_rows), second = (uint8_t)(num_rows > TILE ? num_rows - TILE : first);
    TileShapes shapes = {};
    shapes.palette = 1;
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = 4 * TILE;
        shapes.num_rows[i] = i < 2 || i == 4 ? first : i < 4 || i == 5 ? second : TILE;
    }
    MEMORY_IS_USED;
    _tile_loadconfig(&shapes);
}

/* For the end of a kernel: PyTorch's own products configure tiles themselves. */
static void release_tiles() {
    if (!tile_rows) return;
    tile_rows = 0;
    _tile_release();
    MEMORY_IS_USED;
}

/* c = from + a b of one or two tiles of rows by one or two of columns; `from` is c or NULL. */
template <int is_tall, int is_wide>
INLINE void multiply_tiles(int64_t k, const uint32_t *a, int64_t row, int64_t col, int64_t num_rows, const uint32_t *b,
                           int64_t ldb, const float *from, float *c, int64_t ldc) {
    const int64_t bytes = 4 * ldc;
    if (from) {
        _tile_loadd(0, c, bytes);
        if constexpr (is_wide) _tile_loadd(1, c + TILE, bytes);
        if constexpr (is_tall) _tile_loadd(2, c + TILE * ldc, bytes);
        if constexpr (is_tall && is_wide) _tile_loadd(3, c + TILE * ldc + TILE, bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t p = 0; p < k; p += TILE) {
        const uint32_t *left = a + p;
        int64_t left_row = row;
        uint32_t rows[2 * TILE * TILE];
        if (col != 1) {
            for (int64_t i = 0; i < num_rows; i++)
                for (int64_t j = 0; j < TILE; j++) rows[i * TILE + j] = a[i * row + (p + j) * col];
            left = rows;
            left_row = TILE;
            MEMORY_IS_USED;
        }
        _tile_loadd(4, left, 4 * left_row);
        if constexpr (is_tall) _tile_loadd(5, left + TILE * left_row, 4 * left_row);
        _tile_loadd(6, b + p * ldb, 4 * ldb);
        if constexpr (is_wide) _tile_loadd(7, b + p * ldb + TILE, 4 * ldb);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (is_wide) _tile_dpbf16ps(1, 4, 7);
        if constexpr (is_tall) _tile_dpbf16ps(2, 5, 6);
        if constexpr (is_tall && is_wide) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, bytes);
    if constexpr (is_wide) _tile_stored(1, c + TILE, bytes);
    if constexpr (is_tall) _tile_stored(2, c + TILE * ldc, bytes);
    if constexpr (is_tall && is_wide) _tile_stored(3, c + TILE * ldc + TILE, bytes);
}

/* `pairs_product` without a finish, k a multiple of TILE. */
static void tiles_product(int64_t m, int64_t n, int64_t k, const uint32_t *a, int64_t row, int64_t col, const uint32_t *b,
                          int64_t panel, int64_t ldb, const float *from, float *c, int64_t ldc) {
    for (int64_t i = 0; i < m; i += 2 * TILE) {
        const int64_t num = least(2 * TILE, m - i);
        shape_tiles(num);
        for (int64_t j = 0; j < n; j += NR) {
            const uint32_t *left = a + i * row, *right = b + j / NR * panel;
            float *out = c + i * ldc + j;
            const int is_wide = n - j >= NR;
            if (num > TILE && is_wide) multiply_tiles<1, 1>(k, left, row, col, num, right, ldb, from, out, ldc);
            else if (num > TILE) multiply_tiles<1, 0>(k, left, row, col, num, right, ldb, from, out, ldc);
            else if (is_wide) multiply_tiles<0, 1>(k, left, row, col, num, right, ldb, from, out, ldc);
            else multiply_tiles<0, 0>(k, left, row, col, num, right, ldb, from, out, ldc);
        }
    }
    MEMORY_IS_USED;
}
#else
INLINE void release_tiles() {}
#endif
