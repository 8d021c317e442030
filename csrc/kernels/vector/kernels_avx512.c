/* The avx512 kernel set: the templates over vec_avx512.h.  Exports one symbol. */
#include "vec_avx512.h"

#include "types_template.h"

#define KERNEL_SET avx512
#define OWN_ENGINES
#include "set_template.h"
