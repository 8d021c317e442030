/* Both products for a few rows, as in decoding: straight from caller memory, since packing pays only where
 * many rows share it.  The chains of multiply-adds are those of matmul_template.h, added in the same order, so are
 * the bits.  Needs
 * storage_template.h.
 *
 * Cost per vector of keys with AVX-512: 1 load, 4 shuffles (2 for 16-bit types, 1 for int8), what takes the
 * elements of a lane apart (1 for bfloat16, 3 for int8 and float16), and a multiply-add per row; per vector
 * of values 1 load, 1 or 2 to widen it, and a multiply-add per row.  With up to 4 rows memory is slower than
 * that.
 *
 * Memory is asked for in ascending order, key by key, whatever the order of the loads: that is what the
 * hardware's own prefetching continues, and it keeps more requests in flight than instructions can.
 */

/* Scores of `groups` times VL keys for `rows` rows, both constants, at most FEW_ROWS chains together: one
 * chain alone waits for its own latency.  Of the last VL keys `keys` are real; fewer than VL only where
 * groups is 1.  The squares of all groups go through L1, so that the chains can take turns.  Requests for
 * memory are spread over the multiply-adds: a burst of them waits for a place in the queue of misses, and
 * everything behind it too. */
FA_INLINE void FN(few_scores_tile)(const size_t rows, const size_t groups, size_t cols,
                                   const REAL *q, const struct fa_rows *from, size_t key,
                                   size_t keys, REAL *s, size_t ld, enum fa_dtype dtype)
{
    const int64_t size = fa_dtype_size(dtype);
    const size_t parts = FN(parts)(dtype), step = VL * parts, ahead = FN(keys_ahead)(dtype);
    const char *const *row = from->row + key;
    const bool whole = from->col_stride == size && keys >= VL;
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
                for (size_t part = 0; part < parts; part++) {
                    const REAL *weight = q + c + u * parts + part;
                    FA_UNROLL
                    for (size_t g = 0; g < groups; g++) {
                        VEC x = FN(part)(squares[g][u], (int)part, dtype);
                        FA_UNROLL
                        for (size_t r = 0; r < rows; r++) {
                            acc[r][g] = V(fma)(V(broadcast)(weight + r * cols), x, acc[r][g]);
                        }
                    }
                }
            }
        }
        for (; c < end; c++) {
            FA_UNROLL
            for (size_t g = 0; g < groups; g++) {
                VEC x = FN(load_column)(row + g * VL, keys, (int64_t)c * from->col_stride, dtype);
                FA_UNROLL
                for (size_t r = 0; r < rows; r++) {
                    acc[r][g] = V(fma)(V(broadcast)(q + r * cols + c), x, acc[r][g]);
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

FA_INLINE void FN(few_scores_rows)(const size_t rows, size_t cols, size_t keys, size_t columns,
                                   const REAL *q, const struct fa_rows *from, REAL *s, size_t ld,
                                   enum fa_dtype dtype)
{
    /* Not more than the types' share of a lane: keys of all groups together are what memory is asked for
     * ahead, and float32 waits for memory, not for a chain. */
    const size_t parts = FN(parts)(dtype), most = FEW_ROWS / rows;
    const size_t groups = parts < most ? parts : most;
    size_t key = 0;
    for (; key + groups * VL <= keys; key += groups * VL) {
        FN(few_scores_tile)(rows, groups, cols, q, from, key, VL, s + key, ld, dtype);
    }
    for (; key < columns; key += VL) {
        const size_t live = key < keys ? keys - key : 0;
        FN(few_scores_tile)(rows, 1, cols, q, from, key, live, s + key, ld, dtype);
    }
}

FA_INLINE void FN(few_scores_of)(size_t rows, size_t cols, size_t keys, size_t columns,
                                 const REAL *q, const struct fa_rows *from, REAL *s, size_t ld,
                                 enum fa_dtype dtype)
{
    while (rows > 0) {
        size_t done = 1;
#if FEW_ROWS >= 8
        if (rows >= 8) {
            done = 8;
            FN(few_scores_rows)(8, cols, keys, columns, q, from, s, ld, dtype);
        } else
#endif
            if (rows >= 4) {
            done = 4;
            FN(few_scores_rows)(4, cols, keys, columns, q, from, s, ld, dtype);
        } else if (rows >= 2) {
            done = 2;
            FN(few_scores_rows)(2, cols, keys, columns, q, from, s, ld, dtype);
        } else {
            FN(few_scores_rows)(1, cols, keys, columns, q, from, s, ld, dtype);
        }
        rows -= done;
        q += done * cols;
        s += done * ld;
    }
}

static void FN(few_scores)(const struct fa_product *p, size_t cols, size_t keys,
                           const struct fa_rows *from, float factor)
{
    const size_t rows = p->rows, columns = p->panels * NR, ld = p->c_row;
    const REAL *q = p->a;
    REAL *s = p->c;
    FA_ASSERT(factor == 1);
    (void)factor;
    switch (from->dtype) {
#if WIDENS
    case FA_F16:
        FN(few_scores_of)(rows, cols, keys, columns, q, from, s, ld, FA_F16);
        break;
    case FA_BF16:
        FN(few_scores_of)(rows, cols, keys, columns, q, from, s, ld, FA_BF16);
        break;
    case FA_I8:
        FN(few_scores_of)(rows, cols, keys, columns, q, from, s, ld, FA_I8);
        break;
    default:
        FN(few_scores_of)(rows, cols, keys, columns, q, from, s, ld, FA_F32);
        break;
#else
    default:
        FN(few_scores_of)(rows, cols, keys, columns, q, from, s, ld, FA_F64);
        break;
#endif
    }
}

/* sum[rows][vectors] = weights values for some columns, both constants; at most 2 * FEW_ROWS accumulators.
 * `first` is the first of these columns; `fetch`: ask for whole keys ahead. */
FA_INLINE void FN(few_values_tile)(const size_t rows, const size_t vectors, size_t keys,
                                   size_t first, const REAL *weights, size_t ldw,
                                   const struct fa_rows *from, REAL *sum, size_t ldsum, bool fetch,
                                   int64_t row_bytes, enum fa_dtype dtype)
{
    const int64_t size = fa_dtype_size(dtype);
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
        VEC x[8];
        if (fetch && key + ahead < from->located) {
            FN(fetch_key)(from->row[key + ahead], row_bytes, false);
        }
        if (fetch && key + far < from->located) {
            FN(fetch_key)(from->row[key + far], row_bytes, true);
        }
        FA_UNROLL
        for (size_t j = 0; j < vectors; j++) {
            x[j] = FN(widen)(row + (int64_t)(j * VL) * size, dtype);
        }
        FA_UNROLL
        for (size_t r = 0; r < rows; r++) {
            VEC weight = V(broadcast)(weights + r * ldw + key);
            FA_UNROLL
            for (size_t j = 0; j < vectors; j++) {
                acc[r][j] = V(fma)(weight, x[j], acc[r][j]);
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

/* Columns that do not fill a vector, or do not lie side by side. */
static void FN(few_values_column)(size_t rows, size_t keys, size_t col, const REAL *weights,
                                  size_t ldw, const struct fa_rows *from, REAL *sum, size_t ldsum)
{
    for (size_t r = 0; r < rows; r++) {
        VEC acc = V(zero)();
        for (size_t key = 0; key < keys; key++) {
            REAL x = FN(read_as)(from->row[key] + (int64_t)col * from->col_stride, from->dtype);
            acc = V(fma)(V(set)(weights[r * ldw + key]), V(set)(x), acc);
        }
        REAL lanes[VL];
        V(store)(lanes, acc);
        sum[r * ldsum + col] = lanes[0];
    }
}

/* One size of tile over as many columns as it fits.  Returns the first column that is left. */
FA_INLINE size_t FN(few_values_tiles)(const size_t rows, const size_t vectors, size_t keys,
                                      size_t first, size_t cols, const REAL *weights, size_t ldw,
                                      const struct fa_rows *from, REAL *sum, size_t ldsum,
                                      enum fa_dtype dtype)
{
    const int64_t row_bytes = (int64_t)cols * fa_dtype_size(dtype);
    for (; first + vectors * VL <= cols; first += vectors * VL) {
        FN(few_values_tile)(rows, vectors, keys, first, weights, ldw, from, sum + first, ldsum,
                            first == 0, row_bytes, dtype);
    }
    return first;
}

FA_INLINE void FN(few_values_of)(size_t rows, size_t keys, size_t cols, const REAL *weights,
                                 size_t ldw, const struct fa_rows *from, REAL *sum, size_t ldsum,
                                 enum fa_dtype dtype)
{
    while (rows > 0) {
        size_t first = 0, done = rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
        if (from->col_stride == fa_dtype_size(dtype)) {
            if (done == 4) {
                first = FN(few_values_tiles)(4, FEW_ROWS / 2, keys, first, cols, weights, ldw, from,
                                             sum, ldsum, dtype);
                first = FN(few_values_tiles)(4, 1, keys, first, cols, weights, ldw, from, sum,
                                             ldsum, dtype);
            } else if (done == 2) {
                first = FN(few_values_tiles)(2, FEW_ROWS, keys, first, cols, weights, ldw, from,
                                             sum, ldsum, dtype);
                first = FN(few_values_tiles)(2, 1, keys, first, cols, weights, ldw, from, sum,
                                             ldsum, dtype);
            } else {
                first = FN(few_values_tiles)(1, FEW_ROWS, keys, first, cols, weights, ldw, from,
                                             sum, ldsum, dtype);
                first = FN(few_values_tiles)(1, 1, keys, first, cols, weights, ldw, from, sum,
                                             ldsum, dtype);
            }
        }
        for (; first < cols; first++) {
            FN(few_values_column)(done, keys, first, weights, ldw, from, sum, ldsum);
        }
        rows -= done;
        weights += done * ldw;
        sum += done * ldsum;
    }
}

/* acc += each of `chains` sums in order, unless a sum is not finite.  Then some value may be infinite or NaN, which
 * a weight of 0 spreads: false, and nothing is added. */
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

/* sum[rows][cols] = weights values, for one chain of keys. */
static void FN(few_values_chain)(size_t rows, size_t keys, size_t cols, const REAL *weights,
                                 size_t ldw, const struct fa_rows *from, REAL *sum, size_t ldacc)
{
    switch (from->dtype) {
#if WIDENS
    case FA_F16:
        FN(few_values_of)(rows, keys, cols, weights, ldw, from, sum, ldacc, FA_F16);
        break;
    case FA_BF16:
        FN(few_values_of)(rows, keys, cols, weights, ldw, from, sum, ldacc, FA_BF16);
        break;
    case FA_I8:
        FN(few_values_of)(rows, keys, cols, weights, ldw, from, sum, ldacc, FA_I8);
        break;
    default:
        FN(few_values_of)(rows, keys, cols, weights, ldw, from, sum, ldacc, FA_F32);
        break;
#else
    default:
        FN(few_values_of)(rows, keys, cols, weights, ldw, from, sum, ldacc, FA_F64);
        break;
#endif
    }
}

static bool FN(few_values)(const struct fa_product *p, size_t cols, const struct fa_rows *from,
                           void *scratch)
{
    const size_t rows = p->rows, keys = p->depth, ldacc = p->c_row;
    REAL *sum = scratch;
    const size_t padded = (cols + VL - 1) / VL * VL;
    struct fa_rows rest = *from;
    size_t chains = 0, end = FA_CHAIN - from->into_chain;
    for (size_t key = 0; key < keys; chains++, sum += rows * ldacc) {
        end = end < keys ? end : keys;
        for (size_t r = 0; r < rows; r++) {
            memset(sum + r * ldacc + cols, 0, (padded - cols) * sizeof(REAL));
        }
        FN(few_values_chain)(rows, end - key, cols, (const REAL *)p->a + key, p->a_stride, &rest,
                             sum, ldacc);
        rest.row += end - key;
        rest.located -= end - key;
        key = end;
        end += FA_CHAIN;
    }
    return FN(add_sums)(chains, rows, padded, scratch, p->c, ldacc);
}
