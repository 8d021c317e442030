/* Softmax over the queries of each key, first pass: for every key the maximum and the sum of
 * exp2(score - maximum) over the queries that it takes part in.
 *
 *   for each task (batch, head, block_k keys)                     threads, one atomic counter
 *     pack the keys
 *     for each tile of tile_q rows that may see one of them
 *       scores = q k^T, options applied
 *       running column maxima and sums, lanes along the keys
 *
 * The second pass is the loop nest of forward.c with weights exp2(score - maximum) / sum, computed from
 * the same scores bit for bit.  Three matrix products in all, and two numbers per key of memory.
 */
#include "forward.h"

#include <math.h>
#include <string.h>

#include "keys.h"
#include "scores.h"

/* A column whose statistics left the range of float32, or lost what tells its scores apart, is given back. */
static void give_back_columns(struct fa_forward *forward, const struct fa_head *head,
                              int64_t head_index, const float *col_max, float *col_inverse,
                              int64_t keys)
{
    const struct fa_doubt doubt = fa_head_doubt(head, 0);
    for (int64_t j = 0; j < keys; j++) {
        const float size = fabsf(col_max[j]);
        const bool doubtful = col_inverse[j] != 0 && size > doubt.from && size < doubt.to;
        if (doubtful || !isfinite(col_inverse[j]) || !isfinite(col_max[j])) {
            col_inverse[j] = NAN;
            atomic_store_explicit(forward->head_given_back + head_index, true,
                                  memory_order_relaxed);
            atomic_store_explicit(&forward->any_given_back, true, memory_order_relaxed);
        }
    }
}

/* lse of the columns that were given back, from statistics of float64. */
static void store_lse_again(const struct fa_forward *forward, int64_t head_index, int64_t block_key,
                            int64_t keys, char *lse)
{
    const struct fa_geometry *g = forward->geometry, *before = forward->first->geometry;
    if (lse == NULL || before->ops->size != sizeof(float)) {
        return;
    }
    const char *base = forward->first->col_inverse + fa_column_offset(before, head_index, 0);
    const float *given = (const float *)(const void *)base + block_key;
    const int64_t at = fa_column_offset(g, head_index, block_key / g->block_k);
    const double *col_max = (const double *)(const void *)(forward->col_max + at);
    const double *inverse = (const double *)(const void *)(forward->col_inverse + at);
    for (int64_t j = 0; j < keys; j++) {
        if (isnan(given[j])) {
            const float x = (float)((col_max[j] - log2(inverse[j])) * FA_LN_2);
            memcpy(lse + j * g->params->lse.row, &x, sizeof x);
        }
    }
}

static void run_column_task(struct fa_job *job, int64_t index, int thread)
{
    struct fa_forward *forward = job->context;
    const struct fa_geometry *g = forward->geometry;
    const struct fa_ops *ops = g->ops;
    const int64_t size = (int64_t)ops->size;
    const int64_t key_block = index % g->key_blocks, head_index = index / g->key_blocks;
    const int64_t block_key = key_block * g->block_k;
    const int64_t keys = fa_min(g->block_k, g->params->seqlen_k - block_key);
    struct fa_workspace ws = fa_workspace_of(g, forward->workspaces, thread);
    char *col_max = forward->col_max + fa_column_offset(g, head_index, key_block);
    char *col_sum = forward->col_inverse + fa_column_offset(g, head_index, key_block);
    struct fa_head head;
    bool packed = false;

    if (forward->first != NULL && !forward->first->head_given_back[head_index]) {
        return;
    }
    fa_head_init(&head, g, head_index);
    fa_begin_task(ops);
    ops->column_begin(col_max, col_sum, (size_t)g->block_k);
    for (int64_t row = 0; row < g->rows; row += g->tile_q) {
        struct fa_tile tile;
        if (fa_job_checkpoint(job, thread)) {
            fa_end_task(ops);
            return;
        }
        int64_t rows = fa_min(g->tile_q, g->rows - row);
        if (!fa_tile_init(&tile, &head, &ws, row, rows, 0, block_key)) {
            continue;
        }
        if (!packed) {
            const int64_t live = fa_min(keys, head.kv_length - block_key);
            fa_locate_keys(&head, &ws, block_key, live, 0);
            fa_pack_keys(&head, &ws, live);
            packed = true;
        }
        fa_load_rows(&head, &ws, row, rows);
        fa_want_bias(&head, &ws, row + rows, fa_min(g->tile_q, g->rows - row - rows), block_key);
        fa_tile_scores(&tile, &ws, false);
        ops->column_update(fa_tile_score_data(&tile, &ws), (size_t)g->block_k, (size_t)rows,
                           (size_t)tile.columns, col_max + tile.begin * size,
                           col_sum + tile.begin * size);
    }
    fa_end_task(ops);
    const struct fa_output *lse = &g->params->lse;
    char *block_lse = head.lse == NULL ? NULL : head.lse + block_key * lse->row;
    const enum fa_dtype lse_dtype = g->params->dtype == FA_F64 ? FA_F64 : FA_F32;
    ops->column_finish(col_max, col_sum, (size_t)keys, (size_t)g->block_k,
                       forward->first == NULL ? block_lse : NULL, lse->row, lse_dtype);
    if (forward->first != NULL) {
        store_lse_again(forward, head_index, block_key, keys, block_lse);
    } else if (forward->given_back != NULL && ops->size == sizeof(float)) {
        give_back_columns(forward, &head, head_index, (float *)(void *)col_max,
                          (float *)(void *)col_sum, keys);
    }
}

enum fa_status fa_column_softmax(struct fa_forward *forward, struct fa_job *job)
{
    const struct fa_geometry *g = forward->geometry;
    job->run = run_column_task;
    job->num_tasks = g->batch * g->heads * g->key_blocks;
    job->num_threads = (int)fa_min(g->num_threads, fa_max(job->num_tasks, 1));
    return fa_job_run(job);
}
