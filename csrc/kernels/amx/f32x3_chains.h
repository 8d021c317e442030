/* Both products of float32 for one row or two, as in decoding, in vectors: what a product of
 * tiles computes are chains of 16 multiply-adds, two of them for each of the six products of parts
 * (vec_amx.h), and in registers they take few rows no longer than memory takes to deliver their
 * keys.  The order of sums is that of f32x3_matmul.h, and subnormal numbers count as 0, so the bits
 * are the same.
 *
 * Cost of 16 elements of keys or values: 4 operations to split them, 6 multiply-adds per row, and 4
 * shuffles for keys or 1 to look for small values.  At two operations a cycle 2 rows take 9 to 10
 * cycles, where memory takes 14 to deliver 64 bytes to a core; 3 rows take as long as f32x3_few.h
 * does, 4 longer.
 */
#ifndef FA_F32X3_CHAINS_H
#define FA_F32X3_CHAINS_H

#define CHAIN_ROWS 2 /* 12 chains and 3 parts of 32 registers */
#define FEW_CHUNKS 8 /* of head_dim: 256 */

/* Rows of q or of weights, one chunk: [row][part][32]. */
#define CHAIN_FACTORS (PARTS * TILE_KEYS)

/* One row or two of q or of weights, which are split, and a block of keys or values. */
struct chain_product {
    struct key_block block;
    /* [chunk of head_dim or of keys][row][part][32] */
    const float *factors;
    /* c of the product, rows and columns. */
    float *c;
    size_t c_row, columns;
};

/* chain[row][step] += the row's factor * x, each a part of it. */
FA_INLINE void advance_chains(const size_t rows, vec_f32 chain[CHAIN_ROWS][STEPS], vec_f32 x,
                              const float *factors)
{
    vec_f32 part[PARTS];
    cut_parts(x, part);
    FA_UNROLL
    for (size_t r = 0; r < rows; r++) {
        FA_UNROLL
        for (size_t i = 0; i < STEPS; i++) {
            const float *factor = factors + r * CHAIN_FACTORS + part_step[i].a * TILE_KEYS;
            chain[r][i] = v_fma_f32(v_broadcast_f32(factor), part[part_step[i].b], chain[r][i]);
        }
    }
}

FA_INLINE void clear_chains(const size_t rows, vec_f32 chain[CHAIN_ROWS][STEPS])
{
    FA_UNROLL
    for (size_t r = 0; r < rows; r++) {
        FA_UNROLL
        for (size_t i = 0; i < STEPS; i++) {
            chain[r][i] = v_zero_f32();
        }
    }
}

/* The chains of the first elements of pairs, for the time of those of the second ones. */
FA_INLINE void store_chains(const size_t rows, vec_f32 chain[CHAIN_ROWS][STEPS], float *to)
{
    FA_UNROLL
    for (size_t r = 0; r < rows; r++) {
        FA_UNROLL
        for (size_t i = 0; i < STEPS; i++) {
            v_store_f32(to + (r * STEPS + i) * VL_f32, chain[r][i]);
        }
    }
}

/* sum + what six products of tiles add to it. */
FA_INLINE vec_f32 add_chains(vec_f32 sum, const vec_f32 chain[STEPS], const float *firsts)
{
    FA_UNROLL
    for (size_t i = 0; i < STEPS; i++) {
        sum = v_add_f32(sum, v_add_f32(v_load_f32(firsts + i * VL_f32), chain[i]));
    }
    return sum;
}

/* A chunk of a row of q, from pairs of bfloat16. */
static void widen_chunk(const float *words, float *factors)
{
    for (size_t part = 0; part < PARTS; part++) {
        const vec_u16 word = v_load_u16(words + part * TILE_WORDS);
        v_store_f32(factors + part * TILE_KEYS, v_pair_first(word));
        v_store_f32(factors + part * TILE_KEYS + TILE_WORDS, v_pair_second(word));
    }
}

/* 16 weights, split as in f32x3_matmul.h. */
static void split_weights_apart(const float *weights, float *factors)
{
    vec_f32 part[PARTS];
    round_parts(v_load_f32(weights), part);
    FA_UNROLL
    for (size_t i = 0; i < PARTS; i++) {
        v_store_f32(factors + i * TILE_KEYS, part[i]);
    }
}

/* Keys asked for while those from `key` on, `count` of them, are at work. */
static inline struct fa_stretch chain_ahead(const struct key_block *block, size_t key, size_t count)
{
    const struct fa_rows *from = block->from;
    const size_t near = key + keys_ahead_f32(FA_F32), far = key + keys_far_f32(FA_F32);
    const bool contiguous = from->col_stride == (int64_t)sizeof(float);
    const size_t bytes = contiguous ? block->cols * sizeof(float) : 0;
    return (struct fa_stretch){
        .row = from->row + near,
        .far_row = from->row + far,
        .bytes = near + count <= from->located ? bytes : 0,
        .far_bytes = far + count <= from->located ? bytes : 0,
    };
}

/* Scores of the 16 keys from `key` on; `whole`: all of them are there, side by side. */
FA_INLINE void chain_scores_vector(const size_t rows, const bool whole,
                                   const struct chain_product *x, size_t key)
{
    const size_t cols = x->block.cols;
    const float *factors = x->factors;
    _Alignas(64) float squares[VL_f32 * VL_f32], firsts[CHAIN_ROWS * STEPS * VL_f32];
    struct fa_stretch wanted = chain_ahead(&x->block, key, VL_f32);
    vec_f32 sum[CHAIN_ROWS];
    FA_UNROLL
    for (size_t r = 0; r < rows; r++) {
        sum[r] = v_zero_f32();
    }
    for (size_t c = 0; c < cols; c += TILE_KEYS, factors += rows * CHAIN_FACTORS) {
        vec_f32 chain[CHAIN_ROWS][STEPS];
        for (size_t half = 0; half < TILE_KEYS; half += TILE_WORDS) {
            vec_f32 square[VL_f32];
            load_key_square(whole, square, &x->block, key, c + half);
            FA_UNROLL
            for (size_t u = 0; u < VL_f32; u++) {
                v_store_f32(squares + u * VL_f32, square[u]);
            }
            if (half > 0) {
                store_chains(rows, chain, firsts);
            }
            clear_chains(rows, chain);
            for (size_t u = 0; u < VL_f32; u++) {
                fetch_stretch(&wanted, sizeof(vec_f32));
                advance_chains(rows, chain, v_load_f32(squares + u * VL_f32), factors + half + u);
            }
        }
        FA_UNROLL
        for (size_t r = 0; r < rows; r++) {
            sum[r] = add_chains(sum[r], chain[r], firsts + r * STEPS * VL_f32);
        }
    }
    FA_UNROLL
    for (size_t r = 0; r < rows; r++) {
        v_store_f32(x->c + r * x->c_row + key, sum[r]);
    }
}

FA_INLINE void chain_scores_rows(const size_t rows, const struct chain_product *x)
{
    const struct key_block *block = &x->block;
    const bool whole =
        block->cols % TILE_KEYS == 0 && block->from->col_stride == (int64_t)sizeof(float);
    size_t key = 0;
    for (; whole && key + VL_f32 <= block->keys; key += VL_f32) {
        chain_scores_vector(rows, true, x, key);
    }
    for (; key < x->columns; key += VL_f32) {
        chain_scores_vector(rows, false, x, key);
    }
}

/* No arithmetic of its own, nor that of its caller, may be moved into the other's mode: hence a
 * call. */
FA_NOINLINE void chain_scores(size_t rows, const struct chain_product *x)
{
    if (rows == 1) {
        chain_scores_rows(1, x);
    } else {
        chain_scores_rows(2, x);
    }
}

/* Scores of keys for up to CHAIN_ROWS rows of q, which are split. */
static void few_scores_chains(const struct fa_product *p, const struct key_block *block)
{
    _Alignas(64) float factors[FEW_CHUNKS * CHAIN_ROWS * CHAIN_FACTORS];
    const size_t chunks = (block->cols + TILE_KEYS - 1) / TILE_KEYS, rows = p->rows;
    const struct chain_product x = {*block, factors, p->c, p->c_row, p->panels * PANEL};
    const float *q = p->a;
    for (size_t chunk = 0; chunk < chunks; chunk++) {
        for (size_t r = 0; r < rows; r++) {
            widen_chunk(q + (r * chunks + chunk) * PART_WORDS,
                        factors + (chunk * rows + r) * CHAIN_FACTORS);
        }
    }
    const unsigned mode = flush_subnormals();
    chain_scores(rows, &x);
    restore_mode(mode);
}

/* c += weights values, of the 32 keys from `key` on and the 16 columns from `col` on; the first
 * keys begin the sums.  `whole`: all are there.  Returns the least size of these values. */
FA_INLINE vec_u32 chain_values_vector(const size_t rows, const bool whole,
                                      const struct chain_product *x, size_t key, size_t col,
                                      struct fa_stretch *wanted)
{
    const struct fa_rows *from = x->block.from;
    const size_t keys = x->block.keys, cols = x->block.cols;
    const float *factors = x->factors + key / TILE_KEYS * rows * CHAIN_FACTORS;
    vec_u32 least = no_size();
    _Alignas(64) float firsts[CHAIN_ROWS * STEPS * VL_f32];
    const int64_t at = (int64_t)col * from->col_stride;
    vec_f32 chain[CHAIN_ROWS][STEPS];
    for (size_t half = 0; half < TILE_KEYS; half += TILE_WORDS) {
        if (half > 0) {
            store_chains(rows, chain, firsts);
        }
        clear_chains(rows, chain);
        for (size_t u = half; u < half + TILE_WORDS; u++) {
            const vec_f32 value =
                whole ? v_load_f32(from->row[key + u] + at)
                      : load_value(from, key + u, keys, at, less_or_zero(cols, col));
            fetch_stretch(wanted, sizeof value);
            least = least_size(least, value);
            advance_chains(rows, chain, value, factors + u);
        }
    }
    FA_UNROLL
    for (size_t r = 0; r < rows; r++) {
        float *to = x->c + r * x->c_row + col;
        v_store_f32(to, add_chains(key > 0 ? v_load_f32(to) : v_zero_f32(), chain[r],
                                   firsts + r * STEPS * VL_f32));
    }
    return least;
}

FA_INLINE vec_u32 chain_values_rows(const size_t rows, const struct chain_product *x)
{
    const struct key_block *block = &x->block;
    const bool contiguous = block->from->col_stride == (int64_t)sizeof(float);
    vec_u32 least = no_size();
    for (size_t key = 0; key < block->keys; key += TILE_KEYS) {
        struct fa_stretch wanted = chain_ahead(block, key, TILE_KEYS);
        for (size_t col = 0; col < block->cols; col += VL_f32) {
            const bool whole =
                contiguous && key + TILE_KEYS <= block->keys && col + VL_f32 <= block->cols;
            const vec_u32 found = whole ? chain_values_vector(rows, true, x, key, col, &wanted)
                                        : chain_values_vector(rows, false, x, key, col, &wanted);
            least = v_min_u32(least, found);
        }
    }
    return least;
}

/* The least size of values. */
FA_NOINLINE vec_u32 chain_values(size_t rows, const struct chain_product *x)
{
    return rows == 1 ? chain_values_rows(1, x) : chain_values_rows(2, x);
}

/* c = weights values, for up to CHAIN_ROWS rows.  Returns the least size of values. */
static vec_u32 few_values_chains(const struct fa_product *p, const struct key_block *block)
{
    _Alignas(64) float factors[WEIGHT_KEYS / TILE_KEYS * CHAIN_ROWS * CHAIN_FACTORS];
    const struct chain_product x = {*block, factors, p->c, p->c_row, block->cols};
    float *to = factors;
    for (size_t key = 0; key < block->keys; key += TILE_KEYS) {
        for (size_t r = 0; r < p->rows; r++, to += CHAIN_FACTORS) {
            const float *weights = (const float *)p->a + r * p->a_stride + key;
            split_weights_apart(weights, to);
            split_weights_apart(weights + TILE_WORDS, to + TILE_WORDS);
        }
    }
    const unsigned mode = flush_subnormals();
    const vec_u32 least = chain_values(p->rows, &x);
    restore_mode(mode);
    return least;
}

#endif
