/* Elements of caller memory in any fa_dtype that is computed in DT: widened when read, rounded once
 * when written.  Needs DT and a vec_<isa>.h; see names.h.
 *
 * The type is asked for per vector: a branch that always goes the same way, against a version of
 * every loop for every type.
 */

/* VL elements that lie side by side. */
static inline VEC FN(widen)(const char *p, enum fa_dtype dtype)
{
    switch (dtype) {
#if WIDENS
    case FA_F16:
        return v_widen_f16(p);
    case FA_BF16:
        return v_widen_bf16(p);
    case FA_I8:
        return v_widen_i8(p);
#endif
    default:
        return V(load)(p);
    }
}

static inline void FN(narrow)(char *p, VEC x, enum fa_dtype dtype)
{
    switch (dtype) {
#if WIDENS
    case FA_F16:
        v_narrow_f16(p, x);
        break;
    case FA_BF16:
        v_narrow_bf16(p, x);
        break;
#endif
    default:
        V(store)(p, x);
        break;
    }
}

/* Rounded, but a finite number stays finite. */
static inline REAL FN(saturate)(double x)
{
    const double limit = x < 0 ? -(double)REAL_MAX : (double)REAL_MAX;
    return (REAL)(fabs(x) > (double)REAL_MAX && fabs(x) < INFINITY ? limit : x);
}

/* One element of any type, rounded to DT. */
static inline REAL FN(read_as)(const char *p, enum fa_dtype dtype)
{
    switch (dtype) {
    case FA_F16:
        return (REAL)read_f16(p);
    case FA_BF16:
        return (REAL)read_bf16(p);
    case FA_I8:
        return (REAL)read_i8(p);
    case FA_F32:
        return (REAL)read_f32(p);
    default:
        return FN(saturate)(read_f64(p));
    }
}

/* To float32 with an odd last bit where that is not exact: a second rounding, to 16 bits, is then
 * as if there had been no first. */
static inline float FN(to_odd)(REAL x)
{
    const float near = (float)x;
    if ((REAL)near == x || near != near) {
        return near;
    }
    const bool away = x > 0 ? (REAL)near > x : (REAL)near < x;
    return float_from_bits((bits_from_float(near) - away) | 1);
}

/* One element of any type, rounded once. */
static inline void FN(write_as)(char *p, REAL x, enum fa_dtype dtype)
{
    switch (dtype) {
    case FA_F16:
        write_f16(p, FN(to_odd)(x));
        break;
    case FA_BF16:
        write_bf16(p, FN(to_odd)(x));
        break;
    case FA_F32:
        write_f32(p, (float)x);
        break;
    default:
        write_f64(p, (double)x);
        break;
    }
}

/* Whether widen and narrow know a type: those that are computed in DT. */
static inline bool FN(knows)(enum fa_dtype dtype)
{
    return WIDENS ? dtype != FA_F64 : dtype == FA_F64;
}

/* Elements of a type that share a lane. */
FA_INLINE size_t FN(lane_elements)(enum fa_dtype dtype)
{
    return sizeof(REAL) / (size_t)fa_dtype_size(dtype);
}

/* Memory is asked for this many keys ahead of its use: 8 KiB at head_dim 128, as much as memory
 * delivers to a core in the time that it takes to answer. */
FA_INLINE size_t FN(keys_ahead)(enum fa_dtype dtype) { return 16 * FN(lane_elements)(dtype); }

/* Where all that is waited for is memory, it is also asked for this many keys ahead, into L2: a
 * core has three times as many misses of L2 in flight as of L1.  32 KiB at head_dim 128. */
FA_INLINE size_t FN(keys_far)(enum fa_dtype dtype)
{
    _Static_assert(64 + VL <= FA_KEYS_AHEAD, "where a vector of keys so far ahead lies is known");
    return 64 * FN(lane_elements)(dtype);
}

/* Element `i` of every lane. */
FA_INLINE VEC FN(lane_element)(VEC x, int i, enum fa_dtype dtype)
{
    switch (dtype) {
#if WIDENS
    case FA_F16:
        return v_element_f16(x, i);
    case FA_BF16:
        return v_element_bf16(x, i);
    case FA_I8:
        return v_element_i8(x, i);
#endif
    default:
        (void)i;
        return x;
    }
}

/* VL keys by VL lanes of their elements from byte `at` on, transposed: lane i of square[u] is lane
 * u of key i, and FN(lane_element) takes its elements apart.  So narrow types cost a shuffle per
 * lane, not per element. */
FA_INLINE void FN(load_square)(VEC square[VL], const char *const *row, int64_t at)
{
    FA_UNROLL
    for (size_t i = 0; i < VL; i++) {
        square[i] = V(load)(row[i] + at);
    }
    V(transpose)(square);
}

/* The same of fewer than VL keys, zero for those that are not there. */
static void FN(load_part)(VEC square[VL], const char *const *row, size_t keys, int64_t at)
{
    for (size_t i = 0; i < VL; i++) {
        square[i] = i < keys ? V(load)(row[i] + at) : V(zero)();
    }
    V(transpose)(square);
}

/* Ask for the bytes that a square of later keys holds there. */
FA_INLINE void FN(fetch_square)(const char *const *row, int64_t at)
{
    for (size_t i = 0; i < VL; i++) {
        __builtin_prefetch(row[i] + at);
    }
}

/* Ask for all of a key that is wanted soon, or later. */
FA_INLINE void FN(fetch_key)(const char *row, int64_t bytes, const bool far)
{
    for (int64_t at = 0; at < bytes; at += FA_LINE) {
        if (far) {
            fetch_far(row + at);
        } else {
            fetch_near(row + at);
        }
    }
}

/* One column of `keys` keys, 0 beyond them. */
static inline VEC FN(load_column)(const char *const *row, size_t keys, int64_t at,
                                  enum fa_dtype dtype)
{
    REAL lanes[VL] = {0};
    for (size_t i = 0; i < VL && i < keys; i++) {
        lanes[i] = FN(read_as)(row[i] + at, dtype);
    }
    return V(load)(lanes);
}
