/* The templates for both types that computations are in; a kernel file includes its vec_<isa>.h
 * before. */
#define DT f32
#include "ops_template.h"
#undef DT

#define DT f64
#include "ops_template.h"
#undef DT
