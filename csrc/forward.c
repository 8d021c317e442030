/* Forward attention: the loop nest around the kernels.
 *
 *   for each task (batch, head, columns of v, block_q rows)       threads, one atomic counter
 *     load the rows of q, scaled                                  ws->q
 *     for each block of block_k keys that some row may see        absolute boundaries
 *       for each tile of FA_TILE_Q rows
 *         scores = q k^T, options applied                         ws->scores, L1
 *         weights in place; row_max, row_sum and acc kept up      online softmax
 *         acc += weights v                                        ws->acc
 *     store acc / row_sum + residual, lse
 *
 * K and V of a block are packed when the first tile needs them: once per block_q rows, which costs
 * 2.5 / block_q + 0.5 / block_q of the products.  Every row's result depends on its own scores and on
 * key block boundaries only, so threads, batch and neighbours leave no trace in its bits.
 */
#include "forward.h"

#include <math.h>
#include <string.h>

#include "scores.h"

struct task {
    struct fa_head head;
    int64_t head_index;
    int64_t first_col, cols;
    int64_t first_row, rows;
};

/* Tasks of a head are neighbours, so that threads share its K and V in the last cache; within a head
 * the rows that see the most keys under a causal mask come first. */
static struct task locate_task(const struct fa_geometry *g, int64_t index)
{
    struct task task;
    int64_t row_block = g->row_blocks - 1 - index % g->row_blocks;
    index /= g->row_blocks;
    task.first_col = index % g->dv_blocks * g->block_dv;
    task.cols = fa_min(g->block_dv, g->params->head_dim_v - task.first_col);
    task.head_index = index / g->dv_blocks;
    task.first_row = row_block * g->block_q;
    task.rows = fa_min(g->block_q, g->rows - task.first_row);
    fa_head_init(&task.head, g, task.head_index);
    return task;
}

/* acc[tile rows] += weights v */
static void add_weighted_values(const struct fa_tile *tile, struct fa_workspace *ws, int64_t cols,
                                bool finite)
{
    const struct fa_geometry *g = tile->head->geometry;
    const struct fa_ops *ops = g->ops;
    const int64_t size = (int64_t)ops->size, nr = (int64_t)ops->nr;
    const int64_t group = fa_tile_group(tile);
    const size_t panels = (size_t)fa_ceil_div(cols, nr), panel_stride = (size_t)(g->block_k * nr);
    const char *weights = fa_tile_score_data(tile, ws);

    for (int64_t r = 0; r < tile->rows; r += group) {
        const struct fa_key_range keys = fa_group_keys(tile, r);
        const size_t depth = (size_t)(keys.hi - keys.lo);
        const char *a = weights + (r * g->block_k + keys.lo) * size;
        const char *v = ws->v + (tile->begin + keys.lo) * nr * size;
        char *acc = ws->acc + (tile->row_offset + r) * g->block_dv * size;
        if (finite) {
            ops->matmul((size_t)group, depth, panels, a, (size_t)g->block_k, v, panel_stride, acc,
                        (size_t)g->block_dv, true, &ws->wanted);
        } else {
            ops->matmul_skip_zeros((size_t)fa_min(group, tile->rows - r), depth, panels, a,
                                   (size_t)g->block_k, v, panel_stride, acc, (size_t)g->block_dv);
        }
    }
}

static void weigh_tile(const struct fa_forward *forward, const struct fa_tile *tile,
                       struct fa_workspace *ws, int64_t head_index)
{
    const struct fa_geometry *g = forward->geometry;
    const struct fa_ops *ops = g->ops;
    const int64_t size = (int64_t)ops->size;
    void *scores = fa_tile_score_data(tile, ws);
    if (forward->col_max != NULL) {
        int64_t at =
            fa_column_offset(g, head_index, tile->block_key / g->block_k) + tile->begin * size;
        ops->column_weights(scores, (size_t)g->block_k, (size_t)tile->rows, (size_t)tile->columns,
                            forward->col_max + at, forward->col_inverse + at);
    } else {
        const int64_t rows = fa_round_up(tile->rows, (int64_t)ops->mr);
        ops->softmax_update(scores, (size_t)g->block_k, (size_t)rows, (size_t)tile->columns,
                            ws->row_max + tile->row_offset * size,
                            ws->row_sum + tile->row_offset * (int64_t)ops->vl * size,
                            ws->acc + tile->row_offset * g->block_dv * size, (size_t)g->block_dv);
    }
}

/* The bias of the tile that follows: of the rows from r on, or of the first rows and the next block. */
static void want_next(const struct task *task, struct fa_workspace *ws, int64_t r,
                      int64_t block_key)
{
    if (r == task->rows) {
        r = 0;
        block_key += task->head.geometry->block_k;
    }
    fa_want_bias(&task->head, ws, task->first_row + r, fa_min(FA_TILE_Q, task->rows - r),
                 block_key);
}

/* One key block against all rows of the task. */
static void attend_block(const struct fa_forward *forward, const struct task *task,
                         struct fa_workspace *ws, int64_t block_key, int64_t keys)
{
    const struct fa_geometry *g = forward->geometry;
    const struct fa_attention_params *p = g->params;
    const struct fa_head *head = &task->head;
    bool packed = false, finite = true;

    for (int64_t r = 0; r < task->rows; r += FA_TILE_Q) {
        struct fa_tile tile;
        int64_t rows = fa_min(FA_TILE_Q, task->rows - r);
        if (!fa_tile_init(&tile, head, ws, task->first_row + r, rows, r, block_key)) {
            continue;
        }
        if (!packed) {
            fa_pack_keys(head, ws, block_key, keys);
            finite = g->ops->pack_values(
                ws->v, (size_t)(g->block_k * (int64_t)g->ops->nr), (size_t)keys, (size_t)task->cols,
                head->v + block_key * p->v.row + task->first_col * p->v.col, p->v.row, p->v.col);
            packed = true;
        }
        want_next(task, ws, r + rows, block_key);
        fa_tile_scores(&tile, ws);
        weigh_tile(forward, &tile, ws, task->head_index);
        add_weighted_values(&tile, ws, task->cols, finite);
    }
}

static void store_rows(const struct fa_forward *forward, const struct task *task,
                       struct fa_workspace *ws)
{
    const struct fa_geometry *g = forward->geometry;
    const struct fa_attention_params *p = g->params;
    const struct fa_head *head = &task->head;
    for (int64_t r = 0; r < task->rows; r++) {
        const int64_t row = task->first_row + r;
        const int64_t token = fa_row_token(g, row), member = fa_row_member(g, row);
        struct fa_row_result result = {
            .row = (size_t)r,
            .cols = (size_t)task->cols,
            .sink = -INFINITY,
            .out = head->out + member * p->out.head + token * p->out.row +
                   task->first_col * p->out.col,
            .out_stride = p->out.col,
        };
        if (head->residual != NULL) {
            result.residual = head->residual + member * p->residual.head + token * p->residual.row +
                              task->first_col * p->residual.col;
            result.residual_stride = p->residual.col;
        }
        if (forward->col_max != NULL) {
            g->ops->store(ws->acc + r * g->block_dv * (int64_t)g->ops->size, &result);
            continue;
        }
        if (head->sinks != NULL) {
            memcpy(&result.sink, head->sinks + member * p->sinks.head, sizeof result.sink);
            result.sink *= FA_LOG2_E;
        }
        if (head->lse != NULL && task->first_col == 0) {
            result.lse = head->lse + member * p->lse.head + token * p->lse.row;
        }
        g->ops->softmax_store(ws->row_max, ws->row_sum, ws->acc, (size_t)g->block_dv, &result);
    }
}

static void run_task(struct fa_job *job, int64_t index, int thread)
{
    const struct fa_forward *forward = job->context;
    const struct fa_geometry *g = forward->geometry;
    struct fa_workspace ws = fa_workspace_of(g, forward->workspaces, thread);
    const struct task task = locate_task(g, index);
    const struct fa_key_range keys =
        fa_rows_keys(&task.head, task.first_row, task.first_row + task.rows - 1);

    fa_load_rows(&task.head, &ws, task.first_row, task.rows);
    g->ops->softmax_begin(ws.row_max, ws.row_sum, ws.acc,
                          (size_t)fa_round_up(task.rows, (int64_t)g->ops->mr), (size_t)g->block_dv);
    for (int64_t block = keys.lo / g->block_k * g->block_k; block < keys.hi; block += g->block_k) {
        if (fa_job_checkpoint(job, thread)) {
            return;
        }
        attend_block(forward, &task, &ws, block, fa_min(g->block_k, keys.hi - block));
    }
    store_rows(forward, &task, &ws);
}

static int64_t count_tasks(const struct fa_geometry *g)
{
    return g->batch * g->heads * g->dv_blocks * g->row_blocks;
}

static enum fa_status allocate(struct fa_forward *forward)
{
    const struct fa_geometry *g = forward->geometry;
    int64_t per_thread, total, columns = 0, bytes = 0;
    if (!fa_workspace_bytes(g, &per_thread) || !fa_multiply(per_thread, g->num_threads, &total)) {
        return FA_OVERFLOW;
    }
    forward->workspaces = fa_allocate(total);
    if (g->params->softmax_axis == FA_SOFTMAX_QUERIES) {
        if (!fa_multiply(g->batch * g->heads, g->key_blocks * g->block_k, &columns) ||
            !fa_add_bytes(&bytes, columns, (int64_t)g->ops->size)) {
            return FA_OVERFLOW;
        }
        forward->col_max = fa_allocate(bytes);
        forward->col_inverse = fa_allocate(bytes);
        if (forward->col_max == NULL || forward->col_inverse == NULL) {
            return FA_NO_MEMORY;
        }
    }
    return forward->workspaces == NULL ? FA_NO_MEMORY : FA_OK;
}

enum fa_status fa_attention(const struct fa_attention_params *params,
                            const struct fa_kernels *kernels)
{
    struct fa_geometry geometry;
    enum fa_status status = fa_geometry_init(&geometry, params, fa_ops_for(kernels, params->dtype));
    if (status != FA_OK) {
        return status;
    }
    struct fa_forward forward = {.geometry = &geometry};
    struct fa_job job = {
        .num_threads = geometry.num_threads,
        .context = &forward,
        .poll = params->poll,
        .poll_arg = params->poll_arg,
    };
    status = allocate(&forward);
    if (status == FA_OK && params->softmax_axis == FA_SOFTMAX_QUERIES) {
        status = fa_column_softmax(&forward, &job);
    }
    if (status == FA_OK) {
        job.run = run_task;
        job.num_tasks = count_tasks(&geometry);
        job.num_threads = (int)fa_min(geometry.num_threads, fa_max(job.num_tasks, 1));
        status = fa_job_run(&job);
    }
    fa_release(forward.workspaces);
    fa_release(forward.col_max);
    fa_release(forward.col_inverse);
    return status;
}
