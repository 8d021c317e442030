/* The forward pass over bfloat16 by tiles: its operations and their table.  Needs ops_template.h for f32. */
#ifndef FA_AMX_BF16_H
#define FA_AMX_BF16_H

#include "amx_pack.h"

#include "amx_softmax.h"

#include "amx_matmul.h"

#include "amx_few.h"

/* For the forward pass over bfloat16: the tiles' own operations, and those of float32 between them. */
static const struct fa_ops ops_bf16 = {
    .size = sizeof(float),
    .tile_q = TILES_Q,
    .mr = TILES_Q,
    .nr = PANEL,
    .vl = VL_f32,
    .packed_halves = 1,
    .depth_step = TILE_KEYS,
    .row_step = UPPER_ROWS,
    .begin_task = begin_tiles,
    .end_task = end_tiles,
    .load_rows = load_rows_bf16,
    .pack_keys = pack_keys_bf16,
    .pack_values = pack_values_bf16,
    .few_rows = 1,
    .few_cols = SIZE_MAX,
    .few_scores = few_scores_bf16,
    .few_values = few_values_bf16,
    .matmul = matmul_scores_bf16,
    .matmul_values = matmul_values_bf16,
    .matmul_skip_zeros = matmul_skip_zeros_bf16,
    .softcap = softcap_f32,
    .add_bias = add_bias_f32,
    .add_alibi = add_alibi_f32,
    .mask_bytes = mask_bytes_f32,
    .mark_overflow = mark_overflow_f32,
    .mask_range = mask_range_f32,
    .softmax_begin = softmax_begin_f32,
    .softmax_update = softmax_update_bf16,
    .softmax_update_scaled = softmax_update_scaled_bf16,
    .softmax_fold = softmax_fold_f32,
    .softmax_store = softmax_store_f32,
    .dropout_factors = dropout_factors_f32,
    .apply_dropout = apply_dropout_bf16,
    .column_begin = column_begin_f32,
    .column_update = column_update_f32,
    .column_finish = column_finish_f32,
    .column_weights = column_weights_bf16,
    .store = store_f32,
};

#endif
