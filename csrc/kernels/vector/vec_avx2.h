/* Vectors of the avx2 level (x86-64-v3: AVX2, FMA, F16C, BMI): the only AVX2 intrinsics.
 *
 * v_<op>_<type>.  Loads and stores take any alignment.  v_max returns its second operand when
 * either is NaN, as vmaxps does.  v_keep_ge(x, limit, y) is y where !(x < limit), NaN included,
 * else +0.
 */
#ifndef FA_VEC_AVX2_H
#define FA_VEC_AVX2_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef __m256 vec_f32;
typedef __m256d vec_f64;

#define VL_f32 8
#define VL_f64 4
/* 6 x 2 vectors: 12 accumulators + 2 columns + 1 broadcast of 16 registers. 12 independent chains
 * cover 2 FMA pipes x 4 to 5 cycles of latency. */
#define MR_f32 6
#define MR_f64 6
#define NR_VECTORS_f32 2
#define NR_VECTORS_f64 2
/* exp2 looks up this many bits: the entries of one register.  No instruction permutes 4 doubles by
 * lane indices. */
#define EXP2_TABLE_BITS_f32 3
#define EXP2_TABLE_BITS_f64 0
/* Rows that softmax_update works on side by side: 2 x 5 registers and the constants that stay fill
 * 16. */
#define SOFTMAX_ROWS_f32 2
#define SOFTMAX_ROWS_f64 2
/* Rows whose products are computed straight from caller memory: with a square of keys, 4 + 8
 * registers and some for transposing it. */
#define FEW_ROWS_f32 4
#define FEW_ROWS_f64 4

static inline vec_f32 v_zero_f32(void) { return _mm256_setzero_ps(); }
static inline vec_f64 v_zero_f64(void) { return _mm256_setzero_pd(); }
static inline vec_f32 v_set_f32(float x) { return _mm256_set1_ps(x); }
static inline vec_f64 v_set_f64(double x) { return _mm256_set1_pd(x); }
static inline vec_f32 v_broadcast_f32(const float *p) { return _mm256_broadcast_ss(p); }
static inline vec_f64 v_broadcast_f64(const double *p) { return _mm256_broadcast_sd(p); }
static inline vec_f32 v_load_f32(const void *p) { return _mm256_loadu_ps(p); }
static inline vec_f64 v_load_f64(const void *p) { return _mm256_loadu_pd(p); }
static inline void v_store_f32(void *p, vec_f32 x) { _mm256_storeu_ps(p, x); }
static inline void v_store_f64(void *p, vec_f64 x) { _mm256_storeu_pd(p, x); }

/* VL elements of another type, from and to memory; see memory.h. */
static inline vec_f32 v_widen_f16(const void *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
static inline vec_f32 v_widen_bf16(const void *p)
{
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline vec_f32 v_widen_i8(const void *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
/* Element `sub` of each 32-bit lane that holds several of a narrower type. */
static inline vec_f32 v_element_f16(vec_f32 x, int sub)
{
    __m256i lane = _mm256_castps_si256(x);
    __m256i half =
        sub == 0 ? _mm256_and_si256(lane, _mm256_set1_epi32(0xffff)) : _mm256_srli_epi32(lane, 16);
    half = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(half));
}
static inline vec_f32 v_element_bf16(vec_f32 x, int sub)
{
    __m256i lane = _mm256_castps_si256(x);
    return _mm256_castsi256_ps(sub == 0 ? _mm256_slli_epi32(lane, 16)
                                        : _mm256_and_si256(lane, _mm256_set1_epi32(-65536)));
}
static inline vec_f32 v_element_i8(vec_f32 x, int sub)
{
    __m256i top = _mm256_sllv_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(24 - 8 * sub));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24));
}
static inline void v_narrow_f16(void *p, vec_f32 x)
{
    __m128i half = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128((__m128i *)p, half);
}
static inline void v_narrow_bf16(void *p, vec_f32 x)
{
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, nan, is_nan), 16);
    /* Packing works within 128-bit halves: the halves' results are then brought together. */
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(packed));
}

static inline vec_f32 v_add_f32(vec_f32 a, vec_f32 b) { return _mm256_add_ps(a, b); }
static inline vec_f64 v_add_f64(vec_f64 a, vec_f64 b) { return _mm256_add_pd(a, b); }
static inline vec_f32 v_sub_f32(vec_f32 a, vec_f32 b) { return _mm256_sub_ps(a, b); }
static inline vec_f64 v_sub_f64(vec_f64 a, vec_f64 b) { return _mm256_sub_pd(a, b); }
static inline vec_f32 v_mul_f32(vec_f32 a, vec_f32 b) { return _mm256_mul_ps(a, b); }
static inline vec_f64 v_mul_f64(vec_f64 a, vec_f64 b) { return _mm256_mul_pd(a, b); }
static inline vec_f32 v_div_f32(vec_f32 a, vec_f32 b) { return _mm256_div_ps(a, b); }
static inline vec_f64 v_div_f64(vec_f64 a, vec_f64 b) { return _mm256_div_pd(a, b); }
static inline vec_f32 v_max_f32(vec_f32 a, vec_f32 b) { return _mm256_max_ps(a, b); }
static inline vec_f64 v_max_f64(vec_f64 a, vec_f64 b) { return _mm256_max_pd(a, b); }
/* a * b + c, one rounding */
static inline vec_f32 v_fma_f32(vec_f32 a, vec_f32 b, vec_f32 c)
{
    return _mm256_fmadd_ps(a, b, c);
}
static inline vec_f64 v_fma_f64(vec_f64 a, vec_f64 b, vec_f64 c)
{
    return _mm256_fmadd_pd(a, b, c);
}
#define v_fma_exact_f32 v_fma_f32
#define v_fma_exact_f64 v_fma_f64

static inline vec_f32 v_abs_f32(vec_f32 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
static inline vec_f64 v_abs_f64(vec_f64 x) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), x); }

/* |x| with the sign of s; x >= 0 */
static inline vec_f32 v_copysign_f32(vec_f32 x, vec_f32 s)
{
    return _mm256_or_ps(x, _mm256_and_ps(_mm256_set1_ps(-0.0f), s));
}
static inline vec_f64 v_copysign_f64(vec_f64 x, vec_f64 s)
{
    return _mm256_or_pd(x, _mm256_and_pd(_mm256_set1_pd(-0.0), s));
}

static inline vec_f32 v_keep_ge_f32(vec_f32 x, vec_f32 limit, vec_f32 y)
{
    return _mm256_and_ps(_mm256_cmp_ps(x, limit, _CMP_NLT_UQ), y);
}
static inline vec_f64 v_keep_ge_f64(vec_f64 x, vec_f64 limit, vec_f64 y)
{
    return _mm256_and_pd(_mm256_cmp_pd(x, limit, _CMP_NLT_UQ), y);
}

/* x < limit ? a : b */
static inline vec_f32 v_select_lt_f32(vec_f32 x, vec_f32 limit, vec_f32 a, vec_f32 b)
{
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, limit, _CMP_LT_OQ));
}
static inline vec_f64 v_select_lt_f64(vec_f64 x, vec_f64 limit, vec_f64 a, vec_f64 b)
{
    return _mm256_blendv_pd(b, a, _mm256_cmp_pd(x, limit, _CMP_LT_OQ));
}

/* Whether any lane of x is greater than the same lane of limit. */
static inline int v_any_gt_f32(vec_f32 x, vec_f32 limit)
{
    return _mm256_movemask_ps(_mm256_cmp_ps(x, limit, _CMP_GT_OQ));
}
static inline int v_any_gt_f64(vec_f64 x, vec_f64 limit)
{
    return _mm256_movemask_pd(_mm256_cmp_pd(x, limit, _CMP_GT_OQ));
}

/* What rounding x to t - round leaves: exact. */
static inline vec_f32 v_exp2_rest_f32(vec_f32 x, vec_f32 t, vec_f32 round)
{
    return v_sub_f32(x, v_sub_f32(t, round));
}
static inline vec_f64 v_exp2_rest_f64(vec_f64 x, vec_f64 t, vec_f64 round)
{
    return v_sub_f64(x, v_sub_f64(t, round));
}

/* 2^(i / 8) as bit patterns, less i << (23 - 3): what exp2_scale adds holds i in those places and n
 * in the exponent. */
static const uint32_t exp2_table_f32[8] = {
    0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7,
};

/* 2^m for the integer m, in units of 2^-EXP2_TABLE_BITS, that the low bits of t hold (see
 * EXP2_ROUND).  The permutation looks at the index bits of each lane only. */
static inline vec_f32 v_exp2_scale_f32(vec_f32 t)
{
    __m256i m = _mm256_castps_si256(t);
    __m256i table = _mm256_loadu_si256((const __m256i *)exp2_table_f32);
    __m256i root = _mm256_permutevar8x32_epi32(table, m);
    return _mm256_castsi256_ps(_mm256_add_epi32(root, _mm256_slli_epi32(m, 20)));
}
static inline vec_f64 v_exp2_scale_f64(vec_f64 t)
{
    return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(t), 52));
}

/* mask[lane] != 0 ? x : other.  Reads VL bytes. */
static inline vec_f32 v_select_bytes_f32(const uint8_t *mask, vec_f32 x, vec_f32 other)
{
    __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)mask));
    __m256i zero = _mm256_cmpeq_epi32(wide, _mm256_setzero_si256());
    return _mm256_blendv_ps(x, other, _mm256_castsi256_ps(zero));
}
static inline vec_f64 v_select_bytes_f64(const uint8_t *mask, vec_f64 x, vec_f64 other)
{
    int32_t bytes;
    memcpy(&bytes, mask, sizeof bytes);
    __m256i wide = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes));
    __m256i zero = _mm256_cmpeq_epi64(wide, _mm256_setzero_si256());
    return _mm256_blendv_pd(x, other, _mm256_castsi256_pd(zero));
}

/* 0, 1, 2, ... */
static inline vec_f32 v_iota_f32(void) { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
static inline vec_f64 v_iota_f64(void) { return _mm256_setr_pd(0, 1, 2, 3); }

/* Transpose VL rows of VL elements in place: 24 shuffles for 8 x 8. */
static inline void v_transpose_f32(vec_f32 r[VL_f32])
{
    vec_f32 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}
static inline void v_transpose_f64(vec_f64 r[VL_f64])
{
    vec_f64 a0 = _mm256_unpacklo_pd(r[0], r[1]), a1 = _mm256_unpackhi_pd(r[0], r[1]);
    vec_f64 a2 = _mm256_unpacklo_pd(r[2], r[3]), a3 = _mm256_unpackhi_pd(r[2], r[3]);
    r[0] = _mm256_permute2f128_pd(a0, a2, 0x20);
    r[1] = _mm256_permute2f128_pd(a1, a3, 0x20);
    r[2] = _mm256_permute2f128_pd(a0, a2, 0x31);
    r[3] = _mm256_permute2f128_pd(a1, a3, 0x31);
}

/* 32-bit words, for random numbers.  mul_u32: the lower and the upper halves of the products. */
typedef __m256i vec_u32;
#define VL_u32 8

static inline vec_u32 v_set_u32(uint32_t x) { return _mm256_set1_epi32((int)x); }
static inline vec_u32 v_load_u32(const uint32_t *p)
{
    return _mm256_loadu_si256((const __m256i *)p);
}
static inline void v_store_u32(uint32_t *p, vec_u32 x) { _mm256_storeu_si256((__m256i *)p, x); }
static inline vec_u32 v_xor_u32(vec_u32 a, vec_u32 b) { return _mm256_xor_si256(a, b); }
static inline vec_u32 v_mul_u32(vec_u32 a, vec_u32 b, vec_u32 *upper)
{
    const __m256i even = _mm256_mul_epu32(a, b);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b);
    *upper = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}

#endif
