/* Vectors of aarch64 Advanced SIMD, which is part of that architecture's baseline: the only NEON
 * intrinsics.
 *
 * Same operations and the same meaning as vec_avx2.h.  fmax propagates NaN from either side, so
 * v_max is a comparison and a select.
 */
#ifndef FA_VEC_NEON_H
#define FA_VEC_NEON_H

#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef float32x4_t vec_f32;
typedef float64x2_t vec_f64;

#define VL_f32 4
#define VL_f64 2
/* 6 x 4 vectors: 24 accumulators + 4 columns + 1 broadcast of 32 registers.  24 independent chains
 * cover 4 FMA pipes x 4 cycles of latency; 4 columns, because two of them come with one ldp: 8
 * loads for 24 multiply-adds. */
#define MR_f32 6
#define MR_f64 6
#define NR_VECTORS_f32 4
#define NR_VECTORS_f64 4
/* exp2 looks up no bits: tbl permutes bytes, not lanes. */
#define EXP2_TABLE_BITS_f32 0
#define EXP2_TABLE_BITS_f64 0
/* Rows that softmax_update works on side by side: 3 x 5 registers and the constants fit 32. */
#define SOFTMAX_ROWS_f32 3
#define SOFTMAX_ROWS_f64 3
/* Rows whose products are computed straight from caller memory: with a square of keys, 8 + 4
 * registers. */
#define FEW_ROWS_f32 8
#define FEW_ROWS_f64 8

static inline vec_f32 v_zero_f32(void) { return vdupq_n_f32(0); }
static inline vec_f64 v_zero_f64(void) { return vdupq_n_f64(0); }
static inline vec_f32 v_set_f32(float x) { return vdupq_n_f32(x); }
static inline vec_f64 v_set_f64(double x) { return vdupq_n_f64(x); }
/* Written as a duplicated scalar, which compilers fold into by-element multiply-adds: where
 * vld1q_dup's ld1r stays, it takes a slot of the FMA pipes on many cores. */
static inline vec_f32 v_broadcast_f32(const float *p) { return vdupq_n_f32(*p); }
static inline vec_f64 v_broadcast_f64(const double *p) { return vdupq_n_f64(*p); }
/* As bytes, because vld1q_f32 would promise the alignment of an element to the compiler. */
static inline vec_f32 v_load_f32(const void *p) { return vreinterpretq_f32_u8(vld1q_u8(p)); }
static inline vec_f64 v_load_f64(const void *p) { return vreinterpretq_f64_u8(vld1q_u8(p)); }
static inline void v_store_f32(void *p, vec_f32 x) { vst1q_u8(p, vreinterpretq_u8_f32(x)); }
static inline void v_store_f64(void *p, vec_f64 x) { vst1q_u8(p, vreinterpretq_u8_f64(x)); }

/* VL elements of another type, from and to memory; see memory.h. */
static inline vec_f32 v_widen_f16(const void *p)
{
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}
static inline vec_f32 v_widen_bf16(const void *p)
{
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16));
}
static inline vec_f32 v_widen_i8(const void *p)
{
    int32_t bytes;
    memcpy(&bytes, p, sizeof bytes);
    int8x8_t narrow = vreinterpret_s8_s32(vdup_n_s32(bytes));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(narrow))));
}
/* Element `sub` of each 32-bit lane that holds several of a narrower type. */
static inline vec_f32 v_element_f16(vec_f32 x, int sub)
{
    uint32x4_t lane = vreinterpretq_u32_f32(x);
    uint16x4_t half = sub == 0 ? vmovn_u32(lane) : vshrn_n_u32(lane, 16);
    return vcvt_f32_f16(vreinterpret_f16_u16(half));
}
static inline vec_f32 v_element_bf16(vec_f32 x, int sub)
{
    uint32x4_t lane = vreinterpretq_u32_f32(x);
    return vreinterpretq_f32_u32(sub == 0 ? vshlq_n_u32(lane, 16)
                                          : vandq_u32(lane, vdupq_n_u32(0xffff0000)));
}
static inline vec_f32 v_element_i8(vec_f32 x, int sub)
{
    int32x4_t top = vshlq_s32(vreinterpretq_s32_f32(x), vdupq_n_s32(24 - 8 * sub));
    return vcvtq_f32_s32(vshrq_n_s32(top, 24));
}
static inline void v_narrow_f16(void *p, vec_f32 x)
{
    vst1_u8(p, vreinterpret_u8_f16(vcvt_f16_f32(x)));
}
static inline void v_narrow_bf16(void *p, vec_f32 x)
{
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t nan = vorrq_u32(bits, vdupq_n_u32(0x400000));
    const uint32x4_t upper = vbslq_u32(vceqq_f32(x, x), rounded, nan);
    vst1_u8(p, vreinterpret_u8_u16(vshrn_n_u32(upper, 16)));
}

static inline vec_f32 v_add_f32(vec_f32 a, vec_f32 b) { return vaddq_f32(a, b); }
static inline vec_f64 v_add_f64(vec_f64 a, vec_f64 b) { return vaddq_f64(a, b); }
static inline vec_f32 v_sub_f32(vec_f32 a, vec_f32 b) { return vsubq_f32(a, b); }
static inline vec_f64 v_sub_f64(vec_f64 a, vec_f64 b) { return vsubq_f64(a, b); }
static inline vec_f32 v_mul_f32(vec_f32 a, vec_f32 b) { return vmulq_f32(a, b); }
static inline vec_f64 v_mul_f64(vec_f64 a, vec_f64 b) { return vmulq_f64(a, b); }
static inline vec_f32 v_div_f32(vec_f32 a, vec_f32 b) { return vdivq_f32(a, b); }
static inline vec_f64 v_div_f64(vec_f64 a, vec_f64 b) { return vdivq_f64(a, b); }
static inline vec_f32 v_max_f32(vec_f32 a, vec_f32 b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline vec_f64 v_max_f64(vec_f64 a, vec_f64 b) { return vbslq_f64(vcgtq_f64(a, b), a, b); }
/* a * b + c, one rounding */
static inline vec_f32 v_fma_f32(vec_f32 a, vec_f32 b, vec_f32 c) { return vfmaq_f32(c, a, b); }
static inline vec_f64 v_fma_f64(vec_f64 a, vec_f64 b, vec_f64 c) { return vfmaq_f64(c, a, b); }
#define v_fma_exact_f32 v_fma_f32
#define v_fma_exact_f64 v_fma_f64

static inline vec_f32 v_abs_f32(vec_f32 x) { return vabsq_f32(x); }
static inline vec_f64 v_abs_f64(vec_f64 x) { return vabsq_f64(x); }

/* |x| with the sign of s; x >= 0 */
static inline vec_f32 v_copysign_f32(vec_f32 x, vec_f32 s)
{
    return vbslq_f32(vdupq_n_u32(UINT32_C(1) << 31), s, x);
}
static inline vec_f64 v_copysign_f64(vec_f64 x, vec_f64 s)
{
    return vbslq_f64(vdupq_n_u64(UINT64_C(1) << 63), s, x);
}

static inline vec_f32 v_keep_ge_f32(vec_f32 x, vec_f32 limit, vec_f32 y)
{
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(y), vcltq_f32(x, limit)));
}
static inline vec_f64 v_keep_ge_f64(vec_f64 x, vec_f64 limit, vec_f64 y)
{
    return vreinterpretq_f64_u64(vbicq_u64(vreinterpretq_u64_f64(y), vcltq_f64(x, limit)));
}

/* x < limit ? a : b */
static inline vec_f32 v_select_lt_f32(vec_f32 x, vec_f32 limit, vec_f32 a, vec_f32 b)
{
    return vbslq_f32(vcltq_f32(x, limit), a, b);
}
static inline vec_f64 v_select_lt_f64(vec_f64 x, vec_f64 limit, vec_f64 a, vec_f64 b)
{
    return vbslq_f64(vcltq_f64(x, limit), a, b);
}

/* Whether any lane of x is greater than the same lane of limit. */
static inline int v_any_gt_f32(vec_f32 x, vec_f32 limit)
{
    return vmaxvq_u32(vcgtq_f32(x, limit)) != 0;
}
static inline int v_any_gt_f64(vec_f64 x, vec_f64 limit)
{
    return vmaxvq_u32(vreinterpretq_u32_u64(vcgtq_f64(x, limit))) != 0;
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

/* 2^n where the low bits of t hold n + exponent bias (see EXP2_ROUND): they become the exponent. */
static inline vec_f32 v_exp2_scale_f32(vec_f32 t)
{
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(t), 23));
}
static inline vec_f64 v_exp2_scale_f64(vec_f64 t)
{
    return vreinterpretq_f64_u64(vshlq_n_u64(vreinterpretq_u64_f64(t), 52));
}

/* mask[lane] != 0 ? x : other.  Reads VL bytes. */
static inline vec_f32 v_select_bytes_f32(const uint8_t *mask, vec_f32 x, vec_f32 other)
{
    uint32_t bytes;
    memcpy(&bytes, mask, sizeof bytes);
    uint32x4_t wide = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes))));
    return vbslq_f32(vceqzq_u32(wide), other, x);
}
static inline vec_f64 v_select_bytes_f64(const uint8_t *mask, vec_f64 x, vec_f64 other)
{
    uint16_t bytes;
    memcpy(&bytes, mask, sizeof bytes);
    uint32x4_t wide = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes))));
    return vbslq_f64(vceqzq_u64(vmovl_u32(vget_low_u32(wide))), other, x);
}

/* 0, 1, 2, ... */
static inline vec_f32 v_iota_f32(void) { return (vec_f32){0, 1, 2, 3}; }
static inline vec_f64 v_iota_f64(void) { return (vec_f64){0, 1}; }

/* Transpose VL rows of VL elements in place: 8 permutations for 4 x 4. */
static inline void v_transpose_f32(vec_f32 r[VL_f32])
{
    vec_f64 even01 = vreinterpretq_f64_f32(vtrn1q_f32(r[0], r[1]));
    vec_f64 odd01 = vreinterpretq_f64_f32(vtrn2q_f32(r[0], r[1]));
    vec_f64 even23 = vreinterpretq_f64_f32(vtrn1q_f32(r[2], r[3]));
    vec_f64 odd23 = vreinterpretq_f64_f32(vtrn2q_f32(r[2], r[3]));
    r[0] = vreinterpretq_f32_f64(vtrn1q_f64(even01, even23));
    r[1] = vreinterpretq_f32_f64(vtrn1q_f64(odd01, odd23));
    r[2] = vreinterpretq_f32_f64(vtrn2q_f64(even01, even23));
    r[3] = vreinterpretq_f32_f64(vtrn2q_f64(odd01, odd23));
}
static inline void v_transpose_f64(vec_f64 r[VL_f64])
{
    vec_f64 first = vtrn1q_f64(r[0], r[1]);
    r[1] = vtrn2q_f64(r[0], r[1]);
    r[0] = first;
}

/* 32-bit words, for random numbers.  mul_u32: the lower and the upper halves of the products. */
typedef uint32x4_t vec_u32;
#define VL_u32 4

static inline vec_u32 v_set_u32(uint32_t x) { return vdupq_n_u32(x); }
static inline vec_u32 v_load_u32(const uint32_t *p) { return vld1q_u32(p); }
static inline void v_store_u32(uint32_t *p, vec_u32 x) { vst1q_u32(p, x); }
static inline vec_u32 v_xor_u32(vec_u32 a, vec_u32 b) { return veorq_u32(a, b); }
static inline vec_u32 v_mul_u32(vec_u32 a, vec_u32 b, vec_u32 *upper)
{
    const uint32x4_t first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a), vget_low_u32(b)));
    const uint32x4_t last = vreinterpretq_u32_u64(vmull_high_u32(a, b));
    *upper = vuzp2q_u32(first, last);
    return vuzp1q_u32(first, last);
}

#endif
