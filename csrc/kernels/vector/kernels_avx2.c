/* The avx2 kernel set: the templates over vec_avx2.h.  Exports one symbol. */
#include "vec_avx2.h"

#include "types_template.h"

#define KERNEL_SET avx2
#define OWN_ENGINES
#include "set_template.h"
