/* The scalar kernel set: the templates over vec_scalar.h.  Exports one symbol. */
#include "vec_scalar.h"

#include "types_template.h"

#define KERNEL_SET scalar
#define OWN_ENGINES
#include "set_template.h"
