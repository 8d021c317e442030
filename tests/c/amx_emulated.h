/* Tiles in plain C, for a compiler's -include after avx512_simde.h: kernels_amx.c then runs on CPUs without AMX.
 * By the pseudo-code of Intel's Architecture Instruction Set Extensions Programming Reference, TDPBF16PS.
 */
#ifndef FA_AMX_EMULATED_H
#define FA_AMX_EMULATED_H

#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define FA_EMULATED_TILES 8

struct fa_emulated_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

struct fa_emulated_tile {
    unsigned char row[16][64];
};

static _Thread_local struct fa_emulated_config fa_tile_config;
static _Thread_local struct fa_emulated_tile fa_tiles[FA_EMULATED_TILES];

static inline void fa_tile_loadconfig(const void *config)
{
    memcpy(&fa_tile_config, config, sizeof fa_tile_config);
    memset(fa_tiles, 0, sizeof fa_tiles);
}

static inline void fa_tile_release(void) { memset(&fa_tile_config, 0, sizeof fa_tile_config); }

static inline void fa_tile_zero(int tile) { memset(&fa_tiles[tile], 0, sizeof fa_tiles[tile]); }

static inline void fa_tile_load(int tile, const void *from, size_t stride)
{
    fa_tile_zero(tile);
    for (size_t r = 0; r < fa_tile_config.rows[tile]; r++) {
        memcpy(fa_tiles[tile].row[r], (const char *)from + r * stride,
               fa_tile_config.row_bytes[tile]);
    }
}

static inline void fa_tile_store(int tile, void *to, size_t stride)
{
    for (size_t r = 0; r < fa_tile_config.rows[tile]; r++) {
        memcpy((char *)to + r * stride, fa_tiles[tile].row[r], fa_tile_config.row_bytes[tile]);
    }
}

/* Subnormal numbers are zeros. */
static inline float fa_flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }

static inline float fa_tile_bf16(const unsigned char *p)
{
    uint16_t upper;
    memcpy(&upper, p, sizeof upper);
    const uint32_t bits = (uint32_t)upper << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return fa_flush(x);
}

static inline void fa_tile_dpbf16ps(int c, int a, int b)
{
    const size_t columns = fa_tile_config.row_bytes[c] / 4, pairs = fa_tile_config.row_bytes[a] / 4;
    for (size_t m = 0; m < fa_tile_config.rows[c]; m++) {
        for (size_t n = 0; n < columns; n++) {
            float sum[2] = {0, 0}, total;
            for (size_t k = 0; k < pairs; k++) {
                for (size_t i = 0; i < 2; i++) {
                    const float x = fa_tile_bf16(fa_tiles[a].row[m] + 4 * k + 2 * i);
                    const float y = fa_tile_bf16(fa_tiles[b].row[k] + 4 * n + 2 * i);
                    sum[i] = fa_flush(fmaf(x, y, sum[i]));
                }
            }
            memcpy(&total, fa_tiles[c].row[m] + 4 * n, sizeof total);
            total = fa_flush(fa_flush(total) + fa_flush(sum[0] + sum[1]));
            memcpy(fa_tiles[c].row[m] + 4 * n, &total, sizeof total);
        }
    }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) fa_tile_loadconfig(config)
#define _tile_release() fa_tile_release()
#define _tile_zero(tile) fa_tile_zero(tile)
#define _tile_loadd(tile, from, stride) fa_tile_load(tile, from, stride)
#define _tile_stored(tile, to, stride) fa_tile_store(tile, to, stride)
#define _tile_dpbf16ps(c, a, b) fa_tile_dpbf16ps(c, a, b)

#endif
