/* The control bits of this thread's floating-point arithmetic, for ctypes. */
#include <fenv.h>
#include <stdint.h>

#if defined(__x86_64__)
#define FLUSH UINT64_C(0x8040) /* MXCSR: flush to zero, denormals are zero */
uint64_t get_control(void) { return __builtin_ia32_stmxcsr(); }
static void set_control(uint64_t control) { __builtin_ia32_ldmxcsr((unsigned)control); }
#elif defined(__aarch64__)
#define FLUSH (UINT64_C(1) << 24 | UINT64_C(1) << 25) /* FPCR: flush to zero, default NaN */
uint64_t get_control(void)
{
    uint64_t control;
    __asm__ volatile("mrs %0, fpcr" : "=r"(control));
    return control;
}
static void set_control(uint64_t control) { __asm__ volatile("msr fpcr, %0" : : "r"(control)); }
#else
#define FLUSH 0
uint64_t get_control(void) { return (uint64_t)fegetround(); }
static void set_control(uint64_t control) { fesetround((int)control); }
#endif

/* One of four rounding modes, with or without flushing of subnormal numbers. */
void set_mode(int rounding, int flush)
{
    static const int modes[] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
    fesetround(modes[rounding]);
    set_control(flush ? get_control() | FLUSH : get_control() & ~FLUSH);
}

/* Exception flags, and one that is raised before a call. */
int get_flags(void) { return fetestexcept(FE_ALL_EXCEPT); }
void set_flags(int flags)
{
    feclearexcept(FE_ALL_EXCEPT);
    feraiseexcept(flags);
}
int divbyzero(void) { return FE_DIVBYZERO; }
