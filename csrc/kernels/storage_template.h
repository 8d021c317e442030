/* Elements of caller memory in any fa_dtype that is computed in DT: widened when read, rounded once when
 * written.  Needs DT and a vec_<isa>.h; see names.h.
 *
 * The type is asked for per vector: a branch that always goes the same way, against a version of every
 * loop for every type.
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
        return (REAL)read_f64(p);
    }
}

static inline void FN(write_as)(char *p, REAL x, enum fa_dtype dtype)
{
    switch (dtype) {
#if WIDENS
    case FA_F16:
        write_f16(p, x);
        break;
    case FA_BF16:
        write_bf16(p, x);
        break;
#endif
    default:
        FN(write)(p, x);
        break;
    }
}

/* Whether widen and narrow know a type: those that are computed in DT. */
static inline bool FN(knows)(enum fa_dtype dtype)
{
    return WIDENS ? dtype != FA_F64 : dtype == FA_F64;
}
