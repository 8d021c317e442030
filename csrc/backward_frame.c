#include "backward_frame.h"

#include <float.h>
#include <math.h>

int64_t fa_backward_members(const struct fa_geometry *g)
{
    const struct fa_attention_params *p = g->params;
    return fa_over_queries(g) && p->num_heads > 0 ? p->num_heads / p->num_kv_heads : 1;
}

void fa_backward_leave(struct fa_backward *backward, int64_t head_index)
{
    if (backward->unit_left != NULL) {
        const int64_t unit = head_index / fa_backward_members(&backward->geometry);
        atomic_store_explicit(backward->unit_left + unit, true, memory_order_relaxed);
        atomic_store_explicit(&backward->any_left, true, memory_order_relaxed);
    }
}

bool fa_backward_is_stored(const struct fa_backward *backward, int64_t head_index)
{
    const int64_t unit = head_index / fa_backward_members(&backward->geometry);
    return backward->first != NULL &&
           !atomic_load_explicit(backward->first->unit_left + unit, memory_order_relaxed);
}

bool fa_backward_is_done(const struct fa_backward *backward, int64_t head_index)
{
    /* Softmax over the queries prepares the bias' gradient by the same tasks. */
    return fa_backward_is_stored(backward, head_index) &&
           !(fa_over_queries(&backward->geometry) && backward->params->grad_bias.data != NULL);
}

static void take_buffers(struct fa_memory *memory, const struct fa_backward *b,
                         struct fa_backward_workspace *ws)
{
    const struct fa_geometry *g = &b->geometry;
    const int64_t size = (int64_t)g->ops->size, rows = FA_BACKWARD_ROWS;
    const int64_t nr = (int64_t)g->engine->nr;
    const bool over_queries = fa_over_queries(g);
    fa_take_workspace(memory, g, &ws->forward);
    ws->grad_out = fa_take(memory, rows, g->params->head_dim_v, size);
    ws->q_panels = fa_take(memory, rows, b->padded_k, size);
    ws->grad_out_panels = fa_take(memory, rows, b->padded_v, size);
    ws->k_values = fa_take(memory, g->block_k, b->padded_k, size);
    ws->weights = fa_take(memory, rows, g->score_stride, size);
    ws->gradients = fa_take(memory, rows, g->score_stride, size);
    ws->slope = fa_take(memory, g->params->softcap > 0 ? rows : 0, g->score_stride, size);
    ws->head_grad_v = fa_take(memory, over_queries ? g->block_k : 0, b->padded_v, size);
    ws->grad_k = fa_take(memory, g->block_k, b->padded_k, size);
    ws->grad_v = fa_take(memory, g->block_k, b->padded_v, size);
    /* Last: between the buffers above, these cost 4 % of the pass at head_dim 64 with vectors of
     * 8. */
    ws->row_products = fa_take(memory, rows, (int64_t)g->ops->vl, size);
    ws->col_max = fa_take(memory, over_queries ? g->block_k : 0, 1, size);
    ws->col_sum = fa_take(memory, over_queries ? g->block_k : 0, 1, size);
    ws->value_products = fa_take(memory, over_queries ? nr : 0, nr, size);
    ws->row = fa_take(memory, rows, 1, (int64_t)sizeof *ws->row);
}

bool fa_backward_workspace_bytes(struct fa_backward *backward)
{
    struct fa_memory memory = {.ok = true};
    struct fa_backward_workspace unused;
    take_buffers(&memory, backward, &unused);
    backward->workspace_bytes = memory.bytes;
    return memory.ok;
}

struct fa_backward_workspace fa_backward_workspace_of(const struct fa_backward *backward,
                                                      int thread)
{
    struct fa_backward_workspace ws;
    struct fa_memory memory = {.base = backward->workspaces + thread * backward->workspace_bytes};
    take_buffers(&memory, backward, &ws);
    return ws;
}

double fa_round_real(const struct fa_geometry *g, double x)
{
    if (g->ops->size == sizeof x) {
        return isfinite(x) ? fmin(fmax(x, -DBL_MAX), DBL_MAX) : x;
    }
    return isfinite(x) ? (double)(float)fmin(fmax(x, -(double)FLT_MAX), (double)FLT_MAX) : x;
}
