/* Both products of float32 for one row or two, as in decoding, without tiles: what a product of tiles computes are
 * chains of 16 multiply-adds, two of them for each of the six products of parts (vec_amx.h), and in registers they
 * take few rows no longer than memory takes to deliver their keys.  The order of sums is that of
 * f32x3_matmul.h, and subnormal numbers count as 0, so the bits are the same.
 *
 * Cost of 16 elements of keys or values: 4 operations to split them, 6 multiply-adds per row, and 4 shuffles for
 * keys or 1 to look for small values.  At two operations a cycle 2 rows take 9 to 10 cycles, where memory takes 14
 * to deliver 64 bytes to a core; 3 rows take as long as f32x3_few.h does, 4 longer.
 */
#ifndef FA_F32X3_CHAINS_H
#define FA_F32X3_CHAINS_H

#define CHAIN_ROWS 2 /* 12 chains and 3 parts of 32 registers */
#define FEW_CHUNKS 8 /* of head_dim: 256 */

/* Rows of q or of weights, one chunk: [row][part][32]. */
#define CHAIN_FACTORS (PARTS * TILE_KEYS)

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
static inline struct fa_stretch chain_ahead(const struct fa_rows *from, size_t key, size_t count,
                                            size_t cols)
{
    const size_t near = key + keys_ahead_f32(FA_F32), far = key + keys_far_f32(FA_F32);
    const size_t bytes = from->col_stride == (int64_t)sizeof(float) ? cols * sizeof(float) : 0;
    return (struct fa_stretch){
        .row = from->row + near,
        .far_row = from->row + far,
        .bytes = near + count <= from->located ? bytes : 0,
        .far_bytes = far + count <= from->located ? bytes : 0,
    };
}

/* Scores of 16 keys, `keys` of them real. */
FA_INLINE void chain_scores_tile(const size_t rows, const bool whole, size_t cols,
                                 const float *factors, const struct fa_rows *from, size_t key,
                                 size_t keys, float *s, size_t ld)
{
    _Alignas(64) float squares[VL_f32 * VL_f32], firsts[CHAIN_ROWS * STEPS * VL_f32];
    struct fa_stretch wanted = chain_ahead(from, key, VL_f32, cols);
    vec_f32 sum[CHAIN_ROWS];
    FA_UNROLL
    for (size_t r = 0; r < rows; r++) {
        sum[r] = v_zero_f32();
    }
    for (size_t c = 0; c < cols; c += TILE_KEYS, factors += rows * CHAIN_FACTORS) {
        vec_f32 chain[CHAIN_ROWS][STEPS];
        for (size_t half = 0; half < TILE_KEYS; half += TILE_WORDS) {
            vec_f32 square[VL_f32];
            load_key_square(whole, square, from, key, keys, c + half, cols);
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
        v_store_f32(s + r * ld, sum[r]);
    }
}

FA_INLINE void chain_scores_rows(const size_t rows, size_t cols, size_t keys, size_t columns,
                                 const float *factors, const struct fa_rows *from, float *s,
                                 size_t ld)
{
    const bool whole = cols % TILE_KEYS == 0 && from->col_stride == (int64_t)sizeof(float);
    size_t key = 0;
    for (; whole && key + VL_f32 <= keys; key += VL_f32) {
        chain_scores_tile(rows, true, cols, factors, from, key, VL_f32, s + key, ld);
    }
    for (; key < columns; key += VL_f32) {
        chain_scores_tile(rows, false, cols, factors, from, key, less_or_zero(keys, key), s + key,
                          ld);
    }
}

/* No arithmetic of its own, nor that of its caller, may be moved into the other's mode: hence a call. */
FA_NOINLINE void chain_scores(size_t rows, size_t cols, size_t keys, size_t columns,
                              const float *factors, const struct fa_rows *from, float *s, size_t ld)
{
    if (rows == 1) {
        chain_scores_rows(1, cols, keys, columns, factors, from, s, ld);
    } else {
        chain_scores_rows(2, cols, keys, columns, factors, from, s, ld);
    }
}

/* Scores of keys for up to CHAIN_ROWS rows of q, which are split. */
static void few_scores_chains(size_t rows, size_t cols, size_t keys, size_t columns, const float *q,
                              const struct fa_rows *from, float *s, size_t ld)
{
    _Alignas(64) float factors[FEW_CHUNKS * CHAIN_ROWS * CHAIN_FACTORS];
    const size_t chunks = (cols + TILE_KEYS - 1) / TILE_KEYS;
    for (size_t chunk = 0; chunk < chunks; chunk++) {
        for (size_t r = 0; r < rows; r++) {
            widen_chunk(q + (r * chunks + chunk) * PART_WORDS,
                        factors + (chunk * rows + r) * CHAIN_FACTORS);
        }
    }
    const unsigned mode = flush_subnormals();
    chain_scores(rows, cols, keys, columns, factors, from, s, ld);
    restore_mode(mode);
}

/* sums[row] of 16 columns += weights values of 32 keys, or a chunk's first sums; `whole`: all are there. */
FA_INLINE vec_u32 chain_values_tile(const size_t rows, const bool whole, size_t key, size_t keys,
                                    size_t col, size_t cols, const float *factors,
                                    const struct fa_rows *from, struct fa_stretch *wanted,
                                    float *sums, size_t ld, vec_u32 least)
{
    _Alignas(64) float firsts[CHAIN_ROWS * STEPS * VL_f32];
    const int64_t at = (int64_t)col * from->col_stride;
    vec_f32 chain[CHAIN_ROWS][STEPS];
    for (size_t half = 0; half < TILE_KEYS; half += TILE_WORDS) {
        if (half > 0) {
            store_chains(rows, chain, firsts);
        }
        clear_chains(rows, chain);
        for (size_t u = half; u < half + TILE_WORDS; u++) {
            const vec_f32 x = whole ? v_load_f32(from->row[key + u] + at)
                                    : load_value(from, key + u, keys, at, less_or_zero(cols, col));
            fetch_stretch(wanted, sizeof x);
            least = least_size(least, x);
            advance_chains(rows, chain, x, factors + u);
        }
    }
    FA_UNROLL
    for (size_t r = 0; r < rows; r++) {
        float *to = sums + r * ld + col;
        v_store_f32(to, add_chains(key > 0 ? v_load_f32(to) : v_zero_f32(), chain[r],
                                   firsts + r * STEPS * VL_f32));
    }
    return least;
}

FA_INLINE vec_u32 chain_values_rows(const size_t rows, size_t keys, size_t cols,
                                    const float *factors, const struct fa_rows *from, float *sums,
                                    size_t ld)
{
    const bool contiguous = from->col_stride == (int64_t)sizeof(float);
    vec_u32 least = no_size();
    for (size_t key = 0; key < keys; key += TILE_KEYS, factors += rows * CHAIN_FACTORS) {
        struct fa_stretch wanted = chain_ahead(from, key, TILE_KEYS, cols);
        for (size_t col = 0; col < cols; col += VL_f32) {
            if (contiguous && key + TILE_KEYS <= keys && col + VL_f32 <= cols) {
                least = chain_values_tile(rows, true, key, keys, col, cols, factors, from, &wanted,
                                          sums, ld, least);
            } else {
                least = chain_values_tile(rows, false, key, keys, col, cols, factors, from, &wanted,
                                          sums, ld, least);
            }
        }
    }
    return least;
}

/* The least size of values. */
FA_NOINLINE vec_u32 chain_values(size_t rows, size_t keys, size_t cols, const float *factors,
                                 const struct fa_rows *from, float *sums, size_t ld)
{
    return rows == 1 ? chain_values_rows(1, keys, cols, factors, from, sums, ld)
                     : chain_values_rows(2, keys, cols, factors, from, sums, ld);
}

/* sums[rows][cols] = weights values, for up to CHAIN_ROWS rows.  Returns the least size of values. */
static vec_u32 few_values_chains(size_t rows, size_t keys, size_t cols, const float *weights,
                                 size_t ldw, const struct fa_rows *from, float *sums, size_t ld)
{
    _Alignas(64) float factors[WEIGHT_KEYS / TILE_KEYS * CHAIN_ROWS * CHAIN_FACTORS];
    float *to = factors;
    for (size_t key = 0; key < keys; key += TILE_KEYS) {
        for (size_t r = 0; r < rows; r++, to += CHAIN_FACTORS) {
            split_weights_apart(weights + r * ldw + key, to);
            split_weights_apart(weights + r * ldw + key + TILE_WORDS, to + TILE_WORDS);
        }
    }
    const unsigned mode = flush_subnormals();
    const vec_u32 least = chain_values(rows, keys, cols, factors, from, sums, ld);
    restore_mode(mode);
    return least;
}

#endif
