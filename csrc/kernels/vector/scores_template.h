/* Edits of a score tile between Q K^T and the softmax: softcap, bias, ALiBi, masks.  Scores are
 * base-2 logarithms.  Needs tanh_template.h and pack_template.h. */

/* A cap is rounded once for all scores: what that leaves of it is added, which costs a
 * multiplication. */
static void FN(softcap)(void *s, size_t ld, size_t rows, size_t n, double cap2)
{
    const REAL cap = (REAL)cap2, rest = cap <= REAL_MAX ? (REAL)(cap2 - (double)cap) : 0;
    for (size_t r = 0; r < rows; r++) {
        REAL *row = (REAL *)s + r * ld;
        for (size_t l = 0; l < n; l += VL) {
            const VEC t = FN(tanh)(V(load)(row + l));
            V(store)(row + l, V(fma)(t, V(set)(cap), V(mul)(t, V(set)(rest))));
        }
    }
}

/* s + bias * log2(e), where a finite bias stays finite, and in its place among others: the lowest
 * number of a type is a common "masked" value, and a row of nothing else is a uniform average, not
 * a row without keys.  Beyond BIAS_LIMIT a bias therefore grows by its own difference only, which
 * says as well that nothing beside it weighs anything.  A bias of -inf takes its key out, whatever
 * the score is, NaN included.  Most vectors hold nothing of that size. */
static inline VEC FN(with_bias)(VEC s, VEC bias)
{
    const VEC max = V(set)(REAL_MAX), min = V(set)(-REAL_MAX), limit = V(set)(BIAS_LIMIT);
    VEC sum = V(fma)(bias, V(set)((REAL)FA_LOG2_E), s);
    if (!V(any_gt)(V(abs)(bias), limit)) {
        return sum;
    }
    const VEC more = V(set)((REAL)FA_BIAS_MOVE * BIAS_LIMIT);
    sum = V(select_lt)(limit, bias, V(add)(s, V(add)(bias, more)), sum);
    sum = V(select_lt)(bias, V(set)(-BIAS_LIMIT), V(add)(s, V(sub)(bias, more)), sum);
    VEC kept = sum;
    kept = V(select_lt)(kept, min, min, kept);
    kept = V(select_lt)(max, kept, max, kept);
    kept = V(select_lt)(max, V(abs)(s), sum, kept);
    kept = V(select_lt)(max, V(abs)(bias), sum, kept);
    return V(select_lt)(bias, min, bias, kept);
}

/* Integers have their keys' scales outside the chains of both products: a multiplication per score
 * and weight, not per element. */
static void FN(scale_scores)(void *s, size_t ld, size_t rows, size_t n, const float *scale)
{
    for (size_t r = 0; r < rows; r++) {
        REAL *row = (REAL *)s + r * ld;
        for (size_t l = 0; l < n; l++) {
            row[l] *= (REAL)scale[l];
        }
    }
}

/* A weight of 0 stays 0, whatever the scale of a key that takes no part. */
static void FN(scale_weights)(void *w, size_t ld, size_t rows, size_t n, const float *scale)
{
    for (size_t r = 0; r < rows; r++) {
        REAL *row = (REAL *)w + r * ld;
        for (size_t l = 0; l < n; l++) {
            row[l] = row[l] == 0 ? 0 : row[l] * (REAL)scale[l];
        }
    }
}

static void FN(add_bias)(void *s, size_t n, const void *bias, int64_t stride, enum fa_dtype dtype)
{
    const char *from = bias;
    const int64_t size = fa_dtype_size(dtype);
    REAL *row = s;
    size_t l = 0;
    if (FN(knows)(dtype) && stride == size) {
        for (; l + VL <= n; l += VL) {
            VEC b = FN(widen)(from + (int64_t)l * size, dtype);
            V(store)(row + l, FN(with_bias)(V(load)(row + l), b));
        }
    }
    for (; l < n; l += VL) {
        REAL lanes[VL] = {0};
        for (size_t i = 0; i < VL && l + i < n; i++) {
            lanes[i] = FN(read_as)(from + (int64_t)(l + i) * stride, dtype);
        }
        V(store)(row + l, FN(with_bias)(V(load)(row + l), V(load)(lanes)));
    }
}

static void FN(add_alibi)(void *s, size_t n, double slope2, int64_t distance)
{
    REAL *row = s;
    for (size_t l = 0; l < n; l += VL) {
        VEC d = V(sub)(V(set)((REAL)(distance - (int64_t)l)), V(iota)());
        VEC x = V(load)(row + l);
        V(store)(row + l, V(fma)(V(set)((REAL)-slope2), V(abs)(d), x));
    }
}

static void FN(mask_bytes)(void *s, size_t n, const uint8_t *mask)
{
    REAL *row = s;
    const VEC out = V(set)((REAL)-INFINITY);
    for (size_t l = 0; l < n; l += VL) {
        V(store)(row + l, V(select_bytes)(mask + l, V(load)(row + l), out));
    }
}

/* A tile is looked at whole first: hardly any holds an infinity. */
static void FN(mark_overflow)(void *s, size_t ld, size_t rows, size_t n)
{
    VEC probe = V(zero)();
    for (size_t r = 0; r < rows; r++) {
        for (size_t l = 0; l < n; l += VL) {
            probe = V(fma)(V(load)((const REAL *)s + r * ld + l), V(zero)(), probe);
        }
    }
    for (size_t r = 0; !FN(is_finite)(probe) && r < rows; r++) {
        for (size_t l = 0; l < n; l += VL) {
            REAL *at = (REAL *)s + r * ld + l;
            const VEC x = V(load)(at);
            V(store)(at, V(add)(x, V(sub)(x, x)));
        }
    }
}

static void FN(mask_range)(void *s, size_t n, size_t lo, size_t hi)
{
    REAL *row = s;
    for (size_t l = 0; l < lo; l++) {
        row[l] = (REAL)-INFINITY;
    }
    for (size_t l = hi; l < n; l++) {
        row[l] = (REAL)-INFINITY;
    }
}
