/* Both products for one row of bfloat16, as in decoding, without packing and in vectors: the
 * same chains of multiply-adds in the same order (vec_amx.h), so the same bits.  What the two forms
 * do differently - subnormal numbers - is left to the tiles for values, and for scores is below
 * 2^-126.
 *
 * Cost per key at head_dim 128: scores 16 shuffles, 8 to take pairs apart and 8 multiply-adds;
 * values 4 loads to look for special ones, 8 to widen and 16 multiply-adds, since weights are split
 * in two.  With two rows or more packing for the tiles is the quicker way.
 */
#ifndef FA_BF16_FEW_H
#define FA_BF16_FEW_H

#define FEW_GROUPS 2 /* vectors of keys whose chains take turns */
#define FEW_VECTORS 4 /* vectors of columns whose sums are in registers: 8 chains, 16 sums */

/* The words of 16 keys, transposed: word u of all of them in square[u]; zeros beyond `keys` and
 * `cols`. */
FA_INLINE void load_words(vec_f32 square[VL_f32], const struct fa_rows *from, size_t key,
                          size_t keys, size_t c, size_t cols)
{
    const char *const *row = from->row + key;
    const int64_t at = (int64_t)c * from->col_stride;
    if (keys >= VL_f32 && c + TILE_KEYS <= cols && from->col_stride == (int64_t)sizeof(uint16_t)) {
        load_square_f32(square, row, at);
        return;
    }
    for (size_t i = 0; i < VL_f32; i++) {
        square[i] = v_zero_f32();
        if (i < keys) {
            square[i] = v_as_f32(load_elements(row[i] + at, from->col_stride, cols - c));
        }
    }
    v_transpose_f32(square);
}

/* Scores of `groups` times 16 keys, a constant; of the last 16, `keys` are there. */
FA_INLINE void few_scores_vectors_bf16(const size_t groups, const struct few_product *x, size_t key,
                                       size_t keys)
{
    const struct fa_rows *from = x->block.from;
    const size_t cols = x->block.cols;
    const float *q = x->product.a;
    float *s = (float *)x->product.c + key;
    const size_t ahead = keys_ahead_f32(FA_BF16), far = keys_far_f32(FA_BF16);
    const size_t end = key + groups * VL_f32, row_bytes = cols * sizeof(uint16_t);
    struct fa_stretch wanted = {
        .row = from->row + key + ahead,
        .far_row = from->row + key + far,
        .bytes = end + ahead <= from->located ? row_bytes : 0,
        .far_bytes = end + far <= from->located ? row_bytes : 0,
    };
    vec_f32 acc[FEW_GROUPS];
    FA_UNROLL
    for (size_t g = 0; g < groups; g++) {
        acc[g] = v_zero_f32();
    }
    for (size_t c = 0; c < cols; c += TILE_KEYS) {
        vec_f32 words[FEW_GROUPS][VL_f32], first[FEW_GROUPS], second[FEW_GROUPS];
        FA_UNROLL
        for (size_t g = 0; g < groups; g++) {
            const size_t live = g + 1 < groups ? VL_f32 : keys;
            load_words(words[g], from, key + g * VL_f32, live, c, cols);
            first[g] = second[g] = v_zero_f32();
        }
        for (size_t u = 0; u < TILE_WORDS; u++) {
            const vec_u16 pair = v_as_u16(v_broadcast_f32(q + c / 2 + u));
            fetch_stretch(&wanted, groups * FA_LINE);
            FA_UNROLL
            for (size_t g = 0; g < groups; g++) {
                const vec_u16 k = v_as_u16(words[g][u]);
                first[g] = v_fma_f32(v_pair_first(pair), v_pair_first(k), first[g]);
                second[g] = v_fma_f32(v_pair_second(pair), v_pair_second(k), second[g]);
            }
        }
        FA_UNROLL
        for (size_t g = 0; g < groups; g++) {
            acc[g] = v_add_f32(acc[g], v_add_f32(first[g], second[g]));
        }
    }
    FA_UNROLL
    for (size_t g = 0; g < groups; g++) {
        v_store_f32(s + g * VL_f32, acc[g]);
    }
}

static size_t few_rows_bf16(size_t head_dim)
{
    (void)head_dim;
    return 1;
}

static void few_scores_bf16(const struct fa_product *p, size_t cols, size_t keys,
                            const struct fa_rows *from, float factor)
{
    const size_t step = FEW_GROUPS * VL_f32, columns = p->panels * PANEL;
    const struct few_product x = {.product = *p, .block = {from, keys, cols}};
    size_t key = 0;
    for (; key + step <= keys; key += step) {
        few_scores_vectors_bf16(FEW_GROUPS, &x, key, VL_f32);
    }
    for (; key < columns; key += VL_f32) {
        few_scores_vectors_bf16(1, &x, key, keys_left(&x.block, key));
    }
    if (factor != 1) {
        multiply_scores(p->c, p->c_row, p->rows, columns, v_set_f32(factor));
    }
}

/* sum[part of the weights] over 16 keys of the chunk from `key` on: the first or the second keys of
 * its pairs. */
FA_INLINE void few_values_half(const size_t vectors, const bool second, const struct few_product *x,
                               size_t key, size_t col, vec_f32 sum[2][FEW_VECTORS])
{
    const size_t first = key + (second ? TILE_WORDS : 0), keys = keys_left(&x->block, first);
    const char *const *row = x->block.from->row + first;
    const float *weights = (const float *)x->product.a + key;
    FA_UNROLL
    for (size_t j = 0; j < vectors; j++) {
        sum[0][j] = sum[1][j] = v_zero_f32();
    }
    for (size_t i = 0; i < TILE_WORDS && i < keys; i++) {
        const vec_u16 uppers = v_as_u16(v_broadcast_f32(weights + i));
        const vec_u16 lowers = v_as_u16(v_broadcast_f32(weights + i + TILE_WORDS));
        const vec_f32 w_upper = second ? v_pair_second(uppers) : v_pair_first(uppers);
        const vec_f32 w_lower = second ? v_pair_second(lowers) : v_pair_first(lowers);
        FA_UNROLL
        for (size_t j = 0; j < vectors; j++) {
            const char *from = row[i] + (col + j * VL_f32) * sizeof(uint16_t);
            const vec_f32 value = widen_f32(from, FA_BF16);
            sum[0][j] = v_fma_f32(w_upper, value, sum[0][j]);
            sum[1][j] = v_fma_f32(w_lower, value, sum[1][j]);
        }
    }
}

/* c += weights values for the columns from `col` on, chunk by chunk. */
FA_INLINE void few_values_vectors_bf16(const size_t vectors, const struct few_product *x,
                                       size_t col)
{
    float *sum = (float *)x->product.c + col;
    vec_f32 total[FEW_VECTORS];
    FA_UNROLL
    for (size_t j = 0; j < vectors; j++) {
        total[j] = v_load_f32(sum + j * VL_f32);
    }
    for (size_t key = 0; key < x->block.keys; key += TILE_KEYS) {
        vec_f32 first[2][FEW_VECTORS], second[2][FEW_VECTORS];
        few_values_half(vectors, false, x, key, col, first);
        few_values_half(vectors, true, x, key, col, second);
        FA_UNROLL
        for (size_t part = 0; part < 2; part++) {
            FA_UNROLL
            for (size_t j = 0; j < vectors; j++) {
                total[j] = v_add_f32(total[j], v_add_f32(first[part][j], second[part][j]));
            }
        }
    }
    FA_UNROLL
    for (size_t j = 0; j < vectors; j++) {
        v_store_f32(sum + j * VL_f32, total[j]);
    }
}

/* Whether any value is special, asking for later ones on the way. */
static bool any_special(const struct key_block *block)
{
    const struct fa_rows *from = block->from;
    const size_t ahead = keys_ahead_f32(FA_BF16), far = keys_far_f32(FA_BF16);
    const int64_t row_bytes = (int64_t)(block->cols * sizeof(uint16_t));
    uint32_t special = 0;
    for (size_t key = 0; key < block->keys; key++) {
        if (key + ahead < from->located) {
            fetch_key_f32(from->row[key + ahead], row_bytes, false);
        }
        if (key + far < from->located) {
            fetch_key_f32(from->row[key + far], row_bytes, true);
        }
        for (size_t c = 0; c < block->cols; c += TILE_KEYS) {
            special |= v_special_u16(v_load_u16(from->row[key] + c * sizeof(uint16_t)));
        }
    }
    return special != 0;
}

/* Values whose columns lie side by side and fill chunks of 32, none of them special; the tiles do
 * others. */
static bool few_values_bf16(const struct fa_product *p, size_t cols, const struct fa_rows *from,
                            void *scratch)
{
    const struct few_product x = {.product = *p, .block = {from, p->depth, cols}};
    const size_t wide = FEW_VECTORS * VL_f32;
    if (cols % TILE_KEYS != 0 || from->col_stride != (int64_t)sizeof(uint16_t) ||
        any_special(&x.block)) {
        return false;
    }
    (void)scratch;
    size_t col = 0;
    for (; col + wide <= cols; col += wide) {
        few_values_vectors_bf16(FEW_VECTORS, &x, col);
    }
    for (; col < cols; col += VL_f32) {
        few_values_vectors_bf16(1, &x, col);
    }
    return true;
}

#endif
