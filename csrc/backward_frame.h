/* The things that the passes of the backward pass share: a call, a thread's buffers, and where
 * numbers of rows and columns lie. */
#ifndef FA_BACKWARD_FRAME_H
#define FA_BACKWARD_FRAME_H

#include "geometry.h"
#include "schedule.h"
#include "scores.h"
#include "workspace.h"

/* Rows that meet a key block at a time.  The sums over rows, for grad_k and grad_v, read and
 * write their accumulators once for so many rows: 2 % of their time at 192, where all buffers of
 * a thread still fit a 1 MiB L2 at head_dim 64. */
#define FA_BACKWARD_ROWS (8 * FA_MIN_TILE_Q)

/* Keys per group of key blocks, and the most groups of a head: each costs memory for one more sum
 * of grad_q, and lets one more thread work on the head. */
#define FA_GROUP_K 1024
#define FA_MAX_GROUPS 3

/* One thread's buffers. */
struct fa_backward_workspace {
    /* A workspace as the forward pass has it, with a block_q of FA_BACKWARD_ROWS.  Its v holds V
     * as k holds K, and its scores and slopes are rows of `weights` and `slope`. */
    struct fa_workspace forward;
    /* The first key of the block that the workspace holds. */
    int64_t block_key;
    /* Whether all that q_panels, grad_out_panels and k_values hold is finite. */
    bool q_finite, grad_finite, keys_finite;
    /* real [FA_BACKWARD_ROWS][head_dim_v] */
    char *grad_out;
    /* real [head_dim / nr][FA_BACKWARD_ROWS][nr] */
    char *q_panels;
    /* real [head_dim_v / nr][FA_BACKWARD_ROWS][nr] */
    char *grad_out_panels;
    /* real [head_dim / nr][block_k][nr] */
    char *k_values;
    /* real [FA_BACKWARD_ROWS][score_stride]: scores, then weights. */
    char *weights;
    /* real [FA_BACKWARD_ROWS][score_stride]: gradients of weights, then of scores. */
    char *gradients;
    /* real [FA_BACKWARD_ROWS][score_stride], with softcap. */
    char *slope;
    /* real [block_k][padded_k] and [block_k][padded_v] */
    char *grad_k, *grad_v;
    /* real [FA_BACKWARD_ROWS][vl]: sums of weights times their gradients. */
    char *row_products;
    /* For softmax over the queries: real [block_k][padded_v], grad_v of one query head; real
     * [block_k], twice; and real [nr][nr]. */
    char *head_grad_v, *col_max, *col_sum, *value_products;
    /* [FA_BACKWARD_ROWS] */
    const char **row;
};

/* A softmax by its base-2 scores s: total is the sum of exp2(s - top), sinks included, and
 * products the sum of the same terms times the gradients of their weights. */
struct fa_statistics {
    double top, total, products;
};

/* Weights from base-2 scores: exp2(s - shift) * factor. */
struct fa_weighing {
    double shift, factor;
    /* The weighing comes from statistics. */
    bool by_sums;
    /* The statistics are of all keys that lse is of. */
    bool own;
};

/* Everything that the tasks of one run share. */
struct fa_backward {
    const struct fa_backward_params *params;
    /* Its engine computes the scores again. */
    struct fa_geometry geometry;
    /* Of a first run. */
    struct fa_ranges ranges;
    /* The engine of the products that follow, with panels as wide. */
    const struct fa_gradient_engine *engine;
    /* head_dim and head_dim_v in whole panels. */
    int64_t padded_k, padded_v;
    /* Key blocks of a head are dealt out to so many groups.  Each group has a sum of grad_q, and
     * these are added in order.  A head's seqlen_k alone decides how many it has, so that no bit
     * depends on threads; this is the most that any head has. */
    int64_t groups;
    int64_t workspace_bytes;
    char *workspaces;
    /* real [batch * heads][rows], or [batch * heads][keys] with softmax over the queries.  shift
     * and factor give the weights (fa_weighing); a row without keys has factor 0. */
    char *shift, *factor, *delta;
    /* [batch * heads][rows]: whether delta is the sum of grad_out * out (backward_tile.c). */
    bool *delta_of_out;
    /* As many elements, in a first run: by how much lse exceeds the logarithm of the softmax' own
     * sum, because lse is of more keys than those of this call; 0: it does not; NaN: not known.
     * A second run has scores that are rounded otherwise, and could not tell. */
    char *excess;
    /* The sums of grad_q, or NULL. */
    struct fa_sums *sums;
    /* [units] (fa_sums_init), NULL in a second run: whether a softmax or a gradient of the unit
     * left the range of its type. */
    atomic_bool *unit_left;
    /* Whether any unit did, or a sum of grad_bias. */
    atomic_bool any_left;
    /* NULL, or the first run.  A second run computes again the units that left. */
    const struct fa_backward *first;
    /* NULL, or double [num_threads][bias_elements]: sums of grad_bias, where a thread does not
     * add to its elements as they are. */
    double *bias_sums;
    int64_t bias_elements;
};

/* Heads that share their keys and are not stacked: those of a unit. */
int64_t fa_backward_members(const struct fa_geometry *g);

/* Note that a head's unit left the range of its type. */
void fa_backward_leave(struct fa_backward *backward, int64_t head_index);
/* Whether the first run has stored the gradients of a head's unit; and whether this run has
 * nothing else to do for the unit. */
bool fa_backward_is_stored(const struct fa_backward *backward, int64_t head_index);
bool fa_backward_is_done(const struct fa_backward *backward, int64_t head_index);

/* Bytes of a thread's workspace (false: they leave int64), and the workspace. */
bool fa_backward_workspace_bytes(struct fa_backward *backward);
struct fa_backward_workspace fa_backward_workspace_of(const struct fa_backward *backward,
                                                      int thread);

/* The nearest element of the workspace's type; a finite number stays finite. */
double fa_round_real(const struct fa_geometry *g, double x);

/* Rows of all heads before this one, in arrays that hold a number for every row. */
static inline int64_t fa_rows_before(const struct fa_geometry *g, int64_t head_index)
{
    const int64_t *starts = g->params->q_starts;
    const int64_t entry = head_index / g->heads, head = head_index % g->heads;
    if (starts == NULL) {
        return head_index * g->rows;
    }
    const int64_t rows = (starts[entry + 1] - starts[entry]) * g->stacked;
    return starts[entry] * g->stacked * g->heads + head * rows;
}

/* Keys of a head's arrays, valid or not. */
static inline int64_t fa_backward_seqlen_k(const struct fa_geometry *g, int64_t head_index)
{
    const int64_t *starts = g->params->k_starts, entry = head_index / g->heads;
    return starts == NULL ? g->params->seqlen_k : starts[entry + 1] - starts[entry];
}

static inline int64_t fa_backward_groups(const struct fa_geometry *g, int64_t head_index)
{
    const int64_t wanted = fa_ceil_div(fa_backward_seqlen_k(g, head_index), FA_GROUP_K);
    return fa_max(1, fa_min(FA_MAX_GROUPS, wanted));
}

static inline bool fa_over_queries(const struct fa_geometry *g)
{
    return g->params->softmax_axis == FA_SOFTMAX_QUERIES;
}

/* The factor of sums of gradients of scores, if their terms do not have it. */
static inline double fa_backward_factor(const struct fa_geometry *g)
{
    return g->scales_scores ? 1 : g->params->scale;
}

/* The run that has the array of excesses. */
static inline const struct fa_backward *fa_first_run(const struct fa_backward *b)
{
    return b->first != NULL ? b->first : b;
}

/* Softmax over the queries: where shift, factor and delta of a key lie. */
static inline int64_t fa_column_at(const struct fa_geometry *g, int64_t head_index, int64_t key)
{
    return (head_index * g->key_blocks * g->block_k + key) * (int64_t)g->ops->size;
}

/* Tasks of the passes over rows: FA_BACKWARD_ROWS of one head each. */
static inline int64_t fa_backward_row_blocks(const struct fa_geometry *g)
{
    return fa_ceil_div(g->rows, FA_BACKWARD_ROWS);
}

#endif
