/* float32 as the sum of three bfloat16: x = x0 + x1 + x2 exactly, 8 bits of the 24 in each.  Of the
 * nine products of two such sums the tiles compute six; the other three, x1 y2, x2 y1 and x2 y2,
 * are at most 2^-22 |x y| together (docs/kernels.md).
 *
 * Keys and values, of which there are many, are cut: x0 and x1 are the upper halves of x and of
 * what is left, whose signs are that of x.  Rows of q and weights, the other factor, are rounded to
 * x0 and x1: what is left is of either sign, and so are the products that are not computed, which
 * would make all scores too small otherwise.
 *
 * It does not hold for infinities and NaN, where x0 alone is x, and for numbers so small that their
 * parts are subnormal, which tiles take for 0.  Of q and k that is nothing beside scores of 1
 * unless the other factor is beyond 2^100.
 *
 * Cost: 14 operations for 32 numbers by cutting; 18 by rounding, 24 if they may be the largest.
 */
#ifndef FA_F32X3_PARTS_H
#define FA_F32X3_PARTS_H

#define PARTS 3
#define PART_WORDS (PARTS * TILE_WORDS) /* float32 that the parts of 32 numbers take */

/* Values below VALUE_LEAST, but for 0, infinities and NaN are special: the tiles do not multiply
 * them.  Smaller ones have subnormal parts. */
#define VALUE_LEAST 0x1p-100f

/* x in parts, by cutting. */
FA_INLINE void cut_parts(vec_f32 x, vec_f32 part[PARTS])
{
    part[0] = v_upper_half(x);
    const vec_f32 rest = v_sub_f32(x, part[0]);
    part[1] = v_upper_half(rest);
    part[2] = v_sub_f32(rest, part[1]);
}

/* x in parts, by rounding, first to part[0]. */
FA_INLINE void round_rest(vec_f32 x, vec_f32 part[PARTS])
{
    const vec_f32 rest = v_sub_f32(x, part[0]);
    part[1] = v_upper_half(v_round_half(rest));
    part[2] = v_sub_f32(rest, part[1]);
}

/* Of numbers that are not among the largest. */
FA_INLINE void round_parts(vec_f32 x, vec_f32 part[PARTS])
{
    part[0] = v_upper_half(v_round_half(x));
    round_rest(x, part);
}

/* Of any: x0 is cut where it would become an infinity. */
FA_INLINE void round_any_parts(vec_f32 x, vec_f32 part[PARTS])
{
    const vec_f32 rounded = v_round_half(x), size = v_abs_f32(rounded);
    part[0] = v_upper_half(v_select_lt_f32(size, v_set_f32(INFINITY), rounded, x));
    round_rest(x, part);
}

/* Numbers (x[i], y[i]) as pairs: PARTS rows of 16 words, `stride` words apart. */
FA_INLINE void store_parts(float *to, size_t stride, const vec_f32 x[PARTS], const vec_f32 y[PARTS])
{
    FA_UNROLL
    for (size_t part = 0; part < PARTS; part++) {
        v_store_u16(to + part * stride, v_pair_upper_halves(x[part], y[part]));
    }
}

FA_INLINE void store_cut(float *to, size_t stride, vec_f32 x, vec_f32 y)
{
    vec_f32 of_x[PARTS], of_y[PARTS];
    cut_parts(x, of_x);
    cut_parts(y, of_y);
    store_parts(to, stride, of_x, of_y);
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
    const vec_f32 sum = v_add_f32(x[0], v_add_f32(x[1], x[2]));
    return v_select_lt_f32(v_abs_f32(x[0]), v_set_f32(INFINITY), sum, x[0]);
}

/* The least size of values so far, and whether it is that of a special one. */
static inline vec_u32 least_size(vec_u32 least, vec_f32 x)
{
    return v_min_u32(least, v_size_f32(x));
}
static inline vec_u32 no_size(void) { return v_size_f32(v_zero_f32()); }
static inline bool is_special_size(vec_u32 least)
{
    return v_any_less_u32(least, v_size_f32(v_set_f32(VALUE_LEAST)));
}

/* Lanes with special values. */
static inline uint32_t special_values(vec_f32 x) { return v_outside_f32(x, VALUE_LEAST, INFINITY); }

#endif
