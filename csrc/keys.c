#include "keys.h"

#include <math.h>
#include <string.h>

/* Where elements (key, first column) of the keys lie: side by side, or page by page. */
static void locate_rows(const struct fa_head *head, const char *data, const struct fa_array *in,
                        struct fa_key_range keys, const char **row)
{
    const struct fa_attention_params *p = head->geometry->params;
    const int64_t count = keys.hi - keys.lo;
    if (head->page_table == NULL) {
        data += keys.lo * in->row;
        for (int64_t j = 0; j < count; j++, data += in->row) {
            row[j] = data;
        }
        return;
    }
    int64_t page = keys.lo / p->page_size, slot = keys.lo % p->page_size;
    for (int64_t j = 0; j < count; page++, slot = 0) {
        const int64_t number = fa_read_int64(head->page_table + page * p->page_table.row);
        for (; slot < p->page_size && j < count; slot++, j++) {
            row[j] = data + number * in->batch[0] + slot * in->row;
        }
    }
}

/* Read the scales of the same keys, 0 up to a whole panel; NULL where there are none.  `row` is
 * scratch. */
static const float *read_scales(const struct fa_head *head, const char *data,
                                const struct fa_array *in, struct fa_key_range keys,
                                const char **row, float *scale)
{
    const int64_t count = keys.hi - keys.lo;
    if (data == NULL) {
        return NULL;
    }
    const int64_t padded = fa_round_up(count, (int64_t)head->geometry->engine->nr);
    memset(scale + count, 0, (size_t)(padded - count) * sizeof *scale);
    if (head->page_table == NULL && in->row == (int64_t)sizeof *scale) {
        memcpy(scale, data + keys.lo * in->row, (size_t)count * sizeof *scale);
        return scale;
    }
    if (head->page_table == NULL) {
        for (int64_t j = 0; j < count; j++) {
            memcpy(scale + j, data + (keys.lo + j) * in->row, sizeof *scale);
        }
        return scale;
    }
    locate_rows(head, data, in, keys, row);
    for (int64_t j = 0; j < count; j++) {
        memcpy(scale + j, row[j], sizeof *scale);
    }
    return scale;
}

/* Whether keys that are ordinary integers stay so under their scales, which multiply whole
 * scores. */
static bool are_scales_ordinary(const struct fa_rows *keys, int64_t count)
{
    bool ordinary = true;
    for (int64_t j = 0; keys->scale != NULL && j < count; j++) {
        ordinary &= fabsf(keys->scale[j]) < (float)((int64_t)1 << FA_ORDINARY_EXPONENT);
    }
    return ordinary;
}

/* The factor of every value of a call that is computed again with smaller ones. */
static const float *scale_values(const struct fa_geometry *g, int64_t keys, float *scale)
{
    const int64_t padded = fa_round_up(keys, (int64_t)g->engine->nr);
    for (int64_t j = 0; j < padded; j++) {
        scale[j] = ldexpf(1, -g->value_exponent);
    }
    return scale;
}

void fa_locate_keys(const struct fa_head *head, struct fa_workspace *ws, int64_t block_key,
                    int64_t keys, int64_t first_col)
{
    const struct fa_attention_params *p = head->geometry->params;
    const struct fa_key_range block = {.lo = block_key, .hi = block_key + keys};
    const struct fa_key_range located = {
        .lo = block_key,
        .hi = fa_min(block.hi + fa_keys_ahead(p->kv_dtype), head->kv_length),
    };
    ws->keys_packed = false;
    ws->keys = (struct fa_rows){
        .row = ws->k_row,
        .located = (size_t)(located.hi - located.lo),
        .col_stride = p->k.col,
        .dtype = p->kv_dtype,
        .scale = read_scales(head, head->k_scale, &p->k_scale, block, ws->k_row, ws->k_scale),
    };
    ws->values = (struct fa_rows){
        .row = ws->v_row,
        .located = (size_t)(located.hi - located.lo),
        .col_stride = p->v.col,
        .dtype = p->kv_dtype,
        .scale = read_scales(head, head->v_scale, &p->v_scale, block, ws->v_row, ws->v_scale),
    };
    if (head->geometry->value_exponent != 0) {
        ws->values.scale = scale_values(head->geometry, keys, ws->v_scale);
    }
    /* Of keys that are not packed nothing is known but their type. */
    ws->keys_ordinary =
        (p->kv_dtype == FA_F16 || p->kv_dtype == FA_I8) && are_scales_ordinary(&ws->keys, keys);
    locate_rows(head, head->k, &p->k, located, ws->k_row);
    locate_rows(head, head->v + first_col * p->v.col, &p->v, located, ws->v_row);
}

void fa_pack_keys(const struct fa_head *head, struct fa_workspace *ws, int64_t keys)
{
    const struct fa_geometry *g = head->geometry;
    const bool ordinary =
        g->engine->pack_keys(ws->k, (size_t)keys, (size_t)g->params->head_dim, &ws->keys);
    ws->keys_packed = true;
    ws->keys_ordinary = ordinary && are_scales_ordinary(&ws->keys, keys);
}

bool fa_pack_values(const struct fa_head *head, struct fa_workspace *ws, int64_t keys, int64_t cols)
{
    const struct fa_geometry *g = head->geometry;
    return g->engine->pack_values(ws->v, (size_t)g->value_depth * g->engine->nr, (size_t)keys,
                                  (size_t)cols, &ws->values);
}
