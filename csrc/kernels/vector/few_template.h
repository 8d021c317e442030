/* Both products for a few rows, as in decoding: straight from caller memory, since packing pays
 * only where many rows share it.  The chains of multiply-adds are those of matmul_template.h, added
 * in the same order, so the bits are the same.  Needs storage_template.h.
 *
 * Cost per vector of keys with AVX-512: 1 load, 4 shuffles (2 for 16-bit types, 1 for int8), what
 * takes the elements of a lane apart (1 for bfloat16, 3 for int8 and float16), and a multiply-add
 * per row; per vector of values 1 load, 1 or 2 to widen it, and a multiply-add per row.  With up to
 * 4 rows memory is slower than that.
 *
 * Memory is asked for in ascending order, key by key, whatever the order of the loads: that is what
 * the hardware's own prefetching continues, and it keeps more requests in flight than instructions
 * can.
 */

/* Scores of `groups` times VL keys for `rows` rows, both constants, at most FEW_ROWS chains
 * together: one chain alone waits for its own latency.  Of the last VL keys `live` are there; fewer
 * than VL only where groups is 1.  The squares of all groups go through L1, so that the chains can
 * take turns.  Requests for memory are spread over the multiply-adds: a burst of them waits for a
 * place in the queue of misses, and everything behind it too. */
FA_INLINE void FN(few_scores_vectors)(const size_t rows, const size_t groups,
                                      const struct few_product *x, size_t key, size_t live,
                                      enum fa_dtype dtype)
{
    const struct fa_rows *from = x->block.from;
    const size_t cols = x->block.cols, ld = x->product.c_row;
    const REAL *q = x->product.a;
    REAL *s = (REAL *)x->product.c + key;
    const int64_t size = fa_dtype_size(dtype);
    const size_t share = FN(lane_elements)(dtype), step = VL * share;
    const size_t ahead = FN(keys_ahead)(dtype);
    const char *const *row = from->row + key;
    const bool whole = from->col_stride == size && live >= VL;
    const bool more = key + groups * VL + ahead <= from->located;
    const size_t far = FN(keys_far)(dtype), row_bytes = cols * (size_t)size;
    struct fa_stretch wanted = {
        .row = row + ahead,
        .far_row = row + far,
        .bytes = more ? row_bytes : 0,
        .far_bytes = key + groups * VL + far <= from->located ? row_bytes : 0,
    };
    size_t c = 0, end = 0;
    _Static_assert(FA_CHAIN % (4 * VL) == 0, "a chain is a whole number of squares of any type");
    do {
        const bool add = c > 0;
        VEC acc[FEW_ROWS][FEW_ROWS];
        end = cols - c < FA_CHAIN ? cols : c + FA_CHAIN;
        FA_UNROLL
        for (size_t g = 0; g < groups; g++) {
            FA_UNROLL
            for (size_t r = 0; r < rows; r++) {
                acc[r][g] = V(zero)();
            }
        }
        for (; whole && c + step <= end; c += step) {
            VEC squares[FEW_ROWS][VL];
            for (size_t g = 0; g < groups; g++) {
                VEC square[VL];
                FN(load_square)(square, row + g * VL, (int64_t)c * size);
                FA_UNROLL
                for (size_t u = 0; u < VL; u++) {
                    squares[g][u] = square[u];
                }
            }
            for (size_t u = 0; u < VL; u++) {
                fetch_stretch(&wanted, groups * sizeof(VEC));
                FA_UNROLL
                for (size_t i = 0; i < share; i++) {
                    const REAL *factor = q + c + u * share + i;
                    FA_UNROLL
                    for (size_t g = 0; g < groups; g++) {
                        VEC k = FN(lane_element)(squares[g][u], (int)i, dtype);
                        FA_UNROLL
                        for (size_t r = 0; r < rows; r++) {
                            acc[r][g] = V(fma)(V(broadcast)(factor + r * cols), k, acc[r][g]);
                        }
                    }
                }
            }
        }
        for (; c < end; c++) {
            FA_UNROLL
            for (size_t g = 0; g < groups; g++) {
                VEC k = FN(load_column)(row + g * VL, live, (int64_t)c * from->col_stride, dtype);
                FA_UNROLL
                for (size_t r = 0; r < rows; r++) {
                    acc[r][g] = V(fma)(V(broadcast)(q + r * cols + c), k, acc[r][g]);
                }
            }
        }
        FA_UNROLL
        for (size_t r = 0; r < rows; r++) {
            FA_UNROLL
            for (size_t g = 0; g < groups; g++) {
                REAL *to = s + r * ld + g * VL;
                V(store)(to, add ? V(add)(V(load)(to), acc[r][g]) : acc[r][g]);
            }
        }
    } while (end < cols);
}

FA_INLINE void FN(few_scores_rows)(const size_t rows, const struct few_product *x,
                                   enum fa_dtype dtype)
{
    /* Not more than the types' share of a lane: keys of all groups together are what memory is
     * asked for ahead, and float32 waits for memory, not for a chain. */
    const size_t share = FN(lane_elements)(dtype), most = FEW_ROWS / rows;
    const size_t groups = share < most ? share : most;
    const size_t columns = x->product.panels * NR;
    size_t key = 0;
    for (; key + groups * VL <= x->block.keys; key += groups * VL) {
        FN(few_scores_vectors)(rows, groups, x, key, VL, dtype);
    }
    for (; key < columns; key += VL) {
        FN(few_scores_vectors)(rows, 1, x, key, keys_left(&x->block, key), dtype);
    }
}

FA_INLINE void FN(few_scores_of)(struct few_product x, enum fa_dtype dtype)
{
    struct fa_product *left = &x.product;
    while (left->rows > 0) {
        size_t done = 1;
#if FEW_ROWS >= 8
        if (left->rows >= 8) {
            done = 8;
            FN(few_scores_rows)(8, &x, dtype);
        } else
#endif
            if (left->rows >= 4) {
            done = 4;
            FN(few_scores_rows)(4, &x, dtype);
        } else if (left->rows >= 2) {
            done = 2;
            FN(few_scores_rows)(2, &x, dtype);
        } else {
            FN(few_scores_rows)(1, &x, dtype);
        }
        left->rows -= done;
        left->a = (const REAL *)left->a + done * x.block.cols;
        left->c = (REAL *)left->c + done * left->c_row;
    }
}

static void FN(few_scores)(const struct fa_product *p, size_t cols, size_t keys,
                           const struct fa_rows *from, float factor)
{
    const struct few_product x = {.product = *p, .block = {from, keys, cols}};
    FA_ASSERT(factor == 1);
    (void)factor;
    switch (from->dtype) {
#define CASE(dtype)                                                                                \
    case dtype:                                                                                    \
        FN(few_scores_of)(x, dtype);                                                               \
        break;
        STORAGE_TYPES(CASE)
#undef CASE
    default:
        FA_ASSERT(false);
    }
}

/* sum[rows][vectors] = weights values for the columns from `first` on, rows and vectors constants;
 * at most 2 * FEW_ROWS accumulators.  The first columns ask for whole keys ahead. */
FA_INLINE void FN(few_values_vectors)(const size_t rows, const size_t vectors,
                                      const struct few_product *x, size_t first,
                                      enum fa_dtype dtype)
{
    const struct fa_rows *from = x->block.from;
    const size_t keys = x->block.keys, ldw = x->product.a_stride, ldsum = x->product.c_row;
    const REAL *weights = x->product.a;
    REAL *sum = (REAL *)x->product.c + first;
    const int64_t size = fa_dtype_size(dtype), row_bytes = (int64_t)x->block.cols * size;
    const bool fetch = first == 0;
    const size_t ahead = FN(keys_ahead)(dtype), far = FN(keys_far)(dtype);
    VEC acc[FEW_ROWS][8];
    FA_UNROLL
    for (size_t r = 0; r < rows; r++) {
        FA_UNROLL
        for (size_t j = 0; j < vectors; j++) {
            acc[r][j] = V(zero)();
        }
    }
    for (size_t key = 0; key < keys; key++) {
        const char *row = from->row[key] + (int64_t)first * size;
        VEC value[8];
        if (fetch && key + ahead < from->located) {
            FN(fetch_key)(from->row[key + ahead], row_bytes, false);
        }
        if (fetch && key + far < from->located) {
            FN(fetch_key)(from->row[key + far], row_bytes, true);
        }
        FA_UNROLL
        for (size_t j = 0; j < vectors; j++) {
            value[j] = FN(widen)(row + (int64_t)(j * VL) * size, dtype);
        }
        FA_UNROLL
        for (size_t r = 0; r < rows; r++) {
            VEC weight = V(broadcast)(weights + r * ldw + key);
            FA_UNROLL
            for (size_t j = 0; j < vectors; j++) {
                acc[r][j] = V(fma)(weight, value[j], acc[r][j]);
            }
        }
    }
    FA_UNROLL
    for (size_t r = 0; r < rows; r++) {
        FA_UNROLL
        for (size_t j = 0; j < vectors; j++) {
            V(store)(sum + r * ldsum + j * VL, acc[r][j]);
        }
    }
}

/* The columns from `first` on, which do not fill a vector, or do not lie side by side.  x is a
 * copy, so that the caller's is known to stay as it is and may live in registers. */
static void FN(few_values_rest)(size_t rows, struct few_product x, size_t first)
{
    const struct fa_rows *from = x.block.from;
    const REAL *weights = x.product.a;
    REAL *sum = x.product.c;
    for (size_t col = first; col < x.block.cols; col++) {
        for (size_t r = 0; r < rows; r++) {
            VEC acc = V(zero)();
            for (size_t key = 0; key < x.block.keys; key++) {
                const char *at = from->row[key] + (int64_t)col * from->col_stride;
                const REAL value = FN(read_as)(at, from->dtype);
                acc = V(fma)(V(set)(weights[r * x.product.a_stride + key]), V(set)(value), acc);
            }
            REAL lanes[VL];
            V(store)(lanes, acc);
            sum[r * x.product.c_row + col] = lanes[0];
        }
    }
}

/* As many columns as `vectors` vectors at a time fit.  Returns the first column that is left. */
FA_INLINE size_t FN(few_values_columns)(const size_t rows, const size_t vectors,
                                        const struct few_product *x, size_t first,
                                        enum fa_dtype dtype)
{
    for (; first + vectors * VL <= x->block.cols; first += vectors * VL) {
        FN(few_values_vectors)(rows, vectors, x, first, dtype);
    }
    return first;
}

FA_INLINE void FN(few_values_of)(struct few_product x, enum fa_dtype dtype)
{
    struct fa_product *left = &x.product;
    while (left->rows > 0) {
        size_t first = 0, done = left->rows >= 4 ? 4 : left->rows >= 2 ? 2 : 1;
        if (x.block.from->col_stride == fa_dtype_size(dtype)) {
            if (done == 4) {
                first = FN(few_values_columns)(4, FEW_ROWS / 2, &x, first, dtype);
                first = FN(few_values_columns)(4, 1, &x, first, dtype);
            } else if (done == 2) {
                first = FN(few_values_columns)(2, FEW_ROWS, &x, first, dtype);
                first = FN(few_values_columns)(2, 1, &x, first, dtype);
            } else {
                first = FN(few_values_columns)(1, FEW_ROWS, &x, first, dtype);
                first = FN(few_values_columns)(1, 1, &x, first, dtype);
            }
        }
        if (first < x.block.cols) {
            FN(few_values_rest)(done, x, first);
        }
        left->rows -= done;
        left->a = (const REAL *)left->a + done * left->a_stride;
        left->c = (REAL *)left->c + done * left->c_row;
    }
}

/* acc += each of `chains` sums in order, unless a sum is not finite.  Then some value may be
 * infinite or NaN, which a weight of 0 spreads: false, and nothing is added. */
static bool FN(add_sums)(size_t chains, size_t rows, size_t cols, const REAL *sum, REAL *acc,
                         size_t ld)
{
    VEC probe = V(zero)();
    for (size_t r = 0; r < chains * rows; r++) {
        for (size_t c = 0; c < cols; c += VL) {
            probe = V(fma)(V(load)(sum + r * ld + c), V(zero)(), probe);
        }
    }
    REAL lanes[VL], total = 0;
    V(store)(lanes, probe);
    for (size_t i = 0; i < VL; i++) {
        total += lanes[i];
    }
    if (total != 0) {
        return false;
    }
    for (size_t r = 0; r < rows; r++) {
        for (size_t c = 0; c < cols; c += VL) {
            REAL *to = acc + r * ld + c;
            VEC added = V(load)(to);
            for (size_t i = 0; i < chains; i++) {
                added = V(add)(added, V(load)(sum + (i * rows + r) * ld + c));
            }
            V(store)(to, added);
        }
    }
    return true;
}

/* The weights of one chain of keys times their values. */
static void FN(few_values_chain)(const struct few_product *x)
{
    switch (x->block.from->dtype) {
#define CASE(dtype)                                                                                \
    case dtype:                                                                                    \
        FN(few_values_of)(*x, dtype);                                                              \
        break;
        STORAGE_TYPES(CASE)
#undef CASE
    default:
        FA_ASSERT(false);
    }
}

static bool FN(few_values)(const struct fa_product *p, size_t cols, const struct fa_rows *from,
                           void *scratch)
{
    const size_t rows = p->rows, keys = p->depth, ldacc = p->c_row;
    const size_t padded = (cols + VL - 1) / VL * VL;
    REAL *sum = scratch;
    struct fa_rows rest = *from;
    size_t chains = 0, end = FA_CHAIN - from->into_chain;
    for (size_t key = 0; key < keys; chains++, sum += rows * ldacc) {
        end = end < keys ? end : keys;
        for (size_t r = 0; r < rows; r++) {
            memset(sum + r * ldacc + cols, 0, (padded - cols) * sizeof(REAL));
        }
        struct few_product chain = {.product = *p, .block = {&rest, end - key, cols}};
        chain.product.a = (const REAL *)p->a + key;
        chain.product.c = sum;
        FN(few_values_chain)(&chain);
        rest.row += end - key;
        rest.located -= end - key;
        key = end;
        end += FA_CHAIN;
    }
    return FN(add_sums)(chains, rows, padded, scratch, p->c, ldacc);
}
