/* Softmax over the queries of each key: its statistics, which a first pass finds. */
#ifndef FA_COLUMN_SOFTMAX_H
#define FA_COLUMN_SOFTMAX_H

#include <stdatomic.h>

#include "geometry.h"
#include "schedule.h"

/* The numbers that the tasks of the first pass share, and that the second pass has of them. */
struct fa_columns {
    const struct fa_geometry *geometry;
    /* The caller's workspaces, for geometry->num_threads threads, workspace_bytes apart: a
     * workspace of the forward pass is at the start of each. */
    char *workspaces;
    int64_t workspace_bytes;
    /* Whether columns whose statistics left the range of float32 are given back, for a second
     * run.  Such a column has a reciprocal sum of NaN, which gives back the rows that it takes
     * part in. */
    bool gives_back;
    /* The backward pass computes the same scores, so that their weighing holds there. */
    bool keeps_weighing;
    /* NULL, or the first run.  A second run computes the columns that the first gave back. */
    const struct fa_columns *first;
    /* real [batch * heads][key_blocks * block_k]: the base-2 maximum and the reciprocal sum of
     * every column. */
    char *col_max, *col_inverse;
    /* [batch * heads], with gives_back, else NULL: whether rows or columns of a head were given
     * back. */
    atomic_bool *head_given_back;
    atomic_bool any_given_back;
};

/* Room for col_max, col_inverse and head_given_back. */
enum fa_status fa_columns_allocate(struct fa_columns *columns);
enum fa_status fa_column_softmax(struct fa_columns *columns);
void fa_columns_release(struct fa_columns *columns);

/* Bytes that fa_columns_allocate takes.  False: they leave int64. */
bool fa_columns_bytes(const struct fa_geometry *geometry, int64_t *bytes);

/* Where the statistics of a key block lie in col_max and col_inverse. */
static inline int64_t fa_column_offset(const struct fa_geometry *g, int64_t head_index,
                                       int64_t key_block)
{
    return (head_index * g->key_blocks + key_block) * g->block_k * (int64_t)g->ops->size;
}

/* Mark a row's, or a key's, place of `weighing`: the backward pass is to find shift and factor by
 * itself. */
static inline void fa_forget_weighing(const struct fa_geometry *g, char *weighing)
{
    fa_write_lse(g, weighing, 0);
    fa_write_lse(g, weighing + g->params->weighing.col, NAN);
}

#endif
