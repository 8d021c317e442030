/* The avx512 kernel set: the templates over vec_avx512.h.  Exports one symbol. */
#include "vec_avx512.h"

#define DT f32
#include "ops_template.h"
#undef DT

#define DT f64
#include "ops_template.h"
#undef DT

const struct fa_kernels fa_kernels_avx512 = {.name = "avx512", .f32 = &ops_f32, .f64 = &ops_f64};
