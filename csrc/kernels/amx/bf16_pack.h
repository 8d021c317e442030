/* bfloat16 rows of q, keys and values into the operands of tiles: bits are moved, never changed.
 *
 * q and the keys pair elements 2 i and 2 i + 1 of head_dim.  Values pair keys r and r + 16 of every
 * 32, because that is how weights are cheapest to split (bf16_softmax.h).
 *
 * Cost of keys: 64 shuffles for 16 keys x 32 elements, 16 bytes a cycle; of values 2 permutations,
 * 4 cycles, for 2 keys x 32 elements.
 */
#ifndef FA_BF16_PACK_H
#define FA_BF16_PACK_H

/* The upper half of the least float32 that is not ordinary (engine.h). */
#define ORDINARY_BF16 ((127 + FA_ORDINARY_EXPONENT) << 7)
/* And of the least value that is too large. */
#define LARGE_BF16 ((127 + FA_VALUE_EXPONENT_F32) << 7)

/* Up to 32 elements, then zeros. */
static inline vec_u16 load_elements(const char *p, int64_t col_stride, size_t count)
{
    if (col_stride == (int64_t)sizeof(uint16_t)) {
        return count >= TILE_KEYS ? v_load_u16(p) : v_load_first_u16(p, count);
    }
    uint16_t lanes[TILE_KEYS] = {0};
    for (size_t i = 0; i < TILE_KEYS && i < count; i++) {
        memcpy(lanes + i, p + (int64_t)i * col_stride, sizeof *lanes);
    }
    return v_load_u16(lanes);
}

/* Elements of float32 that the bfloat16 of a row, padded to whole tiles, take. */
static size_t row_elements_bf16(size_t head_dim)
{
    return (head_dim + TILE_KEYS - 1) / TILE_KEYS * TILE_WORDS;
}

static bool load_rows_bf16(void *dst, size_t rows, size_t cols, const struct fa_rows *from,
                           double factor)
{
    const size_t depth = row_elements_bf16(cols);
    const char *const *src = from->row;
    const int64_t col_stride = from->col_stride;
    uint32_t large = 0;
    FA_ASSERT(factor == 1); /* rounding would change them */
    (void)factor;
    for (size_t r = 0; r < rows; r++) {
        float *row = (float *)dst + r * depth;
        for (size_t c = 0; c < cols; c += TILE_KEYS) {
            const vec_u16 x = load_elements(src[r] + (int64_t)c * col_stride, col_stride, cols - c);
            large |= v_large_u16(x, ORDINARY_BF16);
            v_store_u16(row + c / 2, x);
        }
    }
    return large == 0;
}

/* 16 keys from `key` on, of which `keys` are there, into one half of a panel's columns.  Returns
 * which lanes held an element that is not ordinary. */
FA_INLINE uint32_t pack_key_half(const bool whole, float *panel, size_t cols,
                                 const struct fa_rows *from, size_t key, size_t keys)
{
    uint32_t large = 0;
    const char *const *row = from->row + key;
    const size_t ahead = keys_ahead_f32(FA_BF16);
    const bool more = key + ahead + VL_f32 <= from->located;
    for (size_t c = 0; c < cols; c += TILE_KEYS) {
        const int64_t at = (int64_t)c * from->col_stride;
        vec_f32 square[VL_f32];
        if (more) {
            fetch_square_f32(row + ahead, at);
        }
        if (whole && c + TILE_KEYS <= cols) {
            load_square_f32(square, row, at);
        } else {
            for (size_t i = 0; i < VL_f32; i++) {
                square[i] = v_zero_f32();
                if (i < keys) {
                    square[i] = v_as_f32(load_elements(row[i] + at, from->col_stride, cols - c));
                }
            }
            v_transpose_f32(square);
        }
        FA_UNROLL
        for (size_t u = 0; u < VL_f32; u++) {
            large |= v_large_u16(v_load_u16(square + u), ORDINARY_BF16);
            v_store_f32(panel + (c / 2 + u) * PANEL, square[u]);
        }
    }
    return large;
}

static bool pack_keys_bf16(void *dst, size_t keys, size_t cols, const struct fa_rows *from)
{
    const size_t depth = row_elements_bf16(cols);
    const bool contiguous = from->col_stride == (int64_t)sizeof(uint16_t);
    uint32_t large = 0;
    for (size_t key = 0; key < keys; key += VL_f32) {
        float *panel = (float *)dst + key / PANEL * PANEL * depth + key % PANEL;
        const size_t live = keys - key;
        if (contiguous && live >= VL_f32) {
            large |= pack_key_half(true, panel, cols, from, key, live);
        } else {
            large |= pack_key_half(false, panel, cols, from, key, live);
        }
    }
    if (keys % PANEL != 0 && keys % PANEL <= VL_f32) {
        float *panel = (float *)dst + keys / PANEL * PANEL * depth + VL_f32;
        for (size_t word = 0; word < depth; word++) {
            v_store_f32(panel + word * PANEL, v_zero_f32());
        }
    }
    return large == 0;
}

/* Values of keys r and r + 16 of every 32 into one row of pairs, zero beyond `keys` and `cols`.
 * Returns whether none is special (v_special_u16) or too large. */
static bool pack_values_bf16(void *dst, size_t panel_stride, size_t keys, size_t cols,
                             const struct fa_rows *from)
{
    const int64_t panel_bytes = PANEL * from->col_stride;
    const size_t padded = (keys + TILE_KEYS - 1) / TILE_KEYS * TILE_KEYS;
    uint32_t special = 0;
    for (size_t pair = 0; pair < padded / 2; pair++) {
        const size_t first = pair / TILE_WORDS * TILE_KEYS + pair % TILE_WORDS;
        const size_t second = first + TILE_WORDS, later = first + keys_ahead_f32(FA_BF16);
        const bool more = later + TILE_WORDS < from->located;
        float *to = (float *)dst + pair * PANEL;
        for (size_t c = 0; c < cols; c += PANEL) {
            const int64_t at = (int64_t)(c / PANEL) * panel_bytes;
            if (more) {
                __builtin_prefetch(from->row[later] + at);
                __builtin_prefetch(from->row[later + TILE_WORDS] + at);
            }
            vec_u16 x = v_zero_u16(), y = v_zero_u16();
            if (first < keys) {
                x = load_elements(from->row[first] + at, from->col_stride, cols - c);
            }
            if (second < keys) {
                y = load_elements(from->row[second] + at, from->col_stride, cols - c);
            }
            special |= v_special_u16(x) | v_special_u16(y) | v_large_u16(x, LARGE_BF16) |
                       v_large_u16(y, LARGE_BF16);
            v_store_u16(to, v_pair_low_u16(x, y));
            v_store_u16(to + TILE_WORDS, v_pair_high_u16(x, y));
            to += panel_stride;
        }
    }
    return special == 0;
}

#endif
