/* The amx kernel set: what avx512 has, bit for bit, and two engines of the tile unit.  Exports one
 * symbol. */
#include "vec_amx.h"

#include "kernels/vector/types_template.h"

#include "engine_bf16.h"

#include "engine_f32x3.h"

#define KERNEL_SET amx
#define OWN_ENGINES &engine_f32x3, &engine_bf16,
#include "kernels/vector/set_template.h"
