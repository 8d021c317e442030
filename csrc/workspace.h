/* The memory of a call: one buffer per thread, all in one allocation. */
#ifndef FA_WORKSPACE_H
#define FA_WORKSPACE_H

#include "geometry.h"

/* The least and the greatest of some segment ids. */
struct fa_segment_range {
    int64_t lo, hi;
};

/* One thread's buffers, FA_ALIGNMENT-aligned.  `real` is the element type of the geometry's ops. */
struct fa_workspace {
    char *q;            /* real [block_q][head_dim]: scaled rows */
    char *acc;          /* real [block_q][block_dv]: unnormalised output */
    char *row_max;      /* real [block_q] */
    char *row_sum;      /* real [block_q][vl] */
    char *k;            /* real [block_k / nr][head_dim][nr]: packed keys */
    char *v;            /* real [block_dv / nr][block_k][nr]: packed values */
    char *scores;       /* real [FA_TILE_Q][block_k] */
    uint8_t *mask;      /* [FA_TILE_Q][block_k]: 1 where a key takes part */
    int64_t *segments;  /* [block_k]: segment ids of the keys of a block */
    const char *segments_loaded; /* where they came from; NULL: nowhere yet */
    struct fa_segment_range segment_range;
    struct fa_wanted wanted; /* what the products fetch meanwhile */
};

/* Bytes that one thread needs; false on overflow. */
bool fa_workspace_bytes(const struct fa_geometry *geometry, int64_t *bytes);

/* Thread `thread`'s buffers inside an allocation of num_threads * fa_workspace_bytes. */
struct fa_workspace fa_workspace_of(const struct fa_geometry *geometry, char *memory, int thread);

/* FA_ALIGNMENT-aligned memory, or NULL.  bytes is a multiple of FA_ALIGNMENT; 0 gives a pointer too. */
void *fa_allocate(int64_t bytes);
void fa_release(void *memory);

#endif
