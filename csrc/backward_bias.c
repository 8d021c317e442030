/* grad_bias: the gradients of scores, added up where the bias was broadcast.
 *
 * A task owns a part of one plane of the bias, that is of what a (batch entry, head) of it holds, and visits in
 * order all heads that read it: no two tasks write the same element, and every sum has one order.  Scores and
 * products with the values are computed once more, so this pass costs 2 products.
 */
#include <string.h>

#include "backward.h"

/* Rows of a part where the bias has one column: K and V of a key block are packed once for them. */
#define PART_ROWS (4 * FA_BACKWARD_ROWS)

/* A plane is split by key blocks, or, where all keys read the same column, by rows. */
static bool by_keys(const struct fa_output *bias) { return bias->col != 0; }

static int64_t count_parts(const struct fa_geometry *g, const struct fa_output *bias)
{
    if (by_keys(bias)) {
        return fa_max(1, g->key_blocks);
    }
    return bias->row == 0 ? 1 : fa_max(1, fa_ceil_div(g->rows, PART_ROWS));
}

static char *plane_of(const struct fa_geometry *g, const struct fa_output *bias, int64_t index)
{
    const struct fa_head_place place = fa_head_place(g, index);
    return (char *)bias->data + fa_entry_offset(g, place.entry, bias->batch) +
           place.first_head * bias->head;
}

/* Whether a head is the first of those that share its plane. */
static bool owns_plane(const struct fa_geometry *g, const struct fa_output *bias, int64_t index)
{
    const struct fa_attention_params *p = g->params;
    int64_t entry = index / g->heads;
    if (bias->head == 0 && index % g->heads > 0) {
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

int64_t fa_backward_bias_tasks(const struct fa_backward *backward)
{
    const struct fa_geometry *g = &backward->geometry;
    return g->batch * g->heads * count_parts(g, &backward->params->grad_bias);
}

/* to[j] += from[j], stride in elements; grad_bias is aligned. */
static void add_floats(float *to, int64_t stride, const float *from, int64_t n)
{
    if (stride == 1) {
        for (int64_t j = 0; j < n; j++) {
            to[j] += from[j];
        }
        return;
    }
    for (int64_t j = 0; j < n; j++) {
        to[j * stride] += from[j];
    }
}

static void add_doubles(double *to, int64_t stride, const double *from, int64_t n)
{
    for (int64_t j = 0; j < n; j++) {
        to[j * stride] += from[j];
    }
}

static void add_rounded(float *to, int64_t stride, const double *from, int64_t n)
{
    for (int64_t j = 0; j < n; j++) {
        to[j * stride] = (float)((double)to[j * stride] + from[j]);
    }
}

static void add_tile(const struct fa_backward *b, const struct fa_backward_workspace *ws,
                     int64_t first, int64_t rows, int64_t block_key, struct fa_key_range keys,
                     char *plane)
{
    const struct fa_geometry *g = &b->geometry;
    const struct fa_output *bias = &b->params->grad_bias;
    const int64_t size = (int64_t)g->ops->size, stride = bias->col / size;
    for (int64_t r = 0; r < rows; r++) {
        char *to = plane + fa_row_member(g, first + r) * bias->head +
                   fa_row_token(g, first + r) * bias->row + (block_key + keys.lo) * bias->col;
        const char *from = ws->gradients + (r * g->score_stride + keys.lo) * size;
        if (g->widened) {
            add_rounded((float *)(void *)to, bias->col / (int64_t)sizeof(float),
                        (const double *)(const void *)from, keys.hi - keys.lo);
        } else if (size == (int64_t)sizeof(double)) {
            add_doubles((double *)(void *)to, stride, (const double *)(const void *)from,
                        keys.hi - keys.lo);
        } else {
            add_floats((float *)(void *)to, stride, (const float *)(const void *)from,
                       keys.hi - keys.lo);
        }
    }
}

/* Rows [lo, hi) of a head against one key block.  False: stopped. */
static bool visit_block(struct fa_job *job, int thread, const struct fa_head *head,
                        int64_t head_index, int64_t key, int64_t lo, int64_t hi, char *plane)
{
    const struct fa_backward *b = job->context;
    const struct fa_geometry *g = &b->geometry;
    const int64_t keys = fa_min(g->block_k, head->kv_length - key);
    struct fa_backward_workspace ws = fa_backward_workspace_of(b, thread);

    if (keys <= 0) {
        return true;
    }
    fa_backward_pack(head, &ws, key, keys);
    for (int64_t first = lo; first < hi; first += FA_BACKWARD_ROWS) {
        const int64_t rows = fa_min(FA_BACKWARD_ROWS, hi - first);
        const struct fa_key_range reach = fa_rows_keys(head, first, first + rows - 1);
        if (reach.lo >= key + keys || reach.hi <= key) {
            continue;
        }
        if (fa_job_checkpoint(job, thread)) {
            return false;
        }
        fa_load_rows(head, &ws.tile, first, rows);
        fa_backward_load_grad(b, head_index, &ws, first, rows);
        struct fa_key_range seen =
            fa_backward_tile(b, head, head_index, &ws, first, rows, key, false);
        seen.hi = fa_min(seen.hi, keys);
        add_tile(b, &ws, first, rows, key, seen, plane);
    }
    return true;
}

/* One part of one head's scores.  False: stopped. */
static bool visit_head(struct fa_job *job, int thread, int64_t head_index, int64_t part,
                       char *plane)
{
    const struct fa_backward *b = job->context;
    const struct fa_geometry *g = &b->geometry;
    const struct fa_output *bias = &b->params->grad_bias;
    struct fa_head head;
    fa_head_init(&head, g, head_index);
    if (by_keys(bias)) {
        return visit_block(job, thread, &head, head_index, part * g->block_k, 0, head.rows, plane);
    }
    const int64_t lo = bias->row == 0 ? 0 : part * PART_ROWS;
    const int64_t hi = bias->row == 0 ? head.rows : fa_min(lo + PART_ROWS, head.rows);
    for (int64_t key = 0; key < head.kv_length; key += g->block_k) {
        if (!visit_block(job, thread, &head, head_index, key, lo, hi, plane)) {
            return false;
        }
    }
    return true;
}

void fa_backward_bias(struct fa_job *job, int64_t index, int thread)
{
    const struct fa_backward *b = job->context;
    const struct fa_geometry *g = &b->geometry;
    const struct fa_output *bias = &b->params->grad_bias;
    const int64_t parts = count_parts(g, bias), owner = index / parts;
    if (!owns_plane(g, bias, owner)) {
        return;
    }
    char *plane = plane_of(g, bias, owner);
    for (int64_t i = owner; i < g->batch * g->heads; i++) {
        if (plane_of(g, bias, i) == plane && !visit_head(job, thread, i, index % parts, plane)) {
            return;
        }
    }
}
