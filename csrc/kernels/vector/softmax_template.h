/* Online softmax over the keys of a row (Milakov & Gimelshein, arXiv:1805.02867), rescaled lazily
 * (FlashAttention-4): row_max may lag behind the true maximum by RESCALE_THRESHOLD, which costs no
 * accuracy in floating point and saves the pass over acc in all but the first blocks.  The decision
 * looks at one row only, so a row's bits do not depend on its neighbours.  Needs exp2_template.h
 * and pack_template.h.
 *
 * Cost per vector of scores: 1 load + 1 max, then 1 load, 1 sub, exp2 (10 to 13), 1 add, 1 store.
 * One exponential takes some 40 cycles from end to end, and a core's schedulers hold too few of
 * them to hide that: SOFTMAX_ROWS rows go side by side, a vector of each in turn.
 */

/* Base-2: weights stay below 2^8 times the largest weight under the true maximum. */
#define RESCALE_THRESHOLD 8

/* row_max starts at the lowest finite number, not at -inf: a score of -inf less row_max is then
 * never NaN, and the first score that is more than that raises it. */
static void FN(softmax_begin)(size_t rows, const struct fa_state *state, size_t ldacc)
{
    for (size_t r = 0; r < rows; r++) {
        ((REAL *)state->row_max)[r] = -REAL_MAX;
    }
    memset(state->row_sum, 0, rows * VL * sizeof(REAL));
    memset(state->acc, 0, rows * ldacc * sizeof(REAL));
}

/* By halves, which compilers turn into vector operations. */
static inline REAL FN(max_lane)(VEC x)
{
    REAL lanes[VL];
    V(store)(lanes, x);
    for (size_t width = VL / 2; width > 0; width /= 2) {
        for (size_t i = 0; i < width; i++) {
            lanes[i] = lanes[i + width] > lanes[i] ? lanes[i + width] : lanes[i];
        }
    }
    return lanes[0];
}

/* Whether a score is so far above row_max that the row is to be rescaled. */
static inline int FN(outgrown)(VEC block_max, VEC row_max)
{
    return V(any_gt)(block_max, V(add)(row_max, V(set)(RESCALE_THRESHOLD)));
}

static void FN(raise_row_max)(VEC block_max, REAL *row_max, REAL *row_sum, REAL *acc, size_t cols)
{
    const REAL old = *row_max;
    *row_max = FN(max_lane)(block_max);
    if (!V(any_gt)(V(load)(row_sum), V(zero)())) {
        return; /* nothing to rescale yet */
    }
    const VEC factor = FN(exp2)(V(set)(old - *row_max));
    V(store)(row_sum, V(mul)(V(load)(row_sum), factor));
    for (size_t c = 0; c < cols; c += VL) {
        V(store)(acc + c, V(mul)(V(load)(acc + c), factor));
    }
}

/* What is to be done meanwhile, a little for every vector of some rows: nothing. */
static inline void FN(idle)(void *work) { (void)work; }

/* Rows from `first` on, as softmax_update in tile_ops.h has it.  `rows`, up to SOFTMAX_ROWS, and
 * `meanwhile` are constants. */
FA_INLINE void FN(softmax_rows)(const size_t rows, const struct fa_softmax *x, size_t first,
                                void (*meanwhile)(void *), void *work)
{
    const size_t ld = x->ld, n = x->cols, ldacc = x->ldacc;
    REAL *s = (REAL *)x->scores + first * ld, *row_max = (REAL *)x->state->row_max + first;
    REAL *row_sum = (REAL *)x->state->row_sum + first * VL;
    REAL *acc = (REAL *)x->state->acc + first * ldacc;
    VEC block_max[SOFTMAX_ROWS], shift[SOFTMAX_ROWS], sum[SOFTMAX_ROWS];
    int outgrown = 0;
    FA_UNROLL
    for (size_t r = 0; r < rows; r++) {
        shift[r] = V(broadcast)(row_max + r);
        block_max[r] = shift[r];
        sum[r] = V(zero)();
    }
    for (size_t l = 0; l < n; l += VL) {
        FA_UNROLL
        for (size_t r = 0; r < rows; r++) {
            block_max[r] = V(max)(V(load)(s + r * ld + l), block_max[r]);
        }
    }
    FA_UNROLL
    for (size_t r = 0; r < rows; r++) {
        outgrown |= FN(outgrown)(block_max[r], shift[r]);
    }
    if (outgrown) {
        for (size_t r = 0; r < rows; r++) {
            if (FN(outgrown)(block_max[r], shift[r])) {
                FN(raise_row_max)(block_max[r], row_max + r, row_sum + r * VL, acc + r * ldacc,
                                  ldacc);
                shift[r] = V(broadcast)(row_max + r);
            }
        }
    }
    for (size_t l = 0; l < n; l += VL) {
        meanwhile(work);
        FA_UNROLL
        for (size_t r = 0; r < rows; r++) {
            VEC p = FN(exp2)(V(sub)(V(load)(s + r * ld + l), shift[r]));
            V(store)(s + r * ld + l, p);
            sum[r] = V(add)(sum[r], p);
        }
    }
    FA_UNROLL
    for (size_t r = 0; r < rows; r++) {
        V(store)(row_sum + r * VL, V(add)(V(load)(row_sum + r * VL), sum[r]));
    }
}

FA_INLINE void FN(softmax_all_rows)(const struct fa_softmax *x, void (*meanwhile)(void *),
                                    void *work)
{
    size_t r = 0;
    for (; r + SOFTMAX_ROWS <= x->rows; r += SOFTMAX_ROWS) {
        FN(softmax_rows)(SOFTMAX_ROWS, x, r, meanwhile, work);
    }
    for (; r < x->rows; r++) {
        FN(softmax_rows)(1, x, r, meanwhile, work);
    }
}

static void FN(softmax_update)(void *s, size_t ld, size_t rows, size_t n,
                               const struct fa_state *state, size_t ldacc)
{
    const struct fa_softmax x = {
        .scores = s, .ld = ld, .rows = rows, .cols = n, .state = state, .ldacc = ldacc};
    FN(softmax_all_rows)(&x, FN(idle), NULL);
}

/* total = total * keep + split * join, n elements: what rounding leaves of each sum goes into rest,
 * and joins the next.  An infinite sum leaves NaN, which is dropped. */
static void FN(fold_sums)(size_t n, VEC keep, VEC join, const REAL *split, REAL *total, REAL *rest)
{
    for (size_t i = 0; i < n; i += VL) {
        const VEC a = V(mul)(V(load)(total + i), keep);
        const VEC b = V(add)(V(mul)(V(load)(split + i), join), V(mul)(V(load)(rest + i), keep));
        const VEC sum = V(add)(a, b), added = V(sub)(sum, a);
        const VEC left = V(add)(V(sub)(a, V(sub)(sum, added)), V(sub)(b, added));
        V(store)(total + i, sum);
        V(store)(rest + i, V(select_lt)(V(abs)(left), V(set)(REAL_MAX), left, V(zero)()));
    }
}

/* A split without keys changes no bit of the other: its factor is 0, or its sums are.  A thousand
 * splits of like terms would be rounded in one direction.  So the sums are compensated, which costs
 * a split 6 operations more per vector of acc. */
static void FN(softmax_fold)(size_t rows, const struct fa_state *total, const struct fa_state *rest,
                             const struct fa_state *split, size_t ldacc)
{
    for (size_t r = 0; r < rows; r++) {
        REAL *total_max = (REAL *)total->row_max + r;
        const REAL split_max = ((const REAL *)split->row_max)[r];
        const REAL max = *total_max > split_max ? *total_max : split_max;
        const VEC keep = FN(exp2)(V(set)(*total_max - max)),
                  join = FN(exp2)(V(set)(split_max - max));
        *total_max = max;
        FN(fold_sums)(VL, keep, join, (const REAL *)split->row_sum + r * VL,
                      (REAL *)total->row_sum + r * VL, (REAL *)rest->row_sum + r * VL);
        FN(fold_sums)(ldacc, keep, join, (const REAL *)split->acc + r * ldacc,
                      (REAL *)total->acc + r * ldacc, (REAL *)rest->acc + r * ldacc);
    }
}

static inline double FN(sum_lanes)(const REAL *row_sum)
{
    double lanes[VL];
    for (size_t i = 0; i < VL; i++) {
        lanes[i] = (double)row_sum[i];
    }
    for (size_t width = VL / 2; width > 0; width /= 2) {
        for (size_t i = 0; i < width; i++) {
            lanes[i] += lanes[i + width];
        }
    }
    return lanes[0];
}

/* What the backward pass makes of it: see fa_attention_params. */
static void FN(store_kept)(const REAL *acc, REAL shift, REAL factor,
                           const struct fa_row_result *result)
{
    if (result->exact != NULL) {
        struct fa_row_result exact = *result;
        exact.out = result->exact;
        exact.out_stride = result->exact_stride;
        exact.dtype = result->lse_dtype;
        exact.residual = NULL;
        FN(store_row)(acc, factor, &exact);
    }
    if (result->weighing != NULL) {
        char *to = result->weighing;
        FN(write_as)(to, shift, result->lse_dtype);
        FN(write_as)(to + result->weighing_stride, factor, result->lse_dtype);
    }
}

static void FN(store_lse)(const struct fa_row_result *result, double top, double total)
{
    if (result->lse != NULL) {
        const double lse = fa_natural(top, log2(total), result->biased, sizeof(REAL));
        FN(write_as)(result->lse, (REAL)lse, result->lse_dtype);
    }
}

/* Once per row: in double, so that the divisor adds no error of its own. */
static enum fa_stored FN(softmax_store)(const struct fa_state *state, size_t ldacc,
                                        const struct fa_row_result *result)
{
    const size_t row = result->row;
    double top = (double)((const REAL *)state->row_max)[row];
    double total = FN(sum_lanes)((const REAL *)state->row_sum + row * VL), weight = 1;
    const bool empty = total == 0; /* no key takes part, nor a NaN */
    const REAL *acc = (const REAL *)state->acc + row * ldacc;
    if (!result->final && (!(total <= REAL_MAX) || fa_is_doubtful(result->doubt, top, empty))) {
        return FA_ROW_LEFT;
    }
    if (FN(have_sums_left)(acc, result)) {
        return FA_SUMS_LEFT;
    }
    if (empty) {
        top = result->sink;
        weight = 0;
        total = 1;
    } else if (result->sink != -INFINITY) {
        const double max = top;
        top = result->sink > max ? result->sink : max;
        weight = exp2(max - top);
        total = total * weight + exp2(result->sink - top);
    }
    const REAL factor = (REAL)(weight / total);
    FN(store_row)(acc, factor, result);
    FN(store_kept)(acc, empty ? 0 : ((const REAL *)state->row_max)[row], factor, result);
    FN(store_lse)(result, top, total);
    return FA_STORED;
}

static void FN(step_to_next)(struct fa_row_result *result, const struct fa_row_steps *step)
{
    result->row++;
    result->out = (char *)result->out + step->out;
    result->residual =
        result->residual == NULL ? NULL : (const char *)result->residual + step->residual;
    result->lse = result->lse == NULL ? NULL : (char *)result->lse + step->lse;
    result->weighing = result->weighing == NULL ? NULL : (char *)result->weighing + step->weighing;
}

/* What acc of each row is multiplied by.  Returns a bit for each row that is to be given back. */
static uint32_t FN(find_factors)(size_t rows, const REAL *row_max, const double *total,
                                 const struct fa_row_result *result, REAL *factor)
{
    uint32_t left = 0;
    for (size_t r = 0; r < rows; r++) {
        factor[r] = (REAL)(1 / total[r]);
    }
    for (size_t r = 0; r < rows; r++) {
        const bool empty = total[r] == 0, leaves = !(total[r] <= REAL_MAX);
        left |= (uint32_t)(leaves | fa_is_doubtful(result->doubt, (double)row_max[r], empty)) << r;
        factor[r] = empty ? 0 : factor[r];
    }
    return result->final ? 0 : left;
}

/* Sums and quotients of all rows come before the first is stored: those of one row wait for each
 * other, and those of different rows do not. */
static uint32_t FN(softmax_store_rows)(const struct fa_state *state, size_t ldacc, size_t rows,
                                       const struct fa_row_result *first,
                                       const struct fa_row_steps *step)
{
    const REAL *row_max = (const REAL *)state->row_max + first->row;
    const REAL *row_sum = (const REAL *)state->row_sum + first->row * VL;
    const REAL *acc = (const REAL *)state->acc + first->row * ldacc;
    const size_t whole = FN(whole_vectors)(first);
    const bool kept = first->weighing != NULL, has_lse = first->lse != NULL;
    struct fa_row_result result = *first;
    double total[FA_MAX_TILE_Q];
    REAL factor[FA_MAX_TILE_Q];
    FA_ASSERT(rows <= FA_MAX_TILE_Q && result.sink == -INFINITY && result.exponent == 0);
    FA_ASSERT(result.exact == NULL && result.columns == NULL && !result.look_at_acc);
    for (size_t r = 0; r < rows; r++) {
        total[r] = FN(sum_lanes)(row_sum + r * VL);
    }
    const uint32_t left = FN(find_factors)(rows, row_max, total, &result, factor);
    for (size_t r = 0; r < rows; r++, acc += ldacc, FN(step_to_next)(&result, step)) {
        const bool empty = total[r] == 0;
        if (left >> r & 1) {
            continue;
        }
        /* With a constant type the loop asks for none. */
        if (result.dtype == COMPUTED) {
            FN(store_vectors)(acc, factor[r], &result, whole, COMPUTED);
        } else {
            FN(store_vectors)(acc, factor[r], &result, whole, result.dtype);
        }
        if (whole < result.cols) {
            FN(store_elements)(acc, factor[r], &result, whole);
        }
        if (kept) {
            FN(store_kept)(acc, empty ? 0 : row_max[r], factor[r], &result);
        }
        if (has_lse) {
            FN(store_lse)(&result, empty ? result.sink : (double)row_max[r], empty ? 1 : total[r]);
        }
    }
    return left;
}
