/* Vectors of one element: the portable baseline, plain C that any compiler takes.
 *
 * Same operations and the same meaning as vec_avx2.h, with one difference that is part of this
 * set's definition: v_fma rounds twice.  The baseline has no fused multiply-add, and a library call
 * per term would cost tens of cycles; each set promises bitwise repeatability within itself.
 * v_fma_exact rounds once, for the places whose error bound needs it (float32: the product is exact
 * in double).
 */
#ifndef FA_VEC_SCALAR_H
#define FA_VEC_SCALAR_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "memory.h"

typedef float vec_f32;
typedef double vec_f64;

#define VL_f32 1
#define VL_f64 1
/* 4 x 2 elements: 8 accumulators + 2 columns + 1 broadcast fit the 16 registers of SSE2. */
#define MR_f32 4
#define MR_f64 4
#define NR_VECTORS_f32 2
#define NR_VECTORS_f64 2
#define EXP2_TABLE_BITS_f32 0
#define EXP2_TABLE_BITS_f64 0
#define SOFTMAX_ROWS_f32 1
#define SOFTMAX_ROWS_f64 1
#define FEW_ROWS_f32 4
#define FEW_ROWS_f64 4

static inline float v_zero_f32(void) { return 0.0f; }
static inline double v_zero_f64(void) { return 0.0; }
static inline float v_set_f32(float x) { return x; }
static inline double v_set_f64(double x) { return x; }
static inline float v_broadcast_f32(const float *p) { return *p; }
static inline double v_broadcast_f64(const double *p) { return *p; }
static inline float v_load_f32(const void *p) { return read_f32(p); }
static inline double v_load_f64(const void *p) { return read_f64(p); }
static inline void v_store_f32(void *p, float x) { write_f32(p, x); }
static inline void v_store_f64(void *p, double x) { write_f64(p, x); }
static inline float v_widen_f16(const void *p) { return read_f16(p); }
static inline float v_widen_bf16(const void *p) { return read_bf16(p); }
static inline float v_widen_i8(const void *p) { return read_i8(p); }
/* Element `sub` of the lane, which holds several of a narrower type in their order in memory. */
static inline float v_element_f16(float x, int sub) { return read_f16((const char *)&x + 2 * sub); }
static inline float v_element_bf16(float x, int sub)
{
    return read_bf16((const char *)&x + 2 * sub);
}
static inline float v_element_i8(float x, int sub) { return read_i8((const char *)&x + sub); }
static inline void v_narrow_f16(void *p, float x) { write_f16(p, x); }
static inline void v_narrow_bf16(void *p, float x) { write_bf16(p, x); }
static inline float v_add_f32(float a, float b) { return a + b; }
static inline double v_add_f64(double a, double b) { return a + b; }
static inline float v_sub_f32(float a, float b) { return a - b; }
static inline double v_sub_f64(double a, double b) { return a - b; }
static inline float v_mul_f32(float a, float b) { return a * b; }
static inline double v_mul_f64(double a, double b) { return a * b; }
static inline float v_div_f32(float a, float b) { return a / b; }
static inline double v_div_f64(double a, double b) { return a / b; }
static inline float v_max_f32(float a, float b) { return a > b ? a : b; }
static inline double v_max_f64(double a, double b) { return a > b ? a : b; }
static inline float v_fma_f32(float a, float b, float c) { return a * b + c; }
static inline double v_fma_f64(double a, double b, double c) { return a * b + c; }
static inline float v_fma_exact_f32(float a, float b, float c)
{
    return (float)((double)a * b + c);
}
static inline double v_fma_exact_f64(double a, double b, double c) { return fma(a, b, c); }
static inline float v_abs_f32(float x) { return fabsf(x); }
static inline double v_abs_f64(double x) { return fabs(x); }
static inline float v_copysign_f32(float x, float s) { return copysignf(x, s); }
static inline double v_copysign_f64(double x, double s) { return copysign(x, s); }
static inline float v_keep_ge_f32(float x, float limit, float y) { return x < limit ? 0.0f : y; }
static inline double v_keep_ge_f64(double x, double limit, double y) { return x < limit ? 0.0 : y; }
static inline float v_select_lt_f32(float x, float limit, float a, float b)
{
    return x < limit ? a : b;
}
static inline double v_select_lt_f64(double x, double limit, double a, double b)
{
    return x < limit ? a : b;
}
static inline int v_any_gt_f32(float x, float limit) { return x > limit; }
static inline int v_any_gt_f64(double x, double limit) { return x > limit; }

/* What rounding x to t - round leaves: exact. */
static inline float v_exp2_rest_f32(float x, float t, float round)
{
    return v_sub_f32(x, v_sub_f32(t, round));
}
static inline double v_exp2_rest_f64(double x, double t, double round)
{
    return v_sub_f64(x, v_sub_f64(t, round));
}

static inline float v_exp2_scale_f32(float t)
{
    uint32_t bits;
    memcpy(&bits, &t, sizeof bits);
    bits <<= 23;
    memcpy(&t, &bits, sizeof t);
    return t;
}
static inline double v_exp2_scale_f64(double t)
{
    uint64_t bits;
    memcpy(&bits, &t, sizeof bits);
    bits <<= 52;
    memcpy(&t, &bits, sizeof t);
    return t;
}

static inline float v_select_bytes_f32(const uint8_t *mask, float x, float other)
{
    return *mask ? x : other;
}
static inline double v_select_bytes_f64(const uint8_t *mask, double x, double other)
{
    return *mask ? x : other;
}
static inline float v_iota_f32(void) { return 0.0f; }
static inline double v_iota_f64(void) { return 0.0; }
static inline void v_transpose_f32(float r[VL_f32]) { (void)r; }
static inline void v_transpose_f64(double r[VL_f64]) { (void)r; }

/* 32-bit words, for random numbers.  mul_u32: the lower and the upper halves of the products. */
typedef uint32_t vec_u32;
#define VL_u32 1

static inline vec_u32 v_set_u32(uint32_t x) { return x; }
static inline vec_u32 v_load_u32(const uint32_t *p) { return *p; }
static inline void v_store_u32(uint32_t *p, vec_u32 x) { *p = x; }
static inline vec_u32 v_xor_u32(vec_u32 a, vec_u32 b) { return a ^ b; }
static inline vec_u32 v_mul_u32(vec_u32 a, vec_u32 b, vec_u32 *upper)
{
    const uint64_t product = (uint64_t)a * b;
    *upper = (uint32_t)(product >> 32);
    return (uint32_t)product;
}

#endif
