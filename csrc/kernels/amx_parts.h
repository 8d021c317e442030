/* float32 as the sum of three bfloat16: x = x0 + x1 + x2 exactly, 8 bits of the 24 in each, x0 and x1 rounded to
 * nearest.  Of the nine products of two such sums the tiles compute six; the other three, x1 y2, x2 y1 and
 * x2 y2, are at most 2^-23 |x y| together, of either sign, and far less on average (docs/kernels.md).
 *
 * It does not hold for infinities and NaN, one of whose parts is not finite, and for numbers so small that their
 * parts are subnormal, which tiles take for 0.  Of q and k that is nothing beside scores of 1 unless the other
 * factor is beyond 2^100.
 *
 * Cost: 18 operations for 32 numbers, 22 for any.
 */
#ifndef FA_AMX_PARTS_H
#define FA_AMX_PARTS_H

#define PARTS 3
#define PART_WORDS (PARTS * TILE_WORDS) /* float32 that the parts of 32 numbers take */

/* Values outside of [VALUE_LEAST, VALUE_LIMIT) are special, but for 0: the tiles do not multiply them.  x0 of larger
 * ones is infinite; smaller ones have subnormal parts. */
#define VALUE_LEAST 0x1p-100f
#define VALUE_LIMIT 0x1.ffp127f

/* Numbers (x[i], y[i]) as pairs: a row of 16 words of the first parts, and of the others two, `stride` words apart.
 * `any`: x0 of the largest numbers is cut off rather than rounded to an infinity, so that they can be had back. */
FA_INLINE void store_parts_apart(const bool any, float *first, float *others, size_t stride,
                                 vec_f32 x, vec_f32 y)
{
    const vec_f32 x0 = any ? v_round_half_finite(x) : v_round_half(x);
    const vec_f32 y0 = any ? v_round_half_finite(y) : v_round_half(y);
    const vec_f32 x_rest = v_sub_f32(x, v_upper_half(x0)), y_rest = v_sub_f32(y, v_upper_half(y0));
    const vec_f32 x1 = v_round_half(x_rest), y1 = v_round_half(y_rest);
    const vec_f32 x2 = v_sub_f32(x_rest, v_upper_half(x1));
    const vec_f32 y2 = v_sub_f32(y_rest, v_upper_half(y1));
    v_store_u16(first, v_pair_upper_halves(x0, y0));
    v_store_u16(others, v_pair_upper_halves(x1, y1));
    v_store_u16(others + stride, v_pair_upper_halves(x2, y2));
}

FA_INLINE void store_parts(const bool any, float *to, size_t stride, vec_f32 x, vec_f32 y)
{
    store_parts_apart(any, to, to + stride, stride, x, y);
}

/* The numbers again, from the three words of the first or of the second number of 16 pairs. */
static inline vec_f32 join_parts(const float *at, size_t stride, bool second)
{
    vec_f32 x[PARTS];
    FA_UNROLL
    for (size_t part = 0; part < PARTS; part++) {
        const vec_u16 word = v_load_u16(at + part * stride);
        x[part] = second ? v_pair_second(word) : v_pair_first(word);
    }
    /* What an infinity, which x1 is then, leaves for the third part is of no use. */
    const vec_f32 rest = v_add_f32(x[1], x[2]), infinity = v_set_f32(INFINITY);
    return v_add_f32(x[0], v_select_lt_f32(v_abs_f32(x[1]), infinity, rest, x[1]));
}

/* Lanes with special values. */
static inline uint32_t special_values(vec_f32 x)
{
    return v_outside_f32(x, VALUE_LEAST, VALUE_LIMIT);
}

#endif
