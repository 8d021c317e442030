#include "workspace.h"

#include <stdlib.h>

/* Reserve an array at the end of *total and say where it starts. */
static bool reserve(int64_t *total, int64_t *offset, int64_t rows, int64_t cols, int64_t size)
{
    int64_t elements;
    *offset = *total;
    return fa_multiply(rows, cols, &elements) && fa_add_bytes(total, elements, size);
}

struct layout {
    int64_t q, acc, row_max, row_sum, k, v, scores, mask, segments, bytes;
};

static bool lay_out(const struct fa_geometry *g, struct layout *at)
{
    const int64_t size = (int64_t)g->ops->size;
    int64_t total = 0;
    *at = (struct layout){0};
    bool ok = reserve(&total, &at->q, g->block_q, g->params->head_dim, size) &&
              reserve(&total, &at->acc, g->block_q, g->block_dv, size) &&
              reserve(&total, &at->row_max, g->block_q, 1, size) &&
              reserve(&total, &at->row_sum, g->block_q, (int64_t)g->ops->vl, size) &&
              reserve(&total, &at->k, g->block_k, g->params->head_dim, size) &&
              reserve(&total, &at->v, g->block_k, g->block_dv, size) &&
              reserve(&total, &at->scores, FA_TILE_Q, g->block_k, size) &&
              reserve(&total, &at->mask, FA_TILE_Q, g->block_k, 1) &&
              reserve(&total, &at->segments, g->block_k, 1, (int64_t)sizeof(int64_t));
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
        .acc = base + at.acc,
        .row_max = base + at.row_max,
        .row_sum = base + at.row_sum,
        .k = base + at.k,
        .v = base + at.v,
        .scores = base + at.scores,
        .mask = (uint8_t *)base + at.mask,
        .segments = (int64_t *)(void *)(base + at.segments),
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
