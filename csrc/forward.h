/* A run of the forward pass: what its tasks share, and the memory that it takes. */
#ifndef FA_FORWARD_H
#define FA_FORWARD_H

#include <stdatomic.h>

#include "column_softmax.h"
#include "geometry.h"
#include "plan.h"
#include "schedule.h"
#include "workspace.h"

/* Everything that the tasks of one run share. */
struct fa_forward {
    const struct fa_geometry *geometry;
    struct fa_plan plan;
    /* num_threads of them, workspace_bytes apart. */
    char *workspaces;
    int64_t workspace_bytes;
    /* Softmax over queries; else its arrays are NULL. */
    struct fa_columns columns;
    /* With plan.by_splits, else NULL: a state of block_q rows for every task, state_bytes apart. */
    char *states;
    int64_t state_bytes;
    /* With plan.by_splits, else NULL: for every group of tasks, at its first, how many of them
     * are done. */
    atomic_int *arrived;
    /* Rows that were given back (enum fa_stored): [num_tasks][block_q], of the tasks that store
     * them; NULL if no row may be given back. */
    uint8_t *given_back;
    /* Whether there is such a row. */
    atomic_bool any_given_back;
    /* [num_tasks][block_q][column_bytes], for rows whose sums left: a bit for each element.  The
     * first task that has such a row allocates them; where that fails, no_memory is set. */
    _Atomic(uint8_t *) elements_left;
    int64_t column_bytes;
    atomic_bool no_memory;
    /* NULL, or the call's first run.  A second run computes what the first gave back, and nothing
     * else. */
    struct fa_forward *first;
    /* Whether the backward pass computes the same scores, so that their weighing holds there. */
    bool keeps_weighing;
};

/* Bytes that a run allocates besides fa_columns_bytes: the buffers of a thread, and of all, a byte
 * for each row that it may give back, and with plan->by_splits a state for each task, all states
 * together, and as many counters. */
struct fa_forward_bytes {
    int64_t workspace, workspaces, given_back, state, states, arrived;
};

/* The bytes of a run.  again: it is a second run.  False: they leave int64. */
bool fa_forward_count(const struct fa_geometry *geometry, const struct fa_plan *plan, bool again,
                      struct fa_forward_bytes *bytes);

/* The engine of a call's first run: of float64 where its options leave no choice. */
const struct fa_engine *fa_attention_engine(const struct fa_attention_params *params,
                                            const struct fa_kernels *kernels);

#endif
