/* grad_bias: the gradients of scores, added up where the bias was broadcast.
 *
 * A task owns one plane of the bias, that is everything that a (batch entry, head) of it holds, and visits in
 * order all heads that read it: no two tasks write the same element, and every sum has one order.  Scores and
 * products with the values are computed once more, so this pass costs 2 products.
 */
#include <string.h>

#include "backward.h"

/* Whether a head is the first of those that share its plane. */
static bool owns_plane(const struct fa_geometry *g, const struct fa_output *bias, int64_t entry,
                       int64_t head)
{
    const struct fa_attention_params *p = g->params;
    if (bias->head == 0 && head > 0) {
        return false;
    }
    for (int64_t i = p->batch_ndim - 1; i >= 0; i--) {
        if (bias->batch[i] == 0 && entry % p->batch_shape[i] > 0) {
            return false;
        }
        entry /= p->batch_shape[i];
    }
    return true;
}

static char *plane_of(const struct fa_geometry *g, const struct fa_output *bias, int64_t entry,
                      int64_t head)
{
    return (char *)bias->data + fa_entry_offset(g, entry, bias->batch) + head * bias->head;
}

int64_t fa_backward_bias_tasks(const struct fa_backward *backward)
{
    return backward->geometry.batch * backward->params->attention.num_heads;
}

static void add_real(size_t size, char *to, const char *from)
{
    if (size == sizeof(double)) {
        double a, b;
        memcpy(&a, to, sizeof a);
        memcpy(&b, from, sizeof b);
        a += b;
        memcpy(to, &a, sizeof a);
    } else {
        float a, b;
        memcpy(&a, to, sizeof a);
        memcpy(&b, from, sizeof b);
        a += b;
        memcpy(to, &a, sizeof a);
    }
}

/* Rows of one query head among the stacked ones of a tile. */
static void add_tile(const struct fa_backward *b, struct fa_backward_workspace *ws, int64_t first,
                     int64_t rows, int64_t member, int64_t block_key, struct fa_key_range keys,
                     char *plane)
{
    const struct fa_geometry *g = &b->geometry;
    const struct fa_output *bias = &b->params->grad_bias;
    const int64_t size = (int64_t)g->ops->size;
    for (int64_t r = 0; r < rows; r++) {
        if (fa_row_member(g, first + r) != member) {
            continue;
        }
        char *to = plane + fa_row_token(g, first + r) * bias->row + block_key * bias->col;
        const char *from = ws->gradients + r * g->block_k * size;
        for (int64_t j = keys.lo; j < keys.hi; j++) {
            add_real(g->ops->size, to + j * bias->col, from + j * size);
        }
    }
}

/* All of one key head's scores, for one of the query heads that read it.  False: stopped. */
static bool visit_head(struct fa_job *job, int thread, int64_t head_index, int64_t member,
                       char *plane)
{
    const struct fa_backward *b = job->context;
    const struct fa_geometry *g = &b->geometry;
    const struct fa_attention_params *p = &b->params->attention;
    const struct fa_input *grad = &b->params->grad_out;
    const char *grad_out = fa_input_of(g, grad, head_index);
    struct fa_backward_workspace ws = fa_backward_workspace_of(b, thread);
    struct fa_head head;
    fa_head_init(&head, g, head_index);
    for (int64_t key = 0; key < head.kv_length; key += g->block_k) {
        const int64_t keys = fa_min(g->block_k, head.kv_length - key);
        fa_backward_pack(b, &head, &ws, key, keys);
        for (int64_t first = 0; first < head.rows; first += FA_BACKWARD_ROWS) {
            const int64_t rows = fa_min(FA_BACKWARD_ROWS, head.rows - first);
            if (fa_job_checkpoint(job, thread)) {
                return false;
            }
            fa_load_rows(&head, &ws.tile, first, rows);
            for (int64_t r = 0; r < rows; r++) {
                ws.row[r] = fa_row_at(g, grad_out, first + r, grad->head, grad->row);
            }
            g->ops->load_rows(ws.grad_out, (size_t)rows, ws.row, grad->col, (size_t)p->head_dim_v,
                              p->dtype, 1);
            struct fa_key_range seen =
                fa_backward_tile(b, &head, head_index, &ws, first, rows, key, false);
            seen.hi = fa_min(seen.hi, keys);
            add_tile(b, &ws, first, rows, member, key, seen, plane);
        }
    }
    return true;
}

void fa_backward_bias(struct fa_job *job, int64_t index, int thread)
{
    const struct fa_backward *b = job->context;
    const struct fa_geometry *g = &b->geometry;
    const struct fa_output *bias = &b->params->grad_bias;
    const int64_t num_heads = b->params->attention.num_heads;
    if (!owns_plane(g, bias, index / num_heads, index % num_heads)) {
        return;
    }
    char *plane = plane_of(g, bias, index / num_heads, index % num_heads);
    for (int64_t i = 0; i < g->batch * num_heads; i++) {
        const int64_t entry = i / num_heads, head = i % num_heads;
        if (plane_of(g, bias, entry, head) == plane &&
            !visit_head(job, thread, entry * g->heads + head / g->stacked, head % g->stacked,
                        plane)) {
            return;
        }
    }
}
