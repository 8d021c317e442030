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

static double read_real(const char *p, size_t size)
{
    float narrow;
    double wide;
    if (size == sizeof narrow) {
        memcpy(&narrow, p, sizeof narrow);
        return narrow;
    }
    memcpy(&wide, p, sizeof wide);
    return wide;
}

/* Give back the column at these statistics, if they left the range of their type or lost what tells scores apart. */
static void give_back_column(struct fa_forward *forward, struct fa_doubt doubt, int64_t head_index,
                             const char *col_max, char *col_inverse)
{
    const size_t size = forward->geometry->ops->size;
    const double max = read_real(col_max, size), inverse = read_real(col_inverse, size);
    if (!(inverse != 0 && fa_is_doubtful(doubt, max)) && isfinite(inverse) && isfinite(max)) {
        return;
    }
    memset(col_inverse, -1, size); /* a NaN, of either type */
    atomic_store_explicit(forward->head_given_back + head_index, true, memory_order_relaxed);
    atomic_store_explicit(&forward->any_given_back, true, memory_order_relaxed);
}

/* lse of a column that was given back, from its statistics in float64. */
static void store_lse_again(char *lse, const struct fa_attention_params *params, double col_max,
                            double col_inverse)
{
    const enum fa_dtype dtype = fa_lse_dtype(params);
    const bool is_bias = params->bias.data != NULL && fabs(col_max) >= FA_HALF_RANGE_F64;
    const double wide = is_bias ? col_max : (col_max - log2(col_inverse)) * FA_LN_2;
    const float narrow = (float)wide;
    if (dtype == FA_F64) {
        memcpy(lse, &wide, sizeof wide);
    } else {
        memcpy(lse, &narrow, sizeof narrow);
    }
}

/* After a run over columns: those that are given back, or lse of those that were. */
static void settle_columns(struct fa_forward *forward, const struct fa_head *head,
                           int64_t head_index, int64_t block_key, int64_t keys)
{
    const struct fa_geometry *g = forward->geometry;
    const struct fa_forward *first = forward->first;
    const int64_t size = (int64_t)g->ops->size, stride = g->params->lse.row;
    const struct fa_doubt doubt = fa_head_doubt(head, 0);
    const int64_t at = fa_column_offset(g, head_index, block_key / g->block_k);
    const char *given = NULL;
    if (first != NULL) {
        given = first->col_inverse + fa_column_offset(first->geometry, head_index, 0) +
                block_key * (int64_t)first->geometry->ops->size;
    } else if (forward->given_back == NULL) {
        return;
    }
    for (int64_t j = 0; j < keys; j++) {
        const char *max = forward->col_max + at + j * size;
        char *inverse = forward->col_inverse + at + j * size;
        if (first == NULL) {
            give_back_column(forward, doubt, head_index, max, inverse);
        } else if (head->lse != NULL) {
            const size_t given_size = first->geometry->ops->size;
            if (isnan(read_real(given + j * (int64_t)given_size, given_size))) {
                store_lse_again(head->lse + (block_key + j) * stride, g->params,
                                read_real(max, sizeof(double)), read_real(inverse, sizeof(double)));
            }
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
    const bool stores = head.lse != NULL && forward->first == NULL;
    ops->column_finish(col_max, col_sum, (size_t)keys, (size_t)g->block_k,
                       stores ? head.lse + block_key * lse->row : NULL, lse->row,
                       fa_lse_dtype(g->params), g->params->bias.data != NULL);
    settle_columns(forward, &head, head_index, block_key, keys);
}

enum fa_status fa_column_softmax(struct fa_forward *forward, struct fa_job *job)
{
    const struct fa_geometry *g = forward->geometry;
    job->run = run_column_task;
    job->num_tasks = g->batch * g->heads * g->key_blocks;
    job->num_threads = (int)fa_min(g->num_threads, fa_max(job->num_tasks, 1));
    return fa_job_run(job);
}
