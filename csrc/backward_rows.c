/* What the backward pass does row by row: delta before the main pass, grad_q at the end of a head. */
#include <math.h>
#include <string.h>

#include "backward.h"

static double read_real(const struct fa_geometry *g, const char *p)
{
    float single;
    double x;
    if (g->ops->size == sizeof x) {
        memcpy(&x, p, sizeof x);
        return x;
    }
    memcpy(&single, p, sizeof single);
    return (double)single;
}

static void write_real(const struct fa_geometry *g, char *p, double x)
{
    const float single = (float)x;
    if (g->ops->size == sizeof x) {
        memcpy(p, &x, sizeof x);
    } else {
        memcpy(p, &single, sizeof single);
    }
}

static void prepare_row(const struct fa_backward *b, int64_t head_index, int64_t row)
{
    const struct fa_geometry *g = &b->geometry;
    const struct fa_backward_params *p = b->params;
    const struct fa_attention_params *forward = &p->attention;
    const int64_t at = (fa_rows_before(g, head_index) + row) * (int64_t)g->ops->size;
    const struct fa_output *to = &p->delta;
    const char *residual = fa_input_of(g, &forward->residual, head_index);
    const char *grad_lse = fa_input_of(g, &p->grad_lse, head_index);
    const char *lse =
        fa_row_at(g, fa_input_of(g, &p->lse, head_index), row, p->lse.head, p->lse.row);
    struct fa_row_terms terms = {
        .grad = fa_row_at(g, fa_input_of(g, &p->grad_out, head_index), row, p->grad_out.head,
                          p->grad_out.row),
        .out = fa_row_at(g, fa_input_of(g, &p->out, head_index), row, p->out.head, p->out.row),
        .grad_stride = p->grad_out.col,
        .out_stride = p->out.col,
        .residual_stride = forward->residual.col,
        .cols = (size_t)forward->head_dim_v,
        .dtype = forward->dtype,
    };
    if (residual != NULL) {
        terms.residual = fa_row_at(g, residual, row, forward->residual.head, forward->residual.row);
    }
    const double lse_value = read_real(g, lse);
    /* A row without keys has no weights; nothing that is subtracted from -inf may be -inf. */
    const bool empty = lse_value == -INFINITY;
    double delta = empty ? 0 : g->ops->row_delta(&terms);
    if (grad_lse != NULL && !empty) {
        delta -= read_real(g, fa_row_at(g, grad_lse, row, p->grad_lse.head, p->grad_lse.row));
    }
    write_real(g, b->shift + at, empty ? 0 : lse_value * FA_LOG2_E);
    write_real(g, b->delta + at, delta);
    char *out = fa_output_of(g, to, head_index, false) + fa_row_member(g, row) * to->head +
                fa_row_token(g, row) * to->row;
    write_real(g, out, delta);
}

/* Softmax over the queries: the shift of every key of a head.  delta comes with the gradients of values. */
void fa_backward_prepare_keys(struct fa_job *job, int64_t index, int thread)
{
    const struct fa_backward *b = job->context;
    const struct fa_geometry *g = &b->geometry;
    const struct fa_input *lse = &b->params->lse;
    const char *from = fa_input_of(g, lse, index);
    (void)thread;
    for (int64_t j = 0; j < g->key_blocks * g->block_k; j++) {
        const double x = j < g->params->seqlen_k ? read_real(g, from + j * lse->row) : -INFINITY;
        write_real(g, b->shift + fa_column_at(g, index, j), x == -INFINITY ? 0 : x * FA_LOG2_E);
        write_real(g, b->delta + fa_column_at(g, index, j), 0);
    }
}

void fa_backward_prepare_rows(struct fa_job *job, int64_t index, int thread)
{
    const struct fa_backward *b = job->context;
    const struct fa_geometry *g = &b->geometry;
    const int64_t blocks = fa_backward_row_blocks(g), first = index % blocks * FA_BACKWARD_ROWS;
    struct fa_head head;
    (void)thread;
    fa_head_init(&head, g, index / blocks);
    for (int64_t row = first; row < fa_min(first + FA_BACKWARD_ROWS, head.rows); row++) {
        prepare_row(b, index / blocks, row);
    }
}

void fa_backward_store_rows(const struct fa_backward *backward, int64_t head_index,
                            const char *sums, char *scratch)
{
    const struct fa_geometry *g = &backward->geometry;
    const struct fa_output *to = &backward->params->grad_q;
    const int64_t bytes = backward->padded_k * (int64_t)g->ops->size, group_bytes = g->rows * bytes;
    const int64_t groups = fa_backward_groups(g, head_index);
    char *out = fa_output_of(g, to, head_index, false);
    struct fa_head head;
    fa_head_init(&head, g, head_index);
    for (int64_t row = 0; row < head.rows; row++) {
        const char *first = sums + row * bytes;
        const struct fa_row_result result = {
            .cols = (size_t)g->params->head_dim,
            .dtype = backward->params->grad_dtype,
            .out = out + fa_row_member(g, row) * to->head + fa_row_token(g, row) * to->row,
            .out_stride = to->col,
        };
        memcpy(scratch, first, (size_t)bytes);
        for (int64_t i = 1; i < groups; i++) {
            g->ops->add(scratch, first + i * group_bytes, (size_t)backward->padded_k);
        }
        g->ops->store_scaled(scratch, backward->params->attention.scale, &result);
    }
}
