/* The kernel sets: one symbol of each kernel file.  dispatch.c lists those that are built in. */
#ifndef FA_KERNEL_SETS_H
#define FA_KERNEL_SETS_H

#include "engine.h"

extern const struct fa_kernels fa_kernels_scalar, fa_kernels_avx2, fa_kernels_avx512,
    fa_kernels_amx, fa_kernels_neon;

#endif
