/* The score tiles of the backward pass: their weights once more, and the gradients of their
 * scores.
 *
 *   weights   = exp2(scores - shift) * factor
 *   gradients = weights * (grad_out v^T - delta), delta = sum(grad_out * out) - grad_lse
 */
#include "backward_tile.h"

#include <math.h>

#include "keys.h"

void fa_backward_pack(const struct fa_backward *backward, const struct fa_head *head,
                      struct fa_backward_workspace *ws, int64_t block_key, int64_t keys)
{
    const struct fa_geometry *g = head->geometry;
    fa_locate_keys(head, &ws->forward, block_key, keys, 0);
    fa_pack_keys(head, &ws->forward, keys);
    /* V is packed as K is: its product with grad_out is one of rows with rows. */
    backward->engine->pack_transposed(ws->forward.v, (size_t)keys, (size_t)g->params->head_dim_v,
                                      &ws->forward.values);
    ws->block_key = block_key;
}

/* Where the first gradient of row 0 of a tile is. */
static char *gradients_of(const struct fa_tile *tile, const struct fa_backward_workspace *ws)
{
    const struct fa_geometry *g = tile->head->geometry;
    const int64_t at = tile->row_offset * g->score_stride + tile->begin;
    return ws->gradients + at * (int64_t)g->ops->size;
}

/* Clear columns [lo, hi) of some rows of weights and gradients. */
static void clear_columns(const struct fa_geometry *g, struct fa_backward_workspace *ws,
                          int64_t row, int64_t rows, int64_t lo, int64_t hi)
{
    const int64_t size = (int64_t)g->ops->size;
    for (int64_t r = row; hi > lo && r < row + rows; r++) {
        const int64_t at = (r * g->score_stride + lo) * size;
        memset(ws->weights + at, 0, (size_t)((hi - lo) * size));
        memset(ws->gradients + at, 0, (size_t)((hi - lo) * size));
    }
}

/* Computes again the gradient p (x - delta) of one score, where its weight p is above 1/2.  x is
 * the element of grad_out v^T.
 *
 * delta is the mean of the x of the row by its weights.  Where p is near 1, that mean leaves
 * little of x.  But a delta that comes from `out` has another number for this key: y, the same
 * product by the sum of row_delta.  So the difference of the two sums is taken out: p (x - delta
 * - p (x - y)), which is exactly 0 in a row of one weight.  All other weights of the row are
 * below 1/2, and do without. */
static void refine_gradient(const struct fa_backward *b, const struct fa_tile *tile,
                            struct fa_backward_workspace *ws, int64_t r, int64_t column)
{
    const struct fa_geometry *g = tile->head->geometry;
    const struct fa_attention_params *p = g->params;
    const struct fa_array *grad_out = &b->params->grad_out;
    const struct fa_workspace *forward = &ws->forward;
    const int64_t head_index = tile->head->index, row = tile->first_row + r;
    const int64_t size = (int64_t)g->ops->size, at = (r * g->score_stride + column) * size;
    const double weight = fa_read_real(g, (char *)fa_tile_score_data(tile, forward) + at);
    char *gradient = gradients_of(tile, ws) + at;
    const struct fa_row_terms terms = {
        .grad = fa_row_of(g, grad_out, head_index, row),
        .out = forward->v_row[tile->begin + column],
        .grad_stride = grad_out->col,
        .out_stride = p->v.col,
        .cols = (size_t)p->head_dim_v,
        .dtype = p->dtype,
        .out_dtype = p->dtype,
    };
    const double delta = fa_read_real(g, b->delta + (fa_rows_before(g, head_index) + row) * size);
    const double kept =
        p->dropout_p > 0 ? fa_read_real(g, forward->factors + (r * g->block_k + column) * size) : 1;
    const double product = fa_round_real(g, g->ops->row_delta(&terms) * kept);
    const double difference = fa_read_real(g, gradient) / weight;
    const double refined = difference - weight * (difference + delta - product);
    if (isfinite(refined)) {
        fa_write_real(g, gradient, weight * refined);
    }
}

/* The first weight of a row that is above 1/2.  There is one. */
static int64_t find_above_half(const struct fa_geometry *g, const char *weights)
{
    const float *singles = (const float *)(const void *)weights;
    const double *doubles = (const double *)(const void *)weights;
    int64_t c = 0;
    if (g->ops->size == sizeof(float)) {
        while (!(singles[c] > 0.5f)) {
            c++;
        }
    } else {
        while (!(doubles[c] > 0.5)) {
            c++;
        }
    }
    return c;
}

/* dominated: a bit for each row of the tile that has a weight above 1/2. */
static void refine_rows(const struct fa_backward *b, const struct fa_tile *tile,
                        struct fa_backward_workspace *ws, uint32_t dominated)
{
    const struct fa_geometry *g = tile->head->geometry;
    const char *weights = fa_tile_score_data(tile, &ws->forward);
    const bool *delta_of_out =
        b->delta_of_out + fa_rows_before(g, tile->head->index) + tile->first_row;
    for (int64_t r = 0; dominated != 0 && r < tile->rows; r++) {
        if ((dominated >> r & 1) != 0 && delta_of_out[r]) {
            const char *row = weights + r * g->score_stride * (int64_t)g->ops->size;
            refine_gradient(b, tile, ws, r, find_above_half(g, row));
        }
    }
}

bool fa_backward_scores(struct fa_tile *tile, struct fa_backward_workspace *ws,
                        const struct fa_head_rows *rows, int64_t r)
{
    const struct fa_geometry *g = rows->head->geometry;
    const struct fa_head_rows of_tile = fa_tile_rows(rows, r);
    const int64_t at = r * g->score_stride * (int64_t)g->ops->size;
    ws->forward.scores = ws->weights + at;
    ws->forward.slope = g->params->softcap > 0 ? ws->slope + at : NULL;
    if (!fa_tile_init(tile, &ws->forward, &of_tile, r, ws->block_key)) {
        return false;
    }
    fa_tile_scores(tile, &ws->forward, false);
    fa_draw_dropout(tile, &ws->forward);
    return true;
}

char *fa_backward_weight_gradients(const struct fa_backward *backward, const struct fa_tile *tile,
                                   struct fa_backward_workspace *ws)
{
    const struct fa_geometry *g = tile->head->geometry;
    const int64_t size = (int64_t)g->ops->size, nr = (int64_t)g->engine->nr;
    const int64_t dim = g->params->head_dim_v;
    char *gradients = gradients_of(tile, ws);
    const struct fa_product product = {
        .rows = (size_t)tile->rows,
        .depth = (size_t)dim,
        .panels = (size_t)(tile->columns / nr),
        .a = ws->grad_out + tile->row_offset * dim * size,
        .a_stride = (size_t)dim,
        .b = ws->forward.v + tile->begin * dim * size,
        .b_panel = (size_t)(dim * nr),
        .c = gradients,
        .c_row = (size_t)g->score_stride,
    };
    backward->engine->multiply(&product);
    fa_apply_dropout(tile, &ws->forward, gradients, g->ops->apply_dropout);
    return gradients;
}

/* Scores to weights, and gradients of weights to those of scores. */
static void finish_tile(const struct fa_backward *b, const struct fa_tile *tile,
                        struct fa_backward_workspace *ws, char *gradients)
{
    const struct fa_geometry *g = tile->head->geometry;
    const int64_t size = (int64_t)g->ops->size, head_index = tile->head->index;
    const bool over_queries = fa_over_queries(g);
    const int64_t at = over_queries ? fa_column_at(g, head_index, tile->block_key + tile->begin)
                                    : (fa_rows_before(g, head_index) + tile->first_row) * size;
    const struct fa_gradients of = {
        .scores = fa_tile_score_data(tile, &ws->forward),
        .gradients = gradients,
        .ld = (size_t)g->score_stride,
        .rows = (size_t)tile->rows,
        .cols = (size_t)tile->columns,
        .shift = b->shift + at,
        .factor = b->factor + at,
        .delta = b->delta + at,
    };
    if (over_queries) {
        g->ops->column_gradients(&of);
    } else {
        refine_rows(b, tile, ws, g->ops->score_gradients(&of));
    }
    fa_apply_dropout(tile, &ws->forward, of.scores, g->ops->apply_dropout);
}

void fa_backward_load_grad(const struct fa_backward *backward, struct fa_backward_workspace *ws,
                           const struct fa_head_rows *rows)
{
    const struct fa_geometry *g = &backward->geometry;
    const struct fa_attention_params *p = g->params;
    const struct fa_array *grad = &backward->params->grad_out;
    const char *grad_out = fa_array_of(g, grad, rows->head->index, false);
    const struct fa_rows from = {.row = ws->row, .col_stride = grad->col, .dtype = p->dtype};
    for (int64_t r = 0; r < rows->count; r++) {
        ws->row[r] = grad_out + fa_row_offset(g, grad, rows->first + r);
    }
    backward->engine->load_rows(ws->grad_out, (size_t)rows->count, (size_t)p->head_dim_v, &from,
                                ldexp(1, -g->value_exponent));
}

struct fa_key_range fa_backward_tile(const struct fa_backward *backward,
                                     struct fa_backward_workspace *ws,
                                     const struct fa_head_rows *rows, bool weights_only)
{
    const struct fa_geometry *g = &backward->geometry;
    struct fa_key_range of[FA_BACKWARD_ROWS / FA_MIN_TILE_Q], all = {g->block_k, 0};

    g->engine->enter();
    for (int64_t r = 0; r < rows->count; r += g->tile_q) {
        struct fa_key_range *range = &of[r / g->tile_q];
        struct fa_tile tile;
        *range = (struct fa_key_range){0, 0};
        if (!fa_backward_scores(&tile, ws, rows, r)) {
            continue;
        }
        *range = (struct fa_key_range){tile.begin, tile.begin + tile.columns};
        all.lo = fa_min(all.lo, range->lo);
        all.hi = fa_max(all.hi, range->hi);
        finish_tile(backward, &tile, ws,
                    weights_only ? NULL : fa_backward_weight_gradients(backward, &tile, ws));
    }
    g->engine->leave();
    if (all.hi <= all.lo) {
        return (struct fa_key_range){0, 0};
    }
    for (int64_t r = 0; r < rows->count; r += g->tile_q) {
        const int64_t count = fa_tile_rows(rows, r).count;
        const struct fa_key_range range = of[r / g->tile_q];
        if (range.hi == 0) {
            clear_columns(g, ws, r, count, all.lo, all.hi);
        } else {
            clear_columns(g, ws, r, count, all.lo, range.lo);
            clear_columns(g, ws, r, count, range.hi, all.hi);
        }
    }
    return all;
}
