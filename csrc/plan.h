/* How a call is cut into tasks. */
#ifndef FA_PLAN_H
#define FA_PLAN_H

#include "geometry.h"

/* A task: block_q rows of one head, some columns of v, and all the keys or one split of them. */
struct fa_task {
    struct fa_head head;
    int64_t first_col, cols;
    int64_t first_row, rows;
    /* The splits of the task. */
    int64_t first_split, splits;
    /* Tasks that share the rows and columns: one for each split, or 1. */
    int64_t group_size;
    /* The index of the first of these tasks. */
    int64_t first_in_group;
};

struct fa_plan {
    const struct fa_geometry *geometry;
    /* A task has one split of the keys. */
    bool by_splits;
    int64_t num_tasks;
    /* [batch]: batch entries in the order in which threads work on them. */
    int64_t *entry;
    /* [batch + 1]: the first task of each of these entries, then num_tasks. */
    int64_t *first;
};

/* Bytes that a plan takes.  False: they leave int64. */
bool fa_plan_bytes(const struct fa_geometry *geometry, int64_t *bytes);

/* FA_NO_MEMORY or FA_OVERFLOW if there is no plan; else fa_plan_release releases it. */
enum fa_status fa_plan_init(struct fa_plan *plan, const struct fa_geometry *geometry);
void fa_plan_release(struct fa_plan *plan);

/* The task of an index: 0 <= index < num_tasks. */
struct fa_task fa_plan_task(const struct fa_plan *plan, int64_t index);

/* The splits that hold the keys that some row of the head may see. */
struct fa_key_range fa_head_splits(const struct fa_head *head);

#endif
