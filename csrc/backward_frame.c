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

static bool lay_out(const struct fa_backward *b, struct fa_backward_workspace *ws, char *base,
                    int64_t *bytes)
{
    const struct fa_geometry *g = &b->geometry;
    const int64_t size = (int64_t)g->ops->size, rows = FA_BACKWARD_ROWS;
    const struct {
        char **to;
        int64_t rows, cols;
    } parts[] = {
        {&ws->grad_out, rows, g->params->head_dim_v},
        {&ws->q_panels, rows, b->padded_k},
        {&ws->grad_out_panels, rows, b->padded_v},
        {&ws->k_values, g->block_k, b->padded_k},
        {&ws->weights, rows, g->score_stride},
        {&ws->gradients, rows, g->score_stride},
        {&ws->slope, g->params->softcap > 0 ? rows : 0, g->score_stride},
        {&ws->head_grad_v, fa_over_queries(g) ? g->block_k : 0, b->padded_v},
        {&ws->grad_k, g->block_k, b->padded_k},
        {&ws->grad_v, g->block_k, b->padded_v},
        /* Last: between the others they cost 4 % of the pass at head_dim 64 with vectors of 8. */
        {&ws->row_products, rows, (int64_t)g->ops->vl},
        {&ws->col_max, fa_over_queries(g) ? g->block_k : 0, 1},
        {&ws->col_sum, fa_over_queries(g) ? g->block_k : 0, 1},
        {&ws->value_products, fa_over_queries(g) ? (int64_t)g->engine->nr : 0,
         (int64_t)g->engine->nr},
    };
    if (!fa_workspace_bytes(g, bytes)) {
        return false;
    }
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        int64_t elements;
        *parts[i].to = base + *bytes;
        if (!fa_multiply(parts[i].rows, parts[i].cols, &elements) ||
            !fa_add_bytes(bytes, elements, size)) {
            return false;
        }
    }
    ws->row = (const char **)(void *)(base + *bytes);
    return fa_add_bytes(bytes, rows, (int64_t)sizeof *ws->row);
}

bool fa_backward_workspace_bytes(struct fa_backward *backward)
{
    struct fa_backward_workspace ws;
    return lay_out(backward, &ws, NULL, &backward->workspace_bytes);
}

struct fa_backward_workspace fa_backward_workspace_of(const struct fa_backward *backward,
                                                      int thread)
{
    struct fa_backward_workspace ws;
    char *base = backward->workspaces + thread * backward->workspace_bytes;
    int64_t bytes;
    bool ok = lay_out(backward, &ws, base, &bytes);
    FA_ASSERT(ok);
    (void)ok;
    ws.tile = fa_workspace_of(&backward->geometry, base, 0);
    return ws;
}

double fa_round_real(const struct fa_geometry *g, double x)
{
    if (g->ops->size == sizeof x) {
        return isfinite(x) ? fmin(fmax(x, -DBL_MAX), DBL_MAX) : x;
    }
    return isfinite(x) ? (double)(float)fmin(fmax(x, -(double)FLT_MAX), (double)FLT_MAX) : x;
}
