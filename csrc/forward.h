/* The blocks of a forward pass, shared by its two forms of softmax. */
#ifndef FA_FORWARD_H
#define FA_FORWARD_H

#include <stdatomic.h>

#include "geometry.h"
#include "plan.h"
#include "schedule.h"
#include "workspace.h"

/* Everything the tasks of one call share. */
struct fa_forward {
    const struct fa_geometry *geometry;
    struct fa_plan plan;
    char *workspaces;    /* num_threads of them */
    /* Softmax over queries, else NULL: real [batch * heads][key_blocks * block_k], the base-2 maximum
     * and the reciprocal sum of every column. */
    char *col_max, *col_inverse;
    /* With plan.by_splits, else NULL: a state of block_q rows for every task, part_bytes apart, and for every
     * group of tasks, at its first, how many of them are done. */
    char *parts;
    int64_t part_bytes;
    atomic_int *arrived;
};

/* Column statistics of every key: the first pass of softmax over queries. */
enum fa_status fa_column_softmax(struct fa_forward *forward, struct fa_job *job);

/* Where the statistics of a key block lie in col_max and col_inverse. */
static inline int64_t fa_column_offset(const struct fa_geometry *g, int64_t head_index,
                                       int64_t key_block)
{
    return (head_index * g->key_blocks + key_block) * g->block_k * (int64_t)g->ops->size;
}

#endif
