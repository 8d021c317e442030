/* Softmax over the queries of each key, first pass: for every key the maximum and the sum of
 * exp2(score - maximum) over the queries that it takes part in.
 *
 *   for each task (batch, head, block_k keys)                     threads, one atomic counter
 *     pack the keys
 *     for each tile of tile_q rows that may see one of them
 *       scores = q k^T, options applied
 *       running column maxima and sums, lanes along the keys
 *
 * The second pass is the loop nest of forward.c with weights exp2(score - maximum) / sum,
 * computed from the same scores bit for bit.  Three matrix products in all, and two numbers per
 * key of memory. */
#include "column_softmax.h"

#include <math.h>

#include "keys.h"
#include "scores.h"

/* Of col_max, or of col_inverse; and of head_given_back. */
static bool count_bytes(const struct fa_geometry *g, int64_t *statistics, int64_t *heads)
{
    int64_t columns;
    *statistics = *heads = 0;
    return fa_multiply(g->batch * g->heads, g->key_blocks * g->block_k, &columns) &&
           fa_add_bytes(statistics, columns, (int64_t)g->ops->size) &&
           fa_add_bytes(heads, g->batch * g->heads, (int64_t)sizeof(atomic_bool));
}

bool fa_columns_bytes(const struct fa_geometry *geometry, int64_t *bytes)
{
    int64_t statistics, heads;
    return count_bytes(geometry, &statistics, &heads) && fa_multiply(statistics, 2, bytes) &&
           fa_add_bytes(bytes, heads, 1);
}

enum fa_status fa_columns_allocate(struct fa_columns *columns)
{
    const struct fa_geometry *g = columns->geometry;
    int64_t statistics, heads;
    if (!count_bytes(g, &statistics, &heads)) {
        return FA_OVERFLOW;
    }
    columns->col_max = fa_allocate(statistics);
    columns->col_inverse = fa_allocate(statistics);
    if (columns->gives_back) {
        columns->head_given_back = fa_allocate(heads);
    }
    if (columns->col_max == NULL || columns->col_inverse == NULL ||
        (columns->gives_back && columns->head_given_back == NULL)) {
        return FA_NO_MEMORY;
    }
    for (int64_t i = 0; columns->gives_back && i < g->batch * g->heads; i++) {
        atomic_init(columns->head_given_back + i, false);
    }
    return FA_OK;
}

void fa_columns_release(struct fa_columns *columns)
{
    fa_release(columns->col_max);
    fa_release(columns->col_inverse);
    fa_release(columns->head_given_back);
}

/* Give back columns whose statistics left the range of their type, or lost what tells their
 * scores apart. */
static void give_back_columns(struct fa_columns *columns, const struct fa_head *head,
                              int64_t block_key, int64_t keys)
{
    const struct fa_geometry *g = columns->geometry;
    const struct fa_doubt doubt = fa_head_doubt(head, 0);
    const int64_t size = (int64_t)g->ops->size;
    int64_t at = fa_column_offset(g, head->index, block_key / g->block_k);
    for (int64_t j = 0; j < keys; j++, at += size) {
        const double max = fa_read_real(g, columns->col_max + at);
        const double inverse = fa_read_real(g, columns->col_inverse + at);
        if (fa_is_doubtful(doubt, max, inverse == 0) || !isfinite(inverse) || !isfinite(max)) {
            fa_write_real(g, columns->col_inverse + at, NAN);
            atomic_store_explicit(columns->head_given_back + head->index, true,
                                  memory_order_relaxed);
            atomic_store_explicit(&columns->any_given_back, true, memory_order_relaxed);
        }
    }
}

/* lse of the columns that the first run gave back, from their statistics in float64. */
static void store_lse_again(const struct fa_columns *columns, const struct fa_head *head,
                            int64_t block_key, int64_t keys)
{
    const struct fa_geometry *g = columns->geometry, *before = columns->first->geometry;
    const char *given = columns->first->col_inverse + fa_column_offset(before, head->index, 0) +
                        block_key * (int64_t)before->ops->size;
    int64_t at = fa_column_offset(g, head->index, block_key / g->block_k);
    for (int64_t j = 0; j < keys; j++, at += (int64_t)g->ops->size) {
        if (isnan(fa_read_real(before, given + j * (int64_t)before->ops->size))) {
            const double max = fa_read_real(g, columns->col_max + at);
            const double inverse = fa_read_real(g, columns->col_inverse + at);
            const double lse = fa_natural(max, -log2(inverse), fa_is_biased(g), g->ops->size);
            fa_write_lse(g, head->lse + (block_key + j) * g->params->lse.row,
                         inverse == 0 ? -INFINITY : lse); /* no query joined it */
        }
    }
}

/* Maximum and reciprocal sum are shift and factor; they are NaN in a column that was given back. */
static void store_weighing(const struct fa_columns *columns, const struct fa_head *head,
                           int64_t block_key, int64_t keys)
{
    const struct fa_geometry *g = columns->geometry;
    const struct fa_array *to = &g->params->weighing;
    int64_t at = fa_column_offset(g, head->index, block_key / g->block_k);
    for (int64_t j = 0; j < keys; j++, at += (int64_t)g->ops->size) {
        char *weighing = head->weighing + (block_key + j) * to->row;
        if (columns->keeps_weighing) {
            fa_write_lse(g, weighing, fa_read_real(g, columns->col_max + at));
            fa_write_lse(g, weighing + to->col, fa_read_real(g, columns->col_inverse + at));
        } else {
            fa_forget_weighing(g, weighing);
        }
    }
}

static void run_column_task(struct fa_job *job, int64_t index, int thread)
{
    struct fa_columns *columns = job->context;
    const struct fa_geometry *g = columns->geometry;
    const struct fa_tile_ops *ops = g->ops;
    const int64_t size = (int64_t)ops->size;
    const int64_t key_block = index % g->key_blocks, head_index = index / g->key_blocks;
    const int64_t block_key = key_block * g->block_k;
    const int64_t keys = fa_min(g->block_k, g->params->seqlen_k - block_key);
    struct fa_workspace ws =
        fa_workspace_at(g, columns->workspaces + thread * columns->workspace_bytes);
    char *col_max = columns->col_max + fa_column_offset(g, head_index, key_block);
    char *col_sum = columns->col_inverse + fa_column_offset(g, head_index, key_block);
    struct fa_head head;
    const struct fa_head_rows all = {.head = &head, .count = g->rows};
    bool packed = false;

    if (columns->first != NULL && !columns->first->head_given_back[head_index]) {
        return;
    }
    fa_head_init(&head, g, head_index);
    g->engine->enter();
    ops->column_begin(col_max, col_sum, (size_t)g->block_k);
    for (int64_t row = 0; row < g->rows; row += g->tile_q) {
        const struct fa_head_rows rows = fa_tile_rows(&all, row);
        const struct fa_head_rows next = fa_tile_rows(&all, row + g->tile_q);
        struct fa_tile tile;
        if (fa_job_checkpoint(job, thread)) {
            g->engine->leave();
            return;
        }
        if (!fa_tile_init(&tile, &ws, &rows, 0, block_key)) {
            continue;
        }
        if (!packed) {
            const int64_t live = fa_min(keys, head.kv_length - block_key);
            fa_locate_keys(&head, &ws, block_key, live, 0);
            fa_pack_keys(&head, &ws, live);
            packed = true;
        }
        fa_load_rows(&ws, &rows);
        fa_want_bias(&ws, &next, block_key);
        fa_tile_scores(&tile, &ws, false);
        ops->column_update(fa_tile_score_data(&tile, &ws), (size_t)g->score_stride,
                           (size_t)rows.count, (size_t)tile.columns, col_max + tile.begin * size,
                           col_sum + tile.begin * size);
    }
    g->engine->leave();
    const struct fa_array *lse = &g->params->lse;
    const bool stores = head.lse != NULL && columns->first == NULL;
    const struct fa_column_result result = {
        .cols = (size_t)keys,
        .padded = (size_t)g->block_k,
        .lse = stores ? head.lse + block_key * lse->row : NULL,
        .lse_stride = lse->row,
        .lse_dtype = fa_lse_dtype(g->params),
        .biased = fa_is_biased(g),
    };
    ops->column_finish(col_max, col_sum, &result);
    if (columns->gives_back) {
        give_back_columns(columns, &head, block_key, keys);
    } else if (columns->first != NULL && head.lse != NULL) {
        store_lse_again(columns, &head, block_key, keys);
    }
    if (head.weighing != NULL && columns->first == NULL) {
        store_weighing(columns, &head, block_key, keys);
    }
}

enum fa_status fa_column_softmax(struct fa_columns *columns)
{
    const struct fa_geometry *g = columns->geometry;
    struct fa_job job = {
        .num_tasks = g->batch * g->heads * g->key_blocks,
        .run = run_column_task,
        .context = columns,
        .poll = g->params->poll,
        .poll_arg = g->params->poll_arg,
    };
    job.num_threads = (int)fa_min(g->num_threads, fa_max(job.num_tasks, 1));
    return fa_job_run(&job);
}
