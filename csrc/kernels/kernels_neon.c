/* The neon kernel set: the templates over vec_neon.h.  Exports one symbol. */
#include "vec_neon.h"

#define DT f32
#include "ops_template.h"
#undef DT

#define DT f64
#include "ops_template.h"
#undef DT

const struct fa_kernels fa_kernels_neon = {.name = "neon", .f32 = &ops_f32, .f64 = &ops_f64};
