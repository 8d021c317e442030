/* Tiles of the amx level (AMX-TILE and AMX-BF16 beside x86-64-v4), and what their operands need of
 * AVX-512: with vec_avx512.h the only intrinsics of the set.
 *
 * A tile register holds up to 16 rows of 64 bytes.  One product, c += a b, takes a of bfloat16
 * (rows x 32), b of pairs (16 rows of pairs x 16 columns) and c of float32 (rows x 16).  Of each
 * element it sums the first elements of the 16 pairs as one chain of fused multiply-adds from 0,
 * the second ones as another, adds the two and adds that to c; subnormal numbers count as 0 and
 * become 0 (Intel, Architecture Instruction Set Extensions Programming Reference, TDPBF16PS).
 */
#ifndef FA_VEC_AMX_H
#define FA_VEC_AMX_H

#include "kernels/vector/vec_avx512.h"

#define TILE_KEYS 32 /* bfloat16 in a row of a tile: keys, or elements of head_dim */
#define TILE_WORDS 16 /* pairs of them, or float32 */
#define PANEL 32 /* columns of b side by side: two tiles */

/* The tile registers: c has TILES_Q = 16 + 16 rows and 2 x 16 columns.  A product occupies the unit
 * for 16 cycles and takes 52 to be done: four in turn, each adding to the result of its last, wait
 * for nobody. */
#define TILES_Q 32
#define UPPER_ROWS 16
#define UPPER_C0 0
#define UPPER_C1 1
#define LOWER_C0 2
#define LOWER_C1 3
#define UPPER_A 4
#define LOWER_A 5
#define B0 6
#define B1 7

/* What LDTILECFG reads: 64 bytes. */
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

static const struct tile_config tile_config = {
    .palette = 1,
    .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {16, 16, 16, 16, 16, 16, 16, 16},
};

/* Names, not functions: the number of a register is part of the instruction.  c += a b; a register
 * to or from rows `stride` bytes apart; 0. */
#define v_tile_multiply(c, a, b) _tile_dpbf16ps(c, a, b)
#define v_tile_load(tile, from, stride) _tile_loadd(tile, from, stride)
#define v_tile_store(tile, to, stride) _tile_stored(tile, to, stride)
#define v_tile_zero(tile) _tile_zero(tile)

static inline void begin_tiles(void) { _tile_loadconfig(&tile_config); }

static inline void end_tiles(void) { _tile_release(); }

/* Compilers do not know that loads of tiles read memory: what was written before must be there. */
static inline void finish_stores(void) { __asm__ volatile("" ::: "memory"); }

/* The mode in which multiply-adds of float32 do what the tiles do: subnormal numbers count as 0 and
 * become 0, rounding is to nearest, no exception is reported.  Returns the mode before. */
#define TILE_MODE 0x9fc0u /* of MXCSR: flush to zero, all exceptions masked, denormals are zeros */
static inline unsigned flush_subnormals(void)
{
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(TILE_MODE);
    return mode;
}
static inline void restore_mode(unsigned mode) { _mm_setcsr(mode); }

/* 32 elements of 16 bits. */
typedef __m512i vec_u16;

static inline vec_u16 v_load_u16(const void *p) { return _mm512_loadu_si512(p); }
/* The first `count`, then zeros; touches no other memory. */
static inline vec_u16 v_load_first_u16(const void *p, size_t count)
{
    return _mm512_maskz_loadu_epi16((__mmask32)(((uint64_t)1 << count) - 1), p);
}
static inline vec_u16 v_zero_u16(void) { return _mm512_setzero_si512(); }
static inline void v_store_u16(void *p, vec_u16 x) { _mm512_storeu_si512(p, x); }

/* Lanes with a bfloat16 that products of tiles may not see: an infinity or a NaN, whose exponent is
 * all ones, or a subnormal number, whose exponent is 0.  Shifted out of their signs and less
 * 0x7f00, they and 0 are the 512 least of all. */
static inline uint32_t v_special_u16(vec_u16 x)
{
    const vec_u16 shifted = _mm512_add_epi16(x, x);
    const vec_u16 less = _mm512_sub_epi16(shifted, _mm512_set1_epi16(0x7f00));
    return _mm512_cmpgt_epi16_mask(_mm512_set1_epi16(-0x7e00), less) &
           _mm512_test_epi16_mask(shifted, shifted);
}
/* Lanes with a bfloat16 whose bits without their sign are at least these. */
static inline uint32_t v_large_u16(vec_u16 x, int least)
{
    const vec_u16 size = _mm512_and_si512(x, _mm512_set1_epi16(0x7fff));
    return _mm512_cmpgt_epi16_mask(size, _mm512_set1_epi16((short)(least - 1)));
}
static inline vec_u16 v_clear_u16(vec_u16 x, uint32_t lanes)
{
    return _mm512_maskz_mov_epi16((__mmask32)~lanes, x);
}

/* Pairs (x[i], y[i]), i < 16 or i >= 16. */
static inline vec_u16 v_pair_low_u16(vec_u16 x, vec_u16 y)
{
    const __m512i from =
        _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    return _mm512_permutex2var_epi16(x, from, y);
}
static inline vec_u16 v_pair_high_u16(vec_u16 x, vec_u16 y)
{
    const __m512i from =
        _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54,
                         22, 53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
    return _mm512_permutex2var_epi16(x, from, y);
}

/* Pairs of the upper halves of x[i] and y[i]: bfloat16, cut off. */
static inline vec_u16 v_pair_upper_halves(vec_f32 x, vec_f32 y)
{
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(x), 16);
    return _mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_castps_si512(y));
}
/* A float32 cut off to bfloat16. */
static inline vec_f32 v_upper_half(vec_f32 x)
{
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(-65536)));
}
/* To be cut off: then rounded to nearest. */
static inline vec_f32 v_round_half(vec_f32 x)
{
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)));
}
/* Lanes that are neither 0 nor in [least, limit) without their sign, 0 <= least < limit; NaN is
 * outside. */
static inline uint32_t v_outside_f32(vec_f32 x, float least, float limit)
{
    const __m512i size = _mm512_castps_si512(_mm512_abs_ps(x));
    const __m512i low = _mm512_castps_si512(_mm512_set1_ps(least));
    const __m512i high = _mm512_castps_si512(_mm512_set1_ps(limit));
    return _mm512_cmpge_epu32_mask(_mm512_sub_epi32(size, low), _mm512_sub_epi32(high, low)) &
           _mm512_test_epi32_mask(size, size);
}
static inline int v_any_nan_f32(vec_f32 x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }
/* Numbers by size, as integers: |x| < |y| where that of x is less; 0 has the greatest of all. */
typedef __m512i vec_u32;
static inline vec_u32 v_size_f32(vec_f32 x)
{
    const __m512i bits = _mm512_castps_si512(x);
    return _mm512_sub_epi32(_mm512_add_epi32(bits, bits), _mm512_set1_epi32(1));
}
static inline vec_u32 v_min_u32(vec_u32 x, vec_u32 y) { return _mm512_min_epu32(x, y); }
static inline int v_any_less_u32(vec_u32 x, vec_u32 y)
{
    return _mm512_cmpge_epu32_mask(x, y) != 0xffff;
}
/* y in some lanes, x in the others. */
static inline vec_f32 v_blend_lanes_f32(vec_f32 x, vec_f32 y, uint32_t lanes)
{
    return _mm512_mask_mov_ps(x, (__mmask16)lanes, y);
}
/* x in some lanes, 0 in the others. */
static inline vec_f32 v_only_lanes_f32(vec_f32 x, uint32_t lanes)
{
    return _mm512_maskz_mov_ps((__mmask16)lanes, x);
}
/* The first `count`, then zeros; touches no other memory. */
static inline vec_f32 v_load_first_f32(const void *p, size_t count)
{
    return _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
}
/* A NaN without payload for any NaN. */
static inline vec_f32 v_plain_nan(vec_f32 x)
{
    const __m512i nan = _mm512_set1_epi32(0x7fc00000);
    return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_castsi512_ps(nan));
}
static inline vec_f32 v_as_f32(vec_u16 x) { return _mm512_castsi512_ps(x); }
static inline vec_u16 v_as_u16(vec_f32 x) { return _mm512_castps_si512(x); }
static inline vec_f32 v_pair_first(vec_u16 x) { return v_element_bf16(_mm512_castsi512_ps(x), 0); }
static inline vec_f32 v_pair_second(vec_u16 x) { return v_element_bf16(_mm512_castsi512_ps(x), 1); }

#endif
