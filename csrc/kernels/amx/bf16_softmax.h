/* Weights for products of bfloat16: each is split into two, itself rounded and what that left of
 * it, rounded too.  One alone would be 2^-9 off, and results near zero would miss their last bits;
 * two are 2^-18 off (docs/design.md).
 *
 * Split weights take the place of the scores: of every 32 floats of a row the first 16 become the
 * upper parts, the other 16 the lower parts, each as pairs of keys r and r + 16 - what a shift and
 * a blend make of two vectors.
 */
#ifndef FA_BF16_SOFTMAX_H
#define FA_BF16_SOFTMAX_H

/* Scores of a row this far from 0 are weighed by the float32 softmax: see weigh_bf16. */
#define MAX_SHIFT 0x1p18f

/* 2^f = 1 + f P(f) for |f| <= 2^-5, P of degree 1 by interpolation at the Chebyshev nodes: relative
 * error 8.5e-7, a quarter of what splitting leaves. */
static const float exp2_coef_bf16[2] = {0x1.62e430p-1f, 0x1.ebfbe0p-3f};

static void multiply_scores(float *s, size_t ld, size_t rows, size_t n, vec_f32 factor)
{
    for (size_t r = 0; r < rows; r++) {
        for (size_t l = 0; l < n; l += VL_f32) {
            float *at = s + r * ld + l;
            v_store_f32(at, v_mul_f32(v_load_f32(at), factor));
        }
    }
}

/* Rounding may turn a NaN whose last bits are set into a number: where the row's sum is to be NaN
 * besides, no harm is done. */
static inline void store_split(float *s, vec_f32 p0, vec_f32 p1)
{
    const vec_f32 round0 = v_round_half(p0), round1 = v_round_half(p1);
    const vec_f32 rest0 = v_sub_f32(p0, v_upper_half(round0));
    const vec_f32 rest1 = v_sub_f32(p1, v_upper_half(round1));
    v_store_u16(s, v_pair_upper_halves(round0, round1));
    v_store_u16(s + TILE_WORDS, v_pair_upper_halves(v_round_half(rest0), v_round_half(rest1)));
}

static void split_weights(float *s, size_t n)
{
    for (size_t l = 0; l < n; l += TILE_KEYS) {
        const vec_f32 p0 = v_load_f32(s + l), p1 = v_load_f32(s + l + VL_f32);
        store_split(s + l, v_plain_nan(p0), v_plain_nan(p1));
    }
}

/* 2^(s factor - shift) as exp2_template.h has it, for a whole number `shift`: then base =
 * EXP2_ROUND - shift is exact, and one multiply-add gives the rounded sum.  Exactly 0 where that is
 * below EXP2_MIN, NaN for NaN. */
static inline vec_f32 weigh_bf16(vec_f32 s, vec_f32 factor, vec_f32 base)
{
    const vec_f32 t = v_fma_f32(s, factor, base);
    const vec_f32 f = v_fma_f32(s, factor, v_sub_f32(base, t));
    const vec_f32 scale = v_exp2_scale_f32(t);
    const vec_f32 p = v_fma_f32(v_set_f32(exp2_coef_bf16[1]), f, v_set_f32(exp2_coef_bf16[0]));
    return v_keep_ge_f32(t, v_set_f32(EXP2_ROUND_f32 + EXP2_MIN),
                         v_fma_f32(p, v_mul_f32(f, scale), scale));
}

/* Rows from `first` on, whose row_max is a whole number within MAX_SHIFT; `rows` is a constant. */
FA_INLINE void weigh_rows_bf16(const size_t rows, const struct fa_softmax *x, size_t first)
{
    const size_t ld = x->ld, n = x->cols;
    const vec_f32 factor = v_set_f32(x->factor);
    const float *row_max = (const float *)x->state->row_max + first;
    float *s = (float *)x->scores + first * ld;
    float *row_sum = (float *)x->state->row_sum + first * VL_f32;
    vec_f32 base[SOFTMAX_ROWS_f32], sum[SOFTMAX_ROWS_f32];
    FA_UNROLL
    for (size_t r = 0; r < rows; r++) {
        base[r] = v_set_f32(EXP2_ROUND_f32 - row_max[r]);
        sum[r] = v_zero_f32();
    }
    for (size_t l = 0; l < n; l += TILE_KEYS) {
        FA_UNROLL
        for (size_t r = 0; r < rows; r++) {
            float *at = s + r * ld + l;
            const vec_f32 p0 = weigh_bf16(v_load_f32(at), factor, base[r]);
            const vec_f32 p1 = weigh_bf16(v_load_f32(at + VL_f32), factor, base[r]);
            store_split(at, p0, p1);
            sum[r] = v_add_f32(sum[r], v_add_f32(p0, p1));
        }
    }
    FA_UNROLL
    for (size_t r = 0; r < rows; r++) {
        float *total = row_sum + r * VL_f32;
        v_store_f32(total, v_add_f32(v_load_f32(total), sum[r]));
    }
}

/* Raise row_max where a score has outgrown it, to a whole number where that is small enough.
 * Returns whether all rows are such. */
FA_INLINE bool raise_rows_bf16(const size_t rows, const struct fa_softmax *x, size_t first)
{
    const size_t ld = x->ld, n = x->cols, ldacc = x->ldacc;
    const vec_f32 factor = v_set_f32(x->factor);
    const float *s = (const float *)x->scores + first * ld;
    float *row_max = (float *)x->state->row_max + first;
    float *row_sum = (float *)x->state->row_sum + first * VL_f32;
    float *acc = (float *)x->state->acc + first * ldacc;
    vec_f32 block_max[SOFTMAX_ROWS_f32];
    bool small = true;
    FA_UNROLL
    for (size_t r = 0; r < rows; r++) {
        block_max[r] = v_set_f32(-INFINITY);
    }
    for (size_t l = 0; l < n; l += VL_f32) {
        FA_UNROLL
        for (size_t r = 0; r < rows; r++) {
            block_max[r] = v_max_f32(v_load_f32(s + r * ld + l), block_max[r]);
        }
    }
    FA_UNROLL
    for (size_t r = 0; r < rows; r++) {
        const vec_f32 old = v_broadcast_f32(row_max + r);
        block_max[r] = v_mul_f32(block_max[r], factor);
        if (outgrown_f32(block_max[r], old)) {
            const float max = max_lane_f32(v_max_f32(block_max[r], old));
            const vec_f32 to = v_set_f32(max >= -MAX_SHIFT && max <= MAX_SHIFT ? ceilf(max) : max);
            raise_row_max_f32(to, row_max + r, row_sum + r * VL_f32, acc + r * ldacc, ldacc);
        }
        small = small && row_max[r] >= -MAX_SHIFT && row_max[r] <= MAX_SHIFT;
    }
    return small;
}

static void softmax_bf16(const struct fa_softmax *x)
{
    FA_ASSERT(x->beside == NULL);
    size_t r = 0;
    while (r < x->rows) {
        float *s = (float *)x->scores + r * x->ld;
        size_t done = 1;
        if (r + SOFTMAX_ROWS_f32 <= x->rows && raise_rows_bf16(SOFTMAX_ROWS_f32, x, r)) {
            done = SOFTMAX_ROWS_f32;
            weigh_rows_bf16(SOFTMAX_ROWS_f32, x, r);
        } else if (raise_rows_bf16(1, x, r)) {
            weigh_rows_bf16(1, x, r);
        } else {
            multiply_scores(s, x->ld, 1, x->cols, v_set_f32(x->factor));
            softmax_rows_f32(1, x, r, idle_f32, NULL);
            split_weights(s, x->cols);
        }
        r += done;
    }
}

static void weigh_columns_bf16(void *s, size_t ld, size_t rows, size_t n, const void *col_max,
                               const void *col_inverse)
{
    column_weights_f32(s, ld, rows, n, col_max, col_inverse);
    for (size_t r = 0; r < rows; r++) {
        split_weights((float *)s + r * ld, n);
    }
}

/* Split weights of 32 keys, together again: of the first 16 and of the others. */
static inline void join_weights(const float *s, vec_f32 *p0, vec_f32 *p1)
{
    const vec_u16 upper = v_load_u16(s), rest = v_load_u16(s + TILE_WORDS);
    *p0 = v_add_f32(v_pair_first(upper), v_pair_first(rest));
    *p1 = v_add_f32(v_pair_second(upper), v_pair_second(rest));
}

static void drop_weights_bf16(void *weights, const void *factors, size_t n)
{
    for (size_t l = 0; l < n; l += TILE_KEYS) {
        float *s = (float *)weights + l;
        const float *f = (const float *)factors + l;
        const vec_f32 f0 = v_load_f32(f), f1 = v_load_f32(f + VL_f32), zero = v_zero_f32();
        vec_f32 p0, p1;
        join_weights(s, &p0, &p1);
        store_split(s, v_select_lt_f32(zero, f0, v_mul_f32(p0, f0), zero),
                    v_select_lt_f32(zero, f1, v_mul_f32(p1, f1), zero));
    }
}

static void scale_weights_bf16(void *w, size_t ld, size_t rows, size_t n, const float *scale)
{
    for (size_t r = 0; r < rows; r++) {
        for (size_t l = 0; l < n; l += TILE_KEYS) {
            float *s = (float *)w + r * ld + l, joined[TILE_KEYS];
            vec_f32 p0, p1;
            join_weights(s, &p0, &p1);
            v_store_f32(joined, p0);
            v_store_f32(joined + VL_f32, p1);
            scale_weights_f32(joined, TILE_KEYS, 1, TILE_KEYS, scale + l);
            store_split(s, v_load_f32(joined), v_load_f32(joined + VL_f32));
        }
    }
}

#endif
