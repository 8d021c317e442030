#include "workspace.h"

#include <stdlib.h>

void *fa_take(struct fa_memory *memory, int64_t rows, int64_t cols, int64_t size)
{
    int64_t elements;
    if (memory->base != NULL) { /* they were counted before there was memory */
        char *at = memory->base + memory->bytes;
        memory->bytes += fa_round_up(rows * cols * size, FA_ALIGNMENT);
        return at;
    }
    memory->ok = memory->ok && fa_multiply(rows, cols, &elements) &&
                 fa_add_bytes(&memory->bytes, elements, size);
    return NULL;
}

static struct fa_state take_state(struct fa_memory *memory, const struct fa_geometry *g,
                                  int64_t rows)
{
    const int64_t size = (int64_t)g->ops->size;
    struct fa_state state;
    rows = fa_round_up(rows, (int64_t)g->engine->row_step);
    state.row_max = fa_take(memory, rows, 1, size);
    state.row_sum = fa_take(memory, rows, (int64_t)g->ops->vl, size);
    state.acc = fa_take(memory, rows, g->block_dv, size);
    return state;
}

bool fa_state_bytes(const struct fa_geometry *geometry, int64_t rows, int64_t *bytes)
{
    struct fa_memory memory = {.ok = true};
    take_state(&memory, geometry, rows);
    *bytes = memory.bytes;
    return memory.ok;
}

struct fa_state fa_state_at(const struct fa_geometry *geometry, int64_t rows, char *base)
{
    struct fa_memory memory = {.base = base};
    return take_state(&memory, geometry, rows);
}

void fa_take_workspace(struct fa_memory *memory, const struct fa_geometry *geometry,
                       struct fa_workspace *ws)
{
    const struct fa_geometry *g = geometry;
    const struct fa_attention_params *p = g->params;
    const int64_t size = (int64_t)g->ops->size, row_step = (int64_t)g->engine->row_step;
    const int64_t folded_rows = p->seqlen_k > g->split_k ? g->block_q : 0;
    const int64_t ahead_rows = g->engine->multiplies_beside ? g->tile_q : 0;
    const int64_t dropped_rows = p->dropout_p > 0 ? g->tile_q : 0;
    const int64_t located = g->block_k + fa_keys_ahead(p->kv_dtype);
    *ws = (struct fa_workspace){0};
    ws->q = fa_take(memory, fa_round_up(g->block_q, row_step), g->depth, size);
    ws->split = take_state(memory, g, g->block_q);
    ws->total = take_state(memory, g, folded_rows);
    ws->rest = take_state(memory, g, folded_rows);
    ws->k = fa_take(memory, g->block_k, g->depth, size);
    ws->v = fa_take(memory, g->value_depth, g->block_dv, size);
    ws->scores = fa_take(memory, g->tile_q, g->block_k, size);
    ws->scores_ahead = fa_take(memory, ahead_rows, g->block_k, size);
    ws->mask = fa_take(memory, g->tile_q, g->block_k, 1);
    ws->segments = fa_take(memory, g->block_k, 1, (int64_t)sizeof *ws->segments);
    ws->k_row = fa_take(memory, located, 1, (int64_t)sizeof *ws->k_row);
    ws->v_row = fa_take(memory, located, 1, (int64_t)sizeof *ws->v_row);
    ws->k_scale = fa_take(memory, g->block_k, 1, (int64_t)sizeof *ws->k_scale);
    ws->factors = fa_take(memory, dropped_rows, g->block_k, size);
    ws->v_scale = fa_take(memory, g->block_k, 1, (int64_t)sizeof *ws->v_scale);
}

bool fa_workspace_bytes(const struct fa_geometry *geometry, int64_t *bytes)
{
    struct fa_memory memory = {.ok = true};
    struct fa_workspace unused;
    fa_take_workspace(&memory, geometry, &unused);
    *bytes = memory.bytes;
    return memory.ok;
}

struct fa_workspace fa_workspace_at(const struct fa_geometry *geometry, char *base)
{
    struct fa_workspace ws;
    struct fa_memory memory = {.base = base};
    fa_take_workspace(&memory, geometry, &ws);
    return ws;
}

void *fa_allocate(int64_t bytes)
{
    if ((uint64_t)bytes > SIZE_MAX - FA_ALIGNMENT) {
        return NULL;
    }
    return aligned_alloc(FA_ALIGNMENT, (size_t)fa_max(bytes, FA_ALIGNMENT));
}

void fa_release(void *memory) { free(memory); }
