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
    /* Rows that were given back (enum fa_stored): [num_tasks][block_q], of the tasks that store them, and whether there
     * is any; NULL if none may be. */
    uint8_t *given_back;
    atomic_bool any_given_back;
    /* Elements of those whose sums left, a bit each: [num_tasks][block_q][column_bytes].  Made by the task that first
     * has such a row; where it cannot be, no_memory is set. */
    _Atomic(uint8_t *) columns;
    int64_t column_bytes;
    atomic_bool no_memory;
    /* With given_back and softmax over queries, else NULL: [batch * heads], whether rows or columns of a head were
     * given back.  A column that was has a reciprocal sum of NaN, which gives back the rows that it takes part in. */
    atomic_bool *head_given_back;
    /* NULL, or the call's first run, of which this one computes what was given back and nothing else. */
    struct fa_forward *first;
    /* Whether the backward pass computes the same scores, so that their weighing holds there. */
    bool keeps_weighing;
};

/* Column statistics of every key: the first pass of softmax over queries; and room for them, col_max, col_inverse and
 * head_given_back. */
enum fa_status fa_columns_allocate(struct fa_forward *forward);
enum fa_status fa_column_softmax(struct fa_forward *forward, struct fa_job *job);
void fa_columns_release(struct fa_forward *forward);

/* A row's or a key's place of `weighing`: the backward pass is to find these out for itself. */
static inline void fa_forget_weighing(const struct fa_geometry *g, char *weighing)
{
    fa_write_lse(g, weighing, 0);
    fa_write_lse(g, weighing + g->params->weighing.col, NAN);
}

/* Where the statistics of a key block lie in col_max and col_inverse. */
static inline int64_t fa_column_offset(const struct fa_geometry *g, int64_t head_index,
                                       int64_t key_block)
{
    return (head_index * g->key_blocks + key_block) * g->block_k * (int64_t)g->ops->size;
}

/* The engine of a call's first run: of float64 where its options leave no choice. */
const struct fa_engine *fa_attention_engine(const struct fa_attention_params *params,
                                            const struct fa_kernels *kernels);

#endif
