/* The edge between caller memory and workspace: the only code that reads q, k and v and writes out.
 * Needs storage_template.h.
 *
 * Caller memory has byte strides and any alignment, so single elements go through memcpy, and whole
 * vectors are read only where every lane is an element of the array: guard-page tests hold it to
 * that.
 */

/* Whether the sum of probes of elements is finite, and so every element small enough. */
static inline bool FN(is_finite)(VEC probe)
{
    REAL lanes[VL], sum = 0;
    V(store)(lanes, probe);
    for (size_t i = 0; i < VL; i++) {
        sum += lanes[i];
    }
    return sum - sum == 0;
}

/* One row of q, or of a gradient, times a factor.  Returns the probes of its elements summed. */
FA_INLINE VEC FN(load_row)(REAL *row, const char *src, size_t cols, int64_t col_stride, REAL factor,
                           enum fa_dtype dtype)
{
    const int64_t size = fa_dtype_size(dtype);
    const size_t whole = col_stride == size && FN(knows)(dtype) ? cols - cols % VL : 0;
    const VEC ordinary = V(set)(ORDINARY_PROBE);
    VEC found = V(zero)(); /* of the row: one sum of all would wait for its own latency */
    REAL rest = 0;
    size_t c = 0;
    for (; c < whole; c += VL) {
        const VEC x = V(mul)(FN(widen)(src + (int64_t)c * size, dtype), V(set)(factor));
        V(store)(row + c, x);
        found = V(fma)(x, ordinary, found);
    }
    for (; c < cols; c++) {
        row[c] = FN(read_as)(src + (int64_t)c * col_stride, dtype) * factor;
        rest += row[c] * ORDINARY_PROBE;
    }
    return V(add)(found, V(set)(rest));
}

FA_INLINE bool FN(load_rows_of)(REAL *dst, size_t rows, size_t cols, const struct fa_rows *from,
                                REAL factor, enum fa_dtype dtype)
{
    VEC probe = V(zero)();
    for (size_t r = 0; r < rows; r++) {
        probe = V(add)(probe, FN(load_row)(dst + r * cols, from->row[r], cols, from->col_stride,
                                           factor, dtype));
    }
    return FN(is_finite)(probe);
}

static bool FN(load_rows)(void *dst, size_t rows, size_t cols, const struct fa_rows *from,
                          double factor)
{
    switch (from->dtype) {
#define CASE(dtype)                                                                                \
    case dtype:                                                                                    \
        return FN(load_rows_of)(dst, rows, cols, from, (REAL)factor, dtype);
        STORAGE_TYPES(CASE)
#undef CASE
    default:
        return FN(load_rows_of)(dst, rows, cols, from, (REAL)factor, from->dtype);
    }
}

/* VL keys from `key` on into one column of vectors of a panel, zero for those that are not there.
 * Whole squares go through registers, the edges element by element.  Returns the sum of probe and
 * their probes. */
FA_INLINE VEC FN(pack_key_vector)(REAL *panel, const struct key_block *block, size_t key,
                                  enum fa_dtype dtype, VEC probe)
{
    const struct fa_rows *from = block->from;
    const size_t cols = block->cols, keys = keys_left(block, key);
    const int64_t size = fa_dtype_size(dtype);
    const size_t share = FN(lane_elements)(dtype), step = VL * share;
    const char *const *row = from->row + key;
    const bool whole = from->col_stride == size && FN(knows)(dtype);
    const size_t ahead = FN(keys_ahead)(dtype);
    const bool more = key + ahead + VL <= from->located;
    const VEC ordinary = V(set)(ORDINARY_PROBE);
    size_t c = 0;
    for (; whole && c + step <= cols; c += step) {
        VEC square[VL], found = V(zero)();
        if (more) {
            FN(fetch_square)(row + ahead, (int64_t)c * size);
        }
        if (keys >= VL) {
            FN(load_square)(square, row, (int64_t)c * size);
        } else {
            FN(load_part)(square, row, keys, (int64_t)c * size);
        }
        FA_UNROLL
        for (size_t u = 0; u < VL; u++) {
            for (size_t i = 0; i < share; i++) {
                VEC x = FN(lane_element)(square[u], (int)i, dtype);
                V(store)(panel + (c + u * share + i) * NR, x);
                found = V(fma)(x, ordinary, found);
            }
        }
        probe = V(add)(probe, found);
    }
    for (; c < cols; c++) {
        VEC x = FN(load_column)(row, keys, (int64_t)c * from->col_stride, dtype);
        V(store)(panel + c * NR, x);
        probe = V(fma)(x, ordinary, probe);
    }
    return probe;
}

FA_INLINE bool FN(pack_keys_of)(REAL *dst, const struct key_block *block, enum fa_dtype dtype)
{
    VEC probe = V(zero)();
    for (size_t key = 0; key < block->keys; key += NR) {
        for (size_t first = 0; first < NR; first += VL) {
            REAL *to = dst + key * block->cols + first;
            probe = FN(pack_key_vector)(to, block, key + first, dtype, probe);
        }
    }
    return FN(is_finite)(probe);
}

static bool FN(pack_keys)(void *dst, size_t keys, size_t cols, const struct fa_rows *from)
{
    const struct key_block block = {from, keys, cols};
    switch (from->dtype) {
#define CASE(dtype)                                                                                \
    case dtype:                                                                                    \
        return FN(pack_keys_of)(dst, &block, dtype);
        STORAGE_TYPES(CASE)
#undef CASE
    default:
        /* Rows that float32 had no range for, element by element; float32 gets no others. */
        FA_ASSERT(!WIDENS);
        return !WIDENS && FN(pack_keys_of)(dst, &block, from->dtype);
    }
}

/* NR columns of one key, element by element: the first `cols` are there.  Returns their probes
 * summed. */
static VEC FN(pack_value_edge)(REAL *dst, size_t cols, const char *src, int64_t col_stride,
                               enum fa_dtype dtype)
{
    VEC probe = V(zero)();
    for (size_t c = 0; c < NR; c++) {
        dst[c] = c < cols ? FN(read_as)(src + (int64_t)c * col_stride, dtype) : 0;
    }
    for (size_t j = 0; j < NR; j += VL) {
        probe = V(fma)(V(load)(dst + j), V(set)(VALUE_PROBE), probe);
    }
    return probe;
}

/* One key.  Returns the probes of its values summed: not finite where a value is too large. */
FA_INLINE VEC FN(pack_value_row)(REAL *panel, size_t panel_stride, size_t cols, const char *row,
                                 int64_t col_stride, enum fa_dtype dtype)
{
    const int64_t size = fa_dtype_size(dtype);
    const size_t whole = col_stride == size && FN(knows)(dtype) ? cols - cols % NR : 0;
    VEC probe = V(zero)();
    size_t c = 0;
    for (; c < whole; c += NR, panel += panel_stride) {
        for (size_t j = 0; j < NR; j += VL) {
            const VEC x = FN(widen)(row + (int64_t)(c + j) * size, dtype);
            probe = V(fma)(x, V(set)(VALUE_PROBE), probe);
            V(store)(panel + j, x);
        }
    }
    for (; c < cols; c += NR, panel += panel_stride) {
        const char *src = row + (int64_t)c * col_stride;
        probe = V(add)(probe, FN(pack_value_edge)(panel, cols - c, src, col_stride, dtype));
    }
    return probe;
}

FA_INLINE bool FN(pack_values_of)(REAL *dst, size_t panel_stride, const struct key_block *block,
                                  enum fa_dtype dtype)
{
    const struct fa_rows *from = block->from;
    const size_t ahead = FN(keys_ahead)(dtype), cols = block->cols;
    const int64_t bytes = (int64_t)cols * fa_dtype_size(dtype);
    VEC probe = V(zero)();
    for (size_t key = 0; key < block->keys; key++) {
        if (key + ahead < from->located) {
            FN(fetch_key)(from->row[key + ahead], bytes, false);
        }
        probe = V(add)(probe, FN(pack_value_row)(dst + key * NR, panel_stride, cols, from->row[key],
                                                 from->col_stride, dtype));
    }
    return FN(is_finite)(probe);
}

static bool FN(pack_values)(void *dst, size_t panel_stride, size_t keys, size_t cols,
                            const struct fa_rows *from)
{
    const struct key_block block = {from, keys, cols};
    switch (from->dtype) {
#define CASE(dtype)                                                                                \
    case dtype:                                                                                    \
        return FN(pack_values_of)(dst, panel_stride, &block, dtype);
        STORAGE_TYPES(CASE)
#undef CASE
    default:
        return FN(pack_values_of)(dst, panel_stride, &block, from->dtype);
    }
}

/* 0, or NaN where one of the sums of a row is not finite. */
static REAL FN(sum_probes)(const REAL *acc, size_t cols)
{
    VEC probe = V(zero)();
    REAL rest = 0;
    size_t c = 0;
    for (; c + VL <= cols; c += VL) {
        probe = V(fma)(V(load)(acc + c), V(zero)(), probe);
    }
    for (; c < cols; c++) {
        rest += acc[c] * 0;
    }
    return FN(is_finite)(probe) ? rest : (REAL)NAN;
}

/* Whether a row is to be given back because some of its sums are not finite. */
static bool FN(have_sums_left)(const REAL *acc, const struct fa_row_result *result)
{
    return !result->final && result->look_at_acc && result->columns == NULL &&
           FN(sum_probes)(acc, result->cols) != 0;
}

/* Whether an element of a row is stored, where that is asked for each; see struct fa_row_result. */
static bool FN(is_wanted)(const struct fa_row_result *result, size_t c, REAL acc)
{
    const uint8_t bit = (uint8_t)(1u << c % 8);
    if (!result->choose) {
        return result->columns[c / 8] & bit;
    }
    if (acc - acc == 0) {
        return true;
    }
    result->columns[c / 8] |= bit;
    return false;
}

/* What an average of finite values that was rounded past them is. */
static inline REAL FN(clamp)(REAL x)
{
    return x > REAL_MAX ? REAL_MAX : x < -REAL_MAX ? -REAL_MAX : x;
}

/* The first `whole` elements of a row of results, which lie side by side: acc * factor + 0 (+
 * residual).  Adding 0 turns the -0 that an underflow may leave into +0, so that skipping a masked
 * block and multiplying by its zeros agree in every bit.  Reads each residual element before it
 * writes the same element of out: they may be one array. */
FA_INLINE void FN(store_vectors)(const REAL *acc, REAL factor, const struct fa_row_result *result,
                                 size_t whole, enum fa_dtype dtype)
{
    const int64_t size = fa_dtype_size(dtype);
    char *out = result->out;
    const char *residual = result->residual;
    for (size_t c = 0; c < whole; c += VL) {
        VEC x = V(add)(V(mul)(V(load)(acc + c), V(set)(factor)), V(zero)());
        if (residual != NULL) {
            x = V(add)(x, FN(widen)(residual + (int64_t)c * size, dtype));
        }
        FN(narrow)(out + (int64_t)c * size, x, dtype);
    }
}

/* Elements of a row that are stored by vectors. */
static size_t FN(whole_vectors)(const struct fa_row_result *result)
{
    const int64_t size = fa_dtype_size(result->dtype);
    const bool contiguous = result->out_stride == size &&
                            (result->residual == NULL || result->residual_stride == size) &&
                            FN(knows)(result->dtype) && result->exponent == 0 &&
                            result->columns == NULL;
    return contiguous ? result->cols - result->cols % VL : 0;
}

/* The same of the elements from c on, wherever they lie. */
static void FN(store_elements)(const REAL *acc, REAL factor, const struct fa_row_result *result,
                               size_t c)
{
    const enum fa_dtype dtype = result->dtype;
    char *out = result->out;
    const char *residual = result->residual;
    for (; c < result->cols; c++) {
        REAL x = acc[c] * factor + (REAL)0;
        if (result->columns != NULL && !FN(is_wanted)(result, c, acc[c])) {
            continue;
        }
        if (result->mends) {
            const REAL before = FN(read_as)(out + (int64_t)c * result->out_stride, dtype);
            if (before - before == 0) {
                continue;
            }
        }
        if (result->exponent != 0) {
            x = (REAL)ldexp((double)x, result->exponent);
            x = result->averages && acc[c] - acc[c] == 0 ? FN(clamp)(x) : x;
        }
        if (residual != NULL) {
            x += FN(read_as)(residual + (int64_t)c * result->residual_stride, dtype);
        }
        FN(write_as)(out + (int64_t)c * result->out_stride, x, dtype);
    }
}

static void FN(store_row)(const REAL *acc, REAL factor, const struct fa_row_result *result)
{
    const size_t whole = FN(whole_vectors)(result);
    FN(store_vectors)(acc, factor, result, whole, result->dtype);
    FN(store_elements)(acc, factor, result, whole);
}
