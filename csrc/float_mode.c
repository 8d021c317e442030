#include "float_mode.h"

#include <math.h>

#include "common.h"
#include "fastattn.h"

void fa_float_mode_enter(struct fa_float_mode *found)
{
    fegetenv(&found->environment);
    found->control = fa_float_control();
    /* On x86-64 that clears flush-to-zero and denormals-are-zero, too (glibc, musl and macOS). */
    fesetenv(FE_DFL_ENV);
    fa_set_float_control(0);
}

void fa_float_mode_leave(const struct fa_float_mode *found)
{
    fesetenv(&found->environment);
    fa_set_float_control(found->control);
}

double fa_default_scale(int64_t head_dim)
{
    struct fa_float_mode found;
    fa_float_mode_enter(&found);
    /* Volatile, or compilers may compute it before the mode is set or after it is left. */
    volatile double dim = head_dim > 0 ? (double)head_dim : 1.0;
    volatile double scale = 1.0 / sqrt(dim);
    fa_float_mode_leave(&found);
    return scale;
}
