#include "scores.h"

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

static int64_t read_segment(const char *p)
{
    int64_t x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* Fill ws->mask.  Returns whether any key takes part; clears tile->use_mask if all do. */
static bool gather_mask(struct fa_tile *tile, struct fa_workspace *ws)
{
    const struct fa_head *head = tile->head;
    const struct fa_geometry *g = head->geometry;
    const struct fa_attention_params *p = g->params;
    const int64_t first_key = tile->block_key + tile->begin;
    uint8_t any = 0, all = 1;

    if (head->k_segment_ids != NULL) {
        for (int64_t j = 0; j < tile->keys; j++) {
            const char *at = head->k_segment_ids + (first_key + j) * p->k_segment_ids.row;
            ws->segments[j] = read_segment(at);
        }
    }
    for (int64_t r = 0; r < tile->rows; r++) {
        const int64_t row = tile->first_row + r;
        const int64_t token = fa_row_token(g, row), member = fa_row_member(g, row);
        uint8_t *bytes = ws->mask + r * g->block_k;
        if (head->mask != NULL) {
            const char *src =
                head->mask + member * p->mask.head + token * p->mask.row + first_key * p->mask.col;
            copy_mask_row(bytes, src, p->mask.col, tile->keys);
        } else {
            memset(bytes, 1, (size_t)tile->keys);
        }
        if (head->q_segment_ids != NULL) {
            int64_t segment = read_segment(head->q_segment_ids + token * p->q_segment_ids.row);
            match_segments(bytes, ws->segments, segment, tile->keys);
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

bool fa_tile_init(struct fa_tile *tile, const struct fa_head *head, struct fa_workspace *ws,
                  int64_t first_row, int64_t rows, int64_t row_offset, int64_t block_key)
{
    const struct fa_geometry *g = head->geometry;
    const int64_t last_row = first_row + rows - 1;
    const struct fa_key_range keys = fa_rows_keys(head, first_row, last_row);
    const int64_t lo = fa_max(keys.lo, block_key), hi = fa_min(keys.hi, block_key + g->block_k);
    const int64_t panel = (int64_t)g->ops->nr;

    FA_ASSERT(rows >= 1 && rows <= FA_TILE_Q);
    if (lo >= hi) {
        return false;
    }
    const int64_t begin = (lo - block_key) / panel * panel;
    const int64_t live = hi - block_key - begin;
    *tile = (struct fa_tile){
        .head = head,
        .first_row = first_row,
        .rows = rows,
        .row_offset = row_offset,
        .block_key = block_key,
        .begin = begin,
        .keys = live,
        .columns = fa_ceil_div(live, panel) * panel,
    };
    /* Both ends of the range grow with the row: the last row has the highest lo, the first the lowest
     * hi. */
    const int64_t lo_max = fa_token_keys(head, fa_row_token(g, last_row)).lo;
    const int64_t hi_min = fa_token_keys(head, fa_row_token(g, first_row)).hi;
    tile->use_range = lo_max > block_key + begin || hi_min < block_key + begin + tile->columns;
    if (head->mask == NULL && head->k_segment_ids == NULL) {
        return true;
    }
    return gather_mask(tile, ws);
}

void fa_load_rows(const struct fa_head *head, struct fa_workspace *ws, int64_t first_row,
                  int64_t rows)
{
    const struct fa_geometry *g = head->geometry;
    const struct fa_attention_params *p = g->params;
    const int64_t mr = (int64_t)g->ops->mr;
    const double scale = p->softcap > 0 ? p->scale / p->softcap : p->scale * FA_LOG2_E;
    const void *src[FA_TILE_Q];

    for (int64_t r = 0; r < rows; r += FA_TILE_Q) {
        const int64_t count = fa_min(FA_TILE_Q, rows - r);
        const int64_t padded = fa_ceil_div(count, mr) * mr;
        for (int64_t i = 0; i < padded; i++) {
            const int64_t row = first_row + r + i;
            src[i] = i < count ? head->q + fa_row_member(g, row) * p->q.head +
                                     fa_row_token(g, row) * p->q.row
                               : NULL;
        }
        g->ops->load_rows(ws->q + r * p->head_dim * (int64_t)g->ops->size, (size_t)padded, src,
                          p->q.col, (size_t)p->head_dim, scale);
    }
}

void fa_pack_keys(const struct fa_head *head, struct fa_workspace *ws, int64_t block_key,
                  int64_t keys)
{
    const struct fa_geometry *g = head->geometry;
    const struct fa_attention_params *p = g->params;
    g->ops->pack_keys(ws->k, (size_t)keys, (size_t)p->head_dim, head->k + block_key * p->k.row,
                      p->k.row, p->k.col);
}

static double read_double(const char *p)
{
    double x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* The options that look at one row at a time. */
static void edit_row(const struct fa_tile *tile, int64_t r, char *scores, const uint8_t *mask)
{
    const struct fa_head *head = tile->head;
    const struct fa_geometry *g = head->geometry;
    const struct fa_attention_params *p = g->params;
    const int64_t row = tile->first_row + r;
    const int64_t token = fa_row_token(g, row), member = fa_row_member(g, row);
    const int64_t first_key = tile->block_key + tile->begin;

    if (head->bias != NULL) {
        const char *bias =
            head->bias + member * p->bias.head + token * p->bias.row + first_key * p->bias.col;
        g->ops->add_bias(scores, (size_t)tile->keys, bias, p->bias.col, p->bias_dtype);
    }
    if (head->alibi_slopes != NULL) {
        double slope = read_double(head->alibi_slopes + member * p->alibi_slopes.head);
        int64_t distance = token + head->q_offset - first_key;
        g->ops->add_alibi(scores, (size_t)tile->columns, slope * FA_LOG2_E, distance);
    }
    if (tile->use_mask) {
        g->ops->mask_bytes(scores, (size_t)tile->columns, mask);
    }
    if (tile->use_range) {
        struct fa_key_range keys = fa_token_keys(head, token);
        int64_t lo = fa_min(fa_max(keys.lo - first_key, 0), tile->columns);
        int64_t hi = fa_min(fa_max(keys.hi - first_key, lo), tile->columns);
        g->ops->mask_range(scores, (size_t)tile->columns, (size_t)lo, (size_t)hi);
    }
}

void fa_tile_scores(const struct fa_tile *tile, struct fa_workspace *ws)
{
    const struct fa_head *head = tile->head;
    const struct fa_geometry *g = head->geometry;
    const struct fa_ops *ops = g->ops;
    const int64_t size = (int64_t)ops->size, mr = (int64_t)ops->mr;
    const size_t depth = (size_t)g->params->head_dim;
    char *scores = fa_tile_score_data(tile, ws);

    ops->matmul((size_t)(fa_ceil_div(tile->rows, mr) * mr), depth, (size_t)tile->columns / ops->nr,
                ws->q + tile->row_offset * g->params->head_dim * size, depth,
                ws->k + tile->begin * g->params->head_dim * size, depth * ops->nr, scores,
                (size_t)g->block_k, false);
    if (g->params->softcap > 0) {
        ops->softcap(scores, (size_t)g->block_k, (size_t)tile->rows, (size_t)tile->columns,
                     g->params->softcap * FA_LOG2_E);
    }
    if (head->bias == NULL && head->alibi_slopes == NULL && !tile->use_mask && !tile->use_range) {
        return;
    }
    for (int64_t r = 0; r < tile->rows; r++) {
        edit_row(tile, r, scores + r * g->block_k * size, ws->mask + r * g->block_k);
    }
}
