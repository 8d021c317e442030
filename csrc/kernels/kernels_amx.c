/* The amx kernel set: what avx512 has, bit for bit, but for the forward pass over bfloat16 and float32, whose products
 * are by tiles.  Exports one symbol. */
#include "vec_amx.h"

#define DT f32
#include "ops_template.h"
#undef DT

#define DT f64
#include "ops_template.h"
#undef DT

#include "amx_bf16.h"

#include "amx_f32.h"

const struct fa_kernels fa_kernels_amx = {
    .name = "amx",
    .f32 = &ops_f32,
    .f64 = &ops_f64,
    .forward_f32 = &ops_parts,
    .forward_bf16 = &ops_bf16,
};
