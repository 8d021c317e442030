/* The floating-point mode: rounding, flushing of subnormal numbers, traps.  It belongs to a thread,
 * and a caller or another library may have left any.  Results do not depend on it: each thread that
 * computes sets the default, and restores what it found, exception flags included. */
#ifndef FA_FLOAT_MODE_H
#define FA_FLOAT_MODE_H

#include <fenv.h>
#include <stdint.h>

#include "common.h"

struct fa_float_mode {
#ifdef FA_DEFAULT_FLOAT_CONTROL
    uint64_t control;
#else
    fenv_t environment;
#endif
};

void fa_float_mode_enter(struct fa_float_mode *found);
void fa_float_mode_leave(const struct fa_float_mode *found);

#endif
