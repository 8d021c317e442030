/* Softmax over the queries of a column: the statistics of one key block, lanes along the keys, and
 * the weights from them.  Two passes over the scores replace the online rescaling of rows.  Needs
 * exp2_template.h and pack_template.h. */

static void FN(column_begin)(void *col_max, void *col_sum, size_t n)
{
    for (size_t l = 0; l < n; l++) {
        ((REAL *)col_max)[l] = (REAL)-INFINITY;
        ((REAL *)col_sum)[l] = 0;
    }
}

/* The maximum of a column, or 0 where no query has joined it and the maximum is -inf, so that
 * -inf - max is not NaN. */
static inline VEC FN(finite_max)(VEC max)
{
    return V(select_lt)(max, V(set)(-REAL_MAX), V(zero)(), max);
}

static void FN(column_update)(const void *s, size_t ld, size_t rows, size_t n, void *col_max,
                              void *col_sum)
{
    for (size_t l = 0; l < n; l += VL) {
        const REAL *column = (const REAL *)s + l;
        REAL *max_lanes = (REAL *)col_max + l, *sum_lanes = (REAL *)col_sum + l;
        VEC old = V(load)(max_lanes), max = old, sum = V(load)(sum_lanes);
        for (size_t r = 0; r < rows; r++) {
            max = V(max)(V(load)(column + r * ld), max);
        }
        VEC shift = FN(finite_max)(max);
        if (V(any_gt)(max, old)) {
            sum = V(mul)(sum, FN(exp2)(V(sub)(old, shift)));
            V(store)(max_lanes, max);
        }
        VEC tile_sum = V(zero)();
        for (size_t r = 0; r < rows; r++) {
            tile_sum = V(add)(tile_sum, FN(exp2)(V(sub)(V(load)(column + r * ld), shift)));
        }
        V(store)(sum_lanes, V(add)(sum, tile_sum));
    }
}

static void FN(column_finish)(void *col_max, void *col_sum, const struct fa_column_result *result)
{
    const size_t n = result->cols, padded = result->padded;
    REAL *max = col_max, *sum = col_sum;
    memset(max + n, 0, (padded - n) * sizeof(REAL));
    memset(sum + n, 0, (padded - n) * sizeof(REAL));
    for (size_t l = 0; l < n; l++) {
        double total = (double)sum[l], log_sum = -INFINITY;
        if (total != 0) { /* a query takes part, or a NaN does */
            log_sum = fa_natural((double)max[l], log2(total), result->biased, sizeof(REAL));
            sum[l] = (REAL)(1 / total);
        } else {
            max[l] = 0;
        }
        if (result->lse != NULL) {
            FN(write_as)((char *)result->lse + (int64_t)l * result->lse_stride, (REAL)log_sum,
                         result->lse_dtype);
        }
    }
}

static void FN(column_weights)(void *s, size_t ld, size_t rows, size_t n, const void *col_max,
                               const void *col_inverse)
{
    for (size_t r = 0; r < rows; r++) {
        REAL *row = (REAL *)s + r * ld;
        for (size_t l = 0; l < n; l += VL) {
            VEC x = V(load)(row + l);
            VEC p = FN(exp2)(V(sub)(x, V(load)((const REAL *)col_max + l)));
            p = V(mul)(p, V(load)((const REAL *)col_inverse + l));
            /* A masked key weighs 0 though another row's NaN may have made the reciprocal NaN. */
            V(store)(row + l, V(keep_ge)(x, V(set)(-REAL_MAX), p));
        }
    }
}

static void FN(sum_rows)(void *sums, const void *w, size_t ld, size_t rows, size_t n,
                         const void *factor)
{
    for (size_t l = 0; l < n; l += VL) {
        VEC sum = V(zero)();
        for (size_t r = 0; r < rows; r++) {
            const VEC row_factor = V(broadcast)((const REAL *)factor + r);
            sum = V(fma)(V(load)((const REAL *)w + r * ld + l), row_factor, sum);
        }
        V(store)((REAL *)sums + l, sum);
    }
}

static enum fa_stored FN(store)(const void *acc, const struct fa_row_result *result)
{
    if (FN(have_sums_left)(acc, result)) {
        return FA_SUMS_LEFT;
    }
    FN(store_row)((const REAL *)acc, 1, result);
    return FA_STORED;
}
