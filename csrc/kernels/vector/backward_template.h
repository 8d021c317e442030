/* The elementwise part of the backward pass.  Needs exp2_template.h and pack_template.h. */

/* VL elements from element c on, of which those before `cols` are real and the others 0. */
static inline VEC FN(load_terms)(const char *p, int64_t stride, size_t c, size_t cols,
                                 enum fa_dtype dtype)
{
    REAL lanes[VL] = {0};
    if (stride == fa_dtype_size(dtype) && FN(knows)(dtype) && c + VL <= cols) {
        return FN(widen)(p + (int64_t)c * stride, dtype);
    }
    for (size_t i = 0; i < VL && c + i < cols; i++) {
        lanes[i] = FN(read_as)(p + (int64_t)(c + i) * stride, dtype);
    }
    return V(load)(lanes);
}

/* The same chains whatever the strides are: element c belongs to lane c % VL. */
static double FN(row_delta)(const struct fa_row_terms *terms)
{
    const enum fa_dtype out_dtype = terms->out_dtype;
    const size_t cols = terms->cols;
    VEC sum = V(zero)();
    REAL lanes[VL];
    for (size_t c = 0; c < cols; c += VL) {
        const VEC grad = FN(load_terms)(terms->grad, terms->grad_stride, c, cols, terms->dtype);
        VEC out = FN(load_terms)(terms->out, terms->out_stride, c, cols, out_dtype);
        if (terms->residual != NULL) {
            out = V(sub)(
                out, FN(load_terms)(terms->residual, terms->residual_stride, c, cols, out_dtype));
        }
        sum = V(fma)(grad, out, sum);
    }
    V(store)(lanes, sum);
    return FN(sum_lanes)(lanes);
}

/* 1 - tanh(s)^2 = 4 e / (1 + e)^2 with e = e^-2|s|.  The difference would keep nothing of a slope
 * that is less than the rounding of tanh: this form is as accurate as s is. */
static void FN(softcap_slope)(void *slope, const void *s, size_t ld, size_t rows, size_t n)
{
    const VEC one = V(set)(1), four = V(set)(4), base2 = V(set)((REAL)(-2 * FA_LOG2_E));
    for (size_t r = 0; r < rows; r++) {
        for (size_t l = r * ld; l < r * ld + n; l += VL) {
            VEC e = FN(exp2)(V(mul)(V(abs)(V(load)((const REAL *)s + l)), base2));
            VEC sum = V(add)(one, e);
            V(store)((REAL *)slope + l, V(div)(V(mul)(four, e), V(mul)(sum, sum)));
        }
    }
}

/* A weight that is 0 adds nothing: the key may be masked, and what it holds NaN. */
static void FN(add_row_products)(void *sums, const void *w, const void *d, size_t ld, size_t rows,
                                 size_t n)
{
    const VEC zero = V(zero)();
    for (size_t r = 0; r < rows; r++) {
        REAL *row_sum = (REAL *)sums + r * VL;
        VEC sum = zero;
        for (size_t l = r * ld; l < r * ld + n; l += VL) {
            const VEC p = V(load)((const REAL *)w + l);
            sum = V(select_lt)(zero, p, V(fma)(p, V(load)((const REAL *)d + l), sum), sum);
        }
        V(store)(row_sum, V(add)(V(load)(row_sum), sum));
    }
}

/* A row whose lse is NaN: so is everything of the keys that take part. */
static void FN(spoil_row)(REAL *s, REAL *d, size_t n, VEC nan)
{
    for (size_t l = 0; l < n; l += VL) {
        VEC x = V(keep_ge)(V(load)(s + l), V(set)(-REAL_MAX), nan);
        V(store)(s + l, x);
        V(store)(d + l, x);
    }
}

/* Cost per vector: 2 loads, 2 sub, exp2, 2 mul, max, compare, 2 stores.  Where the weight is 0 the
 * gradient is not multiplied but selected: the key may be masked, and what it holds NaN. */
static uint32_t FN(score_gradients)(const struct fa_gradients *tile)
{
    const REAL *shift = tile->shift, *factor = tile->factor, *delta = tile->delta;
    const size_t ld = tile->ld, rows = tile->rows, cols = tile->cols;
    const VEC limit = V(set)(EXP2_MIN), half = V(set)((REAL)0.5);
    uint32_t dominated = 0;
    for (size_t r = 0; r < rows; r++) {
        REAL *s_row = (REAL *)tile->scores + r * ld, *d_row = (REAL *)tile->gradients + r * ld;
        const VEC row_shift = V(broadcast)(shift + r);
        const VEC row_factor = V(broadcast)(factor + r);
        const VEC row_delta = V(broadcast)(delta + r);
        VEC largest = V(zero)();
        if (isnan(shift[r])) {
            FN(spoil_row)(s_row, d_row, cols, row_shift);
            continue;
        }
        for (size_t l = 0; l < cols; l += VL) {
            VEC x = V(sub)(V(load)(s_row + l), row_shift);
            VEC p = V(mul)(FN(exp2)(x), row_factor);
            VEC gradient = V(mul)(p, V(sub)(V(load)(d_row + l), row_delta));
            V(store)(s_row + l, p);
            V(store)(d_row + l, V(keep_ge)(x, limit, gradient));
            largest = V(max)(p, largest);
        }
        dominated |= (uint32_t)(V(any_gt)(largest, half) != 0) << r;
    }
    return dominated;
}

static void FN(column_gradients)(const struct fa_gradients *tile)
{
    const REAL *shift = tile->shift, *factor = tile->factor, *delta = tile->delta;
    const size_t ld = tile->ld, rows = tile->rows, cols = tile->cols;
    REAL *s = tile->scores, *d = tile->gradients;
    const VEC limit = V(set)(EXP2_MIN), lowest = V(set)(-REAL_MAX);
    for (size_t r = 0; r < rows; r++) {
        for (size_t l = 0; l < cols; l += VL) {
            REAL *at = s + r * ld + l;
            VEC score = V(load)(at);
            /* A column's shift may be NaN; its masked scores still weigh 0. */
            VEC x = V(sub)(score, V(load)(shift + l));
            VEC weight = V(mul)(FN(exp2)(x), V(load)(factor + l));
            VEC p = V(keep_ge)(score, lowest, weight);
            V(store)(at, p);
            if (d != NULL) {
                REAL *to = d + r * ld + l;
                VEC difference = V(sub)(V(load)(to), V(load)(delta + l));
                VEC gradient = V(keep_ge)(x, limit, V(mul)(p, difference));
                V(store)(to, V(keep_ge)(score, lowest, gradient));
            }
        }
    }
}

static void FN(scale_gradients)(void *d, const void *slope, size_t ld, size_t rows, size_t n)
{
    for (size_t r = 0; r < rows; r++) {
        for (size_t l = r * ld; l < r * ld + n; l += VL) {
            VEC x = V(load)((REAL *)d + l);
            /* A masked key's slope may be NaN. */
            VEC scaled = V(mul)(x, V(load)((const REAL *)slope + l));
            VEC is_zero = V(abs)(x);
            V(store)((REAL *)d + l, V(select_lt)(V(zero)(), is_zero, scaled, V(add)(x, x)));
        }
    }
}

static void FN(add)(void *sum, const void *x, size_t n)
{
    for (size_t l = 0; l < n; l += VL) {
        REAL *to = (REAL *)sum + l;
        V(store)(to, V(add)(V(load)(to), V(load)((const REAL *)x + l)));
    }
}

static bool FN(store_scaled)(const void *acc, double factor, const struct fa_row_result *result)
{
    FN(store_row)((const REAL *)acc, (REAL)factor, result);
    return FN(sum_probes)(acc, result->cols) == 0;
}
