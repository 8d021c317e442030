/* The most float32 operations per second that one core can do: fused multiply-adds on registers only.
 *
 * 14 independent accumulators of 8 lanes (ymm0 .. ymm13): 2 FMA pipes of 4 to 5 cycles latency keep
 * 10 in flight, and with the two operands all 16 registers are in use.  In assembly, because a
 * compiler may put accumulators into memory, as GCC 12 does with an array of them.  x86-64 with AVX2
 * and FMA, like the avx2 kernel set.  compare_torch.py runs one instance per thread.
 */
#include <stdint.h>
#include <time.h>

#define FLOPS_PER_ROUND (14 * 8 * 2)

double fma_gflops(int64_t rounds);

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Operations per second, in units of 1e9, over that many rounds of 14 FMAs; rounds >= 1. */
double fma_gflops(int64_t rounds)
{
    int64_t left = rounds;
    double start = now();
    /* Zeros throughout: no value changes, none is slow. */
    __asm__ volatile("vzeroall\n"
                     ".p2align 5\n"
                     "1:\n"
                     "vfmadd231ps %%ymm14, %%ymm15, %%ymm0\n"
                     "vfmadd231ps %%ymm14, %%ymm15, %%ymm1\n"
                     "vfmadd231ps %%ymm14, %%ymm15, %%ymm2\n"
                     "vfmadd231ps %%ymm14, %%ymm15, %%ymm3\n"
                     "vfmadd231ps %%ymm14, %%ymm15, %%ymm4\n"
                     "vfmadd231ps %%ymm14, %%ymm15, %%ymm5\n"
                     "vfmadd231ps %%ymm14, %%ymm15, %%ymm6\n"
                     "vfmadd231ps %%ymm14, %%ymm15, %%ymm7\n"
                     "vfmadd231ps %%ymm14, %%ymm15, %%ymm8\n"
                     "vfmadd231ps %%ymm14, %%ymm15, %%ymm9\n"
                     "vfmadd231ps %%ymm14, %%ymm15, %%ymm10\n"
                     "vfmadd231ps %%ymm14, %%ymm15, %%ymm11\n"
                     "vfmadd231ps %%ymm14, %%ymm15, %%ymm12\n"
                     "vfmadd231ps %%ymm14, %%ymm15, %%ymm13\n"
                     "dec %0\n"
                     "jnz 1b\n"
                     "vzeroupper\n"
                     : "+r"(left)
                     :
                     : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
                       "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
    return (double)rounds * FLOPS_PER_ROUND / (now() - start) / 1e9;
}
