/* Which rows and keys a call has, how they are cut into blocks, how many threads the work pays
 * for, and which keys take part in a row.  Sizes and masks only: no scores. */
#ifndef FA_GEOMETRY_H
#define FA_GEOMETRY_H

#include <string.h>

#include "common.h"
#include "fastattn.h"
#include "engine.h"

/* Tasks per thread that a call is cut into, rows permitting, for balance at its end: a thread
 * that waits for the last task of another loses half a task on average, 4 % of the call at 12.
 * More tasks pack K and V more often. */
#define FA_TASKS_PER_THREAD 12

/* Rows of a head up to which threads share its keys rather than its rows: packing costs 5 % of
 * the time at this number, and the states of splits are at most FA_MAX_SPLIT_ROWS / (2 * SPLIT_K)
 * = 9 % of K and V. */
#define FA_MAX_SPLIT_ROWS 192

/* One call's loop nest.
 *
 * Rows that share keys are stacked: softmax over keys stacks the group_size query heads of a key
 * head, token-major, so that K and V are packed once per group and a block of rows spans few
 * tokens (tight causal bounds).  Softmax over queries keeps heads apart, since each has column
 * sums of its own. */
struct fa_geometry {
    const struct fa_attention_params *params;
    /* The engine that computes scores, and in the forward pass the result. */
    const struct fa_engine *engine;
    /* The engine's operations. */
    const struct fa_tile_ops *ops;
    /* Key heads; with softmax over queries, or where heads are chosen, query heads. */
    int64_t heads;
    bool of_key_heads;
    /* Query heads that are stacked in a block of rows. */
    int64_t stacked;
    /* Rows of a head: seqlen_q * stacked; of the longest sequence where sequences are packed. */
    int64_t rows;
    /* The product of batch_shape. */
    int64_t batch;
    /* Elements of the workspace in a row of q and in a packed key. */
    int64_t depth;
    /* Elements of the workspace in a packed column of a block of values. */
    int64_t value_depth;
    /* Rows of a score tile. */
    int64_t tile_q;
    /* Keys of a block, which head_dim and dtype alone decide. */
    int64_t block_k;
    /* Keys of a split, a whole number of blocks, decided likewise. */
    int64_t split_k;
    /* Elements from a row of scores to the next: at least block_k. */
    int64_t score_stride;
    /* Rows of a task. */
    int64_t block_q;
    /* Columns of v of a task. */
    int64_t block_dv;
    int64_t key_blocks, dv_blocks;
    /* Threads that will work. */
    int num_threads;
    /* Nullable: the query heads and the queries that heads and rows are (fa_geometry_choose). */
    const int64_t *chosen_heads, *chosen_rows;
    /* Arrays are narrower than float64, which computes: it reads and writes elements one by one. */
    bool widened;
    /* Of float64: a scale of more than 1 multiplies scores after their sum, a smaller one q, and
     * either multiplies gradients before their sums, so that no sum is infinite where the
     * reference's is not.  Else q has all factors of the scores, and sums of gradients are
     * multiplied. */
    bool scales_scores;
    /* Not 0 in a second run for float64: every value, or every gradient of the result, is divided
     * by 2^value_exponent. */
    int value_exponent;
    /* Nullable: masks that are ranges. */
    const struct fa_ranges *ranges;
};

/* The arrays that ranges may stand for. */
enum fa_masked_by { FA_BY_MASK = 1, FA_BY_BIAS = 2 };

/* Masks that leave each query one range of keys (mask_ranges.c). */
struct fa_ranges {
    /* struct fa_key_range (batch..., seqlen_q), one for each `row`: the keys that take part. */
    struct fa_array keys;
    /* uint8_t (batch...), each of enum fa_masked_by: the arrays that `keys` stands for in a batch
     * entry.  Where there is none, `keys` is not to be used. */
    struct fa_array replaced;
    /* The numbers of `replaced` in memory. */
    int64_t entries;
    /* Of both arrays. */
    void *memory;
};

/* That exponent: 2^64 values of weight 1 have a finite sum then.  Only values below 2^-958 lose
 * bits. */
#define FA_AGAIN_EXPONENT 64

/* Whether the call has an element to write.  If not, its other sizes may be anything: nothing is
 * to be counted, allocated or visited. */
bool fa_has_results(const struct fa_attention_params *params);

/* FA_OVERFLOW if the problem cannot be counted in 64 bits.  The engine may compute in float64
 * whatever the arrays are. */
enum fa_status fa_geometry_init(struct fa_geometry *geometry,
                                const struct fa_attention_params *params,
                                const struct fa_engine *engine);

/* Keep chosen query heads and queries only, NULL for all of them; nothing is stacked.  The
 * queries ascend. */
void fa_geometry_choose(struct fa_geometry *geometry, const int64_t *heads, int64_t num_heads,
                        const int64_t *rows, int64_t num_rows);

/* Share out the rows of a short head evenly over as few tiles as hold them: for passes over tiles
 * whose size is in no bit of their results. */
void fa_geometry_fit_tiles(struct fa_geometry *geometry);

/* Keys [lo, hi); none, if lo is not below hi. */
struct fa_key_range {
    int64_t lo, hi;
};

/* One (batch entry, head) of the call: where its arrays start. */
struct fa_head {
    const struct fa_geometry *geometry;
    /* The index of the head: from 0 to batch * heads - 1. */
    int64_t index;
    /* The batch entry, and the first of the stacked query heads. */
    int64_t entry, first_head;
    const char *q, *k, *v, *residual, *alibi_slopes, *sinks;
    /* NULL, too, where key_ranges stands for them. */
    const char *bias, *mask;
    const char *q_segment_ids, *k_segment_ids, *k_scale, *v_scale, *page_table;
    char *out, *lse, *weighing, *exact;
    /* Queries times stacked heads. */
    int64_t rows;
    /* Keys [0, kv_length) are valid. */
    int64_t kv_length;
    /* The position of token 0 on the key axis. */
    int64_t q_offset;
    /* Nullable: the keys of each token, range_step apart. */
    const struct fa_key_range *key_ranges;
    int64_t range_step;
};

/* Set up the head of an index: 0 <= index < batch * heads. */
void fa_head_init(struct fa_head *head, const struct fa_geometry *geometry, int64_t index);

/* The (batch entry, first query head, key head) that a head index stands for; and bytes from the
 * start of an array with these strides to a batch entry of it. */
struct fa_head_place {
    int64_t entry, first_head, kv_head;
};

struct fa_head_place fa_head_place(const struct fa_geometry *geometry, int64_t index);
int64_t fa_entry_offset(const struct fa_geometry *geometry, int64_t entry, const int64_t *batch);

/* Where the elements of a head begin in an array: those of its first query head, or of its key
 * head; NULL stays NULL. */
char *fa_array_of(const struct fa_geometry *geometry, const struct fa_array *array,
                  int64_t head_index, bool of_keys);

/* Where a row of a head begins in an array of queries; NULL stays NULL. */
char *fa_row_of(const struct fa_geometry *geometry, const struct fa_array *array,
                int64_t head_index, int64_t row);

/* Row r of a head is token r / stacked of the stacked query head r % stacked, or the token that
 * was chosen.  Every row of every tile asks: most calls stack nothing, and need no division. */
static inline int64_t fa_row_token(const struct fa_geometry *geometry, int64_t row)
{
    if (geometry->chosen_rows != NULL) {
        return geometry->chosen_rows[row];
    }
    return geometry->stacked == 1 ? row : row / geometry->stacked;
}

static inline int64_t fa_row_member(const struct fa_geometry *geometry, int64_t row)
{
    return geometry->stacked == 1 ? 0 : row % geometry->stacked;
}

/* Bytes from the first element of a head in an array to a row of it: to its token, and to the
 * stacked head that it is of. */
static inline int64_t fa_row_offset(const struct fa_geometry *geometry,
                                    const struct fa_array *array, int64_t row)
{
    return fa_row_member(geometry, row) * array->head + fa_row_token(geometry, row) * array->row;
}

/* Numbers of any alignment. */
static inline int64_t fa_read_int64(const char *p)
{
    int64_t x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* A number of float32 or float64, in `size` bytes of any alignment. */
static inline double fa_read_number(const char *p, size_t size)
{
    float single;
    double x;
    if (size == sizeof x) {
        memcpy(&x, p, sizeof x);
        return x;
    }
    memcpy(&single, p, sizeof single);
    return (double)single;
}

static inline void fa_write_number(char *p, double x, size_t size)
{
    const float single = (float)x;
    if (size == sizeof x) {
        memcpy(p, &x, sizeof x);
    } else {
        memcpy(p, &single, sizeof single);
    }
}

/* An element of the workspace. */
static inline double fa_read_real(const struct fa_geometry *g, const char *p)
{
    return fa_read_number(p, g->ops->size);
}

static inline void fa_write_real(const struct fa_geometry *g, char *p, double x)
{
    fa_write_number(p, x, g->ops->size);
}

/* An element of lse or its gradient, or of the sinks' terms. */
static inline double fa_read_lse(const struct fa_geometry *g, const char *p)
{
    return fa_read_number(p, (size_t)fa_dtype_size(fa_lse_dtype(g->params)));
}

static inline void fa_write_lse(const struct fa_geometry *g, char *p, double x)
{
    fa_write_number(p, x, (size_t)fa_dtype_size(fa_lse_dtype(g->params)));
}

/* Whether the call has a bias, also one that ranges stand for. */
static inline bool fa_is_biased(const struct fa_geometry *g)
{
    return g->params->bias.data != NULL;
}

/* Keys that causal, window and kv_lengths leave to a token.  Both ends grow with the token, so the
 * ends of a run of tokens bound all of it. */
struct fa_key_range fa_position_keys(const struct fa_head *head, int64_t token);

/* Keys that these leave and masks that are ranges, whose ends may be anywhere. */
struct fa_key_range fa_token_keys(const struct fa_head *head, int64_t token);

/* Rows [first, first + count) of a head. */
struct fa_head_rows {
    const struct fa_head *head;
    int64_t first, count;
};

/* The rows of the tile that begins at the r-th of some rows: tile_q of them, or all that are
 * left. */
static inline struct fa_head_rows fa_tile_rows(const struct fa_head_rows *rows, int64_t r)
{
    return (struct fa_head_rows){
        .head = rows->head,
        .first = rows->first + r,
        .count = fa_min(rows->head->geometry->tile_q, rows->count - r),
    };
}

/* Of some keys, those from the first to the last that any of the rows may see, and those that all
 * of them see. */
struct fa_rows_keys {
    struct fa_key_range any, all;
};

/* There is at least one row. */
struct fa_rows_keys fa_rows_keys_of(const struct fa_head_rows *rows, struct fa_key_range keys);

/* Keys that any of the rows may see, of all. */
struct fa_key_range fa_rows_keys(const struct fa_head_rows *rows);

#endif
