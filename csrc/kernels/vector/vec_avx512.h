/* Vectors of the avx512 level (x86-64-v4: AVX-512 F, DQ, BW, VL): the only AVX-512 intrinsics.
 *
 * Same operations and the same meaning as vec_avx2.h.
 */
#ifndef FA_VEC_AVX512_H
#define FA_VEC_AVX512_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "names.h"

typedef __m512 vec_f32;
typedef __m512d vec_f64;

#define VL_f32 16
#define VL_f64 8
/* 12 x 2 vectors: 24 accumulators + 2 columns + 1 broadcast of 32 registers, 14 loads for 24
 * multiply-adds.  24 chains cover 2 FMA pipes x 4 to 5 cycles of latency. */
#define MR_f32 12
#define MR_f64 12
#define NR_VECTORS_f32 2
#define NR_VECTORS_f64 2
/* exp2 looks up this many bits: the entries of one register. */
#define EXP2_TABLE_BITS_f32 4
#define EXP2_TABLE_BITS_f64 3
/* Rows that softmax_update works on side by side: chains enough to fill the time that one
 * exponential takes from its first operation to its last.  4 x 5 registers and the constants are 29
 * of 32. */
#define SOFTMAX_ROWS_f32 4
#define SOFTMAX_ROWS_f64 4
/* Rows whose products are computed straight from caller memory: with a square of keys, 8 + 16
 * registers and some for transposing it. */
#define FEW_ROWS_f32 8
#define FEW_ROWS_f64 8

static inline vec_f32 v_zero_f32(void) { return _mm512_setzero_ps(); }
static inline vec_f64 v_zero_f64(void) { return _mm512_setzero_pd(); }
static inline vec_f32 v_set_f32(float x) { return _mm512_set1_ps(x); }
static inline vec_f64 v_set_f64(double x) { return _mm512_set1_pd(x); }
static inline vec_f32 v_broadcast_f32(const float *p) { return _mm512_set1_ps(*p); }
static inline vec_f64 v_broadcast_f64(const double *p) { return _mm512_set1_pd(*p); }
static inline vec_f32 v_load_f32(const void *p) { return _mm512_loadu_ps(p); }
static inline vec_f64 v_load_f64(const void *p) { return _mm512_loadu_pd(p); }
static inline void v_store_f32(void *p, vec_f32 x) { _mm512_storeu_ps(p, x); }
static inline void v_store_f64(void *p, vec_f64 x) { _mm512_storeu_pd(p, x); }

/* VL elements of another type, from and to memory; see memory.h. */
static inline vec_f32 v_widen_f16(const void *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
static inline vec_f32 v_widen_bf16(const void *p)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline vec_f32 v_widen_i8(const void *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
/* Element `sub` of each 32-bit lane that holds several of a narrower type. */
static inline vec_f32 v_element_f16(vec_f32 x, int sub)
{
    __m512i lane = _mm512_castps_si512(x);
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(sub == 0 ? lane : _mm512_srli_epi32(lane, 16)));
}
static inline vec_f32 v_element_bf16(vec_f32 x, int sub)
{
    __m512i lane = _mm512_castps_si512(x);
    return _mm512_castsi512_ps(sub == 0 ? _mm512_slli_epi32(lane, 16)
                                        : _mm512_and_si512(lane, _mm512_set1_epi32(-65536)));
}
static inline vec_f32 v_element_i8(vec_f32 x, int sub)
{
    __m512i top = _mm512_sllv_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(24 - 8 * sub));
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(top, 24));
}
static inline void v_narrow_f16(void *p, vec_f32 x)
{
    __m256i half = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256((__m256i *)p, half);
}
static inline void v_narrow_bf16(void *p, vec_f32 x)
{
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i nan = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i upper =
        _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), nan);
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(upper, 16)));
}

static inline vec_f32 v_add_f32(vec_f32 a, vec_f32 b) { return _mm512_add_ps(a, b); }
static inline vec_f64 v_add_f64(vec_f64 a, vec_f64 b) { return _mm512_add_pd(a, b); }
static inline vec_f32 v_sub_f32(vec_f32 a, vec_f32 b) { return _mm512_sub_ps(a, b); }
static inline vec_f64 v_sub_f64(vec_f64 a, vec_f64 b) { return _mm512_sub_pd(a, b); }
static inline vec_f32 v_mul_f32(vec_f32 a, vec_f32 b) { return _mm512_mul_ps(a, b); }
static inline vec_f64 v_mul_f64(vec_f64 a, vec_f64 b) { return _mm512_mul_pd(a, b); }
static inline vec_f32 v_div_f32(vec_f32 a, vec_f32 b) { return _mm512_div_ps(a, b); }
static inline vec_f64 v_div_f64(vec_f64 a, vec_f64 b) { return _mm512_div_pd(a, b); }
static inline vec_f32 v_max_f32(vec_f32 a, vec_f32 b) { return _mm512_max_ps(a, b); }
static inline vec_f64 v_max_f64(vec_f64 a, vec_f64 b) { return _mm512_max_pd(a, b); }
/* a * b + c, one rounding */
static inline vec_f32 v_fma_f32(vec_f32 a, vec_f32 b, vec_f32 c)
{
    return _mm512_fmadd_ps(a, b, c);
}
static inline vec_f64 v_fma_f64(vec_f64 a, vec_f64 b, vec_f64 c)
{
    return _mm512_fmadd_pd(a, b, c);
}
#define v_fma_exact_f32 v_fma_f32
#define v_fma_exact_f64 v_fma_f64

static inline vec_f32 v_abs_f32(vec_f32 x) { return _mm512_abs_ps(x); }
static inline vec_f64 v_abs_f64(vec_f64 x) { return _mm512_abs_pd(x); }

/* |x| with the sign of s; x >= 0 */
static inline vec_f32 v_copysign_f32(vec_f32 x, vec_f32 s)
{
    return _mm512_or_ps(x, _mm512_and_ps(_mm512_set1_ps(-0.0f), s));
}
static inline vec_f64 v_copysign_f64(vec_f64 x, vec_f64 s)
{
    return _mm512_or_pd(x, _mm512_and_pd(_mm512_set1_pd(-0.0), s));
}

static inline vec_f32 v_keep_ge_f32(vec_f32 x, vec_f32 limit, vec_f32 y)
{
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), y);
}
static inline vec_f64 v_keep_ge_f64(vec_f64 x, vec_f64 limit, vec_f64 y)
{
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(x, limit, _CMP_NLT_UQ), y);
}

/* x < limit ? a : b */
static inline vec_f32 v_select_lt_f32(vec_f32 x, vec_f32 limit, vec_f32 a, vec_f32 b)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ), b, a);
}
static inline vec_f64 v_select_lt_f64(vec_f64 x, vec_f64 limit, vec_f64 a, vec_f64 b)
{
    return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(x, limit, _CMP_LT_OQ), b, a);
}

/* Whether any lane of x is greater than the same lane of limit. */
static inline int v_any_gt_f32(vec_f32 x, vec_f32 limit)
{
    return _mm512_cmp_ps_mask(x, limit, _CMP_GT_OQ);
}
static inline int v_any_gt_f64(vec_f64 x, vec_f64 limit)
{
    return _mm512_cmp_pd_mask(x, limit, _CMP_GT_OQ);
}

/* What rounding x to a multiple of 2^-EXP2_TABLE_BITS leaves, ties to even: exact, and 0 for an
 * infinity. */
static inline vec_f32 v_exp2_rest_f32(vec_f32 x, vec_f32 t, vec_f32 round)
{
    (void)t;
    (void)round;
    return _mm512_reduce_ps(x, EXP2_TABLE_BITS_f32 << 4 | _MM_FROUND_NO_EXC);
}
static inline vec_f64 v_exp2_rest_f64(vec_f64 x, vec_f64 t, vec_f64 round)
{
    (void)t;
    (void)round;
    return _mm512_reduce_pd(x, EXP2_TABLE_BITS_f64 << 4 | _MM_FROUND_NO_EXC);
}

/* 2^(i / 16) and 2^(i / 8) as bit patterns, less i << (mantissa bits - table bits): what exp2_scale
 * adds holds i in those places and n in the exponent. */
static const uint32_t exp2_table_f32[16] = {
    0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
    0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d,
};
static const uint64_t exp2_table_f64[8] = {
    0x3ff0000000000000, 0x3fef72b83c7d517b, 0x3fef06fe0a31b715, 0x3feebfdad5362a27,
    0x3feea09e667f3bcd, 0x3feeace5422aa0db, 0x3feee89f995ad3ad, 0x3fef5818dcfba487,
};

/* 2^m for the integer m, in units of 2^-EXP2_TABLE_BITS, that the low bits of t hold (see
 * EXP2_ROUND).  A permutation looks at the index bits of each lane only. */
static inline vec_f32 v_exp2_scale_f32(vec_f32 t)
{
    __m512i m = _mm512_castps_si512(t);
    __m512i root = _mm512_permutexvar_epi32(m, _mm512_loadu_si512(exp2_table_f32));
    return _mm512_castsi512_ps(_mm512_add_epi32(root, _mm512_slli_epi32(m, 19)));
}
static inline vec_f64 v_exp2_scale_f64(vec_f64 t)
{
    __m512i m = _mm512_castpd_si512(t);
    __m512i root = _mm512_permutexvar_epi64(m, _mm512_loadu_si512(exp2_table_f64));
    return _mm512_castsi512_pd(_mm512_add_epi64(root, _mm512_slli_epi64(m, 49)));
}

/* mask[lane] != 0 ? x : other.  Reads VL bytes. */
static inline vec_f32 v_select_bytes_f32(const uint8_t *mask, vec_f32 x, vec_f32 other)
{
    __m128i bytes = _mm_loadu_si128((const __m128i *)mask);
    return _mm512_mask_blend_ps(_mm_test_epi8_mask(bytes, bytes), other, x);
}
static inline vec_f64 v_select_bytes_f64(const uint8_t *mask, vec_f64 x, vec_f64 other)
{
    __m128i bytes = _mm_loadl_epi64((const __m128i *)mask);
    return _mm512_mask_blend_pd((__mmask8)_mm_test_epi8_mask(bytes, bytes), other, x);
}

/* 0, 1, 2, ... */
static inline vec_f32 v_iota_f32(void)
{
    return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
static inline vec_f64 v_iota_f64(void) { return _mm512_setr_pd(0, 1, 2, 3, 4, 5, 6, 7); }

/* Transpose VL rows of VL elements in place: pairs, quads, then 128-bit quarters; 64 shuffles for
 * 16 x 16. */
FA_INLINE void v_transpose_f32(vec_f32 r[VL_f32])
{
    vec_f32 a[16], b[16];
    FA_UNROLL
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    FA_UNROLL
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    /* b[4 g + c] holds, in quarter h, column 4 h + c of rows 4 g .. 4 g + 3. */
    FA_UNROLL
    for (int c = 0; c < 4; c++) {
        vec_f32 low01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88);
        vec_f32 low23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
        vec_f32 high01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
        vec_f32 high23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
        r[c] = _mm512_shuffle_f32x4(low01, low23, 0x88);
        r[8 + c] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
        r[4 + c] = _mm512_shuffle_f32x4(high01, high23, 0x88);
        r[12 + c] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
    }
}
FA_INLINE void v_transpose_f64(vec_f64 r[VL_f64])
{
    vec_f64 a[8];
    FA_UNROLL
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm512_unpacklo_pd(r[i], r[i + 1]);
        a[i + 1] = _mm512_unpackhi_pd(r[i], r[i + 1]);
    }
    /* a[2 g + c] holds, in quarter h, column 2 h + c of rows 2 g and 2 g + 1. */
    FA_UNROLL
    for (int c = 0; c < 2; c++) {
        vec_f64 low01 = _mm512_shuffle_f64x2(a[c], a[2 + c], 0x88);
        vec_f64 low23 = _mm512_shuffle_f64x2(a[4 + c], a[6 + c], 0x88);
        vec_f64 high01 = _mm512_shuffle_f64x2(a[c], a[2 + c], 0xdd);
        vec_f64 high23 = _mm512_shuffle_f64x2(a[4 + c], a[6 + c], 0xdd);
        r[c] = _mm512_shuffle_f64x2(low01, low23, 0x88);
        r[4 + c] = _mm512_shuffle_f64x2(low01, low23, 0xdd);
        r[2 + c] = _mm512_shuffle_f64x2(high01, high23, 0x88);
        r[6 + c] = _mm512_shuffle_f64x2(high01, high23, 0xdd);
    }
}

/* 32-bit words, for random numbers.  mul_u32: the lower and the upper halves of the products. */
typedef __m512i vec_u32;
#define VL_u32 16

static inline vec_u32 v_set_u32(uint32_t x) { return _mm512_set1_epi32((int)x); }
static inline vec_u32 v_load_u32(const uint32_t *p) { return _mm512_loadu_si512(p); }
static inline void v_store_u32(uint32_t *p, vec_u32 x) { _mm512_storeu_si512(p, x); }
static inline vec_u32 v_xor_u32(vec_u32 a, vec_u32 b) { return _mm512_xor_si512(a, b); }
static inline vec_u32 v_mul_u32(vec_u32 a, vec_u32 b, vec_u32 *upper)
{
    const __m512i even = _mm512_mul_epu32(a, b);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
    *upper = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
    return _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
}

#endif
