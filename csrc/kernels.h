/* What a kernel set is: sizes of its register tile and the functions of the inner loops, for each
 * element type it computes in.  A set knows one instruction set and neither threads nor batches; the
 * macro-kernels (forward.c, column_softmax.c) know everything else and no instruction set.
 *
 * Buffers named here are workspace: contiguous, FA_ALIGNMENT-aligned, zero-padded, and never shared
 * between threads.  Only the load/pack/store functions touch caller memory; there strides are in
 * bytes and arbitrary, and no byte outside the named elements is read or written.
 *
 * Scores are kept in base-2 logarithms: s2 = log2(e) * s, so that a weight is exp2(s2 - row_max).
 */
#ifndef FA_KERNELS_H
#define FA_KERNELS_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "fastattn.h"

/* log2(e) and ln(2): between natural and base-2 logarithms. */
#define FA_LOG2_E 1.4426950408889634074
#define FA_LN_2 0.69314718055994530942

/* Rows of a score tile.  A multiple of every set's MR; small enough that the score tile, its Q rows
 * and one packed panel share a 32 KiB L1 (24 x 128 float32 scores = 12 KiB).  A table of its own for the forward
 * pass may take another number, up to FA_MAX_TILE_Q. */
#define FA_TILE_Q 24
#define FA_MAX_TILE_Q 32

/* Bytes of a row of the score tile: 24 rows are 12 KiB, which leaves the Q rows and a packed panel
 * their place in a 32 KiB L1; by tiles two of 32 rows are 32 KiB of 48.  So also the most weights that
 * a kernel meets in a row. */
#define FA_SCORE_ROW_BYTES 512
#define FA_MAX_BLOCK_K_F32 (FA_SCORE_ROW_BYTES / 4)

/* Keys beyond those of a block whose place is known while it is read, so that loops can ask for memory
 * ahead; for each element that a lane of float32 holds. */
#define FA_KEYS_AHEAD 80

/* Multiply-adds of a chain: sums of products are cut at its multiples, counted from the start of head_dim, or of a
 * block of keys or rows, and the chains are added in order.  One chain of n terms of one sign errs by up to n / 2
 * rounding units, 64 up to 6.4 (docs/design.md), and what ends a chain costs 1 / 64 of an
 * addition per multiply-add.  A multiple of the most elements that few_template.h loads at a time. */
#define FA_CHAIN 64

/* Bytes of a cache line on the machines that the kernel sets are for. */
#define FA_LINE 64

/* Caller memory that is wanted soon, for the products to fetch while they compute: `rows` stretches of
 * `bytes` bytes.  Zero bytes want nothing. */
struct fa_wanted {
    const char *row[FA_MAX_TILE_Q];
    size_t rows, bytes;
    size_t next_row, next_byte; /* not asked for yet */
};

/* The keys, or the values, of a block, wherever each of them lies. */
struct fa_keys {
    const char *const *row; /* the first element of each key */
    size_t located;         /* of which there are more than are packed: they come next */
    int64_t col_stride;
    enum fa_dtype dtype;
    const float *scale; /* of each key, up to a whole panel; NULL: 1.  Not part of the elements. */
    size_t into_chain; /* place of the first key in its chain: below FA_CHAIN */
};

/* c = (accumulate ? c : 0) + a b, in elements of the workspace's type, for i < rows, k < depth and
 * j < panels * nr:
 * a(i, k) = a[i * a_stride + k], or a[k * a_stride + i] where a product says that it takes a transposed,
 * b(k, j) = b[j / nr * b_panel + k * nr + j % nr],
 * c(i, j) = c[i * c_row + j]. */
struct fa_product {
    size_t rows, depth, panels;
    const void *a;
    size_t a_stride;
    const void *b;
    size_t b_panel;
    void *c;
    size_t c_row;
    bool accumulate;
    size_t into_chain; /* place of k = 0 in its chain: below FA_CHAIN */
    float factor; /* c is multiplied by it, where load_rows did not do that to a */
};

/* Elements of queries, scaled or not, and of keys that are below 2^FA_ORDINARY_EXPONENT are ordinary: no sum of
 * FA_ORDINARY_DIM products of two of them leaves float32, in whatever order it is taken, nor does that times
 * FA_ORDINARY_FACTOR: 53 + 53 + 13 + 8 < 128.  The same of float64: 500 + 500 + 13 + 8 < 1024. */
#define FA_ORDINARY_EXPONENT 53
#define FA_ORDINARY_EXPONENT_F64 500
#define FA_ORDINARY_DIM 8192
#define FA_ORDINARY_FACTOR 256

/* Values below 2^FA_VALUE_EXPONENT_F32 (_F64) have a finite sum over this many keys under weights of at most 2^8
 * (softmax_template.h): 96 + 8 + 23 < 128. */
#define FA_VALUE_EXPONENT_F32 96
#define FA_VALUE_EXPONENT_F64 960
#define FA_MOST_KEYS (1 << 23)

/* Biases beyond this size are not multiplied by log2(e), but moved by what that makes of it (scores_template.h): so they
 * keep their order up to the end of the range. */
#define FA_BIAS_LIMIT_F32 0x1p100
#define FA_BIAS_LIMIT_F64 0x1p960
#define FA_BIAS_MOVE (FA_LOG2_E - 1)

/* Natural sizes of lse from which on it is such a bias.  Rows of float32 between the limit and this are computed by
 * float64 (fa_head_doubt). */
#define FA_BIAS_FROM_F32 0x1p127
#define FA_BIAS_FROM_F64 FA_BIAS_LIMIT_F64

/* What a base-2 score of that size is moved by, of a real type of `size` bytes. */
static inline double fa_bias_move(double bias, size_t size)
{
    const double limit = size == sizeof(double) ? FA_BIAS_LIMIT_F64 : FA_BIAS_LIMIT_F32;
    return copysign(FA_BIAS_MOVE * limit, bias);
}

static inline bool fa_is_bias(double lse, size_t size)
{
    return fabs(lse) >= (size == sizeof(double) ? FA_BIAS_FROM_F64 : FA_BIAS_FROM_F32);
}

/* The natural logarithm of 2^top times a sum, `biased` if there are biases at all: without, no score is one. */
static inline double fa_natural(double top, double log2_sum, bool biased, size_t size)
{
    const double bias = top - fa_bias_move(top, size);
    return biased && fa_is_bias(bias, size) ? bias : (top + log2_sum) * FA_LN_2;
}

/* Rows of online softmax over the keys seen so far. */
struct fa_state {
    void *row_max; /* real [rows] */
    void *row_sum; /* real [rows][vl] */
    void *acc; /* real [rows][ldacc]: unnormalised output */
};

/* Base-2 maxima of softmaxes that float64 had better compute: above `from`, or below -from but not as low as -to.  from
 * < 0: all, those too that seem to have no key, because every score may have become -inf. */
struct fa_doubt {
    double from, to;
};

static inline bool fa_is_doubtful(struct fa_doubt doubt, double top, bool empty)
{
    return empty ? doubt.from < 0 : top > doubt.from || (-top > doubt.from && -top < doubt.to);
}

/* One finished row of the online softmax, on its way to caller memory. */
struct fa_row_result {
    size_t row; /* index into row_max, row_sum and acc */
    size_t cols; /* elements to store */
    enum fa_dtype dtype; /* of out and residual */
    double sink; /* base-2 logit that joins the denominator; -inf: none */
    void *out; /* cols elements, out_stride bytes apart */
    int64_t out_stride;
    const void *residual; /* nullable; may be `out` */
    int64_t residual_stride;
    void *lse; /* nullable; one element, natural logarithm, of lse_dtype */
    enum fa_dtype lse_dtype; /* FA_F32 or FA_F64 */
    bool biased; /* the scores have biases in them: see fa_natural */
    /* Nullable, of lse_dtype: cols elements as in `out`, but without residual; shift and factor of the weights. */
    void *exact, *weighing;
    int64_t exact_stride, weighing_stride;
    int exponent; /* of 2, that values were divided by: the result is multiplied, residual aside */
    bool averages; /* of values: finite where acc is */
    bool mends; /* with an exponent: elements of out that are finite stay as they are */
    /* What is not stored, see enum fa_stored: `final` stores everything. */
    bool final, look_at_acc;
    struct fa_doubt doubt;
    /* Nullable: a bit for each element.  With `choose` the finite ones of acc are stored, and the bits of the others
     * are set; else elements are stored whose bit is set. */
    uint8_t *columns;
    bool choose;
};

/* A row that left the range of its element type is given back instead of stored. */
enum fa_stored {
    FA_STORED,
    FA_ROW_LEFT, /* its sum is not finite, or its row_max is doubtful (fa_is_doubtful) */
    FA_SUMS_LEFT, /* with look_at_acc and without columns: elements of acc are not finite */
};

/* Where a row of weights stands, and what is drawn against its random words. */
struct fa_dropout {
    uint64_t seed;
    uint32_t threshold; /* words below it drop */
    double kept; /* factor of the others; 0 if these drop, too */
    uint32_t query, head, entry;
};

/* Rows of caller memory that meet in a sum. */
struct fa_row_terms {
    const char *grad, *out, *residual; /* residual nullable */
    int64_t grad_stride, out_stride, residual_stride;
    size_t cols;
    enum fa_dtype dtype, out_dtype; /* of out and residual: out_dtype */
};

/* The inner loops for one element type ("real").
 *
 * A set may have a table of its own for the forward pass over a type, whose products take what they multiply in
 * another form than `real`: an element of it takes `packed_halves` halves of an element of the workspace, of
 * head_dim in the rows of q and the packed keys, of the keys in the packed values.  Scores, row_max, row_sum and
 * acc are `real` all the same. */
struct fa_ops {
    size_t size; /* bytes of an element */
    size_t tile_q; /* rows of a score tile, a multiple of mr */
    size_t mr, nr; /* rows and columns of the register tile; nr is a whole number of vectors */
    size_t vl; /* lanes of a vector */
    size_t packed_halves; /* 2 where elements are packed as they are: see above */
    size_t depth_step; /* elements of a row of q and of a packed key: a multiple of this */
    size_t row_step; /* products touch rows of q, scores and acc up to a multiple of this */

    /* Around every task, on its thread; nullable: prepare the registers of the products, and give them back. */
    void (*begin_task)(void);
    void (*end_task)(void);

    /* dst[r][0..cols) = factor * src[r][...], zero up to a whole depth_step; without the factor where that
     * would round, and matmul multiplies instead.  Returns whether every element is ordinary. */
    bool (*load_rows)(void *dst, size_t rows, const char *const *src, int64_t col_stride,
                      size_t cols, enum fa_dtype dtype, double factor);

    /* Transpose keys into panels dst[key / nr][col][key % nr], zero beyond `keys` up to whole panels.  Returns
     * whether every element is ordinary. */
    bool (*pack_keys)(void *dst, size_t keys, size_t cols, const struct fa_keys *from);

    /* Copy values into panels dst[col / nr][key][col % nr], panel_stride elements apart, zero beyond
     * `cols` up to a whole panel.  Returns whether matmul_values may have them: every value is so small that
     * FA_MOST_KEYS of them have a finite sum under the largest weights, or what the set says besides. */
    bool (*pack_values)(void *dst, size_t panel_stride, size_t keys, size_t cols,
                        const struct fa_keys *from);

    /* For at most few_rows rows, both products without packing:
     * s[rows][columns] = q[rows][cols] keys, 0 beyond `keys`; columns: multiple of vl.  Multiplied by the
     * factor where load_rows did not do that to q. */
    size_t few_rows, few_cols; /* head_dim is few_cols at most */
    void (*few_scores)(size_t rows, size_t cols, size_t keys, size_t columns, const void *q,
                       const struct fa_keys *from, void *s, size_t ld, float factor);
    /* acc[rows][cols] += weights[rows][keys] values.  scratch: [chains of the keys][rows][ldacc].  False, and acc as it was, if
     * a sum is not finite, or a value is one that it does not take: only matmul_skip_zeros is then right. */
    bool (*few_values)(size_t rows, size_t keys, size_t cols, const void *weights, size_t ldw,
                       const struct fa_keys *from, void *scratch, void *acc, size_t ldacc);

    /* Any number of rows; depth may be 0.  Each element is a sum of chains of FA_CHAIN fused multiply-adds in order
     * of depth, or what docs/kernels.md says of the set.  Asks for some of what is wanted on the way. */
    void (*matmul)(const struct fa_product *product, struct fa_wanted *wanted);
    /* The same of weights and values: weights are as softmax_update, column_weights and apply_dropout leave
     * them, which a table of bfloat16 need not do in `real`.  So does matmul_skip_zeros take them. */
    void (*matmul_values)(const struct fa_product *product, struct fa_wanted *wanted);
    void (*matmul_transposed)(const struct fa_product *product);

    /* The same chains, but terms whose a is exactly zero are left out: for b with infinities and NaN,
     * which 0 * b would spread. */
    void (*matmul_skip_zeros)(const struct fa_product *product, bool transposed);

    /* Score tile edits, n elements of one row, or rows x n with leading dimension ld. */
    void (*scale_scores)(void *s, size_t ld, size_t rows, size_t n, const float *scale);
    /* w *= scale of its column; 0 stays 0. */
    void (*scale_weights)(void *w, size_t ld, size_t rows, size_t n, const float *scale);
    void (*softcap)(void *s, size_t ld, size_t rows, size_t n,
                    double cap2); /* s = cap2 * tanh(s) */
    void (*add_bias)(void *s, size_t n, const void *bias, int64_t stride, enum fa_dtype bias_dtype);
    /* s[l] -= slope2 * |distance - l| */
    void (*add_alibi)(void *s, size_t n, double slope2, int64_t distance);
    void (*mask_bytes)(void *s, size_t n, const uint8_t *mask); /* zero byte: s = -inf */
    /* Infinite scores become NaN: a sum of products may have passed the range of `real` on its way to anywhere. */
    void (*mark_overflow)(void *s, size_t ld, size_t rows, size_t n);
    /* s = -inf outside [lo, hi); 0 <= lo <= hi <= n */
    void (*mask_range)(void *s, size_t n, size_t lo, size_t hi);

    /* Start rows of online softmax: row_max is the lowest finite number, row_sum = 0, acc = 0. */
    void (*softmax_begin)(size_t rows, const struct fa_state *state, size_t ldacc);
    /* Replace scores by weights relative to row_max, raising row_max and rescaling row_sum and acc
     * where a row needs it.  n: multiple of vl. */
    void (*softmax_update)(void *s, size_t ld, size_t rows, size_t n, const struct fa_state *state,
                           size_t ldacc);
    /* Nullable.  The same, and a matmul of the tile that follows at the same time. */
    void (*softmax_update_beside)(void *s, size_t ld, size_t rows, size_t n,
                                  const struct fa_state *state, size_t ldacc,
                                  const struct fa_product *product, struct fa_wanted *wanted);
    /* Nullable.  The same of scores that are to be multiplied by a finite factor > 0 first. */
    void (*softmax_update_scaled)(void *s, size_t ld, size_t rows, size_t n, float factor,
                                  const struct fa_state *state, size_t ldacc);
    /* total = total and part together: the same rows over other keys.  rest: what rounding has left of the sums of
     * total so far, 0 at first; its row_max is not used. */
    void (*softmax_fold)(size_t rows, const struct fa_state *total, const struct fa_state *rest,
                         const struct fa_state *part, size_t ldacc);
    /* out = acc / sum (+ residual), and lse.  A row that saw no key stores 0 (+ residual), and its sink as lse.
     * Stores nothing that it gives back. */
    enum fa_stored (*softmax_store)(const struct fa_state *state, size_t ldacc,
                                    const struct fa_row_result *result);

    /* Dropout: n factors for the keys from `key` on, 0 or kept; and n weights times theirs, n a multiple of
     * vl. */
    void (*dropout_factors)(void *factors, size_t n, const struct fa_dropout *dropout, int64_t key);
    void (*apply_dropout)(void *x, const void *factors, size_t n);

    /* Backward.  Sum of grad * (out - residual) over one row; residual nullable. */
    double (*row_delta)(const struct fa_row_terms *terms);
    /* slope = 1 - tanh(s)^2: of softcap, for the scores s that it is about to take. */
    void (*softcap_slope)(void *slope, const void *s, size_t ld, size_t rows, size_t n);
    /* sums[row][vl] += weights w times their gradients d, the row's vectors added up; nothing
     * where the weight is 0. */
    void (*add_row_products)(void *sums, const void *w, const void *d, size_t ld, size_t rows,
                             size_t n);
    /* From scores s and gradients of weights d, weights and gradients of scores in their place:
     * s = exp2(s - shift[row]) * factor[row], d = s * (d - delta[row]), both 0 where the weight
     * is.  Returns a bit for each row, FA_MAX_TILE_Q at most, with a weight above 1/2. */
    uint32_t (*score_gradients)(void *s, void *d, size_t ld, size_t rows, size_t n,
                                const void *shift, const void *factor, const void *delta);
    /* The same with a shift, a factor and a delta for each column; d nullable: weights only. */
    void (*column_gradients)(void *s, void *d, size_t ld, size_t rows, size_t n, const void *shift,
                             const void *factor, const void *delta);
    /* d *= slope */
    void (*scale_gradients)(void *d, const void *slope, size_t ld, size_t rows, size_t n);
    /* sum += x; n: multiple of vl. */
    void (*add)(void *sum, const void *x, size_t n);
    /* out = acc * factor: one row of gradients.  Returns whether the sums are finite. */
    bool (*store_scaled)(const void *acc, double factor, const struct fa_row_result *result);

    /* Softmax over queries: running column maxima and sums of one key block. */
    void (*column_begin)(void *col_max, void *col_sum, size_t n);
    void (*column_update)(const void *s, size_t ld, size_t rows, size_t n, void *col_max,
                          void *col_sum);
    /* Turn col_sum into reciprocals, and store n natural-log sums.  Where no query takes part, and in
     * columns [n, padded), maximum and reciprocal become 0. */
    void (*column_finish)(void *col_max, void *col_sum, size_t n, size_t padded, void *lse,
                          int64_t lse_stride, enum fa_dtype lse_dtype, bool biased);
    /* s = exp2(s - col_max) * col_inverse */
    void (*column_weights)(void *s, size_t ld, size_t rows, size_t n, const void *col_max,
                           const void *col_inverse);
    /* sums[l] = sum of factor[r] * w[r][l]: rows of weights together, at most FA_MAX_TILE_Q of them.  n: multiple
     * of vl. */
    void (*sum_rows)(void *sums, const void *w, size_t ld, size_t rows, size_t n,
                     const void *factor);
    /* out = acc (+ residual): softmax over queries has nothing left to divide by. */
    enum fa_stored (*store)(const void *acc, const struct fa_row_result *result);

    /* For benchmarks: `rounds` times the same number of multiply-adds x = x * factor + x on registers
     * only.  Returns how many operations one round is. */
    double (*probe_fma)(int64_t rounds, double factor);
};

struct fa_kernels {
    const char *name;
    const struct fa_ops *f32, *f64;
    /* The forward pass over q, k and v of one type; nullable: f32 does it. */
    const struct fa_ops *forward_f32, *forward_bf16;
};

/* One per kernel file; dispatch.c lists those that are built in. */
extern const struct fa_kernels fa_kernels_scalar, fa_kernels_avx2, fa_kernels_avx512,
    fa_kernels_amx, fa_kernels_neon;

/* The operations that compute with elements of a type. */
static inline const struct fa_ops *fa_ops_for(const struct fa_kernels *kernels, enum fa_dtype dtype)
{
    return dtype == FA_F64 ? kernels->f64 : kernels->f32;
}

/* The operations of the forward pass.  float32 by tiles has none for softmax over queries. */
static inline const struct fa_ops *fa_forward_ops(const struct fa_kernels *kernels,
                                                  const struct fa_attention_params *params)
{
    const struct fa_ops *own = NULL;
    if (params->dtype == FA_BF16 && params->kv_dtype == FA_BF16) {
        own = kernels->forward_bf16;
    } else if (params->dtype == FA_F32 && params->kv_dtype == FA_F32 &&
               params->softmax_axis == FA_SOFTMAX_KEYS) {
        own = kernels->forward_f32;
    }
    return own != NULL ? own : fa_ops_for(kernels, params->dtype);
}

static inline void fa_begin_task(const struct fa_ops *ops)
{
    if (ops->begin_task != NULL) {
        ops->begin_task();
    }
}

static inline void fa_end_task(const struct fa_ops *ops)
{
    if (ops->end_task != NULL) {
        ops->end_task();
    }
}

#endif
