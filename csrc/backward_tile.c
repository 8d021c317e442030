/* The score tiles of the backward pass: weights again from scores, and the gradients of scores.
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
    fa_locate_keys(head, &ws->tile, block_key, keys, 0);
    fa_pack_keys(head, &ws->tile, keys);
    /* V as K is: its product with grad_out is one of rows with rows. */
    backward->engine->pack_transposed(ws->tile.v, (size_t)keys, (size_t)g->params->head_dim_v,
                                      &ws->tile.values);
}

/* gradients = grad_out v^T on the columns of a tile. */
static void multiply_values(const struct fa_backward *b, const struct fa_tile *tile,
                            struct fa_backward_workspace *ws, int64_t offset)
{
    const struct fa_geometry *g = tile->head->geometry;
    const int64_t size = (int64_t)g->ops->size, nr = (int64_t)g->engine->nr;
    const int64_t dim = g->params->head_dim_v;
    const struct fa_product product = {
        .rows = (size_t)tile->rows,
        .depth = (size_t)dim,
        .panels = (size_t)(tile->columns / nr),
        .a = ws->grad_out + offset * dim * size,
        .a_stride = (size_t)dim,
        .b = ws->tile.v + tile->begin * dim * size,
        .b_panel = (size_t)(dim * nr),
        .c = ws->gradients + (offset * g->score_stride + tile->begin) * size,
        .c_row = (size_t)g->score_stride,
    };
    b->engine->multiply(&product);
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

/* The gradient p (x - delta) of one score again, x being its element of grad_out v^T, where the weight p is above 1/2.
 *
 * delta is the mean of the row's x by its weights.  Where p is near 1, the gradient is what little that mean leaves of
 * x; but a delta that comes from `out` has for this key not x in it, but y, the same product by row_delta's sum.  So the
 * difference of the two sums is taken out: p (x - delta - p (x - y)), which is exactly 0 in a row of one weight.  The
 * row's other weights are below 1/2, and do without. */
static void refine_gradient(const struct fa_backward *b, const struct fa_tile *tile,
                            const struct fa_workspace *part, int64_t head_index, int64_t r,
                            int64_t column, double weight, char *gradient)
{
    const struct fa_geometry *g = tile->head->geometry;
    const struct fa_attention_params *p = g->params;
    const struct fa_array *grad_out = &b->params->grad_out;
    const int64_t size = (int64_t)g->ops->size, row = tile->first_row + r;
    const struct fa_row_terms terms = {
        .grad = fa_row_of(g, grad_out, head_index, row),
        .out = part->v_row[tile->begin + column],
        .grad_stride = grad_out->col,
        .out_stride = p->v.col,
        .cols = (size_t)p->head_dim_v,
        .dtype = p->dtype,
        .out_dtype = p->dtype,
    };
    const double delta = fa_read_real(g, b->delta + (fa_rows_before(g, head_index) + row) * size);
    const double kept =
        p->dropout_p > 0 ? fa_read_real(g, part->factors + (r * g->block_k + column) * size) : 1;
    const double product = fa_round_real(g, g->ops->row_delta(&terms) * kept);
    const double difference = fa_read_real(g, gradient) / weight;
    const double refined = difference - weight * (difference + delta - product);
    if (isfinite(refined)) {
        fa_write_real(g, gradient, weight * refined);
    }
}

/* The first of a row's weights that is above 1/2, of which there is one. */
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
                        const struct fa_workspace *part, int64_t head_index, const char *weights,
                        char *gradients, uint32_t dominated)
{
    const struct fa_geometry *g = tile->head->geometry;
    const int64_t size = (int64_t)g->ops->size;
    const bool *delta_of_out = b->delta_of_out + fa_rows_before(g, head_index) + tile->first_row;
    for (int64_t r = 0; dominated != 0 && r < tile->rows; r++) {
        const int64_t at = r * g->score_stride * size;
        if ((dominated >> r & 1) != 0 && delta_of_out[r]) {
            const int64_t c = find_above_half(g, weights + at);
            refine_gradient(b, tile, part, head_index, r, c,
                            fa_read_real(g, weights + at + c * size), gradients + at + c * size);
        }
    }
}

/* Scores to weights, and gradients of weights to those of scores. */
static void finish_tile(const struct fa_backward *b, const struct fa_tile *tile,
                        struct fa_workspace *part, struct fa_backward_workspace *ws,
                        int64_t head_index, int64_t offset, bool weights_only)
{
    const struct fa_geometry *g = tile->head->geometry;
    const int64_t size = (int64_t)g->ops->size;
    const size_t rows = (size_t)tile->rows, columns = (size_t)tile->columns;
    void *scores = fa_tile_score_data(tile, part);
    char *gradients = ws->gradients + (offset * g->score_stride + tile->begin) * size;
    if (fa_over_queries(g)) {
        const int64_t at = fa_column_at(g, head_index, tile->block_key + tile->begin);
        g->ops->column_gradients(scores, weights_only ? NULL : gradients, (size_t)g->score_stride,
                                 rows, columns, b->shift + at, b->factor + at, b->delta + at);
    } else {
        const int64_t at = (fa_rows_before(g, head_index) + tile->first_row) * size;
        const uint32_t dominated =
            g->ops->score_gradients(scores, gradients, (size_t)g->score_stride, rows, columns,
                                    b->shift + at, b->factor + at, b->delta + at);
        refine_rows(b, tile, part, head_index, scores, gradients, dominated);
    }
    fa_apply_dropout(tile, part, scores, g->ops->apply_dropout);
}

bool fa_backward_scores(const struct fa_backward *backward, struct fa_tile *tile,
                        struct fa_workspace *part, const struct fa_head *head,
                        struct fa_backward_workspace *ws, int64_t first, int64_t rows,
                        int64_t offset, int64_t block_key, bool weights_only)
{
    const struct fa_geometry *g = head->geometry;
    const int64_t size = (int64_t)g->ops->size, at = offset * g->score_stride * size;
    *part = ws->tile;
    part->scores = ws->weights + at;
    part->slope = g->params->softcap > 0 ? ws->slope + at : NULL;
    if (!fa_tile_init(tile, head, part, first, rows, offset, block_key)) {
        return false;
    }
    ws->tile.segments_loaded = part->segments_loaded;
    ws->tile.segment_range = part->segment_range;
    fa_tile_scores(tile, part, false);
    fa_draw_dropout(tile, part);
    if (!weights_only) {
        multiply_values(backward, tile, ws, offset);
        fa_apply_dropout(tile, part, ws->gradients + at + tile->begin * size,
                         g->ops->apply_dropout);
    }
    return true;
}

void fa_backward_load_grad(const struct fa_backward *backward, int64_t head_index,
                           struct fa_backward_workspace *ws, int64_t first, int64_t rows)
{
    const struct fa_geometry *g = &backward->geometry;
    const struct fa_attention_params *p = g->params;
    const struct fa_array *grad = &backward->params->grad_out;
    const char *grad_out = fa_array_of(g, grad, head_index, false);
    const struct fa_rows from = {.row = ws->row, .col_stride = grad->col, .dtype = p->dtype};
    for (int64_t r = 0; r < rows; r++) {
        ws->row[r] = grad_out + fa_row_offset(g, grad, first + r);
    }
    backward->engine->load_rows(ws->grad_out, (size_t)rows, (size_t)p->head_dim_v, &from,
                                ldexp(1, -g->value_exponent));
}

struct fa_key_range fa_backward_tile(const struct fa_backward *backward, const struct fa_head *head,
                                     int64_t head_index, struct fa_backward_workspace *ws,
                                     int64_t first, int64_t rows, int64_t block_key,
                                     bool weights_only)
{
    const struct fa_geometry *g = head->geometry;
    struct fa_key_range of[FA_BACKWARD_ROWS / FA_MIN_TILE_Q], all = {g->block_k, 0};

    g->engine->enter();
    for (int64_t r = 0; r < rows; r += g->tile_q) {
        const int64_t count = fa_min(g->tile_q, rows - r);
        struct fa_key_range *range = &of[r / g->tile_q];
        struct fa_workspace part;
        struct fa_tile tile;
        *range = (struct fa_key_range){0, 0};
        if (!fa_backward_scores(backward, &tile, &part, head, ws, first + r, count, r, block_key,
                                weights_only)) {
            continue;
        }
        *range = (struct fa_key_range){tile.begin, tile.begin + tile.columns};
        all.lo = fa_min(all.lo, range->lo);
        all.hi = fa_max(all.hi, range->hi);
        finish_tile(backward, &tile, &part, ws, head_index, r, weights_only);
    }
    g->engine->leave();
    if (all.hi <= all.lo) {
        return (struct fa_key_range){0, 0};
    }
    for (int64_t r = 0; r < rows; r += g->tile_q) {
        const int64_t count = fa_min(g->tile_q, rows - r);
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
