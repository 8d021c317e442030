/* The neon kernel set: the templates over vec_neon.h.  Exports one symbol. */
#include "vec_neon.h"

#include "types_template.h"

#define KERNEL_SET neon
#define OWN_ENGINES
#include "set_template.h"
