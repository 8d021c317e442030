/* The memory of a call: one buffer per thread, all in one allocation. */
#ifndef FA_WORKSPACE_H
#define FA_WORKSPACE_H

#include "geometry.h"

/* Keys beyond those of a block whose place is known while it is read. */
static inline int64_t fa_keys_ahead(enum fa_dtype dtype)
{
    return FA_KEYS_AHEAD * fa_max(1, 4 / fa_dtype_size(dtype));
}

/* The least and the greatest of some segment ids. */
struct fa_segment_range {
    int64_t lo, hi;
};

/* One thread's buffers, FA_ALIGNMENT-aligned.  `real` is the element type of the geometry's ops. */
struct fa_workspace {
    /* real [block_q][depth]: scaled rows. */
    char *q;
    /* The state of block_q rows over the keys of one split, with an ldacc of block_dv. */
    struct fa_state split;
    /* The same over all splits so far. */
    struct fa_state total;
    /* What rounding has left of the sums in `total`. */
    struct fa_state rest;
    /* real [block_k / nr][depth][nr]: packed keys. */
    char *k;
    /* real [block_dv / nr][value_depth][nr]: packed values. */
    char *v;
    /* real [tile_q][block_k] */
    char *scores;
    /* real [tile_q][block_k]: scores of the next tile, where the softmax multiplies beside. */
    char *scores_ahead;
    /* Nullable: room like `scores` for the slopes of softcap.  The backward pass sets it. */
    char *slope;
    /* [tile_q][block_k]: 1 where a key takes part. */
    uint8_t *mask;
    /* [block_k]: segment ids of the keys of a block. */
    int64_t *segments;
    /* Where these ids come from; NULL: none are loaded yet. */
    const char *segments_loaded;
    struct fa_segment_range segment_range;
    /* [block_k + fa_keys_ahead]: where the keys of a block lie, and their values. */
    const char **k_row, **v_row;
    /* [block_k]: the scales of these keys and values. */
    float *k_scale, *v_scale;
    /* real [tile_q][block_k]: factors of dropout. */
    char *factors;
    /* The keys and values of a block, in caller memory. */
    struct fa_rows keys, values;
    /* Caller memory that the products fetch while they compute. */
    struct fa_wanted wanted;
    /* Whether the rows, and the keys, are ordinary: then no score passes the range of float32. */
    bool rows_ordinary, keys_ordinary;
    /* k holds the keys of the block.  If not, the products read them where they lie. */
    bool keys_packed;
    /* A sum of values may have passed the range of `real`. */
    bool look_at_acc;
};

/* A stretch of memory that buffers are taken from, one after another, each FA_ALIGNMENT-aligned:
 * the code that takes a set of buffers is the only list of them.  With base NULL they are only
 * counted, which comes first and finds sizes that leave int64. */
struct fa_memory {
    char *base;
    /* Bytes taken so far. */
    int64_t bytes;
    /* Whether the bytes can be counted: true at first.  Not used with a base. */
    bool ok;
};

/* Room for rows * cols elements of `size` bytes; and for all buffers of a workspace. */
void *fa_take(struct fa_memory *memory, int64_t rows, int64_t cols, int64_t size);
void fa_take_workspace(struct fa_memory *memory, const struct fa_geometry *geometry,
                       struct fa_workspace *ws);

/* Bytes that one thread needs.  False: they leave int64. */
bool fa_workspace_bytes(const struct fa_geometry *geometry, int64_t *bytes);

/* A workspace laid out in fa_workspace_bytes of memory.  Every task lays out its own, so that no
 * task finds what another has left there: some 400 instructions of x86-64-v3 code by GCC 12,
 * counted by valgrind --tool=callgrind over a call of (32,4,49,32). */
struct fa_workspace fa_workspace_at(const struct fa_geometry *geometry, char *base);

/* Bytes of a state of `rows` rows (false: they leave int64), and a state laid out in memory. */
bool fa_state_bytes(const struct fa_geometry *geometry, int64_t rows, int64_t *bytes);
struct fa_state fa_state_at(const struct fa_geometry *geometry, int64_t rows, char *base);

/* Rows from `row` on of a state. */
static inline struct fa_state fa_state_from(const struct fa_geometry *g,
                                            const struct fa_state *state, int64_t row)
{
    const int64_t size = (int64_t)g->ops->size;
    return (struct fa_state){
        .row_max = (char *)state->row_max + row * size,
        .row_sum = (char *)state->row_sum + row * (int64_t)g->ops->vl * size,
        .acc = (char *)state->acc + row * g->block_dv * size,
    };
}

/* FA_ALIGNMENT-aligned memory, or NULL.  bytes is a multiple of FA_ALIGNMENT; 0 gives a pointer,
 * too. */
void *fa_allocate(int64_t bytes);
void fa_release(void *memory);

#endif
