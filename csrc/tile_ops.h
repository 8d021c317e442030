/* Tile operations: the elementwise work on score tiles, their sums and their gradients, for one
 * element type ("real") and one instruction set.  No slot is NULL.
 *
 * Buffers named here are workspace: contiguous, FA_ALIGNMENT-aligned, zero-padded, and never
 * shared between threads.  Only functions that store touch caller memory; there strides are in
 * bytes and arbitrary, and no byte outside the named elements is read or written.
 *
 * Scores are kept in base-2 logarithms: s2 = log2(e) * s, so that a weight is exp2(s2 - row_max).
 */
#ifndef FA_TILE_OPS_H
#define FA_TILE_OPS_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "fastattn.h"

/* log2(e) and ln(2): between natural and base-2 logarithms. */
#define FA_LOG2_E 1.4426950408889634074
#define FA_LN_2 0.69314718055994530942

/* Biases beyond this size are not multiplied by log2(e), but moved as far as that would move one
 * of this size (scores_template.h).  So they keep their order up to the end of the range. */
#define FA_BIAS_LIMIT_F32 0x1p100
#define FA_BIAS_LIMIT_F64 0x1p960
#define FA_BIAS_MOVE (FA_LOG2_E - 1)

/* From this natural size on, lse is such a bias.  Rows of float32 between the limit and this size
 * are computed by float64 (fa_head_doubt). */
#define FA_BIAS_FROM_F32 0x1p127
#define FA_BIAS_FROM_F64 FA_BIAS_LIMIT_F64

/* How far a bias of a real type of `size` bytes is moved. */
static inline double fa_bias_move(double bias, size_t size)
{
    const double limit = size == sizeof(double) ? FA_BIAS_LIMIT_F64 : FA_BIAS_LIMIT_F32;
    return copysign(FA_BIAS_MOVE * limit, bias);
}

static inline bool fa_is_bias(double lse, size_t size)
{
    return fabs(lse) >= (size == sizeof(double) ? FA_BIAS_FROM_F64 : FA_BIAS_FROM_F32);
}

/* The natural logarithm of 2^top times a sum.  Without biases (`biased`) no score is one. */
static inline double fa_natural(double top, double log2_sum, bool biased, size_t size)
{
    const double bias = top - fa_bias_move(top, size);
    return biased && fa_is_bias(bias, size) ? bias : (top + log2_sum) * FA_LN_2;
}

/* Rows of online softmax over the keys seen so far. */
struct fa_state {
    /* real [rows] */
    void *row_max;
    /* real [rows][vl] */
    void *row_sum;
    /* real [rows][ldacc]: the result before its division. */
    void *acc;
};

/* Base-2 maxima of softmaxes that float64 had better compute: those above `from`, and those below
 * -from that are not as low as -to.  With from < 0 all are, and also softmaxes that seem to have
 * no key, because every score may have become -inf. */
struct fa_doubt {
    double from, to;
};

static inline bool fa_is_doubtful(struct fa_doubt doubt, double top, bool empty)
{
    return empty ? doubt.from < 0 : top > doubt.from || (-top > doubt.from && -top < doubt.to);
}

/* One finished row of the online softmax, on its way to caller memory. */
struct fa_row_result {
    /* The index into row_max, row_sum and acc. */
    size_t row;
    /* Elements to store. */
    size_t cols;
    /* The type of out and residual. */
    enum fa_dtype dtype;
    /* A base-2 score that joins the denominator; -inf: there is none. */
    double sink;
    /* cols elements, out_stride bytes apart. */
    void *out;
    int64_t out_stride;
    /* Nullable; may be `out`. */
    const void *residual;
    int64_t residual_stride;
    /* Nullable; one element of lse_dtype: the natural logarithm. */
    void *lse;
    /* FA_F32 or FA_F64. */
    enum fa_dtype lse_dtype;
    /* The scores have biases in them: see fa_natural. */
    bool biased;
    /* Nullable, of lse_dtype: cols elements as in `out`, but without residual; and shift and
     * factor of the weights. */
    void *exact, *weighing;
    int64_t exact_stride, weighing_stride;
    /* The exponent of the power of 2 that values were divided by.  The result is multiplied by
     * that power, the residual is not. */
    int exponent;
    /* The result is an average of values: finite where acc is finite. */
    bool averages;
    /* With an exponent: elements of out that are finite stay as they are. */
    bool mends;
    /* final: the row is stored whatever it is.  look_at_acc: its elements of acc may not be
     * finite. */
    bool final, look_at_acc;
    struct fa_doubt doubt;
    /* Nullable: a bit for each element.  With `choose` the finite elements of acc are stored, and
     * the bits of all that are not finite are set; without it the elements whose bit is set are
     * stored. */
    uint8_t *columns;
    bool choose;
};

/* Bytes from one row to the next in the arrays of a result. */
struct fa_row_steps {
    int64_t out, residual, lse, weighing;
};

/* The finished columns of a key block, whose softmax is over the queries. */
struct fa_column_result {
    /* Columns that are keys, and columns that the statistics have. */
    size_t cols, padded;
    /* Nullable; cols elements of lse_dtype, lse_stride bytes apart. */
    void *lse;
    int64_t lse_stride;
    /* FA_F32 or FA_F64. */
    enum fa_dtype lse_dtype;
    /* The scores have biases in them: see fa_natural. */
    bool biased;
};

/* A row that left the range of its element type is given back instead of stored. */
enum fa_stored {
    FA_STORED,
    /* The row's sum is not finite, or its row_max is doubtful (fa_is_doubtful). */
    FA_ROW_LEFT,
    /* Elements of acc are not finite; with look_at_acc and without columns. */
    FA_SUMS_LEFT,
};

/* Where a row of weights stands, and the numbers that its random words are compared with. */
struct fa_dropout {
    uint64_t seed;
    /* Words below it drop their weight. */
    uint32_t threshold;
    /* The factor of the other weights; 0 if all are dropped. */
    double kept;
    uint32_t query, head, entry;
};

/* Rows of caller memory that meet in a sum. */
struct fa_row_terms {
    /* residual is nullable. */
    const char *grad, *out, *residual;
    int64_t grad_stride, out_stride, residual_stride;
    size_t cols;
    /* The type of grad, and that of out and residual. */
    enum fa_dtype dtype, out_dtype;
};

/* Rows of a score tile whose gradients are to be found. */
struct fa_gradients {
    /* real [rows][ld]: scores, replaced by weights. */
    void *scores;
    /* real [rows][ld]: gradients of weights, replaced by gradients of scores. */
    void *gradients;
    size_t ld, rows;
    /* Whole panels. */
    size_t cols;
    /* real, an element for each row, or for each column with softmax over the queries. */
    const void *shift, *factor, *delta;
};

struct fa_tile_ops {
    /* Bytes of an element. */
    size_t size;
    /* Lanes of a vector. */
    size_t vl;

    /* Score tile edits, n elements of one row, or rows x n with leading dimension ld. */
    void (*scale_scores)(void *s, size_t ld, size_t rows, size_t n, const float *scale);
    /* s = cap2 * tanh(s) */
    void (*softcap)(void *s, size_t ld, size_t rows, size_t n, double cap2);
    void (*add_bias)(void *s, size_t n, const void *bias, int64_t stride, enum fa_dtype bias_dtype);
    /* s[l] -= slope2 * |distance - l| */
    void (*add_alibi)(void *s, size_t n, double slope2, int64_t distance);
    /* s = -inf where the byte is 0. */
    void (*mask_bytes)(void *s, size_t n, const uint8_t *mask);
    /* Infinite scores become NaN: a sum of products may have passed the range of `real` on its
     * way to any number. */
    void (*mark_overflow)(void *s, size_t ld, size_t rows, size_t n);
    /* s = -inf outside [lo, hi); 0 <= lo <= hi <= n */
    void (*mask_range)(void *s, size_t n, size_t lo, size_t hi);

    /* Start rows of online softmax: row_max is the lowest finite number, row_sum = 0, acc = 0. */
    void (*softmax_begin)(size_t rows, const struct fa_state *state, size_t ldacc);
    /* Replace scores by weights relative to row_max, raising row_max and rescaling row_sum and
     * acc where a row needs it.  n is a multiple of vl. */
    void (*softmax_update)(void *s, size_t ld, size_t rows, size_t n, const struct fa_state *state,
                           size_t ldacc);
    /* total = total and split together: the same rows over other keys.  rest holds what rounding
     * has left of the sums of total so far, 0 at first; its row_max is not used. */
    void (*softmax_fold)(size_t rows, const struct fa_state *total, const struct fa_state *rest,
                         const struct fa_state *split, size_t ldacc);
    /* out = acc / sum (+ residual), and lse.  A row that saw no key stores 0 (+ residual), and
     * its sink as lse.  Stores nothing that it gives back. */
    enum fa_stored (*softmax_store)(const struct fa_state *state, size_t ldacc,
                                    const struct fa_row_result *result);
    /* The same for `rows` rows from that of the result on, FA_MAX_TILE_Q at most.  The result has
     * no sink, exact, exponent, columns or look_at_acc.  Returns a bit for each row that
     * softmax_store would give back. */
    uint32_t (*softmax_store_rows)(const struct fa_state *state, size_t ldacc, size_t rows,
                                   const struct fa_row_result *first,
                                   const struct fa_row_steps *step);

    /* Dropout: n factors for the keys from `key` on, each of them 0 or `kept`; and n weights
     * times their factors.  n is a multiple of vl. */
    void (*dropout_factors)(void *factors, size_t n, const struct fa_dropout *dropout, int64_t key);
    void (*apply_dropout)(void *x, const void *factors, size_t n);

    /* Backward: the sum of grad * (out - residual) over one row.  residual is nullable. */
    double (*row_delta)(const struct fa_row_terms *terms);
    /* slope = 1 - tanh(s)^2: the slope of softcap, for the scores s that softcap is about to
     * take. */
    void (*softcap_slope)(void *slope, const void *s, size_t ld, size_t rows, size_t n);
    /* sums[row][vl] += weights w times their gradients d, the vectors of a row added up; nothing
     * where the weight is 0. */
    void (*add_row_products)(void *sums, const void *w, const void *d, size_t ld, size_t rows,
                             size_t n);
    /* weight = exp2(score - shift[row]) * factor[row], and the gradient of the score is weight *
     * (gradient of the weight - delta[row]); both are 0 where the weight is.  Returns a bit for
     * each row, FA_MAX_TILE_Q at most, with a weight above 1/2. */
    uint32_t (*score_gradients)(const struct fa_gradients *tile);
    /* The same with a shift, a factor and a delta for each column.  Without gradients (NULL) only
     * the weights are computed. */
    void (*column_gradients)(const struct fa_gradients *tile);
    /* d *= slope */
    void (*scale_gradients)(void *d, const void *slope, size_t ld, size_t rows, size_t n);
    /* sum += x.  n is a multiple of vl. */
    void (*add)(void *sum, const void *x, size_t n);
    /* out = acc * factor: one row of gradients.  Returns whether the sums are finite. */
    bool (*store_scaled)(const void *acc, double factor, const struct fa_row_result *result);

    /* Softmax over queries: running column maxima and sums of one key block. */
    void (*column_begin)(void *col_max, void *col_sum, size_t n);
    void (*column_update)(const void *s, size_t ld, size_t rows, size_t n, void *col_max,
                          void *col_sum);
    /* Turn col_sum into reciprocals, and store lse.  Where no query takes part, and in columns
     * [cols, padded), maximum and reciprocal become 0. */
    void (*column_finish)(void *col_max, void *col_sum, const struct fa_column_result *result);
    /* s = exp2(s - col_max) * col_inverse */
    void (*column_weights)(void *s, size_t ld, size_t rows, size_t n, const void *col_max,
                           const void *col_inverse);
    /* sums[l] = sum of factor[r] * w[r][l] over the rows, of which there are FA_MAX_TILE_Q at
     * most.  n is a multiple of vl. */
    void (*sum_rows)(void *sums, const void *w, size_t ld, size_t rows, size_t n,
                     const void *factor);
    /* out = acc (+ residual): softmax over queries leaves nothing to divide by. */
    enum fa_stored (*store)(const void *acc, const struct fa_row_result *result);
};

#endif
