#include "workspace.h"

#include <stdlib.h>

/* Reserve an array at the end of *total and say where it starts. */
static bool reserve(int64_t *total, int64_t *offset, int64_t rows, int64_t cols, int64_t size)
{
    int64_t elements;
    *offset = *total;
    return fa_multiply(rows, cols, &elements) && fa_add_bytes(total, elements, size);
}

struct state_layout {
    int64_t row_max, row_sum, acc;
};

static bool lay_out_state(const struct fa_geometry *g, int64_t rows, int64_t *total,
                          struct state_layout *at)
{
    const int64_t size = (int64_t)g->ops->size;
    rows = fa_round_up(rows, (int64_t)g->engine->row_step);
    return reserve(total, &at->row_max, rows, 1, size) &&
           reserve(total, &at->row_sum, rows, (int64_t)g->ops->vl, size) &&
           reserve(total, &at->acc, rows, g->block_dv, size);
}

static struct fa_state state_at(char *base, const struct state_layout *at)
{
    return (struct fa_state){
        .row_max = base + at->row_max,
        .row_sum = base + at->row_sum,
        .acc = base + at->acc,
    };
}

bool fa_state_bytes(const struct fa_geometry *geometry, int64_t rows, int64_t *bytes)
{
    struct state_layout at;
    *bytes = 0;
    return lay_out_state(geometry, rows, bytes, &at);
}

struct fa_state fa_state_at(const struct fa_geometry *geometry, int64_t rows, char *memory)
{
    struct state_layout at = {0};
    int64_t bytes = 0;
    bool ok = lay_out_state(geometry, rows, &bytes, &at);
    FA_ASSERT(ok);
    (void)ok;
    return state_at(memory, &at);
}

struct layout {
    struct state_layout part, total, rest;
    int64_t q, k, v, scores, scores_ahead, mask, segments, k_row, v_row, k_scale, v_scale, factors,
        bytes;
};

static bool lay_out(const struct fa_geometry *g, struct layout *at)
{
    const int64_t size = (int64_t)g->ops->size;
    int64_t total = 0;
    const int64_t folded_rows = g->params->seqlen_k > g->split_k ? g->block_q : 0;
    *at = (struct layout){0};
    bool ok =
        reserve(&total, &at->q, fa_round_up(g->block_q, (int64_t)g->engine->row_step), g->depth,
                size) &&
        lay_out_state(g, g->block_q, &total, &at->part) &&
        lay_out_state(g, folded_rows, &total, &at->total) &&
        lay_out_state(g, folded_rows, &total, &at->rest) &&
        reserve(&total, &at->k, g->block_k, g->depth, size) &&
        reserve(&total, &at->v, g->value_depth, g->block_dv, size) &&
        reserve(&total, &at->scores, g->tile_q, g->block_k, size) &&
        reserve(&total, &at->scores_ahead, g->engine->multiplies_beside ? g->tile_q : 0, g->block_k,
                size) &&
        reserve(&total, &at->mask, g->tile_q, g->block_k, 1) &&
        reserve(&total, &at->segments, g->block_k, 1, (int64_t)sizeof(int64_t)) &&
        reserve(&total, &at->k_row, g->block_k + fa_keys_ahead(g->params->kv_dtype), 1,
                (int64_t)sizeof(char *)) &&
        reserve(&total, &at->v_row, g->block_k + fa_keys_ahead(g->params->kv_dtype), 1,
                (int64_t)sizeof(char *)) &&
        reserve(&total, &at->k_scale, g->block_k, 1, (int64_t)sizeof(float)) &&
        reserve(&total, &at->factors, g->params->dropout_p > 0 ? g->tile_q : 0, g->block_k, size) &&
        reserve(&total, &at->v_scale, g->block_k, 1, (int64_t)sizeof(float));
    at->bytes = total;
    return ok;
}

bool fa_workspace_bytes(const struct fa_geometry *geometry, int64_t *bytes)
{
    struct layout at;
    bool ok = lay_out(geometry, &at);
    *bytes = at.bytes;
    return ok;
}

struct fa_workspace fa_workspace_of(const struct fa_geometry *geometry, char *memory, int thread)
{
    struct layout at;
    bool ok = lay_out(geometry, &at);
    FA_ASSERT(ok);
    (void)ok;
    char *base = memory + thread * at.bytes;
    return (struct fa_workspace){
        .q = base + at.q,
        .part = state_at(base, &at.part),
        .total = state_at(base, &at.total),
        .rest = state_at(base, &at.rest),
        .k = base + at.k,
        .v = base + at.v,
        .scores = base + at.scores,
        .scores_ahead = base + at.scores_ahead,
        .mask = (uint8_t *)base + at.mask,
        .segments = (int64_t *)(void *)(base + at.segments),
        .k_row = (const char **)(void *)(base + at.k_row),
        .v_row = (const char **)(void *)(base + at.v_row),
        .factors = base + at.factors,
        .k_scale = (float *)(void *)(base + at.k_scale),
        .v_scale = (float *)(void *)(base + at.v_scale),
    };
}

void *fa_allocate(int64_t bytes)
{
    if ((uint64_t)bytes > SIZE_MAX - FA_ALIGNMENT) {
        return NULL;
    }
    return aligned_alloc(FA_ALIGNMENT, (size_t)fa_max(bytes, FA_ALIGNMENT));
}

void fa_release(void *memory) { free(memory); }
