/* Row by row: weighing and delta before the main pass, grad_q at the end of a head. */
#include "backward_rows.h"

#include <math.h>

#include "backward_statistics.h"

static double row_lse(const struct fa_backward *b, const struct fa_head *head, int64_t row)
{
    const struct fa_geometry *g = &b->geometry;
    return fa_read_lse(g, fa_row_of(g, &b->params->lse, head->index, row));
}

/* The base-2 score of the sink of a row; -inf: there is no sink. */
static double row_sink(const struct fa_head *head, int64_t row)
{
    const struct fa_geometry *g = head->geometry;
    const struct fa_array *sinks = &g->params->sinks;
    if (head->sinks == NULL) {
        return -INFINITY;
    }
    return fa_read_number(head->sinks + fa_row_offset(g, sinks, row), sizeof(double)) * FA_LOG2_E;
}

/* Whether there is a result that is as the sums left it. */
static bool is_out_exact(const struct fa_backward_params *p)
{
    const struct fa_attention_params *forward = &p->attention;
    return p->exact.data != NULL ||
           (forward->residual.data == NULL && fa_lse_dtype(forward) == forward->dtype);
}

/* sum(grad_out * out), of the exact result or of the one that the caller has. */
static double delta_of_out(const struct fa_backward *b, const struct fa_head *head, int64_t row)
{
    const struct fa_geometry *g = &b->geometry;
    const struct fa_backward_params *p = b->params;
    const struct fa_attention_params *forward = &p->attention;
    const bool exact = p->exact.data != NULL;
    const struct fa_array *out = exact ? &p->exact : &p->out;
    const struct fa_row_terms terms = {
        .grad = fa_row_of(g, &p->grad_out, head->index, row),
        .out = fa_row_of(g, out, head->index, row),
        .residual = exact ? NULL : fa_row_of(g, &forward->residual, head->index, row),
        .grad_stride = p->grad_out.col,
        .out_stride = out->col,
        .residual_stride = forward->residual.col,
        .cols = (size_t)forward->head_dim_v,
        .dtype = forward->dtype,
        .out_dtype = exact ? fa_lse_dtype(forward) : forward->dtype,
    };
    return ldexp(g->ops->row_delta(&terms), -g->value_exponent);
}

/* Whether scores left the range of float32, or lost what tells them apart there. */
static bool have_scores_left(const struct fa_backward *b, const struct fa_head *head, int64_t row,
                             const struct fa_statistics *of)
{
    const struct fa_doubt doubt = fa_head_doubt(head, fa_row_member(&b->geometry, row));
    return !isfinite(of->total) || fa_is_doubtful(doubt, of->top, of->total == 0);
}

/* Whether the forward pass kept all that a row needs. */
static bool is_row_kept(const struct fa_backward *b, const struct fa_head *head, int64_t row,
                        struct fa_weighing *kept)
{
    const struct fa_geometry *g = &b->geometry;
    const struct fa_array *from = &b->params->weighing;
    return from->data != NULL && is_out_exact(b->params) &&
           fa_weighing_kept(b, fa_row_of(g, from, head->index, row), kept);
}

/* Store shift, factor and delta of a row, and its term of the gradient of its sink.  of: the
 * statistics of the row, or NULL. */
static void store_row(struct fa_backward *b, const struct fa_head *head, int64_t row,
                      struct fa_statistics *of)
{
    const struct fa_geometry *g = &b->geometry;
    const struct fa_backward_params *p = b->params;
    const struct fa_backward *first = fa_first_run(b);
    const int64_t index = fa_rows_before(g, head->index) + row;
    const int64_t at = index * (int64_t)g->ops->size;
    char *excess = first->excess + index * (int64_t)first->geometry.ops->size;
    const struct fa_array *to = &p->sink_terms;
    const double lse = row_lse(b, head, row), sink = row_sink(head, row);
    struct fa_weighing kept;
    const bool is_kept = of == NULL && is_row_kept(b, head, row, &kept);
    /* A row without keys has no weights.  Nothing that is subtracted from -inf may be -inf. */
    bool empty = lse == -INFINITY, left = false;
    double delta = 0;

    if (is_kept) {
        empty = kept.factor == 0 && sink == -INFINITY;
    } else if (of != NULL && isinf(lse)) {
        empty = of->total == 0 && sink == -INFINITY;
    }
    if (of != NULL) {
        left = have_scores_left(b, head, row, of);
        fa_statistics_add_sink(of, sink);
    }
    struct fa_weighing weighing =
        fa_weigh(b, excess, is_kept ? &kept : NULL, empty ? NULL : of, !left, lse);
    if (empty) {
        weighing = (struct fa_weighing){0};
    } else {
        delta = weighing.own ? of->products / of->total : delta_of_out(b, head, row);
    }
    if (p->grad_lse.data != NULL && !empty) {
        const double grad = fa_read_lse(g, fa_row_of(g, &p->grad_lse, head->index, row));
        delta -= ldexp(grad, -g->value_exponent);
    }
    fa_write_real(g, b->shift + at, weighing.shift);
    fa_write_real(g, b->factor + at, weighing.factor);
    fa_write_real(g, b->delta + at, delta);
    b->delta_of_out[index] = !empty && !weighing.own;
    if (left || !isfinite(fa_read_real(g, b->delta + at))) {
        fa_backward_leave(b, head->index);
    }
    if (to->data != NULL && !fa_backward_is_stored(b, head->index)) {
        char *term = fa_row_of(g, to, head->index, row);
        double weight = 0;
        if (is_kept && !empty) {
            weight = fa_kept_sink_weight(&kept, sink);
        } else if (!empty) {
            weight = fa_sink_weight(weighing.by_sums ? of : NULL, lse, sink);
        }
        const double x = weight == 0 ? 0 : ldexp(-weight * delta, g->value_exponent);
        if (g->value_exponent == 0 || !isfinite(fa_read_number(term, sizeof x))) {
            memcpy(term, &x, sizeof x);
        }
    }
}

/* Whether a row needs statistics.  A row with a residual does, too: `out` was rounded with the
 * residual in it, and may have lost the rest. */
static bool row_wants_statistics(const struct fa_backward *b, const struct fa_head *head,
                                 int64_t row)
{
    const struct fa_geometry *g = &b->geometry;
    /* Masks do not count, so that no bit depends on whether they are ranges. */
    const struct fa_key_range keys = fa_position_keys(head, fa_row_token(g, row));
    const double lse = row_lse(b, head, row);
    struct fa_weighing kept;
    if (is_row_kept(b, head, row, &kept)) {
        return false;
    }
    return fa_statistics_wanted(b, lse, keys.hi - keys.lo, head->rows / g->stacked) ||
           (head->residual != NULL && isfinite(lse));
}

void fa_backward_prepare_rows(struct fa_job *job, int64_t index, int thread)
{
    struct fa_backward *b = job->context;
    const struct fa_geometry *g = &b->geometry;
    const int64_t blocks = fa_backward_row_blocks(g), first = index % blocks * FA_BACKWARD_ROWS;
    const int64_t head_index = index / blocks;
    struct fa_statistics of[FA_BACKWARD_ROWS];
    bool wanted[FA_BACKWARD_ROWS], any = false;
    struct fa_head head;
    if (b->params->grad_bias.data == NULL && fa_backward_is_done(b, head_index)) {
        return;
    }
    fa_head_init(&head, g, head_index);
    const struct fa_head_rows rows = {&head, first, fa_min(FA_BACKWARD_ROWS, head.rows - first)};
    for (int64_t r = 0; r < rows.count; r++) {
        wanted[r] = row_wants_statistics(b, &head, first + r);
        any = any || wanted[r];
    }
    if (any) {
        struct fa_backward_workspace ws = fa_backward_workspace_of(b, thread);
        if (!fa_backward_row_statistics(job, thread, &ws, &rows, wanted, of)) {
            return;
        }
    }
    for (int64_t r = 0; r < rows.count; r++) {
        store_row(b, &head, first + r, wanted[r] ? &of[r] : NULL);
    }
}

void fa_backward_store_rows(struct fa_backward *backward, int64_t head_index, const char *sums,
                            char *scratch)
{
    const struct fa_geometry *g = &backward->geometry;
    const struct fa_array *to = &backward->params->grad_q;
    const int64_t bytes = backward->padded_k * (int64_t)g->ops->size, group_bytes = g->rows * bytes;
    const int64_t groups = fa_backward_groups(g, head_index);
    char *out = fa_array_of(g, to, head_index, false);
    struct fa_head head;
    fa_head_init(&head, g, head_index);
    for (int64_t row = 0; row < head.rows; row++) {
        const char *first = sums + row * bytes;
        const struct fa_row_result result = {
            .cols = (size_t)g->params->head_dim,
            .dtype = backward->params->grad_dtype,
            .out = out + fa_row_offset(g, to, row),
            .out_stride = to->col,
            .exponent = g->value_exponent,
            .mends = g->value_exponent != 0,
        };
        memcpy(scratch, first, (size_t)bytes);
        for (int64_t i = 1; i < groups; i++) {
            g->ops->add(scratch, first + i * group_bytes, (size_t)backward->padded_k);
        }
        if (!g->ops->store_scaled(scratch, fa_backward_factor(g), &result)) {
            fa_backward_leave(backward, head_index);
        }
    }
}
