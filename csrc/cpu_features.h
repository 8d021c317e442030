/* What this CPU can do and this operating system lets it do. */
#ifndef FA_CPU_FEATURES_H
#define FA_CPU_FEATURES_H

#include <stdbool.h>

/* x86-64-v3: AVX2, FMA, F16C, BMI1, BMI2, and an OS that saves the YMM registers. */
bool fa_cpu_has_avx2(void);

/* x86-64-v4: AVX-512 F, CD, DQ, BW and VL besides, and an OS that saves the ZMM and mask
 * registers. */
bool fa_cpu_has_avx512(void);

/* AMX-TILE and AMX-BF16 besides, and an OS that saves the tile registers of a process that has
 * asked for them. */
bool fa_cpu_has_amx(void);

/* Ask for the tile registers, for this process with all its threads and children.  Their state is
 * 8 KiB of every signal frame from then on.  False where the OS refuses. */
bool fa_request_amx(void);

#endif
