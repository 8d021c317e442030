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

/* Missing from SIMDe 0.7.4, which Debian 12 has: one function, and two aliases. */
#undef _mm_test_epi8_mask
#define _mm_test_epi8_mask(a, b) _mm_cmpneq_epi8_mask(_mm_and_si128(a, b), _mm_setzero_si128())
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4(a, b, imm) simde_mm512_shuffle_f32x4(a, b, imm)
#undef _mm512_shuffle_f64x2
#define _mm512_shuffle_f64x2(a, b, imm) simde_mm512_shuffle_f64x2(a, b, imm)

#endif
