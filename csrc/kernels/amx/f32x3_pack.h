/* float32 rows of q, keys and values into the operands of tiles, in three parts (f32x3_parts.h).
 *
 * 32 elements of a row of q are three rows of 16 words, part by part; so are 32 elements of
 * head_dim, or 32 keys of values, of a panel, where each word stands in a row of PANEL columns.
 * Pairs are elements, or keys, i and i + 16: what a shift and a blend make of two vectors.
 *
 * Cost of 16 keys x 32 elements: 128 shuffles, 16 times 14 operations to split and 4 to make NaN
 * plain.
 */
#ifndef FA_F32X3_PACK_H
#define FA_F32X3_PACK_H

/* 16 elements, or the first `count` and zeros; a NaN without payload, which no cutting off turns
 * into an infinity. */
static inline vec_f32 load_floats(const char *p, int64_t col_stride, size_t count)
{
    if (col_stride == (int64_t)sizeof(float)) {
        return v_plain_nan(count >= VL_f32 ? v_load_f32(p) : v_load_first_f32(p, count));
    }
    float lanes[VL_f32] = {0};
    for (size_t i = 0; i < VL_f32 && i < count; i++) {
        lanes[i] = read_f32(p + (int64_t)i * col_stride);
    }
    return v_plain_nan(v_load_f32(lanes));
}

static inline size_t less_or_zero(size_t a, size_t b) { return a > b ? a - b : 0; }

/* Elements of float32 that the three parts of a row, padded to whole tiles, take. */
static size_t row_elements_f32x3(size_t head_dim)
{
    return (head_dim + TILE_KEYS - 1) / TILE_KEYS * PART_WORDS;
}

static bool load_rows_f32x3(void *dst, size_t rows, size_t cols, const struct fa_rows *rows_of_q,
                            double factor)
{
    const char *const *src = rows_of_q->row;
    const int64_t col_stride = rows_of_q->col_stride;
    const vec_f32 f = v_set_f32((float)factor);
    const vec_f32 ordinary = v_set_f32(ORDINARY_PROBE_f32);
    vec_f32 probe = v_zero_f32();
    float *to = dst;
    for (size_t r = 0; r < rows; r++) {
        for (size_t c = 0; c < cols; c += TILE_KEYS, to += PART_WORDS) {
            const char *from = src[r] + (int64_t)c * col_stride;
            const char *later = from + TILE_WORDS * col_stride;
            const size_t left = less_or_zero(cols - c, TILE_WORDS);
            const vec_f32 x = v_mul_f32(load_floats(from, col_stride, cols - c), f);
            const vec_f32 y = v_mul_f32(load_floats(later, col_stride, left), f);
            vec_f32 of_x[PARTS], of_y[PARTS];
            round_any_parts(x, of_x);
            round_any_parts(y, of_y);
            probe = v_fma_f32(x, ordinary, v_fma_f32(y, ordinary, probe));
            store_parts(to, TILE_WORDS, of_x, of_y);
        }
    }
    return is_finite_f32(probe);
}

/* Elements c .. c + 15 of the 16 keys from `key` on, transposed: element u of all of them in
 * square[u].  `whole`: all are there, side by side. */
FA_INLINE void load_key_square(const bool whole, vec_f32 square[VL_f32],
                               const struct key_block *block, size_t key, size_t c)
{
    const struct fa_rows *from = block->from;
    const size_t keys = keys_left(block, key), cols = block->cols;
    const char *const *row = from->row + key;
    const int64_t at = (int64_t)c * from->col_stride;
    if (whole) {
        load_square_f32(square, row, at);
        return;
    }
    for (size_t i = 0; i < VL_f32; i++) {
        square[i] = v_zero_f32();
        if (i < keys && c < cols) {
            square[i] = load_floats(row[i] + at, from->col_stride, cols - c);
        }
    }
    v_transpose_f32(square);
}

/* 16 keys from `key` on into one half of a panel's columns, zero for those that are not there. 
 * `whole`: they are all there, and their elements lie side by side.  Returns the sum of probe and
 * their probes. */
FA_INLINE vec_f32 pack_key_half_parts(const bool whole, float *panel, const struct key_block *block,
                                      size_t key, vec_f32 probe)
{
    const struct fa_rows *from = block->from;
    const vec_f32 ordinary = v_set_f32(ORDINARY_PROBE_f32);
    const size_t ahead = keys_ahead_f32(FA_F32);
    const bool more = key + ahead + VL_f32 <= from->located;
    for (size_t c = 0; c < block->cols; c += TILE_KEYS, panel += PART_WORDS * PANEL) {
        const int64_t at = (int64_t)c * from->col_stride;
        vec_f32 first[VL_f32], second[VL_f32];
        if (more) {
            fetch_square_f32(from->row + key + ahead, at);
            fetch_square_f32(from->row + key + ahead, at + TILE_WORDS * from->col_stride);
        }
        if (whole && c + TILE_KEYS <= block->cols) {
            load_key_square(true, first, block, key, c);
            load_key_square(true, second, block, key, c + TILE_WORDS);
        } else {
            load_key_square(false, first, block, key, c);
            load_key_square(false, second, block, key, c + TILE_WORDS);
        }
        vec_f32 of_first = v_zero_f32(), of_second = v_zero_f32();
        FA_UNROLL
        for (size_t u = 0; u < TILE_WORDS; u++) {
            of_first = v_fma_f32(first[u], ordinary, of_first);
            of_second = v_fma_f32(second[u], ordinary, of_second);
            store_cut(panel + u * PANEL, TILE_WORDS * PANEL, v_plain_nan(first[u]),
                      v_plain_nan(second[u]));
        }
        probe = v_add_f32(probe, v_add_f32(of_first, of_second));
    }
    return probe;
}

static bool pack_keys_f32x3(void *dst, size_t keys, size_t cols, const struct fa_rows *from)
{
    const size_t depth = row_elements_f32x3(cols);
    const size_t padded = (keys + PANEL - 1) / PANEL * PANEL;
    const struct key_block block = {from, keys, cols};
    const bool contiguous = from->col_stride == (int64_t)sizeof(float);
    vec_f32 probe = v_zero_f32();
    for (size_t key = 0; key < padded; key += VL_f32) {
        float *panel = (float *)dst + key / PANEL * PANEL * depth + key % PANEL;
        if (contiguous && key + VL_f32 <= keys) {
            probe = pack_key_half_parts(true, panel, &block, key, probe);
        } else {
            probe = pack_key_half_parts(false, panel, &block, key, probe);
        }
    }
    return is_finite_f32(probe);
}

/* 16 columns of a key, of which `cols` are there; zeros for a key that is not there. */
static inline vec_f32 load_value(const struct fa_rows *from, size_t key, size_t keys, int64_t at,
                                 size_t cols)
{
    return key < keys && cols > 0 ? load_floats(from->row[key] + at, from->col_stride, cols)
                                  : v_zero_f32();
}

/* Values of keys r and r + 16 of every 32 into rows of pairs, zero beyond `keys` and `cols`.
 * `whole`: chunks and panels are whole, and values side by side; NaN are then not made plain.
 * Returns whether no value is special. */
FA_INLINE bool pack_values_of(const bool whole, float *dst, size_t panel_stride, size_t keys,
                              size_t cols, const struct fa_rows *from)
{
    const size_t ahead = keys_ahead_f32(FA_F32);
    const vec_f32 large = v_set_f32(VALUE_PROBE_f32);
    vec_u32 least = no_size();
    vec_f32 probe = v_zero_f32();
    for (size_t key = 0; key < keys; key += TILE_KEYS, dst += PART_WORDS * PANEL) {
        const char *const *row = from->row + key;
        const bool more = key + TILE_KEYS + ahead <= from->located;
        for (size_t pair = 0; pair < TILE_WORDS; pair++) {
            const size_t other = pair + TILE_WORDS;
            float *to = dst + pair * PANEL;
            for (size_t c = 0; c < cols; c += TILE_WORDS) {
                const int64_t at = (int64_t)c * from->col_stride;
                if (more) {
                    fetch_near(row[ahead + pair] + at);
                    fetch_near(row[ahead + other] + at);
                }
                const vec_f32 x = whole ? v_load_f32(row[pair] + at)
                                        : load_value(from, key + pair, keys, at, cols - c);
                const vec_f32 y = whole ? v_load_f32(row[other] + at)
                                        : load_value(from, key + other, keys, at, cols - c);
                least = least_size(least_size(least, x), y);
                probe = v_fma_f32(x, large, v_fma_f32(y, large, probe));
                store_cut(to + c / PANEL * panel_stride + c % PANEL, TILE_WORDS * PANEL, x, y);
            }
            if (cols % PANEL != 0 && cols % PANEL <= TILE_WORDS) {
                store_cut(to + cols / PANEL * panel_stride + TILE_WORDS, TILE_WORDS * PANEL,
                          v_zero_f32(), v_zero_f32());
            }
        }
    }
    return is_finite_f32(probe) && !is_special_size(least);
}

static bool pack_values_f32x3(void *dst, size_t panel_stride, size_t keys, size_t cols,
                              const struct fa_rows *from)
{
    const bool whole =
        keys % TILE_KEYS == 0 && cols % PANEL == 0 && from->col_stride == (int64_t)sizeof(float);
    return (whole && pack_values_of(true, dst, panel_stride, keys, cols, from)) ||
           pack_values_of(false, dst, panel_stride, keys, cols, from);
}

#endif
