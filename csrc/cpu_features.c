#define _DEFAULT_SOURCE /* syscall */

#include "cpu_features.h"

#if defined(__x86_64__) || defined(__i386__)

#include <cpuid.h>
#include <stdint.h>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* Bits of CPUID leaf 1 ECX, leaf 7 EBX, and XCR0 (Intel SDM volume 2A, CPUID; volume 1, 13.3). */
#define LEAF1_ECX_FMA (1u << 12)
#define LEAF1_ECX_OSXSAVE (1u << 27)
#define LEAF1_ECX_AVX (1u << 28)
#define LEAF1_ECX_F16C (1u << 29)
#define LEAF7_EBX_BMI1 (1u << 3)
#define LEAF7_EBX_AVX2 (1u << 5)
#define LEAF7_EBX_BMI2 (1u << 8)
#define LEAF7_EBX_AVX512_F_DQ_CD_BW_VL (1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31)
#define LEAF7_EDX_AMX_BF16 (1u << 22)
#define LEAF7_EDX_AMX_TILE (1u << 24)
#define XCR0_SSE_AVX 0x6u
#define XCR0_SSE_AVX_AVX512 0xe6u
#define XCR0_TILES 0x60000u /* configuration and data */

/* Linux, Documentation/arch/x86/xstate.rst: the state components that it can save, and permission
 * to use one, which a process must ask for before it uses tile registers.  18 is the component of
 * their data. */
#define ARCH_GET_XCOMP_SUPP 0x1021
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

static bool has_all(uint32_t bits, uint32_t wanted) { return (bits & wanted) == wanted; }

/* XGETBV is legal only where CPUID reports OSXSAVE. */
static uint32_t read_xcr0(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static bool has_leaf7_ebx(uint32_t wanted)
{
    uint32_t eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && has_all(ebx, wanted);
}

bool fa_cpu_has_avx2(void)
{
    uint32_t eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) &&
           has_all(ecx, LEAF1_ECX_FMA | LEAF1_ECX_OSXSAVE | LEAF1_ECX_AVX | LEAF1_ECX_F16C) &&
           has_all(read_xcr0(), XCR0_SSE_AVX) &&
           has_leaf7_ebx(LEAF7_EBX_BMI1 | LEAF7_EBX_AVX2 | LEAF7_EBX_BMI2);
}

bool fa_cpu_has_avx512(void)
{
    return fa_cpu_has_avx2() && has_all(read_xcr0(), XCR0_SSE_AVX_AVX512) &&
           has_leaf7_ebx(LEAF7_EBX_AVX512_F_DQ_CD_BW_VL);
}

static bool system_saves_tiles(void)
{
#if defined(__linux__) && defined(__x86_64__)
    uint64_t saved = 0;
    return syscall(SYS_arch_prctl, ARCH_GET_XCOMP_SUPP, &saved) == 0 &&
           (saved >> XFEATURE_XTILEDATA & 1) != 0;
#else
    return false;
#endif
}

bool fa_request_amx(void)
{
#if defined(__linux__) && defined(__x86_64__)
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}

bool fa_cpu_has_amx(void)
{
    uint32_t eax, ebx, ecx, edx;
    return fa_cpu_has_avx512() && has_all(read_xcr0(), XCR0_TILES) &&
           __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) &&
           has_all(edx, LEAF7_EDX_AMX_BF16 | LEAF7_EDX_AMX_TILE) && system_saves_tiles();
}

#else

bool fa_cpu_has_amx(void) { return false; }

bool fa_request_amx(void) { return false; }

bool fa_cpu_has_avx512(void) { return false; }

bool fa_cpu_has_avx2(void) { return false; }

#endif
