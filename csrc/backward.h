/* The passes of the backward pass. */
#ifndef FA_BACKWARD_H
#define FA_BACKWARD_H

#include <string.h>

#include "geometry.h"
#include "schedule.h"
#include "scores.h"
#include "workspace.h"

/* Rows that meet a key block at a time.  The sums over rows, for grad_k and grad_v, read and write their
 * accumulators once per so many rows: 2 % of their time at 192, where all buffers of a thread still fit a
 * 1 MiB L2 at head_dim 64. */
#define FA_BACKWARD_ROWS (8 * FA_MIN_TILE_Q)

/* Keys per group of key blocks, and the most groups of a head: each costs memory for one more sum of grad_q,
 * and lets one more thread work on the head. */
#define FA_GROUP_K 1024
#define FA_MAX_GROUPS 3

/* One thread's buffers. */
struct fa_backward_workspace {
    struct fa_workspace
        tile; /* of the forward pass, with block_q = FA_BACKWARD_ROWS; v holds V like k holds K */
    char *grad_out;        /* real [FA_BACKWARD_ROWS][head_dim_v] */
    char *q_panels;        /* real [head_dim / nr][FA_BACKWARD_ROWS][nr] */
    char *grad_out_panels; /* real [head_dim_v / nr][FA_BACKWARD_ROWS][nr] */
    char *k_values;        /* real [head_dim / nr][block_k][nr] */
    char *weights;         /* real [FA_BACKWARD_ROWS][block_k]: scores, then weights */
    char *gradients;       /* likewise: of weights, then of scores */
    char *slope;           /* likewise, with softcap */
    char *grad_k, *grad_v; /* real [block_k][padded_k], [block_k][padded_v] */
    char *row_products; /* real [FA_BACKWARD_ROWS][vl]: sums of weights times their gradients */
    /* Softmax over the queries: like grad_v, of one query head; real [block_k]; [nr][nr]. */
    char *head_grad_v, *col_max, *col_sum, *value_products;
    const char **row; /* [FA_BACKWARD_ROWS] */
};

/* Of a softmax, from its base-2 scores s: total is the sum of exp2(s - top), sinks included, and
 * products the sum of these times the gradients of their weights. */
struct fa_statistics {
    double top, total, products;
};

/* Weights from base-2 scores: exp2(s - shift) * factor. */
struct fa_weighing {
    double shift, factor;
    bool by_sums; /* from statistics */
    bool own; /* and these are of all keys that lse is of */
};

/* Everything the tasks of one call share. */
struct fa_backward {
    const struct fa_backward_params *params;
    struct fa_geometry geometry; /* whose engine computes the scores again */
    const struct fa_gradient_engine *engine; /* of the products that follow, with panels as wide */
    int64_t padded_k, padded_v; /* head_dim and head_dim_v in whole panels */
    /* Key blocks of a head are dealt out to this many groups; each has its own sum of grad_q, and these are
     * added in order.  How many depends on a head's seqlen_k alone, so the bits depend on no thread; this is
     * the most of any head. */
    int64_t groups;
    int64_t workspace_bytes;
    char *workspaces;
    /* real [batch * heads][rows], or [batch * heads][keys] with softmax over the queries.  shift
     * and factor give the weights, see fa_weighing; a row without keys has factor 0. */
    char *shift, *factor, *delta;
    bool *
        delta_of_out; /* [batch * heads][rows]: whether delta is grad_out * out, see fa_backward_tile */
    /* Likewise, in a first run: by how much lse exceeds the logarithm of the softmax' own sum, because it is of more
     * keys than those of this call; 0: it does not; NaN: not known.  A second run has scores that are rounded
     * otherwise, and could not tell. */
    char *excess;
    struct fa_sums *sums; /* of grad_q, or NULL */
    /* [units], see fa_sums_init: whether a softmax or a gradient of the unit left the range of its type, and whether
     * any did, or a sum of grad_bias; NULL in a second run.  `first`: NULL, or the run whose units of that kind this
     * one computes again. */
    atomic_bool *unit_left;
    atomic_bool any_left;
    const struct fa_backward *first;
    /* double [num_threads][bias_elements]: a part of grad_bias for each thread, where its elements are not added to as
     * they are; or NULL. */
    double *bias_sums;
    int64_t bias_elements;
};

/* Heads that share their keys and are not stacked: those of a unit. */
int64_t fa_backward_members(const struct fa_geometry *g);

/* Note that a head's unit left the range of its type. */
void fa_backward_leave(struct fa_backward *backward, int64_t head_index);
/* Whether the first run stored the gradients of a head's unit, and whether this run has nothing else to do for it. */
bool fa_backward_is_stored(const struct fa_backward *backward, int64_t head_index);
bool fa_backward_is_done(const struct fa_backward *backward, int64_t head_index);

/* Sums of grad_q (backward_sums.c).  A unit is what one task of each group works on: a key head, or, with softmax
 * over the queries, all heads that share it.  Its sums, real [heads of it][groups][rows][padded_k], exist from
 * its first task on until its last has added and stored them. */
enum fa_status fa_sums_init(struct fa_backward *backward, int64_t units, int64_t heads_per_unit);
void fa_sums_release(struct fa_sums *sums);
/* A unit's sums, for a task of it; their contents are arbitrary.  `tasks`: how many it has. */
char *fa_sums_enter(struct fa_sums *sums, int64_t unit, int64_t tasks);
/* The task is done.  True: it is the unit's last, and calls fa_sums_leave when it needs the sums no more. */
bool fa_sums_finish(struct fa_sums *sums, int64_t unit);
void fa_sums_leave(struct fa_sums *sums, int64_t unit);

/* Workspace of a thread. */
bool fa_backward_workspace_bytes(struct fa_backward *backward);
struct fa_backward_workspace fa_backward_workspace_of(const struct fa_backward *backward,
                                                      int thread);

/* Rows [first, first + rows) of a head against the key block whose packed keys and values ws holds and has
 * located: weights and gradients of scores, in ws->weights and ws->gradients, 0 where a key takes no part.  Returns the
 * columns, whole panels, outside of which there is nothing; none: lo == hi.  weights_only: and nothing in
 * ws->gradients. */
struct fa_key_range fa_backward_tile(const struct fa_backward *backward, const struct fa_head *head,
                                     int64_t head_index, struct fa_backward_workspace *ws,
                                     int64_t first, int64_t rows, int64_t block_key,
                                     bool weights_only);

/* Scores of rows [first, first + rows), at most tile_q, against that key block, into ws->weights
 * at row `offset`, and gradients of weights, dropout included, into ws->gradients.  `part`: where
 * they are, as a workspace of the forward pass.  False: no key takes part. */
bool fa_backward_scores(const struct fa_backward *backward, struct fa_tile *tile,
                        struct fa_workspace *part, const struct fa_head *head,
                        struct fa_backward_workspace *ws, int64_t first, int64_t rows,
                        int64_t offset, int64_t block_key, bool weights_only);

/* Rows [first, first + rows) of grad_out into ws->grad_out; where they lie stays in ws->row. */
void fa_backward_load_grad(const struct fa_backward *backward, int64_t head_index,
                           struct fa_backward_workspace *ws, int64_t first, int64_t rows);

/* Pack the keys and values of a block for fa_backward_tile. */
void fa_backward_pack(const struct fa_backward *backward, const struct fa_head *head,
                      struct fa_backward_workspace *ws, int64_t block_key, int64_t keys);

/* Statistics (backward_statistics.c).  Whether a softmax over `scores` scores, one of `softmaxes`,
 * needs its own, because lse is not exact enough for its weights. */
bool fa_statistics_wanted(const struct fa_backward *backward, double lse, int64_t scores,
                          int64_t softmaxes);
/* How a softmax is weighed: as the forward pass kept it, by its statistics, or by lse if there are none or lse is not
 * theirs.  It is not where the caller merged attention over more keys than those of this call, and means the gradients
 * of that; with what the forward pass kept, nothing is merged.  kept, of: each may be NULL.  excess: its own, in the
 * first run's array.  sure: the statistics are to be believed.  A second run's total becomes that of all keys. */
struct fa_weighing fa_weigh(const struct fa_backward *backward, char *excess,
                            const struct fa_weighing *kept, struct fa_statistics *of, bool sure,
                            double lse);
/* A sink, a base-2 score or -inf, joins the total; its weight, by statistics or, where they are NULL, by lse. */
void fa_statistics_add_sink(struct fa_statistics *of, double sink);
double fa_sink_weight(const struct fa_statistics *of, double lse, double sink);
/* The nearest element of the workspace's type; a finite number stays finite. */
double fa_round_real(const struct fa_geometry *g, double x);
/* That of a row, or of a key with softmax over the queries, as the forward pass kept it.  False: it is not there, or
 * not of the scores that this run computes. */
bool fa_weighing_kept(const struct fa_backward *backward, const char *at, struct fa_weighing *kept);
/* The weight of a sink, a base-2 score or -inf, beside it. */
double fa_kept_sink_weight(const struct fa_weighing *kept, double sink);
/* Those of the rows from `first` on, FA_BACKWARD_ROWS at most, that are wanted; the others' are
 * arbitrary.  Without sinks.  False: stopped. */
bool fa_backward_row_statistics(struct fa_job *job, int thread, const struct fa_head *head,
                                int64_t head_index, struct fa_backward_workspace *ws, int64_t first,
                                int64_t rows, const bool *wanted, struct fa_statistics *of);
/* Those of all keys of the block that ws holds: top and total, into ws->col_max and ws->col_sum.
 * False: stopped. */
bool fa_backward_column_statistics(struct fa_job *job, int thread, const struct fa_head *head,
                                   struct fa_backward_workspace *ws, int64_t block_key);

/* shift, factor and delta of every row; grad_bias. */
void fa_backward_prepare_rows(struct fa_job *job, int64_t index, int thread);
void fa_backward_bias(struct fa_job *job, int64_t index, int thread);
/* bias_sums, for a run that needs them. */
enum fa_status fa_backward_allocate_bias(struct fa_backward *backward);
int64_t fa_backward_bias_tasks(const struct fa_backward *backward);

/* grad_q of a head from its `groups` sums, each of rows times padded_k elements, g->rows apart; scratch: padded_k
 * elements. */
void fa_backward_store_rows(struct fa_backward *backward, int64_t head_index, const char *sums,
                            char *scratch);

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

/* What sums of gradients of scores are multiplied by, if their terms were not. */
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
