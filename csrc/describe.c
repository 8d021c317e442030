/* The figures of a call that fa_attention would compute: from the same geometry and the same
 * tiles, without results. */
#include "float_mode.h"
#include "forward.h"
#include "mask_ranges.h"
#include "scores.h"

/* Heads that a mask, lengths, offsets and segment ids cannot tell apart are counted once. */
struct count {
    const struct fa_geometry *geometry;
    char *workspaces;
    int64_t workspace_bytes;
    /* Heads of a batch entry that are counted. */
    int64_t heads;
    /* Blocks of rows of a head. */
    int64_t row_blocks;
    _Atomic int64_t total, computed;
};

/* Whether batch entries differ in the keys that are ruled out. */
static bool entries_differ(const struct fa_attention_params *p)
{
    const struct fa_array *ruling_out[] = {&p->mask,          &p->kv_lengths,    &p->q_offset,
                                           &p->q_segment_ids, &p->k_segment_ids, &p->bias};
    bool differ = p->q_starts != NULL || p->k_starts != NULL;
    for (size_t i = 0; i < sizeof ruling_out / sizeof *ruling_out; i++) {
        for (int64_t axis = 0; axis < p->batch_ndim; axis++) {
            differ |= ruling_out[i]->data != NULL && ruling_out[i]->batch[axis] != 0;
        }
    }
    return differ;
}

/* Key blocks of one head, whatever its masks leave. */
static int64_t head_key_blocks(const struct fa_head *head)
{
    const struct fa_geometry *g = head->geometry;
    const bool packed = g->params->k_starts != NULL;
    return fa_ceil_div(packed ? head->kv_length : g->params->seqlen_k, g->block_k);
}

/* Tiles of some rows that some key takes part in. */
static int64_t count_tiles(struct fa_job *job, int thread, struct fa_workspace *ws,
                           const struct fa_head_rows *rows)
{
    const struct fa_head *head = rows->head;
    const struct fa_geometry *g = head->geometry;
    const struct fa_key_range keys = fa_rows_keys(rows);
    const int64_t first = keys.lo / g->block_k, last = fa_ceil_div(keys.hi, g->block_k);
    if (keys.lo >= keys.hi) {
        return 0;
    }
    if (head->mask == NULL && head->key_ranges == NULL && head->k_segment_ids == NULL) {
        return last - first;
    }
    int64_t count = 0;
    for (int64_t block = first; block < last && !fa_job_checkpoint(job, thread); block++) {
        struct fa_tile tile;
        count += fa_tile_init(&tile, ws, rows, 0, block * g->block_k);
    }
    return count;
}

/* A block of rows of one head. */
static void run_count(struct fa_job *job, int64_t index, int thread)
{
    struct count *count = job->context;
    const struct fa_geometry *g = count->geometry;
    const int64_t block = index % count->row_blocks, place = index / count->row_blocks;
    struct fa_workspace ws =
        fa_workspace_at(g, count->workspaces + thread * count->workspace_bytes);
    struct fa_head head;
    int64_t total = 0, computed = 0;
    fa_head_init(&head, g, place / count->heads * g->heads + place % count->heads);
    const int64_t first = block * g->block_q;
    const struct fa_head_rows all = {&head, first, fa_min(g->block_q, head.rows - first)};
    for (int64_t r = 0; r < all.count; r += g->tile_q) {
        const struct fa_head_rows rows = fa_tile_rows(&all, r);
        if (fa_job_checkpoint(job, thread)) {
            return;
        }
        total += head_key_blocks(&head);
        computed += count_tiles(job, thread, &ws, &rows);
    }
    atomic_fetch_add_explicit(&count->total, total, memory_order_relaxed);
    atomic_fetch_add_explicit(&count->computed, computed, memory_order_relaxed);
}

/* Tiles of the problem, in as many threads as it would have. */
static enum fa_status count_all(const struct fa_geometry *g, int64_t per_thread,
                                struct fa_attention_plan *plan)
{
    const struct fa_attention_params *p = g->params;
    struct count count = {
        .geometry = g,
        .heads = p->mask.data != NULL && p->mask.head != 0 ? g->heads : 1,
        .row_blocks = fa_max(1, fa_ceil_div(g->rows, fa_max(1, g->block_q))),
    };
    const int64_t entries = entries_differ(p) ? g->batch : 1;
    struct fa_job job = {
        .num_tasks = entries * count.heads * count.row_blocks,
        .num_threads = g->num_threads,
        .run = run_count,
        .context = &count,
        .poll = p->poll,
        .poll_arg = p->poll_arg,
    };
    int64_t bytes;
    if (g->batch == 0 || g->heads == 0 || g->rows == 0) {
        return FA_OK;
    }
    if (!fa_multiply(per_thread, g->num_threads, &bytes)) {
        return FA_OVERFLOW;
    }
    count.workspace_bytes = per_thread;
    count.workspaces = fa_allocate(bytes);
    if (count.workspaces == NULL) {
        return FA_NO_MEMORY;
    }
    const enum fa_status status = fa_job_run(&job);
    const int64_t alike = g->batch / entries * (g->heads / count.heads);
    plan->tiles_total = alike * atomic_load(&count.total);
    plan->tiles_computed = alike * atomic_load(&count.computed);
    fa_release(count.workspaces);
    return status;
}

static struct fa_attention_plan plan_of(const struct fa_geometry *g, int64_t num_tasks)
{
    return (struct fa_attention_plan){
        .engine = g->engine->name,
        .block_q = g->block_q,
        .block_k = g->block_k,
        .tile_q = g->tile_q,
        .mr = (int64_t)g->engine->mr,
        .nr = (int64_t)g->engine->nr,
        .vl = (int64_t)g->ops->vl,
        .num_tasks = num_tasks,
        .num_threads = fa_min(g->num_threads, fa_max(num_tasks, 1)),
    };
}

/* Describe a call without results, whose sizes may be anything: the blocks of its widths, or of
 * the widest that can be counted with, and no tasks. */
static enum fa_status describe_nothing(const struct fa_attention_params *params,
                                       const struct fa_kernels *kernels,
                                       struct fa_attention_plan *plan)
{
    const struct fa_attention_params empty = {
        .dtype = params->dtype,
        .kv_dtype = params->kv_dtype,
        .softmax_axis = params->softmax_axis,
        .head_dim = fa_min(params->head_dim, INT32_MAX),
        .head_dim_v = fa_min(params->head_dim_v, INT32_MAX),
        .num_threads = params->num_threads,
    };
    struct fa_geometry g;
    const struct fa_engine *engine = fa_attention_engine(&empty, kernels);
    const enum fa_status status = fa_geometry_init(&g, &empty, engine);
    if (status == FA_OK) {
        *plan = plan_of(&g, 0);
    }
    return status;
}

static enum fa_status describe_tasks(const struct fa_geometry *g, struct fa_attention_plan *plan)
{
    struct fa_plan tasks;
    struct fa_forward_bytes bytes;
    int64_t per_thread, total, ranges, columns = 0;
    const enum fa_status status = fa_plan_init(&tasks, g);
    if (status != FA_OK) {
        return status;
    }
    const int64_t num_tasks = tasks.num_tasks;
    const bool counted = fa_forward_count(g, &tasks, false, &bytes) &&
                         fa_workspace_bytes(g, &per_thread) && fa_plan_bytes(g, &total) &&
                         fa_ranges_bytes(g, &ranges);
    fa_plan_release(&tasks);
    if (!counted ||
        (g->params->softmax_axis == FA_SOFTMAX_QUERIES && !fa_columns_bytes(g, &columns))) {
        return FA_OVERFLOW;
    }
    const int64_t more[] = {bytes.workspaces, bytes.given_back, bytes.states,
                            bytes.arrived,    ranges,           columns};
    for (size_t i = 0; i < sizeof more / sizeof *more; i++) {
        if (!fa_add_bytes(&total, more[i], 1)) {
            return FA_OVERFLOW;
        }
    }
    *plan = plan_of(g, num_tasks);
    plan->workspace_bytes = total;
    plan->mask_is_ranges = fa_ranges_replace(g, FA_BY_MASK);
    plan->bias_is_ranges = fa_ranges_replace(g, FA_BY_BIAS);
    return count_all(g, per_thread, plan);
}

static enum fa_status describe(const struct fa_attention_params *params,
                               const struct fa_kernels *kernels, struct fa_attention_plan *plan)
{
    struct fa_geometry g;
    struct fa_ranges ranges;
    const struct fa_engine *engine = fa_attention_engine(params, kernels);
    if (!fa_has_results(params)) {
        return describe_nothing(params, kernels, plan);
    }
    enum fa_status status = fa_geometry_init(&g, params, engine);
    if (status != FA_OK) {
        return status;
    }
    fa_geometry_fit_tiles(&g);
    status = fa_ranges_find(&ranges, &g);
    if (status == FA_OK) {
        status = describe_tasks(&g, plan);
    }
    fa_ranges_release(&ranges);
    return status;
}

enum fa_status fa_attention_describe(const struct fa_attention_params *params,
                                     const struct fa_kernels *kernels,
                                     struct fa_attention_plan *plan)
{
    struct fa_float_mode found;
    fa_float_mode_enter(&found);
    const enum fa_status status = describe(params, kernels, plan);
    fa_float_mode_leave(&found);
    return status;
}
