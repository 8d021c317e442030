/* Every inner loop of one element type, and the table of them.  A kernel file includes its
 * vec_<isa>.h, then this once per DT; all that it defines is static. */
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "constants.h"
#include "engine.h"
#include "memory.h"
#include "names.h"
#include "philox.h"

#include "exp2_template.h"

#include "tanh_template.h"

#include "matmul_template.h"

#include "storage_template.h"

#include "pack_template.h"

#include "few_template.h"

#include "scores_template.h"

#include "softmax_template.h"

#include "column_template.h"

#include "dropout_template.h"

#include "backward_template.h"

#include "probe_template.h"

static const struct fa_tile_ops FN(ops) = {
    .size = sizeof(REAL),
    .vl = VL,
    .scale_scores = FN(scale_scores),
    .softcap = FN(softcap),
    .add_bias = FN(add_bias),
    .add_alibi = FN(add_alibi),
    .mask_bytes = FN(mask_bytes),
    .mark_overflow = FN(mark_overflow),
    .mask_range = FN(mask_range),
    .softmax_begin = FN(softmax_begin),
    .softmax_update = FN(softmax_update),
    .softmax_fold = FN(softmax_fold),
    .softmax_store = FN(softmax_store),
    .softmax_store_rows = FN(softmax_store_rows),
    .dropout_factors = FN(dropout_factors),
    .apply_dropout = FN(apply_dropout),
    .row_delta = FN(row_delta),
    .softcap_slope = FN(softcap_slope),
    .add_row_products = FN(add_row_products),
    .score_gradients = FN(score_gradients),
    .column_gradients = FN(column_gradients),
    .scale_gradients = FN(scale_gradients),
    .add = FN(add),
    .store_scaled = FN(store_scaled),
    .column_begin = FN(column_begin),
    .column_update = FN(column_update),
    .column_finish = FN(column_finish),
    .column_weights = FN(column_weights),
    .sum_rows = FN(sum_rows),
    .store = FN(store),
};

#include "engine_template.h"
