/* The edge between caller memory and workspace: the only code that reads q, k and v.  Needs DT and a
 * vec_<isa>.h; see names.h.
 *
 * Caller memory has byte strides and any alignment, so single elements go through memcpy, and whole
 * vectors are read only where every lane is an element of the array: guard-page tests hold it to that.
 */

static void FN(load_rows)(void *dst, size_t rows, const void *const *src, int64_t col_stride,
                          size_t cols, double factor)
{
    const REAL f = (REAL)factor;
    const size_t whole = col_stride == (int64_t)sizeof(REAL) ? cols - cols % VL : 0;
    for (size_t r = 0; r < rows; r++) {
        REAL *row = (REAL *)dst + r * cols;
        const char *from = src[r];
        size_t c = 0;
        if (from == NULL) {
            memset(row, 0, cols * sizeof(REAL));
            continue;
        }
        for (; c < whole; c += VL) {
            V(store)(row + c, V(mul)(V(load)(from + c * sizeof(REAL)), V(set)(f)));
        }
        for (; c < cols; c++) {
            row[c] = FN(read)(from + (int64_t)c * col_stride) * f;
        }
    }
}

/* One panel of NR keys, of which `keys` are real.  Whole VL x VL squares go through registers (24
 * shuffles for 64 elements with AVX2), the edges element by element. */
static inline void FN(pack_key_panel)(REAL *panel, size_t keys, size_t cols, const char *src,
                                      int64_t row_stride, int64_t col_stride)
{
    const bool contiguous = col_stride == (int64_t)sizeof(REAL);
    for (size_t first = 0; first < NR; first += VL) {
        size_t c = 0;
        if (contiguous && first + VL <= keys) {
            for (; c + VL <= cols; c += VL) {
                VEC square[VL];
                for (size_t i = 0; i < VL; i++) {
                    square[i] = V(load)(src + (int64_t)(first + i) * row_stride + c * sizeof(REAL));
                }
                V(transpose)(square);
                for (size_t i = 0; i < VL; i++) {
                    V(store)(panel + (c + i) * NR + first, square[i]);
                }
            }
        }
        for (; c < cols; c++) {
            for (size_t i = first; i < first + VL; i++) {
                const char *from = src + (int64_t)i * row_stride + (int64_t)c * col_stride;
                panel[c * NR + i] = i < keys ? FN(read)(from) : 0;
            }
        }
    }
}

static void FN(pack_keys)(void *dst, size_t keys, size_t cols, const void *src, int64_t row_stride,
                          int64_t col_stride)
{
    for (size_t key = 0; key < keys; key += NR) {
        size_t live = keys - key < NR ? keys - key : NR;
        FN(pack_key_panel)((REAL *)dst + key * cols, live, cols,
                           (const char *)src + (int64_t)key * row_stride, row_stride, col_stride);
    }
}

/* NR columns of one key, the first `cols` of them real.  Returns x * 0 summed: NaN where a value is
 * not finite. */
static inline VEC FN(pack_value_row)(REAL *dst, size_t cols, const char *src, int64_t col_stride)
{
    VEC probe = V(zero)();
    if (cols >= NR && col_stride == (int64_t)sizeof(REAL)) {
        for (size_t j = 0; j < NR; j += VL) {
            VEC x = V(load)(src + j * sizeof(REAL));
            probe = V(fma)(x, V(zero)(), probe);
            V(store)(dst + j, x);
        }
        return probe;
    }
    for (size_t c = 0; c < NR; c++) {
        dst[c] = c < cols ? FN(read)(src + (int64_t)c * col_stride) : 0;
    }
    for (size_t j = 0; j < NR; j += VL) {
        probe = V(fma)(V(load)(dst + j), V(zero)(), probe);
    }
    return probe;
}

static bool FN(pack_values)(void *dst, size_t panel_stride, size_t keys, size_t cols,
                            const void *src, int64_t row_stride, int64_t col_stride)
{
    VEC probe = V(zero)();
    for (size_t key = 0; key < keys; key++) {
        const char *row = (const char *)src + (int64_t)key * row_stride;
        REAL *first_panel = (REAL *)dst + key * NR;
        for (size_t c = 0; c < cols; c += NR) {
            VEC found = FN(pack_value_row)(first_panel + c / NR * panel_stride, cols - c,
                                           row + (int64_t)c * col_stride, col_stride);
            probe = V(add)(probe, found);
        }
    }
    REAL lanes[VL], sum = 0;
    V(store)(lanes, probe);
    for (size_t i = 0; i < VL; i++) {
        sum += lanes[i];
    }
    return sum == 0;
}

/* Store one row of results, acc * factor + 0 (+ residual).  Adding 0 turns the -0 that an underflow
 * may leave into +0, so that skipping a masked block and multiplying by its zeros agree in every bit.
 * Reads each residual element before it writes the same element of out: they may be one array. */
static void FN(store_row)(const REAL *acc, REAL factor, const struct fa_row_result *result)
{
    const int64_t size = (int64_t)sizeof(REAL);
    const bool contiguous =
        result->out_stride == size && (result->residual == NULL || result->residual_stride == size);
    const size_t whole = contiguous ? result->cols - result->cols % VL : 0;
    char *out = result->out;
    const char *residual = result->residual;
    size_t c = 0;
    for (; c < whole; c += VL) {
        VEC x = V(add)(V(mul)(V(load)(acc + c), V(set)(factor)), V(zero)());
        if (residual != NULL) {
            x = V(add)(x, V(load)(residual + c * sizeof(REAL)));
        }
        V(store)(out + c * sizeof(REAL), x);
    }
    for (; c < result->cols; c++) {
        REAL x = acc[c] * factor + (REAL)0;
        if (residual != NULL) {
            x += FN(read)(residual + (int64_t)c * result->residual_stride);
        }
        FN(write)(out + (int64_t)c * result->out_stride, x);
    }
}
