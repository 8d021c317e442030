/* The weighing of a softmax: from lse, or, where lse is not exact enough, from the sums of the
 * softmax once more.
 *
 * lse is one number of the results' dtype.  Its rounding is an error of u |lse| that all weights
 * of a row share: 8 u of them at lse 8.  Where the scores are huge (a mask of finfo.min or -1e9),
 * log(n) is lost altogether.  A row of many keys with weights of the same order shows nothing of
 * 8 u beside all other roundings, and most rows of a long call are such.  If the forward pass did
 * not keep shift and factor of a row (fa_attention_params), and the row is of another kind, its
 * row_max, row_sum and delta are summed from its own scores first, by the tiles that the main
 * pass computes again: 2 products more for the tiles that hold such a row.
 *
 *   top = row_max, total = sum exp2(s - top), products = sum exp2(s - top) * (grad_out v^T)
 *   weights = exp2(s - top) / total, delta = products / total
 *
 * So delta owes nothing to the rounding of `out`, and in a row of one weight grad_out v^T - delta
 * is exactly 0.  Each decision looks at one row alone. */
#include "backward_statistics.h"

#include <math.h>

#include "backward_tile.h"

/* lse is exact enough where its rounding is at most SMALL_LSE u, or LARGE_LSE u among MANY
 * softmaxes, whose errors no gradient of a key or value then shows. */
#define SMALL_LSE 4
#define LARGE_LSE 16
#define MANY 64

/* A softmax is flat if it has so many scores, and lse is within FLAT of the logarithm of their
 * number.  Normal scores of deviation x have x^2 / 2 there. */
#define FLAT_SCORES 32
#define FLAT 2

/* log2(e) less its nearest double. */
#define LOG2_E_REST 2.0355273740931033e-17

/* Base-2: totals up to here leave factor = 1 / total far from the smallest float32. */
#define LARGE_TOTAL 0x1p40

/* Base-2: how far a shift may be from the top of its softmax, and its factor from 1 / total. */
#define MOST_APART 64

/* Base-2: beside a sink this far above them, scores are nothing. */
#define ALL_APART 100

bool fa_statistics_wanted(const struct fa_backward *backward, double lse, int64_t scores,
                          int64_t softmaxes)
{
    const struct fa_geometry *g = &backward->geometry;
    if (isinf(lse)) { /* of no key, or of scores that float32 has no lse for */
        return g->params->dtype != FA_F64 && scores > 0;
    }
    if (isnan(lse)) {
        return false;
    }
    const bool flat = scores >= FLAT_SCORES && fabs(lse - log((double)scores)) <= FLAT;
    /* In a second run lse may be of the scores of the first, and delta be lost among sums that
     * passed the range of the results. */
    return backward->first != NULL || !flat ||
           fabs(lse) > (softmaxes >= MANY ? LARGE_LSE : SMALL_LSE);
}

/* How far apart two lse of the same scores may be, beside the rounding of each. */
static double tolerance(enum fa_dtype dtype)
{
    switch (dtype) {
    case FA_F64:
        return 0x1p-40;
    case FA_F32:
        return 0x1p-16;
    default:
        return 0x1p-11; /* where the forward pass multiplies bfloat16, and its exp2 */
    }
}

static double lse_again(const struct fa_geometry *g, const struct fa_statistics *of)
{
    return fa_natural(of->top, log2(of->total), fa_is_biased(g), g->ops->size);
}

/* Whether lse is of these scores alone.  The lse of more keys is larger: where it is less,
 * roundings made it so. */
static bool agrees(const struct fa_backward *backward, const struct fa_statistics *of, double lse)
{
    const struct fa_geometry *g = &backward->geometry;
    const bool wide = fa_lse_dtype(g->params) == FA_F64;
    const double again = lse_again(g, of), unit = wide ? 0x1p-53 : 0x1p-24;
    if (backward->params->weighing.data != NULL) {
        return true;
    }
    if (isinf(lse)) {
        return (wide ? again : (double)(float)again) == lse;
    }
    return lse - again <= tolerance(g->params->dtype) + 8 * unit * fabs(lse);
}

/* A sum times a factor.  A factor of 0 leaves nothing of any sum. */
static double fade(double sum, double factor) { return factor == 0 ? 0 : sum * factor; }

void fa_statistics_add_sink(struct fa_statistics *of, double sink)
{
    if (sink == -INFINITY) {
        return;
    }
    const double top = sink > of->top ? sink : of->top, keep = exp2(of->top - top);
    of->total = fade(of->total, keep) + exp2(sink - top);
    of->products = fade(of->products, keep);
    of->top = top;
}

double fa_sink_weight(const struct fa_statistics *of, double lse, double sink)
{
    return of != NULL ? exp2(sink - of->top) / of->total : exp2(sink - lse * FA_LOG2_E);
}

static struct fa_weighing weighing_by_statistics(const struct fa_geometry *g,
                                                 const struct fa_statistics *of)
{
    const double more = of->total > LARGE_TOTAL ? log2(of->total) : 0;
    const double shift = fa_round_real(g, of->top + more);
    /* They are far apart only where a sink is the top, and no score is near it. */
    const double apart = fmin(fmax(shift - of->top, -MOST_APART), MOST_APART);
    return (struct fa_weighing){.shift = shift, .factor = exp2(apart) / of->total, .by_sums = true};
}

static struct fa_weighing weighing_by_lse(const struct fa_geometry *g, double lse)
{
    if (lse == -INFINITY) {
        return (struct fa_weighing){0};
    }
    if (fa_is_biased(g) && isfinite(lse) && fa_is_bias(lse, g->ops->size)) {
        const double moved = fa_round_real(g, lse + fa_bias_move(lse, g->ops->size));
        return (struct fa_weighing){.shift = moved, .factor = 1};
    }
    const double shift = fa_round_real(g, lse * FA_LOG2_E);
    /* The error of that rounding: exact in double, but for the last bits of log2(e). */
    const double rest = fma(lse, FA_LOG2_E, -shift) + lse * LOG2_E_REST;
    return (struct fa_weighing){.shift = shift, .factor = exp2(-rest)};
}

bool fa_weighing_kept(const struct fa_backward *backward, const char *at, struct fa_weighing *kept)
{
    const struct fa_geometry *g = &backward->geometry;
    if (backward->first != NULL || g->ops->size != (size_t)fa_dtype_size(fa_lse_dtype(g->params))) {
        return false;
    }
    *kept = (struct fa_weighing){
        .shift = fa_read_lse(g, at),
        .factor = fa_read_lse(g, at + backward->params->weighing.col),
    };
    return !isnan(kept->factor);
}

/* A sink so far above the scores that float32 cannot hold their weights has all of the weight. */
double fa_kept_sink_weight(const struct fa_weighing *kept, double sink)
{
    const bool alone = kept->factor == 0 || sink - kept->shift >= ALL_APART;
    return alone ? sink != -INFINITY : exp2(sink - kept->shift) * kept->factor;
}

struct fa_weighing fa_weigh(const struct fa_backward *backward, char *excess,
                            const struct fa_weighing *kept, struct fa_statistics *of, bool sure,
                            double lse)
{
    const struct fa_geometry *g = &backward->geometry;
    const size_t size = fa_first_run(backward)->geometry.ops->size;
    double more = NAN;
    if (kept != NULL) {
        fa_write_number(excess, 0, size);
        return *kept;
    }
    if (of != NULL && of->total == 0) { /* no key, of this call at least */
        of = NULL;
    }
    if (backward->first != NULL) {
        more = fa_read_number(excess, size);
    } else if (of != NULL && sure) {
        more = agrees(backward, of, lse) ? 0 : lse - lse_again(g, of);
    }
    const bool own = of != NULL && (isnan(more) ? agrees(backward, of, lse) : more == 0);
    struct fa_weighing weighing;
    if (own) {
        weighing = weighing_by_statistics(g, of);
    } else if (of != NULL && backward->first != NULL && !isnan(more)) {
        of->total *= exp(more);
        weighing = weighing_by_statistics(g, of);
    } else {
        weighing = weighing_by_lse(g, lse);
    }
    if (backward->first == NULL) {
        fa_write_number(excess, more, size);
    }
    weighing.own = own;
    return weighing;
}

/* Fold the statistics of the rows over one more split of the keys.  In double, as there are few
 * folds. */
static void fold(const struct fa_geometry *g, const struct fa_backward_workspace *ws, int64_t rows,
                 struct fa_statistics *of)
{
    const int64_t size = (int64_t)g->ops->size, vl = (int64_t)g->ops->vl;
    for (int64_t r = 0; r < rows; r++) {
        const char *row_sum = (const char *)ws->forward.split.row_sum + r * vl * size;
        const char *row_products = ws->row_products + r * vl * size;
        double top = fa_read_real(g, (const char *)ws->forward.split.row_max + r * size);
        double total = 0, products = 0;
        for (int64_t i = 0; i < vl; i++) {
            total += fa_read_real(g, row_sum + i * size);
            products += fa_read_real(g, row_products + i * size);
        }
        if (total == 0) {
            continue; /* no key takes part */
        }
        const double max = top > of[r].top ? top : of[r].top;
        const double keep = exp2(of[r].top - max), join = exp2(top - max);
        of[r] = (struct fa_statistics){
            .top = max,
            .total = fade(of[r].total, keep) + fade(total, join),
            .products = fade(of[r].products, keep) + fade(products, join),
        };
    }
}

/* One key block against the tiles that hold a wanted row. */
static void sum_block(const struct fa_backward *b, struct fa_backward_workspace *ws,
                      const struct fa_head_rows *rows, const bool *wanted, int64_t block_key)
{
    const struct fa_geometry *g = &b->geometry;
    const int64_t size = (int64_t)g->ops->size, vl = (int64_t)g->ops->vl;
    const size_t ld = (size_t)g->score_stride;
    bool packed = false;
    for (int64_t r = 0; r < rows->count; r += g->tile_q) {
        const struct fa_head_rows of_tile = fa_tile_rows(rows, r);
        const struct fa_key_range keys = fa_rows_keys(&of_tile);
        struct fa_tile tile;
        bool any = false;
        for (int64_t i = r; i < r + of_tile.count; i++) {
            any = any || wanted[i];
        }
        if (!any || keys.lo >= block_key + g->block_k || keys.hi <= block_key) {
            continue;
        }
        if (!packed) {
            const int64_t live = fa_min(g->block_k, rows->head->kv_length - block_key);
            fa_backward_pack(b, rows->head, ws, block_key, live);
            packed = true;
        }
        if (!fa_backward_scores(&tile, ws, rows, r)) {
            continue;
        }
        /* A row has its products in the place that acc has in the forward pass: one vector wide. */
        const struct fa_state state = {
            .row_max = (char *)ws->forward.split.row_max + r * size,
            .row_sum = (char *)ws->forward.split.row_sum + r * vl * size,
            .acc = ws->row_products + r * vl * size,
        };
        char *scores = fa_tile_score_data(&tile, &ws->forward);
        const char *gradients = fa_backward_weight_gradients(b, &tile, ws);
        const size_t count = (size_t)tile.rows, columns = (size_t)tile.columns;
        g->ops->softmax_update(scores, ld, count, columns, &state, (size_t)vl);
        g->ops->add_row_products(state.acc, scores, gradients, ld, count, columns);
    }
}

bool fa_backward_row_statistics(struct fa_job *job, int thread, struct fa_backward_workspace *ws,
                                const struct fa_head_rows *rows, const bool *wanted,
                                struct fa_statistics *of)
{
    const struct fa_backward *b = job->context;
    const struct fa_geometry *g = &b->geometry;
    const struct fa_key_range keys = fa_rows_keys(rows);
    const struct fa_state begin = {
        .row_max = ws->forward.split.row_max,
        .row_sum = ws->forward.split.row_sum,
        .acc = ws->row_products,
    };
    for (int64_t r = 0; r < rows->count; r++) {
        of[r] = (struct fa_statistics){.top = -INFINITY};
    }
    fa_load_rows(&ws->forward, rows);
    fa_backward_load_grad(b, ws, rows);
    for (int64_t lo = keys.lo / g->split_k * g->split_k; lo < keys.hi; lo += g->split_k) {
        g->ops->softmax_begin((size_t)rows->count, &begin, g->ops->vl);
        for (int64_t key = lo; key < fa_min(lo + g->split_k, keys.hi); key += g->block_k) {
            if (fa_job_checkpoint(job, thread)) {
                return false;
            }
            g->engine->enter();
            sum_block(b, ws, rows, wanted, key);
            g->engine->leave();
        }
        fold(g, ws, rows->count, of);
    }
    return true;
}

bool fa_backward_column_statistics(struct fa_job *job, int thread, const struct fa_head *head,
                                   struct fa_backward_workspace *ws)
{
    const struct fa_geometry *g = head->geometry;
    const struct fa_head_rows all = {.head = head, .count = head->rows};
    const int64_t size = (int64_t)g->ops->size, block_key = ws->block_key;
    g->ops->column_begin(ws->col_max, ws->col_sum, (size_t)g->block_k);
    for (int64_t first = 0; first < head->rows; first += g->tile_q) {
        const struct fa_head_rows rows = fa_tile_rows(&all, first);
        const struct fa_key_range keys = fa_rows_keys(&rows);
        struct fa_tile tile;
        if (fa_job_checkpoint(job, thread)) {
            return false;
        }
        if (keys.lo >= block_key + g->block_k || keys.hi <= block_key) {
            continue;
        }
        g->engine->enter();
        fa_load_rows(&ws->forward, &rows);
        if (fa_backward_scores(&tile, ws, &rows, 0)) {
            g->ops->column_update(fa_tile_score_data(&tile, &ws->forward), (size_t)g->score_stride,
                                  (size_t)tile.rows, (size_t)tile.columns,
                                  ws->col_max + tile.begin * size, ws->col_sum + tile.begin * size);
        }
        g->engine->leave();
    }
    return true;
}
