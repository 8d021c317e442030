/* The engine f32x3 of the tile unit: float32 operands, each in three parts of bfloat16.  Needs
 * ops_template.h for f32. */
#ifndef FA_ENGINE_F32X3_H
#define FA_ENGINE_F32X3_H

#include "f32x3_parts.h"

#include "f32x3_pack.h"

#include "f32x3_matmul.h"

#include "f32x3_chains.h"

#include "f32x3_few.h"

/* Scores that are computed again, too.  lse is of the forward pass' scores: others, as accurate,
 * would not be as close to it as they are to each other. */
static bool takes_f32x3(const struct fa_attention_params *params, enum fa_pass pass)
{
    (void)pass;
    return params->dtype == FA_F32 && params->kv_dtype == FA_F32 &&
           params->softmax_axis == FA_SOFTMAX_KEYS;
}

/* Packed values are pairs of keys, in three parts. */
static size_t value_elements_f32x3(size_t keys) { return keys / 2 * PARTS; }

static const struct fa_engine engine_f32x3 = {
    .name = "amx_f32x3",
    .ops = &ops_f32,
    .takes = takes_f32x3,
    .tile_q = TILES_Q,
    .mr = TILES_Q,
    .nr = PANEL,
    .row_step = UPPER_ROWS,
    .scale_at = FA_SCALE_ROWS,
    .multiplies_beside = true,
    .row_elements = row_elements_f32x3,
    .value_elements = value_elements_f32x3,
    .enter = begin_tiles,
    .leave = end_tiles,
    .load_rows = load_rows_f32x3,
    .pack_keys = pack_keys_f32x3,
    .scores = scores_f32x3,
    .pack_values = pack_values_f32x3,
    .values = values_f32x3,
    .values_careful = values_careful_f32x3,
    .few_rows = few_rows_f32x3,
    .few_scores = few_scores_f32x3,
    .few_values = few_values_f32x3,
    .softmax = softmax_f32x3,
    .weigh_columns = column_weights_f32,
    .drop_weights = apply_dropout_f32,
    .scale_weights = scale_weights_f32,
};

#endif
