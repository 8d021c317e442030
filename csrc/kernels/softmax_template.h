/* Online softmax over the keys of a row (Milakov & Gimelshein, arXiv:1805.02867), rescaled lazily
 * (FlashAttention-4): row_max may lag behind the true maximum by RESCALE_THRESHOLD, which costs no
 * accuracy in floating point and saves the pass over acc in all but the first blocks.  The decision
 * looks at one row only, so a row's bits do not depend on its neighbours.  Needs exp2_template.h and
 * pack_template.h.
 *
 * Cost per vector of scores: 1 load + 1 max, then 1 load, 1 sub, exp2 (13), 1 add, 1 store.
 */

/* Base-2: weights stay below 2^8 times the largest weight under the true maximum. */
#define RESCALE_THRESHOLD 8

static void FN(softmax_begin)(void *row_max, void *row_sum, void *acc, size_t rows, size_t cols)
{
    for (size_t r = 0; r < rows; r++) {
        ((REAL *)row_max)[r] = (REAL)-INFINITY;
    }
    memset(row_sum, 0, rows * VL * sizeof(REAL));
    memset(acc, 0, rows * cols * sizeof(REAL));
}

static inline REAL FN(max_lane)(VEC x)
{
    REAL lanes[VL], max;
    V(store)(lanes, x);
    max = lanes[0];
    for (size_t i = 1; i < VL; i++) {
        max = lanes[i] > max || max != max ? lanes[i] : max;
    }
    return max;
}

/* Returns the new maximum.  Rows that have seen no key yet have nothing to rescale. */
static REAL FN(raise_row_max)(REAL old, VEC block_max, REAL *row_sum, REAL *acc, size_t cols)
{
    REAL max = FN(max_lane)(block_max);
    if (old == (REAL)-INFINITY) {
        return max;
    }
    VEC factor = FN(exp2)(V(set)(old - max));
    V(store)(row_sum, V(mul)(V(load)(row_sum), factor));
    for (size_t c = 0; c < cols; c += VL) {
        V(store)(acc + c, V(mul)(V(load)(acc + c), factor));
    }
    return max;
}

static void FN(softmax_update)(void *s, size_t ld, size_t rows, size_t n, void *row_max,
                               void *row_sum, void *acc, size_t ldacc)
{
    for (size_t r = 0; r < rows; r++) {
        REAL *row = (REAL *)s + r * ld;
        REAL *sum_lanes = (REAL *)row_sum + r * VL;
        REAL max = ((REAL *)row_max)[r];
        VEC block_max = V(load)(row);
        for (size_t l = VL; l < n; l += VL) {
            block_max = V(max)(V(load)(row + l), block_max);
        }
        if (V(any_gt)(block_max, V(set)(max + RESCALE_THRESHOLD))) {
            max = FN(raise_row_max)(max, block_max, sum_lanes, (REAL *)acc + r * ldacc, ldacc);
            ((REAL *)row_max)[r] = max;
        }
        /* All of a row masked so far: -inf - 0 gives weight 0, where -inf - -inf would give NaN. */
        const VEC shift = V(set)(max == (REAL)-INFINITY ? 0 : max);
        VEC sum = V(zero)();
        for (size_t l = 0; l < n; l += VL) {
            VEC p = FN(exp2)(V(sub)(V(load)(row + l), shift));
            V(store)(row + l, p);
            sum = V(add)(sum, p);
        }
        V(store)(sum_lanes, V(add)(V(load)(sum_lanes), sum));
    }
}

/* Once per row: in double, so that the divisor adds no error of its own. */
static void FN(softmax_store)(const void *row_max, const void *row_sum, const void *acc,
                              size_t ldacc, const struct fa_row_result *result)
{
    const REAL *lanes = (const REAL *)row_sum + result->row * VL;
    double max = (double)((const REAL *)row_max)[result->row];
    double sum = 0, factor = 0, lse = -INFINITY;
    for (size_t i = 0; i < VL; i++) {
        sum += (double)lanes[i];
    }
    if (sum != 0) { /* a key takes part, or a NaN does */
        double top = result->sink > max ? result->sink : max;
        double weight = exp2(max - top);
        double total = sum * weight;
        if (result->sink != -INFINITY) {
            total += exp2(result->sink - top);
        }
        factor = weight / total;
        lse = (top + log2(total)) * FA_LN_2;
    }
    FN(store_row)((const REAL *)acc + result->row * ldacc, (REAL)factor, result);
    if (result->lse != NULL) {
        FN(write)(result->lse, (REAL)lse);
    }
}
