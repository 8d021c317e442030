#include "plan.h"

#include <stdlib.h>

#include "workspace.h"

static int64_t row_blocks_of(const struct fa_geometry *g, const struct fa_head *head)
{
    return g->block_q == 0 ? 0 : fa_ceil_div(head->rows, g->block_q);
}

/* Keys that some row of the head may see. */
static struct fa_key_range head_keys(const struct fa_head *head)
{
    const struct fa_head_rows rows = {.head = head, .count = head->rows};
    return head->rows == 0 ? (struct fa_key_range){0, 0} : fa_rows_keys(&rows);
}

/* What the work of a row grows with: keys that the head has, or that its masks leave. */
static int64_t count_keys(const struct fa_head *head)
{
    const struct fa_key_range keys = head_keys(head);
    return head->key_ranges == NULL ? head->kv_length : keys.hi - keys.lo;
}

struct fa_key_range fa_head_splits(const struct fa_head *head)
{
    const int64_t split_k = head->geometry->split_k;
    const struct fa_key_range keys = head_keys(head);
    return (struct fa_key_range){.lo = keys.lo / split_k, .hi = fa_ceil_div(keys.hi, split_k)};
}

/* Tasks of one head. */
static int64_t count_tasks(const struct fa_plan *plan, const struct fa_head *head)
{
    const struct fa_geometry *g = plan->geometry;
    const struct fa_key_range splits = fa_head_splits(head);
    const int64_t count = plan->by_splits ? fa_max(1, splits.hi - splits.lo) : 1;
    return g->dv_blocks * row_blocks_of(g, head) * count;
}

/* Whether the rows make too few tasks for the threads, while their keys make several splits. */
static bool wants_splits(const struct fa_geometry *g, int64_t num_tasks)
{
    return g->params->softmax_axis == FA_SOFTMAX_KEYS && g->num_threads > 1 &&
           g->rows <= FA_MAX_SPLIT_ROWS && g->params->seqlen_k > g->split_k &&
           num_tasks < g->num_threads * FA_TASKS_PER_THREAD;
}

struct ranked {
    double cost;
    int64_t entry;
};

/* Most work first, and batch entries of equal work in their own order. */
static int compare_ranks(const void *left, const void *right)
{
    const struct ranked *a = left, *b = right;
    if (a->cost != b->cost) {
        return a->cost > b->cost ? -1 : 1;
    }
    return (a->entry > b->entry) - (a->entry < b->entry);
}

/* Long sequences first, so that the last tasks of the call are short ones. */
static enum fa_status order_entries(struct fa_plan *plan)
{
    const struct fa_geometry *g = plan->geometry;
    const struct fa_attention_params *p = g->params;
    const bool unequal = p->q_starts != NULL || p->k_starts != NULL || p->kv_lengths.data != NULL ||
                         g->ranges != NULL;
    for (int64_t i = 0; i < g->batch; i++) {
        plan->entry[i] = i;
    }
    if (!unequal || g->batch < 2 || g->heads == 0) {
        return FA_OK;
    }
    struct ranked *ranks = malloc((size_t)g->batch * sizeof *ranks);
    if (ranks == NULL) {
        return FA_NO_MEMORY;
    }
    for (int64_t i = 0; i < g->batch; i++) {
        struct fa_head head;
        fa_head_init(&head, g, i * g->heads);
        ranks[i].cost = (double)head.rows * (double)count_keys(&head);
        ranks[i].entry = i;
    }
    qsort(ranks, (size_t)g->batch, sizeof *ranks, compare_ranks);
    for (int64_t i = 0; i < g->batch; i++) {
        plan->entry[i] = ranks[i].entry;
    }
    free(ranks);
    return FA_OK;
}

static enum fa_status number_tasks(struct fa_plan *plan)
{
    const struct fa_geometry *g = plan->geometry;
    plan->num_tasks = 0;
    for (int64_t i = 0; i < g->batch; i++) {
        struct fa_head head;
        int64_t tasks = 0;
        if (g->heads > 0) {
            fa_head_init(&head, g, plan->entry[i] * g->heads);
            tasks = count_tasks(plan, &head);
        }
        plan->first[i] = plan->num_tasks;
        if (!fa_multiply(tasks, g->heads, &tasks) ||
            !fa_add(plan->num_tasks, tasks, &plan->num_tasks)) {
            return FA_OVERFLOW;
        }
    }
    plan->first[g->batch] = plan->num_tasks;
    return FA_OK;
}

bool fa_plan_bytes(const struct fa_geometry *geometry, int64_t *bytes)
{
    int64_t numbers; /* entry, and first, which has one more */
    *bytes = 0;
    return fa_multiply(geometry->batch, 2, &numbers) &&
           fa_add_bytes(bytes, numbers + 1, (int64_t)sizeof(int64_t));
}

enum fa_status fa_plan_init(struct fa_plan *plan, const struct fa_geometry *geometry)
{
    const int64_t batch = geometry->batch;
    *plan = (struct fa_plan){.geometry = geometry};
    int64_t bytes;
    if (!fa_plan_bytes(geometry, &bytes)) {
        return FA_OVERFLOW;
    }
    plan->entry = fa_allocate(bytes);
    if (plan->entry == NULL) {
        return FA_NO_MEMORY;
    }
    plan->first = plan->entry + batch;
    enum fa_status status = order_entries(plan);
    if (status == FA_OK) {
        status = number_tasks(plan);
    }
    if (status == FA_OK && wants_splits(geometry, plan->num_tasks)) {
        plan->by_splits = true;
        status = number_tasks(plan);
    }
    if (status != FA_OK) {
        fa_plan_release(plan);
    }
    return status;
}

void fa_plan_release(struct fa_plan *plan)
{
    fa_release(plan->entry);
    plan->entry = NULL;
}

/* The place of a task's batch entry in the order of batch entries. */
static int64_t find_place(const struct fa_plan *plan, int64_t index)
{
    int64_t lo = 0, hi = plan->geometry->batch - 1;
    while (lo < hi) {
        const int64_t middle = lo + (hi - lo + 1) / 2;
        if (plan->first[middle] <= index) {
            lo = middle;
        } else {
            hi = middle - 1;
        }
    }
    return lo;
}

/* Tasks of a head are neighbours, so that threads share its K and V in the last cache; within a
 * head the rows that see the most keys under a causal mask come first. */
struct fa_task fa_plan_task(const struct fa_plan *plan, int64_t index)
{
    const struct fa_geometry *g = plan->geometry;
    const int64_t place = find_place(plan, index);
    const int64_t tasks = (plan->first[place + 1] - plan->first[place]) / g->heads;
    int64_t within = index - plan->first[place];
    struct fa_task task;
    fa_head_init(&task.head, g, plan->entry[place] * g->heads + within / tasks);
    within %= tasks;

    const struct fa_key_range splits = fa_head_splits(&task.head);
    task.first_split = splits.lo;
    task.splits = splits.hi - splits.lo;
    task.group_size = 1;
    if (plan->by_splits) {
        task.group_size = fa_max(1, task.splits);
        task.first_split += within % task.group_size;
        task.splits = fa_min(1, task.splits);
    }
    task.first_in_group = index - within % task.group_size;
    within /= task.group_size;

    const int64_t row_blocks = row_blocks_of(g, &task.head);
    task.first_row = (row_blocks - 1 - within % row_blocks) * g->block_q;
    task.rows = fa_min(g->block_q, task.head.rows - task.first_row);
    task.first_col = within / row_blocks * g->block_dv;
    task.cols = fa_min(g->block_dv, g->params->head_dim_v - task.first_col);
    return task;
}
