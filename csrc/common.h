/* Small things every C file needs: assertions, checked sizes, alignment, and the extensions of C
 * that files outside kernels/ use.  Only cpu_features.c has one of its own, to ask the processor,
 * and team.c an OpenMP region. */
#ifndef FA_COMMON_H
#define FA_COMMON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Contracts that the Python side has enforced already.  Test builds check them
 * (FASTATTN_DEBUG=1). */
#ifdef FA_DEBUG
#include <assert.h>
#define FA_ASSERT(condition) assert(condition)
#else
#define FA_ASSERT(condition) ((void)0)
#endif

/* Bytes of a cache line, and of the widest vector of any kernel set. */
#define FA_ALIGNMENT 64

static inline int64_t fa_min(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t fa_max(int64_t a, int64_t b) { return a > b ? a : b; }

/* For a >= 0 and b > 0, without the overflow of (a + b - 1). */
static inline int64_t fa_ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

/* a rounded up to a multiple of step > 0, for a far from INT64_MAX. */
static inline int64_t fa_round_up(int64_t a, int64_t step) { return fa_ceil_div(a, step) * step; }

/* *sum = a + b.  False when the sum leaves int64. */
static inline bool fa_add(int64_t a, int64_t b, int64_t *sum)
{
    return !__builtin_add_overflow(a, b, sum);
}

/* *product = a * b.  False when the product leaves int64. */
static inline bool fa_multiply(int64_t a, int64_t b, int64_t *product)
{
    return !__builtin_mul_overflow(a, b, product);
}

/* *total += count * size, rounded up to FA_ALIGNMENT.  False when it leaves int64. */
static inline bool fa_add_bytes(int64_t *total, int64_t count, int64_t size)
{
    int64_t bytes;
    if (!fa_multiply(count, size, &bytes) || !fa_add(bytes, FA_ALIGNMENT - 1, &bytes)) {
        return false;
    }
    return fa_add(*total, bytes - bytes % FA_ALIGNMENT, total);
}

/* For a loop that waits for another thread's write: the core's other thread runs meanwhile. */
static inline void fa_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb"); /* "yield" does nothing on most cores */
#endif
}

/* The floating-point mode and exception flags in one number, where a register or two hold them:
 * reading and writing takes nanoseconds, where <fenv.h> takes 200 and leaves out what C does not
 * name. */
#if defined(__x86_64__)

/* MXCSR: rounds to nearest, traps nothing, flushes nothing. */
#define FA_DEFAULT_FLOAT_CONTROL UINT64_C(0x1F80)

static inline uint64_t fa_float_control(void) { return __builtin_ia32_stmxcsr(); }

static inline void fa_set_float_control(uint64_t control)
{
    __builtin_ia32_ldmxcsr((uint32_t)control);
}

#elif defined(__aarch64__)

#define FA_DEFAULT_FLOAT_CONTROL UINT64_C(0)

static inline uint64_t fa_float_control(void)
{
    uint64_t control, flags;
    __asm__ volatile("mrs %0, fpcr\n\tmrs %1, fpsr" : "=r"(control), "=r"(flags));
    return control | flags << 32;
}

static inline void fa_set_float_control(uint64_t control)
{
    __asm__ volatile("msr fpcr, %0\n\tmsr fpsr, %1"
                     :
                     : "r"(control & UINT32_MAX), "r"(control >> 32));
}

#endif

#endif
