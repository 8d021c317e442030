/* AVX-512 intrinsics in terms of AVX2, for a compiler's -include: kernels_avx512.c then runs on CPUs
 * without AVX-512.  Where SIMDe falls back on plain C it rounds multiply-adds twice; over AVX2, with
 * -mfma, it does not.
 */
#ifndef FA_AVX512_SIMDE_H
#define FA_AVX512_SIMDE_H

#if !defined(__FMA__) || defined(__AVX512F__)
#error "compile with -mavx2 -mfma and without AVX-512"
#endif

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>
#include <math.h>
#include <string.h>

/* Missing from SIMDe 0.7.4, which Debian 12 has: three functions, and two aliases. */

/* x less x rounded to a multiple of 2^-(imm / 16), ties to even. */
static inline simde__m512 fa_reduce_ps(simde__m512 x, int imm)
{
    float lanes[16];
    simde_mm512_storeu_ps(lanes, x);
    for (int i = 0; i < 16; i++) {
        const float scale = (float)(1 << (imm >> 4));
        lanes[i] = isinf(lanes[i]) ? 0 : lanes[i] - rintf(lanes[i] * scale) / scale;
    }
    return simde_mm512_loadu_ps(lanes);
}
#undef _mm512_reduce_ps
#define _mm512_reduce_ps(x, imm) fa_reduce_ps(x, imm)

static inline simde__m512d fa_reduce_pd(simde__m512d x, int imm)
{
    double lanes[8];
    simde_mm512_storeu_pd(lanes, x);
    for (int i = 0; i < 8; i++) {
        const double scale = 1 << (imm >> 4);
        lanes[i] = isinf(lanes[i]) ? 0 : lanes[i] - rint(lanes[i] * scale) / scale;
    }
    return simde_mm512_loadu_pd(lanes);
}
#undef _mm512_reduce_pd
#define _mm512_reduce_pd(x, imm) fa_reduce_pd(x, imm)

#undef _mm_test_epi8_mask
#define _mm_test_epi8_mask(a, b) _mm_cmpneq_epi8_mask(_mm_and_si128(a, b), _mm_setzero_si128())
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4(a, b, imm) simde_mm512_shuffle_f32x4(a, b, imm)
#undef _mm512_shuffle_f64x2
#define _mm512_shuffle_f64x2(a, b, imm) simde_mm512_shuffle_f64x2(a, b, imm)

/* Conversions and a shift that are missing too, lane by lane, or for halves by F16C as two of 8. */
static inline simde__m512i fa_cvtepu16_epi32(simde__m256i x)
{
    uint16_t from[16];
    uint32_t to[16];
    simde_mm256_storeu_si256((simde__m256i *)from, x);
    for (int i = 0; i < 16; i++) {
        to[i] = from[i];
    }
    return simde_mm512_loadu_si512(to);
}
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32(x) fa_cvtepu16_epi32(x)

static inline simde__m512i fa_cvtepi8_epi32(simde__m128i x)
{
    int8_t from[16];
    int32_t to[16];
    simde_mm_storeu_si128((simde__m128i *)from, x);
    for (int i = 0; i < 16; i++) {
        to[i] = from[i];
    }
    return simde_mm512_loadu_si512(to);
}
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32(x) fa_cvtepi8_epi32(x)

static inline simde__m256i fa_cvtepi32_epi16(simde__m512i x)
{
    uint32_t from[16];
    uint16_t to[16];
    simde_mm512_storeu_si512(from, x);
    for (int i = 0; i < 16; i++) {
        to[i] = (uint16_t)from[i];
    }
    return simde_mm256_loadu_si256((const simde__m256i *)to);
}
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16(x) fa_cvtepi32_epi16(x)

static inline simde__m512 fa_cvtepi32_ps(simde__m512i x)
{
    int32_t from[16];
    float to[16];
    simde_mm512_storeu_si512(from, x);
    for (int i = 0; i < 16; i++) {
        to[i] = (float)from[i];
    }
    return simde_mm512_loadu_ps(to);
}
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps(x) fa_cvtepi32_ps(x)

static inline simde__m512i fa_srai_epi32(simde__m512i x, int count)
{
    int32_t lanes[16];
    simde_mm512_storeu_si512(lanes, x);
    for (int i = 0; i < 16; i++) {
        lanes[i] >>= count;
    }
    return simde_mm512_loadu_si512(lanes);
}
#undef _mm512_srai_epi32
#define _mm512_srai_epi32(x, count) fa_srai_epi32(x, count)

static inline simde__mmask32 fa_cmpgt_epi16_mask(simde__m512i x, simde__m512i y)
{
    int16_t left[32], right[32];
    simde__mmask32 mask = 0;
    simde_mm512_storeu_si512(left, x);
    simde_mm512_storeu_si512(right, y);
    for (int i = 0; i < 32; i++) {
        mask |= (simde__mmask32)(left[i] > right[i]) << i;
    }
    return mask;
}
#undef _mm512_cmpgt_epi16_mask
#define _mm512_cmpgt_epi16_mask(x, y) fa_cmpgt_epi16_mask(x, y)

/* Reads no element that the mask leaves out. */
static inline simde__m512i fa_maskz_loadu_epi16(simde__mmask32 mask, const void *p)
{
    uint16_t lanes[32] = {0};
    for (int i = 0; i < 32; i++) {
        if (mask >> i & 1) {
            memcpy(&lanes[i], (const char *)p + 2 * i, sizeof lanes[i]);
        }
    }
    return simde_mm512_loadu_si512(lanes);
}
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16(mask, p) fa_maskz_loadu_epi16(mask, p)

static inline simde__m512 fa_maskz_loadu_ps(simde__mmask16 mask, const void *p)
{
    float lanes[16] = {0};
    for (int i = 0; i < 16; i++) {
        if (mask >> i & 1) {
            memcpy(&lanes[i], (const char *)p + 4 * i, sizeof lanes[i]);
        }
    }
    return simde_mm512_loadu_ps(lanes);
}
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps(mask, p) fa_maskz_loadu_ps(mask, p)

static inline simde__m512 fa_cvtph_ps(simde__m256i halves)
{
    float lanes[16];
    _mm256_storeu_ps(lanes, _mm256_cvtph_ps(simde_mm256_extracti128_si256(halves, 0)));
    _mm256_storeu_ps(lanes + 8, _mm256_cvtph_ps(simde_mm256_extracti128_si256(halves, 1)));
    return simde_mm512_loadu_ps(lanes);
}
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps(halves) fa_cvtph_ps(halves)

/* The only rounding that is asked for is to nearest, ties to even. */
static inline simde__m256i fa_cvtps_ph(simde__m512 x)
{
    float lanes[16];
    simde_mm512_storeu_ps(lanes, x);
    return simde_mm256_set_m128i(
        _mm256_cvtps_ph(_mm256_loadu_ps(lanes + 8), _MM_FROUND_TO_NEAREST_INT),
        _mm256_cvtps_ph(_mm256_loadu_ps(lanes), _MM_FROUND_TO_NEAREST_INT));
}
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(x, rounding) fa_cvtps_ph(x)

#endif
