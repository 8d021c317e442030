/* The avx2 kernel set: the templates over vec_avx2.h.  Exports one symbol. */
#include "kernels/kernel_sets.h"

#include "vec_avx2.h"

#define DT f32
#include "ops_template.h"
#undef DT

#define DT f64
#include "ops_template.h"
#undef DT

static const struct fa_engine *const engines[] = {&engine_f32, &engine_f64, NULL};

const struct fa_kernels fa_kernels_avx2 = {
    .name = "avx2",
    .f32 = &ops_f32,
    .f64 = &ops_f64,
    .engines = engines,
    .gradients_f32 = &gradients_f32,
    .gradients_f64 = &gradients_f64,
    .probe_fma_f32 = probe_fma_f32,
    .probe_fma_f64 = probe_fma_f64,
};
