/* What fa_attention would do, from the same geometry and the same tiles, without doing it. */
#include "forward.h"
#include "scores.h"

/* Key blocks of one head, whatever its masks leave. */
static int64_t head_key_blocks(const struct fa_head *head)
{
    const struct fa_geometry *g = head->geometry;
    const bool packed = g->params->k_starts != NULL;
    return fa_ceil_div(packed ? head->kv_length : g->params->seqlen_k, g->block_k);
}

/* Tiles of one head that some key takes part in. */
static int64_t count_tiles(const struct fa_geometry *g, const struct fa_head *head,
                           struct fa_workspace *ws)
{
    int64_t count = 0;
    for (int64_t row = 0; row < head->rows; row += g->tile_q) {
        int64_t rows = fa_min(g->tile_q, head->rows - row);
        for (int64_t block = 0; block < g->params->seqlen_k; block += g->block_k) {
            struct fa_tile tile;
            count += fa_tile_init(&tile, head, ws, row, rows, 0, block);
        }
    }
    return count;
}

enum fa_status fa_attention_describe(const struct fa_attention_params *params,
                                     const struct fa_kernels *kernels,
                                     struct fa_attention_plan *plan)
{
    struct fa_geometry g;
    struct fa_plan tasks;
    int64_t per_thread, total, part = 0;
    const struct fa_ops *ops = fa_attention_ops(params, kernels);
    enum fa_status status = fa_geometry_init(&g, params, ops, ops);
    if (status == FA_OK) {
        status = fa_plan_init(&tasks, &g);
    }
    if (status != FA_OK) {
        return status;
    }
    const int64_t num_tasks = tasks.num_tasks;
    const bool by_splits = tasks.by_splits;
    fa_plan_release(&tasks);
    if (!fa_workspace_bytes(&g, &per_thread) || !fa_multiply(per_thread, g.num_threads, &total) ||
        !fa_state_bytes(&g, g.block_q, &part) || !fa_multiply(part, num_tasks, &part)) {
        return FA_OVERFLOW;
    }
    const int64_t heads = g.batch * g.heads;
    total += by_splits ? part : 0;
    if (params->softmax_axis == FA_SOFTMAX_QUERIES) {
        total += 2 * heads * g.key_blocks * g.block_k * (int64_t)g.ops->size;
    }
    *plan = (struct fa_attention_plan){
        .block_q = g.block_q,
        .block_k = g.block_k,
        .tile_q = g.tile_q,
        .mr = (int64_t)g.ops->mr,
        .nr = (int64_t)g.ops->nr,
        .vl = (int64_t)g.ops->vl,
        .num_tasks = num_tasks,
        .num_threads = fa_min(g.num_threads, fa_max(num_tasks, 1)),
        .workspace_bytes = total,
    };
    char *memory = fa_allocate(per_thread);
    if (memory == NULL) {
        return FA_NO_MEMORY;
    }
    struct fa_workspace ws = fa_workspace_of(&g, memory, 0);
    for (int64_t i = 0; i < heads; i++) {
        struct fa_head head;
        fa_head_init(&head, &g, i);
        plan->tiles_total += fa_ceil_div(head.rows, g.tile_q) * head_key_blocks(&head);
        plan->tiles_computed += count_tiles(&g, &head, &ws);
    }
    fa_release(memory);
    return FA_OK;
}
