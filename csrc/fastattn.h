/* fastattn: exact attention on multicore CPUs.  The whole C interface of the library.
 *
 * Nothing here or below csrc/ knows Python.  The caller (fastattn/_core.pyx) has validated every
 * shape, dtype and value; C states the same rules as FA_ASSERT, which test builds switch on.
 *
 * Strides are in BYTES and may be zero, negative or no multiple of the element size: NumPy allows
 * all three, and every element of caller memory is read and written at the pack and store edges of
 * the kernels only, one exact element at a time where a vector would reach past the last one.
 */
#ifndef FASTATTN_H
#define FASTATTN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Leading ("batch") dimensions of a call.  NumPy has at most 64 dimensions, and the last three of
 * an attention operand are head, sequence and feature. */
#define FA_MAX_BATCH_DIMS 61

enum fa_status {
    FA_OK = 0,
    /* An allocation failed.  Nothing was written, or the outputs are partial. */
    FA_NO_MEMORY,
    /* A size does not fit in 64 bits. */
    FA_OVERFLOW,
    /* The poll callback asked to stop.  The outputs are partial. */
    FA_INTERRUPTED,
    /* This is a child that poll has forked: threads that had tasks are the parent's. */
    FA_FORKED,
};

/* How elements lie in memory.  All but FA_F64 are computed in float32. */
enum fa_dtype {
    FA_F32 = 0,
    FA_F64 = 1,
    /* IEEE binary16. */
    FA_F16 = 2,
    /* The upper half of a float32. */
    FA_BF16 = 3,
    /* Integers, which are multiplied by a float32 scale for each key: k and v only. */
    FA_I8 = 4,
};

/* Bytes of an element. */
static inline int64_t fa_dtype_size(enum fa_dtype dtype)
{
    switch (dtype) {
    case FA_F32:
        return 4;
    case FA_F64:
        return 8;
    case FA_I8:
        return 1;
    default:
        return 2;
    }
}

enum fa_softmax_axis {
    /* The weights of each query sum to one over the keys. */
    FA_SOFTMAX_KEYS = 0,
    /* The weights of each key sum to one over the queries. */
    FA_SOFTMAX_QUERIES = 1,
};

/* An array.  data == NULL: it is absent.  Element (b..., h, i, j) lies at
 *   data + sum(b[x] * batch[x]) + h * head + i * row + j * col.
 * Arrays that lack an axis hold stride 0 there.  Inputs are never written; no two elements of an
 * output share memory. */
struct fa_array {
    void *data;
    int64_t batch[FA_MAX_BATCH_DIMS];
    int64_t head, row, col;
};

/* One call of attention.  All sizes are >= 0.  Aliasing: outputs overlap no input, with one
 * exception: `residual` may be exactly `out` (same address, same strides). */
struct fa_attention_params {
    /* The type of q, out and residual.  lse is float64 for FA_F64, else float32. */
    enum fa_dtype dtype;
    /* The type of k and v: FA_F64 exactly if dtype is FA_F64. */
    enum fa_dtype kv_dtype;
    /* The type of bias: not FA_I8. */
    enum fa_dtype bias_dtype;
    enum fa_softmax_axis softmax_axis;

    /* From 0 to FA_MAX_BATCH_DIMS. */
    int64_t batch_ndim;
    int64_t batch_shape[FA_MAX_BATCH_DIMS];
    /* num_heads is a multiple of num_kv_heads. */
    int64_t num_heads, num_kv_heads;
    int64_t seqlen_q, seqlen_k;
    int64_t head_dim, head_dim_v;

    /* (batch..., num_heads, seqlen_q, head_dim) */
    struct fa_array q;
    /* (batch..., num_kv_heads, seqlen_k, head_dim) */
    struct fa_array k;
    /* (batch..., num_kv_heads, seqlen_k, head_dim_v) */
    struct fa_array v;
    /* float32 (batch..., num_kv_heads, seqlen_k), one for each `row`, with FA_I8, else absent:
     * key j is k_scale[j] times its integers.  v_scale is the same for values. */
    struct fa_array k_scale;
    /* The same for values. */
    struct fa_array v_scale;
    /* (batch..., num_heads, seqlen_q, head_dim_v) */
    struct fa_array out;
    /* Nullable.  (batch..., num_heads, seqlen_q), one for each `row`; with softmax over queries
     * (batch..., num_heads, seqlen_k). */
    struct fa_array lse;
    /* Nullable.  An array of out's shape, which is added to the result. */
    struct fa_array residual;

    /* For the backward pass, in lse's dtype.  `weighing` is nullable, not without lse, of lse's
     * shape and 2 more columns, shift and factor: a weight is exp2(base-2 score - shift) *
     * factor, to the bit what this pass multiplied.  A factor of NaN says that this pass cannot
     * tell.  `exact` is nullable, of out's shape: the result without residual, not rounded to a
     * narrower dtype; softmax over keys only. */
    struct fa_array weighing, exact;

    /* Pages: nullable; int64 (batch..., pages), one per `row`.  Key j of a batch entry is then key
     * j % page_size of page page_table[j / page_size], and k, v, k_scale and v_scale are
     * (pages, num_kv_heads, page_size, ...), their stride from page to page in batch[0]. */
    struct fa_array page_table;
    /* At least 1 with page_table. */
    int64_t page_size;

    /* Packed sequences: nullable, int64 [batch + 1], contiguous, ascending from 0.  q, out, lse and
     * residual hold all queries one after another, those of batch entry b are rows
     * [q_starts[b], q_starts[b + 1]), and seqlen_q is the number of all; likewise keys. */
    const int64_t *q_starts, *k_starts;

    /* The factor of <q_i, k_j>, finite or not. */
    double scale;
    /* Above 0 and finite; 0: there is no softcap. */
    double softcap;
    /* Nullable.  (batch..., num_heads, seqlen_q, seqlen_k) */
    struct fa_array bias;
    /* Nullable.  float64 (batch..., num_heads) */
    struct fa_array alibi_slopes;
    /* Nullable.  float64 (num_heads,), with softmax over keys only. */
    struct fa_array sinks;

    /* Nullable.  (batch..., num_heads, seqlen_q, seqlen_k) of bytes; where a byte is not 0, the
     * key takes part. */
    struct fa_array mask;
    /* Nullable.  int64 (batch...), each from 0 to seqlen_k. */
    struct fa_array kv_lengths;
    /* Nullable: the last query then sees the last key.  int64 (batch...), of at most 2^60 in
     * size. */
    struct fa_array q_offset;
    /* Nullable, with k_segment_ids.  int64 (batch..., seqlen_q), one for each `row`. */
    struct fa_array q_segment_ids;
    /* int64 (batch..., seqlen_k), one for each `row`. */
    struct fa_array k_segment_ids;
    /* Keys j <= i + q_offset take part. */
    bool causal;
    /* Keys from i + q_offset - window_left on take part.  At most 2^60; below 0, this side is
     * open. */
    int64_t window_left;
    /* Keys up to i + q_offset + window_right take part.  At most 2^60; below 0, this side is
     * open. */
    int64_t window_right;

    /* From 0 to 1: the share of weights that become 0.  The others are divided by 1 - dropout_p. */
    double dropout_p;
    /* With (batch entry, head, query, key) the seed decides which weights do
     * (kernels/vector/philox.h). */
    uint64_t dropout_seed;

    /* The most threads that may work on this call: at least 1.  Fewer may be had. */
    int num_threads;

    /* nullable; called now and then by the calling thread only.  Non-zero: stop, return
     * FA_INTERRUPTED. */
    int (*poll)(void *poll_arg);
    void *poll_arg;
};

static inline enum fa_dtype fa_lse_dtype(const struct fa_attention_params *params)
{
    return params->dtype == FA_F64 ? FA_F64 : FA_F32;
}

/* Gradients of one call of attention.  The forward's arguments are `attention`, with head_dim and
 * head_dim_v at most FA_MAX_BACKWARD_DIM, no page_table, no bias with packed sequences, kv_dtype
 * == dtype; its `out`, `lse`, `weighing` and `exact` are not used.  Nothing overlaps, but that
 * rows of grad_bias may share memory. */
struct fa_backward_params {
    struct fa_attention_params attention;
    /* The result of the forward pass, `residual` included. */
    struct fa_array out;
    /* (batch..., num_heads, seqlen_q), as the forward pass gave it. */
    struct fa_array lse;
    /* An array of out's shape and dtype. */
    struct fa_array grad_out;
    /* Nullable.  An array of lse's shape and dtype. */
    struct fa_array grad_lse;
    /* Nullable, each by itself: what the forward pass wrote there. */
    struct fa_array weighing, exact;
    /* Nullable.  An array of q's shape. */
    struct fa_array grad_q;
    /* Nullable.  An array of k's shape, at its full batch shape. */
    struct fa_array grad_k;
    /* Nullable.  An array of v's shape, at its full batch shape. */
    struct fa_array grad_v;
    /* The type of grad_q, grad_k and grad_v: dtype, or FA_F32 beside 16-bit inputs. */
    enum fa_dtype grad_dtype;
    /* Nullable.  An array of bias' shape, with stride 0 where bias is broadcast.  The caller
     * fills it with 0. */
    struct fa_array grad_bias;
    /* FA_F64 for FA_F64, else bias_dtype or FA_F32. */
    enum fa_dtype grad_bias_dtype;
    /* Nullable.  float64 (batch..., num_heads, seqlen_q): the gradient of a head's sink is the
     * sum over its rows. */
    struct fa_array sink_terms;
};

#define FA_MAX_BACKWARD_DIM 1024

/* What becomes of the weights of chosen queries and heads. */
enum fa_weights_form {
    /* (batch..., num_heads, num_rows, seqlen_k) */
    FA_WEIGHTS_EACH,
    /* (batch..., num_heads, pool_rows, pool_cols) of means over blocks.  Of n elements cut into m
     * blocks, block i begins at i * n / m, rounded down. */
    FA_WEIGHTS_MEANS,
    /* (batch..., num_heads, seqlen_k) of sums over the queries. */
    FA_WEIGHTS_SUMS,
};

/* The weights of one call of attention.  The call's arguments are `attention`, where v is like k
 * with no columns (head_dim_v 0), and which has no page_table, q_starts, k_starts or dropout; its
 * out, lse and residual are not used. */
struct fa_weights_params {
    struct fa_attention_params attention;
    enum fa_weights_form form;
    /* The chosen queries, ascending; NULL: all of them, and num_rows is seqlen_q.  `places` is
     * nullable, and NULL without FA_WEIGHTS_EACH: the row of the result for each chosen query,
     * every row once. */
    const int64_t *rows, *places;
    int64_t num_rows;
    /* The chosen query heads in the order of the result; NULL: all of them, and num_heads is
     * their number. */
    const int64_t *heads;
    int64_t num_heads;
    /* With FA_WEIGHTS_MEANS: from 1 to num_rows, and from 1 to seqlen_k. */
    int64_t pool_rows, pool_cols;
    /* The result, in the dtype of lse, contiguous.  The caller fills it with 0. */
    void *weights;
};

/* What a call would do. */
struct fa_attention_plan {
    /* The name of the engine, a static string. */
    const char *engine;
    /* Rows of a task, keys of a block, and rows of a score tile. */
    int64_t block_q, block_k, tile_q;
    /* Rows and columns of a register tile, and lanes of a vector. */
    int64_t mr, nr, vl;
    int64_t num_tasks;
    /* The threads that would work: never more than asked for, nor than tasks. */
    int64_t num_threads;
    /* Bytes that would be allocated for the call, for all threads together. */
    int64_t workspace_bytes;
    /* Score tiles of the problem: tile_q rows against block_k keys. */
    int64_t tiles_total;
    /* The score tiles among these that no mask rules out. */
    int64_t tiles_computed;
    /* The mask, or a bias of 0 and -inf, leaves every query one range of keys, and is read once. */
    bool mask_is_ranges, bias_is_ranges;
};

struct fa_kernels; /* engine.h */

/* The kernel sets that this build holds and this CPU and OS run, best first; NULL past the end. */
const struct fa_kernels *fa_kernels_available(int index);
/* Ask the operating system for the registers that a set needs, before the first call with it.
 * What is granted holds for the process and its children, and asking again does nothing.  False:
 * refused. */
bool fa_kernels_request(const struct fa_kernels *kernels);
/* Every name this library knows, built in or not, in dispatch order; NULL past the end. */
const char *fa_kernels_known_name(int index);
const char *fa_kernels_name(const struct fa_kernels *kernels);
/* Names of the engines of a set, best first; NULL past the end. */
const char *fa_engine_name(const struct fa_kernels *kernels, int index);

/* All entry points compute in the default floating-point mode and leave the thread's own as they
 * found it, exception flags included. */

/* Compute attention.  `kernels` and `params` are read only and not kept. */
enum fa_status fa_attention(const struct fa_attention_params *params,
                            const struct fa_kernels *kernels);

/* Compute the gradients that have somewhere to go. */
enum fa_status fa_attention_backward(const struct fa_backward_params *params,
                                     const struct fa_kernels *kernels);

/* Compute weights and no values. */
enum fa_status fa_attention_weights(const struct fa_weights_params *params,
                                    const struct fa_kernels *kernels);

/* Say what fa_attention would do.  Reads mask, bias and segment ids (to count tiles, on num_threads
 * threads), nothing else; data pointers of q, k, v and out may be NULL.  Polls as fa_attention
 * does. */
enum fa_status fa_attention_describe(const struct fa_attention_params *params,
                                     const struct fa_kernels *kernels,
                                     struct fa_attention_plan *plan);

/* 1 / sqrt(head_dim), 1 for 0. */
double fa_default_scale(int64_t head_dim);

/* Call once, at import and before any fork: without it callers work alone.  Starts no thread.
 * FA_NO_MEMORY if the handler that tells a forked child that it has no team cannot be registered.
 */
enum fa_status fa_team_init(void);

/* The most threads that work on a call, however many it asks for: the number of CPUs, or 16 where
 * there are fewer; 1 without OpenMP. */
int fa_team_limit(void);

/* Whether the library was built with OpenMP. */
bool fa_has_openmp(void);
/* The OpenMP runtime's present thread limit for this thread (omp_get_max_threads), 1 without
 * OpenMP. threadpoolctl and torch.set_num_threads lower it. */
int fa_openmp_max_threads(void);

/* For benchmarks: seconds and operations of `rounds` (>= 1, rounded up a little) times a dozen or
 * two vector multiply-adds without memory on each of num_threads threads: flops / seconds is the
 * most that this kernel set can reach on this machine. */
enum fa_status fa_probe_fma(const struct fa_kernels *kernels, enum fa_dtype dtype, int64_t rounds,
                            int num_threads, double *seconds, double *flops);
/* For benchmarks: seconds to read `bytes` bytes once, all threads together.  data is aligned to
 * 8. */
enum fa_status fa_probe_read(const void *data, int64_t bytes, int num_threads, double *seconds);

#endif
