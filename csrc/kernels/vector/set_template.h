/* The table of a kernel set, once all that it holds is defined.  A kernel file defines KERNEL_SET,
 * its name, and OWN_ENGINES, those that it has besides the engines of vectors: nothing, or a list,
 * best first, with a comma behind the last. */
#include "kernels/kernel_sets.h"

#define VECTOR_ENGINES &engine_f32, &engine_f64

static const struct fa_engine *const engines[] = {OWN_ENGINES VECTOR_ENGINES, NULL};

const struct fa_kernels FA_PASTE(fa_kernels_, KERNEL_SET) = {
    .name = FA_STRING(KERNEL_SET),
    .f32 = &ops_f32,
    .f64 = &ops_f64,
    .engines = engines,
    .gradients_f32 = &gradients_f32,
    .gradients_f64 = &gradients_f64,
    .probe_fma_f32 = probe_fma_f32,
    .probe_fma_f64 = probe_fma_f64,
};
