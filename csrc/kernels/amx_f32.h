/* The forward pass over float32 by tiles: its operations and their table.  Needs ops_template.h for f32. */
#ifndef FA_AMX_F32_H
#define FA_AMX_F32_H

#include "amx_parts.h"

#include "amx_parts_pack.h"

#include "amx_parts_matmul.h"

#include "amx_parts_chains.h"

#include "amx_parts_few.h"

/* For the forward pass over float32: products by tiles, and the operations of float32 between them. */
static const struct fa_ops ops_parts = {
    .size = sizeof(float),
    .tile_q = TILES_Q,
    .mr = TILES_Q,
    .nr = PANEL,
    .vl = VL_f32,
    .packed_halves = PARTS,
    .depth_step = TILE_KEYS,
    .row_step = UPPER_ROWS,
    .begin_task = begin_tiles,
    .end_task = end_tiles,
    .load_rows = load_rows_parts,
    .pack_keys = pack_keys_parts,
    .pack_values = pack_values_parts,
    .few_rows = FEW_TILE_ROWS,
    .few_cols = FEW_CHUNKS * TILE_KEYS,
    .few_scores = few_scores_parts,
    .few_values = few_values_parts,
    .matmul = matmul_scores_parts,
    .matmul_values = matmul_values_parts,
    .matmul_skip_zeros = matmul_skip_zeros_parts,
    .scale_scores = scale_scores_f32,
    .scale_weights = scale_weights_f32,
    .softcap = softcap_f32,
    .add_bias = add_bias_f32,
    .add_alibi = add_alibi_f32,
    .mask_bytes = mask_bytes_f32,
    .mark_overflow = mark_overflow_f32,
    .mask_range = mask_range_f32,
    .softmax_begin = softmax_begin_f32,
    .softmax_update = softmax_update_f32,
    .softmax_update_beside = softmax_update_beside_parts,
    .softmax_fold = softmax_fold_f32,
    .softmax_store = softmax_store_f32,
    .dropout_factors = dropout_factors_f32,
    .apply_dropout = apply_dropout_f32,
};

#endif
