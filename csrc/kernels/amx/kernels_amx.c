/* The amx kernel set: what avx512 has, bit for bit, but for the forward pass over bfloat16 and float32, whose products
 * are by tiles.  Exports one symbol. */
#include "vec_amx.h"

#define DT f32
#include "kernels/vector/ops_template.h"
#undef DT

#define DT f64
#include "kernels/vector/ops_template.h"
#undef DT

#include "kernels/kernel_sets.h"

#include "engine_bf16.h"

#include "engine_f32x3.h"

static const struct fa_engine *const engines[] = {&engine_f32x3, &engine_bf16, &engine_f32,
                                                  &engine_f64, NULL};

const struct fa_kernels fa_kernels_amx = {
    .name = "amx",
    .f32 = &ops_f32,
    .f64 = &ops_f64,
    .engines = engines,
    .gradients_f32 = &gradients_f32,
    .gradients_f64 = &gradients_f64,
    .probe_fma_f32 = probe_fma_f32,
    .probe_fma_f64 = probe_fma_f64,
};
