/* The engine bf16 of the tile unit: bfloat16 operands, in the forward pass.  Needs ops_template.h
 * for f32. */
#ifndef FA_ENGINE_BF16_H
#define FA_ENGINE_BF16_H

#include "bf16_pack.h"

#include "bf16_softmax.h"

#include "bf16_matmul.h"

#include "bf16_few.h"

/* Of scores that are computed again, gradients and weights want more bits than its exp2 leaves. */
static bool takes_bf16(const struct fa_attention_params *params, enum fa_pass pass)
{
    return pass == FA_FORWARD && params->dtype == FA_BF16 && params->kv_dtype == FA_BF16;
}

/* Packed values are pairs of keys in a float32. */
static size_t value_elements_bf16(size_t keys) { return keys / 2; }

static const struct fa_engine engine_bf16 = {
    .name = "amx_bf16",
    .ops = &ops_f32,
    .takes = takes_bf16,
    .tile_q = TILES_Q,
    .mr = TILES_Q,
    .nr = PANEL,
    .row_step = UPPER_ROWS,
    .scale_at = FA_SCALE_LATE,
    .multiplies_beside = false,
    .row_elements = row_elements_bf16,
    .value_elements = value_elements_bf16,
    .enter = begin_tiles,
    .leave = end_tiles,
    .load_rows = load_rows_bf16,
    .pack_keys = pack_keys_bf16,
    .scores = scores_bf16,
    .pack_values = pack_values_bf16,
    .values = values_bf16,
    .values_careful = values_careful_bf16,
    .few_rows = few_rows_bf16,
    .few_scores = few_scores_bf16,
    .few_values = few_values_bf16,
    .softmax = softmax_bf16,
    .weigh_columns = weigh_columns_bf16,
    .drop_weights = drop_weights_bf16,
    .scale_weights = scale_weights_bf16,
};

#endif
