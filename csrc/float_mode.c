#include "float_mode.h"

#include <math.h>

#include "fastattn.h"

#ifdef FA_DEFAULT_FLOAT_CONTROL

void fa_float_mode_enter(struct fa_float_mode *found)
{
    found->control = fa_float_control();
    fa_set_float_control(FA_DEFAULT_FLOAT_CONTROL);
}

void fa_float_mode_leave(const struct fa_float_mode *found)
{
    fa_set_float_control(found->control);
}

#else

void fa_float_mode_enter(struct fa_float_mode *found)
{
    fegetenv(&found->environment);
    fesetenv(FE_DFL_ENV);
}

void fa_float_mode_leave(const struct fa_float_mode *found) { fesetenv(&found->environment); }

#endif

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
