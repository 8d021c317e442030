#include "scores.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* Mask bytes of one row as 0 or 1. */
static void copy_mask_row(uint8_t *dst, const char *src, int64_t stride, int64_t n)
{
    if (stride == 1) {
        for (int64_t j = 0; j < n; j++) {
            dst[j] = src[j] != 0;
        }
    } else {
        for (int64_t j = 0; j < n; j++) {
            dst[j] = src[j * stride] != 0;
        }
    }
}

static void match_segments(uint8_t *dst, const int64_t *segments, int64_t segment, int64_t n)
{
    for (int64_t j = 0; j < n; j++) {
        dst[j] &= segments[j] == segment;
    }
}

/* The block's segment ids into ws->segments, and their range.  The tiles of a block share them. */
static void load_segments(const struct fa_head *head, struct fa_workspace *ws, int64_t block_key)
{
    const struct fa_geometry *g = head->geometry;
    const int64_t stride = g->params->k_segment_ids.row;
    const int64_t keys = fa_min(g->block_k, g->params->seqlen_k - block_key);
    const char *ids = head->k_segment_ids + block_key * stride;
    if (ws->segments_loaded == ids) {
        return;
    }
    struct fa_segment_range range = {.lo = fa_read_int64(ids), .hi = fa_read_int64(ids)};
    for (int64_t j = 0; j < keys; j++) {
        ws->segments[j] = fa_read_int64(ids + j * stride);
        range.lo = fa_min(range.lo, ws->segments[j]);
        range.hi = fa_max(range.hi, ws->segments[j]);
    }
    ws->segment_range = range;
    ws->segments_loaded = ids;
}

static struct fa_segment_range query_segments(const struct fa_tile *tile)
{
    const struct fa_geometry *g = tile->head->geometry;
    const int64_t stride = g->params->q_segment_ids.row;
    struct fa_segment_range range = {.lo = INT64_MAX, .hi = INT64_MIN};
    for (int64_t r = 0; r < tile->rows; r++) {
        const int64_t token = fa_row_token(g, tile->first_row + r);
        const int64_t segment = fa_read_int64(tile->head->q_segment_ids + token * stride);
        range.lo = fa_min(range.lo, segment);
        range.hi = fa_max(range.hi, segment);
    }
    return range;
}

/* Segments of packed documents ascend, so that ranges decide almost every tile: a tile of another
 * document is skipped without a look at its keys, and one inside a document needs no mask. */
enum overlap { NONE, SOME, ALL };

static enum overlap compare_segments(const struct fa_tile *tile, struct fa_workspace *ws)
{
    if (tile->head->k_segment_ids == NULL) {
        return ALL;
    }
    load_segments(tile->head, ws, tile->block_key);
    const struct fa_segment_range q = query_segments(tile), k = ws->segment_range;
    if (q.hi < k.lo || k.hi < q.lo) {
        return NONE;
    }
    return q.lo == q.hi && k.lo == k.hi ? ALL : SOME;
}

/* Fill ws->mask.  Returns whether any key takes part; clears tile->use_mask if all do. */
static bool gather_mask(struct fa_tile *tile, struct fa_workspace *ws, bool use_segments)
{
    const struct fa_head *head = tile->head;
    const struct fa_geometry *g = head->geometry;
    const struct fa_attention_params *p = g->params;
    const int64_t first_key = tile->block_key + tile->begin;
    uint8_t any = 0, all = 1;

    for (int64_t r = 0; r < tile->rows; r++) {
        const int64_t row = tile->first_row + r;
        const int64_t token = fa_row_token(g, row);
        uint8_t *bytes = ws->mask + r * g->block_k;
        if (head->mask != NULL) {
            const char *src =
                head->mask + fa_row_offset(g, &p->mask, row) + first_key * p->mask.col;
            copy_mask_row(bytes, src, p->mask.col, tile->keys);
        } else {
            memset(bytes, 1, (size_t)tile->keys);
        }
        if (use_segments) {
            int64_t segment = fa_read_int64(head->q_segment_ids + token * p->q_segment_ids.row);
            match_segments(bytes, ws->segments + tile->begin, segment, tile->keys);
        }
        for (int64_t j = 0; j < tile->keys; j++) {
            any |= bytes[j];
            all &= bytes[j];
        }
        /* Vectors of mask bytes reach into the padding; what it holds is cut off by the range. */
        memset(bytes + tile->keys, 0, (size_t)(tile->columns - tile->keys));
    }
    tile->use_mask = !all;
    return any;
}

bool fa_tile_init(struct fa_tile *tile, struct fa_workspace *ws, const struct fa_head_rows *rows,
                  int64_t row_offset, int64_t block_key)
{
    const struct fa_head *head = rows->head;
    const struct fa_geometry *g = head->geometry;
    const struct fa_key_range block = {.lo = block_key, .hi = block_key + g->block_k};
    const struct fa_rows_keys keys = fa_rows_keys_of(rows, block);
    const int64_t panel = (int64_t)g->engine->nr;

    FA_ASSERT(rows->count >= 1 && rows->count <= g->tile_q);
    if (keys.any.lo >= keys.any.hi) {
        return false;
    }
    const int64_t begin = (keys.any.lo - block_key) / panel * panel;
    const int64_t live = keys.any.hi - block_key - begin, columns = fa_round_up(live, panel);
    const bool alike = keys.any.lo == keys.all.lo && keys.any.hi == keys.all.hi;
    const int64_t first = block_key + begin;
    const bool cut = keys.all.lo > first || keys.all.hi < first + columns;
    *tile = (struct fa_tile){
        .head = head,
        .first_row = rows->first,
        .rows = rows->count,
        .row_offset = row_offset,
        .block_key = block_key,
        .begin = begin,
        .keys = live,
        .columns = columns,
        .group = alike ? rows->count : (int64_t)g->engine->mr,
        .use_range = cut,
    };
    const enum overlap segments = compare_segments(tile, ws);
    if (segments == NONE || (segments == ALL && head->mask == NULL)) {
        return segments == ALL;
    }
    return gather_mask(tile, ws, segments == SOME);
}

struct fa_key_range fa_group_keys(const struct fa_tile *tile, int64_t r)
{
    const struct fa_geometry *g = tile->head->geometry;
    const int64_t panel = (int64_t)g->engine->nr, first_key = tile->block_key + tile->begin;
    if (tile->group >= tile->rows) {
        return (struct fa_key_range){.lo = 0, .hi = tile->keys};
    }
    const struct fa_head_rows rows = {
        .head = tile->head,
        .first = tile->first_row + r,
        .count = fa_min(tile->group, tile->rows - r),
    };
    const struct fa_key_range of = {.lo = first_key, .hi = first_key + tile->keys};
    struct fa_key_range keys = fa_rows_keys_of(&rows, of).any;
    keys.hi = fa_min(fa_max(keys.hi - first_key, 0), tile->keys);
    keys.lo = fa_min(fa_max(keys.lo - first_key, 0), keys.hi) / panel * panel;
    return keys;
}

/* The factor from <q, k> to the number that softcap or the softmax takes. */
static double score_factor(const struct fa_attention_params *p)
{
    return p->softcap > 0 ? p->scale / p->softcap : p->scale * FA_LOG2_E;
}

/* The factor of q in a run that scales scores: a scale that makes numbers smaller comes before
 * the sum of products, which then does not pass the range on its way, and one that makes them
 * larger comes after it. */
static double row_factor(const struct fa_attention_params *p)
{
    return fabs(p->scale) < 1 ? p->scale : 1;
}

/* Whether float32 holds the number with as many bits, and its products with ordinary numbers,
 * too. */
static bool is_narrow(double x) { return x == 0 || (fabs(x) > 0x1p-100 && fabs(x) < 0x1p100); }

/* A product that becomes a subnormal number when it is divided by the cap loses bits, and the cap
 * multiplies that loss: below this cap, by less than a rounding of the score. */
#define NARROW_SOFTCAP 0x1p20

bool fa_has_narrow_options(const struct fa_attention_params *params)
{
    return !isfinite(params->scale) ||
           (is_narrow(params->scale) && is_narrow(score_factor(params)) &&
            is_narrow(params->softcap) && params->softcap <= NARROW_SOFTCAP);
}

const struct fa_tile_ops *fa_ops_of_call(const struct fa_kernels *kernels,
                                         const struct fa_attention_params *params)
{
    return fa_has_narrow_options(params) ? fa_ops_for(kernels, params->dtype) : kernels->f64;
}

bool fa_are_few(const struct fa_geometry *geometry, int64_t rows)
{
    const size_t most = geometry->engine->few_rows((size_t)geometry->params->head_dim);
    return !geometry->widened && (size_t)rows <= most;
}

bool fa_scales_scores(const struct fa_attention_params *params, bool again)
{
    return !fa_has_narrow_options(params) || (again && params->dtype == FA_F64);
}

/* Beside a bias, or a distance, of more than 2^16, float32 has less than 7 bits for the rest of a
 * score behind the point, and these tell keys apart.  Narrow biases from -2^127 down leave none
 * of it in float64 either: models mask with the lowest number of a type, and such rows are the
 * average of their keys in both types. */
#define DOUBTFUL_FROM 0x1p16
#define DOUBTFUL_TO 0x1p127

struct fa_doubt fa_head_doubt(const struct fa_head *head, int64_t member)
{
    const struct fa_attention_params *p = head->geometry->params;
    const bool biased = fa_is_biased(head->geometry);
    double slope = 0;
    if (head->alibi_slopes != NULL) {
        slope = fa_read_number(head->alibi_slopes + member * p->alibi_slopes.head, sizeof(double));
    }
    if (head->geometry->ops->size == sizeof(double) || (!biased && slope == 0)) {
        return (struct fa_doubt){.from = INFINITY, .to = INFINITY};
    }
    if (!is_narrow(slope)) {
        return (struct fa_doubt){.from = -1, .to = INFINITY};
    }
    /* A large scale may make scores that do show beside such a bias. */
    const bool wide =
        (biased && p->bias_dtype == FA_F64) || fabs(score_factor(p)) > FA_ORDINARY_FACTOR;
    return (struct fa_doubt){.from = DOUBTFUL_FROM, .to = wide ? INFINITY : DOUBTFUL_TO};
}

float fa_softmax_factor(const struct fa_head *head)
{
    const struct fa_attention_params *p = head->geometry->params;
    const float factor = (float)score_factor(p);
    const bool biased = fa_is_biased(head->geometry);
    const bool edited = p->softcap > 0 || biased || head->alibi_slopes != NULL;
    return head->geometry->engine->scale_at == FA_SCALE_LATE && !edited && factor > 0 &&
                   factor <= FLT_MAX && p->softmax_axis == FA_SOFTMAX_KEYS
               ? factor
               : 1;
}

void fa_load_rows(struct fa_workspace *ws, const struct fa_head_rows *rows)
{
    const struct fa_head *head = rows->head;
    const struct fa_geometry *g = head->geometry;
    const struct fa_attention_params *p = g->params;
    const double scale = g->scales_scores ? row_factor(p) : score_factor(p);
    const double factor = g->engine->scale_at == FA_SCALE_ROWS ? scale : 1;
    const char *src[FA_MAX_TILE_Q];
    const struct fa_rows from = {.row = src, .col_stride = p->q.col, .dtype = p->dtype};

    ws->rows_ordinary = fabs(scale) <= FA_ORDINARY_FACTOR && p->head_dim <= FA_ORDINARY_DIM;
    for (int64_t r = 0; r < rows->count; r += FA_MAX_TILE_Q) {
        const int64_t count = fa_min(FA_MAX_TILE_Q, rows->count - r);
        for (int64_t i = 0; i < count; i++) {
            src[i] = head->q + fa_row_offset(g, &p->q, rows->first + r + i);
        }
        ws->rows_ordinary &=
            g->engine->load_rows(ws->q + r * g->depth * (int64_t)g->ops->size, (size_t)count,
                                 (size_t)p->head_dim, &from, factor);
    }
}

/* The options that look at one row at a time, on the columns [first, first + columns) of the
 * tile, whose row r begins at row_scores. */
static void edit_row(const struct fa_tile *tile, const struct fa_workspace *ws, int64_t r,
                     char *row_scores, int64_t first, int64_t columns)
{
    const struct fa_head *head = tile->head;
    const struct fa_geometry *g = head->geometry;
    const struct fa_attention_params *p = g->params;
    const int64_t row = tile->first_row + r;
    const int64_t token = fa_row_token(g, row), member = fa_row_member(g, row);
    const int64_t tile_key = tile->block_key + tile->begin, first_key = tile_key + first;
    const int64_t live = fa_min(columns, tile->keys - first);
    char *scores = row_scores + first * (int64_t)g->ops->size;

    if (head->bias != NULL) {
        const char *bias = head->bias + fa_row_offset(g, &p->bias, row) + first_key * p->bias.col;
        g->ops->add_bias(scores, (size_t)live, bias, p->bias.col, p->bias_dtype);
    }
    if (head->alibi_slopes != NULL) {
        double slope =
            fa_read_number(head->alibi_slopes + member * p->alibi_slopes.head, sizeof(double));
        int64_t distance = token + head->q_offset - first_key;
        g->ops->add_alibi(scores, (size_t)columns, slope * FA_LOG2_E, distance);
    }
    if (tile->use_mask) {
        g->ops->mask_bytes(scores, (size_t)columns, ws->mask + r * g->block_k + first);
    }
    if (tile->use_range) {
        struct fa_key_range keys = fa_token_keys(head, token);
        int64_t lo = fa_min(fa_max(keys.lo - tile_key, 0), tile->columns);
        int64_t hi = fa_min(fa_max(keys.hi - tile_key, lo), tile->columns);
        g->ops->mask_range(row_scores, (size_t)tile->columns, (size_t)lo, (size_t)hi);
    }
}

void fa_want_bias(struct fa_workspace *ws, const struct fa_head_rows *rows, int64_t block_key)
{
    const struct fa_head *head = rows->head;
    const struct fa_geometry *g = head->geometry;
    const struct fa_array *bias = &g->params->bias;
    const int64_t size = fa_dtype_size(g->params->bias_dtype);
    ws->wanted.rows = ws->wanted.bytes = ws->wanted.next_row = ws->wanted.next_byte = 0;
    if (head->bias == NULL || bias->row == 0 || bias->col != size || rows->count <= 0) {
        return;
    }
    const int64_t end = fa_rows_keys(rows).hi;
    ws->wanted.rows = (size_t)rows->count;
    ws->wanted.bytes = (size_t)(fa_max(0, fa_min(g->block_k, end - block_key)) * size);
    for (int64_t r = 0; r < rows->count; r++) {
        const int64_t row = rows->first + r;
        ws->wanted.row[r] = head->bias + fa_row_offset(g, bias, row) + block_key * size;
    }
}

/* The factor that the product of scores is to have: neither rows nor softmax multiply by it. */
static float product_factor(const struct fa_head *head)
{
    const struct fa_geometry *g = head->geometry;
    const bool elsewhere = g->engine->scale_at == FA_SCALE_ROWS || fa_softmax_factor(head) != 1;
    return elsewhere ? 1 : (float)score_factor(g->params);
}

/* q k^T of the tile's rows [r, r + rows), `scores` being its first score of row 0. */
static struct fa_product group_product(const struct fa_tile *tile, const struct fa_workspace *ws,
                                       char *scores, int64_t r, int64_t rows)
{
    const struct fa_geometry *g = tile->head->geometry;
    const struct fa_key_range keys = fa_group_keys(tile, r);
    const int64_t size = (int64_t)g->ops->size, nr = (int64_t)g->engine->nr, depth = g->depth;
    return (struct fa_product){
        .rows = (size_t)rows,
        .depth = (size_t)depth,
        .panels = (size_t)fa_ceil_div(keys.hi - keys.lo, nr),
        .a = ws->q + (tile->row_offset + r) * depth * size,
        .a_stride = (size_t)depth,
        .b = ws->k + (tile->begin + keys.lo) * depth * size,
        .b_panel = (size_t)(depth * nr),
        .c = scores + (r * g->score_stride + keys.lo) * size,
        .c_row = (size_t)g->score_stride,
    };
}

struct fa_product fa_tile_product_ahead(const struct fa_tile *tile, const struct fa_workspace *ws)
{
    FA_ASSERT(ws->keys_packed && tile->group >= tile->rows);
    return group_product(tile, ws, fa_tile_scores_in(tile, ws->scores_ahead), 0, tile->rows);
}

/* Multiply products by the rest of score_factor.  Scale and cap may have a quotient that float64
 * has not. */
static void scale_products(double *scores, int64_t stride, int64_t rows, int64_t columns,
                           const struct fa_attention_params *p)
{
    const double factor = fabs(p->scale) < 1 ? 1 : p->scale;
    const double divisor = p->softcap > 0 ? p->softcap : FA_LN_2;
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t j = 0; j < columns; j++) {
            scores[r * stride + j] = scores[r * stride + j] * factor / divisor;
        }
    }
}

/* Scores of the tile's rows [r, r + rows); the product may be there already. */
static void group_scores(const struct fa_tile *tile, struct fa_workspace *ws, int64_t r,
                         int64_t rows, bool ready)
{
    const struct fa_head *head = tile->head;
    const struct fa_geometry *g = head->geometry;
    const struct fa_tile_ops *ops = g->ops;
    const struct fa_key_range keys = fa_group_keys(tile, r);
    const int64_t size = (int64_t)ops->size;
    const int64_t columns = fa_round_up(keys.hi - keys.lo, (int64_t)g->engine->nr);
    char *row = (char *)fa_tile_score_data(tile, ws) + r * g->score_stride * size;
    char *scores = row + keys.lo * size;

    if (!ready) {
        const struct fa_product product =
            group_product(tile, ws, fa_tile_score_data(tile, ws), r, rows);
        if (ws->keys_packed) {
            g->engine->scores(&product, product_factor(head), &ws->wanted);
        } else {
            const struct fa_rows from = fa_rows_from(&ws->keys, tile->begin + keys.lo);
            g->engine->few_scores(&product, (size_t)g->params->head_dim,
                                  (size_t)(keys.hi - keys.lo), &from, product_factor(head));
        }
    }
    if (ws->keys.scale != NULL) {
        ops->scale_scores(scores, (size_t)g->score_stride, (size_t)rows, (size_t)columns,
                          ws->keys.scale + tile->begin + keys.lo);
    }
    if (g->scales_scores) {
        scale_products((double *)(void *)scores, g->score_stride, rows, columns, g->params);
    } else if (!g->widened && !(ws->rows_ordinary && ws->keys_ordinary)) {
        /* Before the options, so that keys which take no part are masked after all.  A run that
         * scales scores is the last, and float64 holds every score of narrower numbers: there a
         * score is infinite where the reference's is. */
        ops->mark_overflow(scores, (size_t)g->score_stride, (size_t)rows, (size_t)columns);
    }
    if (g->params->softcap > 0) {
        const double cap2 = g->params->softcap * FA_LOG2_E;
        if (ws->slope != NULL) {
            ops->softcap_slope(ws->slope + (scores - ws->scores), scores, (size_t)g->score_stride,
                               (size_t)rows, (size_t)columns);
        }
        ops->softcap(scores, (size_t)g->score_stride, (size_t)rows, (size_t)columns, cap2);
    }
    if (head->bias == NULL && head->alibi_slopes == NULL && !tile->use_mask && !tile->use_range) {
        return;
    }
    for (int64_t i = r; i < r + rows; i++) {
        edit_row(tile, ws, i, row + (i - r) * g->score_stride * size, keys.lo, columns);
    }
}

void fa_tile_scores(const struct fa_tile *tile, struct fa_workspace *ws, bool ready)
{
    const int64_t group = tile->group;
    for (int64_t r = 0; r < tile->rows; r += group) {
        group_scores(tile, ws, r, fa_min(group, tile->rows - r), ready);
    }
}

static void draw_row(const struct fa_tile *tile, struct fa_workspace *ws, int64_t r)
{
    const struct fa_head *head = tile->head;
    const struct fa_geometry *g = head->geometry;
    const struct fa_attention_params *p = g->params;
    const int64_t row = tile->first_row + r;
    const struct fa_dropout dropout = {
        .seed = p->dropout_seed,
        .threshold = p->dropout_p < 1 ? (uint32_t)(p->dropout_p * 0x1p32) : UINT32_MAX,
        .kept = p->dropout_p < 1 ? 1 / (1 - p->dropout_p) : 0,
        .query = (uint32_t)fa_row_token(g, row),
        .head = (uint32_t)(head->first_head + fa_row_member(g, row)),
        .entry = (uint32_t)head->entry,
    };
    g->ops->dropout_factors(ws->factors + r * g->block_k * (int64_t)g->ops->size,
                            (size_t)tile->columns, &dropout, tile->block_key + tile->begin);
}

void fa_draw_dropout(const struct fa_tile *tile, struct fa_workspace *ws)
{
    const bool drops = tile->head->geometry->params->dropout_p > 0;
    for (int64_t r = 0; drops && r < tile->rows; r++) {
        draw_row(tile, ws, r);
    }
}

void fa_apply_dropout(const struct fa_tile *tile, const struct fa_workspace *ws, char *rows,
                      void (*multiply)(void *row, const void *factors, size_t n))
{
    const struct fa_geometry *g = tile->head->geometry;
    const int64_t size = (int64_t)g->ops->size;
    for (int64_t r = 0; g->params->dropout_p > 0 && r < tile->rows; r++) {
        multiply(rows + r * g->score_stride * size, ws->factors + r * g->block_k * size,
                 (size_t)tile->columns);
    }
}
