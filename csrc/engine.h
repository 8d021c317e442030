/* Engines, each a way to multiply with the form that its operands take; and kernel sets.
 *
 * Attention multiplies twice.  Scores are rows of q times keys, results are weights times values,
 * and between the two the softmax makes weights of scores.  An engine does both products and the
 * softmax, because these three share more than a tile: the softmax leaves weights in the form
 * that the second product takes, it may compute the scores of the next tile meanwhile, and it may
 * apply the scale that the first product left out.  Scores, row_max, row_sum and acc are `real`
 * in every engine.  The form of packed operands and of weights is the engine's own: no other code
 * reads them.
 *
 * Gradients are products of matrices of `real`, and have engines of their own (struct
 * fa_gradient_engine).
 *
 * All buffers are workspace (tile_ops.h); only functions that load or pack read caller memory,
 * and no byte outside the named elements. */
#ifndef FA_ENGINE_H
#define FA_ENGINE_H

#include "common.h"
#include "tile_ops.h"

/* Rows of a score tile, the least and the most that an engine may have.  The score tile, its
 * rows of q and one packed panel share a 32 KiB L1: 24 x 128 float32 scores are 12 KiB. */
#define FA_MIN_TILE_Q 24
#define FA_MAX_TILE_Q 32

/* Bytes of a row of the score tile, and so the most weights that an engine meets in a row: two
 * tiles of FA_MAX_TILE_Q rows are 32 KiB. */
#define FA_SCORE_ROW_BYTES 512
#define FA_MAX_BLOCK_K_F32 (FA_SCORE_ROW_BYTES / 4)

/* Keys beyond those of a block whose place is known while it is read, so that loops can ask for
 * memory ahead; for each element that a lane of float32 holds. */
#define FA_KEYS_AHEAD 80

/* Multiply-adds of a chain: sums of products are cut at its multiples, counted from the start of
 * head_dim, or of a block of keys or rows, and the chains are added in order.  One chain of n
 * terms of one sign errs by up to n / 2 rounding units, 64 up to 6.4 (docs/design.md), and what
 * ends a chain costs 1 / 64 of an addition per multiply-add.  A multiple of the most elements
 * that few_template.h loads at a time. */
#define FA_CHAIN 64

/* Bytes of a cache line on the machines that the kernel sets are for. */
#define FA_LINE 64

/* Caller memory that is wanted soon, for the products to fetch while they compute: `rows`
 * stretches of `bytes` bytes.  Zero bytes want nothing. */
struct fa_wanted {
    const char *row[FA_MAX_TILE_Q];
    size_t rows, bytes;
    /* The next byte to ask for. */
    size_t next_row, next_byte;
};

/* Rows of caller memory, wherever each of them lies: of q or of a gradient, or the keys or
 * values of a block. */
struct fa_rows {
    /* The first element of each row. */
    const char *const *row;
    /* There may be more rows than are packed: these come next, and may be asked for. */
    size_t located;
    int64_t col_stride;
    enum fa_dtype dtype;
    /* A factor of each row, which its elements do not have yet, up to a whole panel; NULL: 1. */
    const float *scale;
    /* The place of the first row in its chain: below FA_CHAIN. */
    size_t into_chain;
};

/* c = (accumulate ? c : 0) + a b, in elements of the workspace's type, for i < rows, k < depth and
 * j < panels * nr:
 *   a(i, k) = a[i * a_stride + k], or a[k * a_stride + i] where a product takes a transposed,
 *   b(k, j) = b[j / nr * b_panel + k * nr + j % nr],
 *   c(i, j) = c[i * c_row + j].
 * An engine whose operands are packed otherwise counts in the same elements, those that its
 * row_elements and value_elements return. */
struct fa_product {
    size_t rows, depth, panels;
    const void *a;
    size_t a_stride;
    const void *b;
    size_t b_panel;
    void *c;
    size_t c_row;
    bool accumulate;
    /* The place of k = 0 in its chain: below FA_CHAIN. */
    size_t into_chain;
};

/* Elements of queries, scaled or not, and of keys that are below 2^FA_ORDINARY_EXPONENT are
 * ordinary: no sum of FA_ORDINARY_DIM products of two of them leaves float32, in whatever order
 * it is taken, nor does that times FA_ORDINARY_FACTOR: 53 + 53 + 13 + 8 < 128.  The same of
 * float64: 500 + 500 + 13 + 8 < 1024. */
#define FA_ORDINARY_EXPONENT 53
#define FA_ORDINARY_EXPONENT_F64 500
#define FA_ORDINARY_DIM 8192
#define FA_ORDINARY_FACTOR 256

/* Values below 2^FA_VALUE_EXPONENT_F32 (_F64) have a finite sum over this many keys under
 * weights of at most 2^8 (softmax_template.h): 96 + 8 + 23 < 128. */
#define FA_VALUE_EXPONENT_F32 96
#define FA_VALUE_EXPONENT_F64 960
#define FA_MOST_KEYS (1 << 23)

/* The purpose of scores.  Gradients, and weights made visible, come after the forward pass and
 * compute its scores again.  They are the more exact, the more bits of the scores are the same. */
enum fa_pass { FA_FORWARD, FA_AGAIN };

/* Where the factor between <q, k> and a score comes in. */
enum fa_scale_at {
    /* load_rows multiplies q by it, and the factor of every later slot is 1. */
    FA_SCALE_ROWS,
    /* `scores` multiplies by it, or `softmax` where no option comes between. */
    FA_SCALE_LATE,
};

/* Rows of a score tile to be weighed. */
struct fa_softmax {
    /* real [rows][ld]: replaced by weights in the form that `values` takes. */
    void *scores;
    size_t ld, rows;
    /* Whole panels. */
    size_t cols;
    /* A factor that the scores are to be multiplied by first: finite, and above 0. */
    float factor;
    const struct fa_state *state;
    size_t ldacc;
    /* Scores of the next tile, to be computed meanwhile; NULL: none. */
    const struct fa_product *beside;
    /* As in `scores`, for `beside`. */
    struct fa_wanted *wanted;
};

/* One way to do the products of attention.  No slot is NULL. */
struct fa_engine {
    /* The name that explain() prints. */
    const char *name;
    /* The operations on scores between the products, and on sums. */
    const struct fa_tile_ops *ops;

    /* Rows of a score tile: a multiple of mr, from FA_MIN_TILE_Q to FA_MAX_TILE_Q. */
    size_t tile_q;
    /* Rows and columns of the register tile; nr, a panel, is a whole number of vectors. */
    size_t mr, nr;
    /* Products touch rows of q, scores and acc up to a multiple of this. */
    size_t row_step;
    enum fa_scale_at scale_at;
    /* `softmax` takes a product beside it; scale_at is FA_SCALE_ROWS then. */
    bool multiplies_beside;

    /* Whether the engine serves a call: it reads q, k and v of the call, and has all that its
     * options need. */
    bool (*takes)(const struct fa_attention_params *params, enum fa_pass pass);

    /* Elements of the workspace in a row of q or in a packed key; and in a packed column of so
     * many values, a whole number of panels. */
    size_t (*row_elements)(size_t head_dim);
    size_t (*value_elements)(size_t keys);

    /* Around every task, on its thread: prepare the registers of the products, and give them
     * back. */
    void (*enter)(void);
    void (*leave)(void);

    /* dst[r] = factor * from[r][0..cols), packed.  Returns whether every element is ordinary. */
    bool (*load_rows)(void *dst, size_t rows, size_t cols, const struct fa_rows *from,
                      double factor);
    /* Keys into panels, zero beyond `keys` up to whole panels.  Returns whether every element is
     * ordinary. */
    bool (*pack_keys)(void *dst, size_t keys, size_t cols, const struct fa_rows *from);
    /* factor * q k^T, for any number of rows; depth may be 0.  Each element is a sum of chains
     * of FA_CHAIN fused multiply-adds in order of depth, or what docs/kernels.md says of the
     * engine.  Asks for some of what is wanted. */
    void (*scores)(const struct fa_product *product, float factor, struct fa_wanted *wanted);

    /* Values into panels, panel_stride elements apart, zero beyond `cols` up to a whole panel.
     * Returns whether `values` may have them: every value is so small that FA_MOST_KEYS of them
     * have a finite sum under the largest weights, or what the engine says besides. */
    bool (*pack_values)(void *dst, size_t panel_stride, size_t keys, size_t cols,
                        const struct fa_rows *from);
    /* c += weights values. */
    void (*values)(const struct fa_product *product, struct fa_wanted *wanted);
    /* The same chains, but terms whose weight is exactly zero are left out: for values with
     * infinities and NaN, which 0 * b would spread. */
    void (*values_careful)(const struct fa_product *product);

    /* For at most few_rows(head_dim) rows, both products without packing, with the same bits.
     * few_scores does not read product->b; `keys` of the product's columns are keys, and all
     * other columns become 0.  few_values does not read b; scratch is [chains of the
     * keys][rows][c_row].  False, and c as it was, if a sum is not finite, or the engine does not
     * take a value: then only values_careful is right. */
    size_t (*few_rows)(size_t head_dim);
    void (*few_scores)(const struct fa_product *product, size_t head_dim, size_t keys,
                       const struct fa_rows *from, float factor);
    bool (*few_values)(const struct fa_product *product, size_t cols, const struct fa_rows *from,
                       void *scratch);

    /* Scores to weights relative to row_max, raising row_max and rescaling row_sum and acc where
     * a row needs it. */
    void (*softmax)(const struct fa_softmax *softmax);
    /* Softmax over the queries: scores to weights, exp2(s - col_max) * col_inverse. */
    void (*weigh_columns)(void *s, size_t ld, size_t rows, size_t n, const void *col_max,
                          const void *col_inverse);
    /* n weights of a row times factors of dropout, real [n]: exactly 0 where the factor is 0.  n
     * is a multiple of vl. */
    void (*drop_weights)(void *weights, const void *factors, size_t n);
    /* Weights times the scale of their column; 0 stays 0. */
    void (*scale_weights)(void *w, size_t ld, size_t rows, size_t n, const float *scale);
};

/* One way to do the products of gradients, all of whose operands are `real`.  No slot is NULL. */
struct fa_gradient_engine {
    const struct fa_tile_ops *ops;
    /* Columns of a panel. */
    size_t nr;

    /* dst[r][0..cols) = factor * from[r][...]. */
    bool (*load_rows)(void *dst, size_t rows, size_t cols, const struct fa_rows *from,
                      double factor);
    /* Rows into panels dst[row / nr][col][row % nr], zero beyond `rows` up to whole panels. */
    bool (*pack_transposed)(void *dst, size_t rows, size_t cols, const struct fa_rows *from);
    /* Rows into panels dst[col / nr][row][col % nr], panel_stride elements apart, zero beyond
     * `cols` up to a whole panel.  Returns whether `multiply` may have them, as
     * fa_engine.pack_values does. */
    bool (*pack)(void *dst, size_t panel_stride, size_t rows, size_t cols,
                 const struct fa_rows *from);
    /* Products like those of `scores`, of a as it is or transposed; the careful one is like
     * values_careful. */
    void (*multiply)(const struct fa_product *product);
    void (*multiply_transposed)(const struct fa_product *product);
    void (*multiply_careful)(const struct fa_product *product, bool transposed);
};

/* A kernel set: the operations and engines of one instruction set. */
struct fa_kernels {
    const char *name;
    const struct fa_tile_ops *f32, *f64;
    /* Best first, NULL behind the last.  The last two, of float32 and float64, take every call
     * of their type. */
    const struct fa_engine *const *engines;
    const struct fa_gradient_engine *gradients_f32, *gradients_f64;
    /* For benchmarks: `rounds` times the same number of multiply-adds x = x * factor + x on
     * registers only.  Returns how many operations one round is. */
    double (*probe_fma_f32)(int64_t rounds, double factor);
    double (*probe_fma_f64)(int64_t rounds, double factor);
};

/* The operations that compute with elements of a type. */
static inline const struct fa_tile_ops *fa_ops_for(const struct fa_kernels *kernels,
                                                   enum fa_dtype dtype)
{
    return dtype == FA_F64 ? kernels->f64 : kernels->f32;
}

/* `rounds` rounds of multiply-adds in a type.  x - 2 x changes only its sign, so that no number
 * becomes infinite or subnormal, which is slow on some CPUs. */
static inline double fa_multiply_add(const struct fa_kernels *kernels, enum fa_dtype dtype,
                                     int64_t rounds)
{
    return dtype == FA_F64 ? kernels->probe_fma_f64(rounds, -2.0)
                           : kernels->probe_fma_f32(rounds, -2.0);
}

/* The best engine for a call that computes by `ops`. */
static inline const struct fa_engine *fa_engine_for(const struct fa_kernels *kernels,
                                                    const struct fa_tile_ops *ops,
                                                    const struct fa_attention_params *params,
                                                    enum fa_pass pass)
{
    const struct fa_engine *const *engine = kernels->engines;
    while ((*engine)->ops != ops || !(*engine)->takes(params, pass)) {
        engine++;
    }
    return *engine;
}

static inline const struct fa_gradient_engine *fa_gradients_for(const struct fa_kernels *kernels,
                                                                const struct fa_tile_ops *ops)
{
    return ops == kernels->f64 ? kernels->gradients_f64 : kernels->gradients_f32;
}

#endif
