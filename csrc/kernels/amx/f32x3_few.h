/* Both products of float32 for 3 to 16 rows, as in decoding: keys and values are split in passing,
 * a chunk of 32 at a time, and never packed.  The sums are those of f32x3_matmul.h, in the same
 * order; so are those of f32x3_chains.h, for fewer rows.
 *
 * Scores are computed with keys as the rows of a, in the order in which they lie, and the rows of
 * q, turned, as the columns of b: no key is transposed.  Values are columns of b as they lie.
 * While the tile unit multiplies one chunk the next is split.
 *
 * Cost of 16 elements, whatever the number of rows: 7 operations to split them, 1 more to look for
 * small values, and 3 to 5 cycles of the tile unit, on the side: less than memory takes to
 * deliver them to a core.
 */
#ifndef FA_F32X3_FEW_H
#define FA_F32X3_FEW_H

#define FEW_TILE_ROWS 16
#define FEW_KEYS 32 /* keys at a time: two tiles of 16, whose sums take turns */
#define FEW_TILES 4 /* tiles of 16 columns of values at a time */
#define TILE_SIZE (TILE_WORDS * TILE_WORDS)

/* The tile registers here: sums 0 to 3, two of a, two of b. */
#define FEW_A0 4
#define FEW_A1 5
#define FEW_B0 6
#define FEW_B1 7

/* Keys ahead of those at work that are asked for, into L2: 24 KiB at head_dim 128, more than memory
 * delivers to a core in the time that it takes to answer.  Asking for them into L1, where fewer
 * misses can be in flight, or for others into L1 besides, took a quarter longer. */
#define FEW_AHEAD 48
_Static_assert(FEW_AHEAD + FEW_KEYS <= FA_KEYS_AHEAD, "where keys so far ahead lie is known");

/* 128 bytes of a key that comes later. */
FA_INLINE void fetch_later(const char *key, int64_t at)
{
    fetch_far(key + at);
    fetch_far(key + at + FA_LINE);
}

/* One chunk of the rows of q as columns: b[part][word][row], zero for rows that are not there. */
static void turn_chunk(size_t rows, const float *q, size_t depth, float *b)
{
    for (size_t word = 0; word < PART_WORDS; word++) {
        vec_f32 column = v_zero_f32();
        for (size_t r = 0; r < rows; r++) {
            column = v_blend_lanes_f32(column, v_broadcast_f32(q + r * depth + word), 1u << r);
        }
        v_store_f32(b + word * TILE_WORDS, column);
    }
}

/* A chunk that is split while another is multiplied: 32 elements, or columns, from `col` on of the
 * keys from `key` on. */
struct split_chunk {
    size_t key, col;
    /* Of keys [part][key of FEW_KEYS][16], of values [tile][part][pair of keys][16]. */
    float *parts;
};

/* Elements from byte `at` on of `count` keys that are there, side by side; later[i]: a key that
 * comes later. */
FA_INLINE void split_whole_keys(const char *const *row, const char *const *later, size_t count,
                                int64_t at, float *parts)
{
    for (size_t i = 0; i < count; i++) {
        const char *from = row[i] + at;
        fetch_later(later[i], at);
        store_cut(parts + i * TILE_WORDS, FEW_KEYS * TILE_WORDS, v_load_f32(from),
                  v_load_f32(from + VL_f32 * sizeof(float)));
    }
}

/* Whether elements c .. c + 31 of FEW_KEYS keys are all there, side by side. */
static inline bool few_keys_whole(const struct key_block *block, size_t key, size_t c)
{
    return key + FEW_KEYS <= block->keys && c + TILE_KEYS <= block->cols &&
           block->from->col_stride == (int64_t)sizeof(float);
}

/* The keys that are asked for while those from `key` on are split: they themselves, where there are
 * no later ones. */
static inline const char *const *few_later(const struct fa_rows *from, size_t key)
{
    return from->row + key + (key + FEW_KEYS + FEW_AHEAD <= from->located ? FEW_AHEAD : 0);
}

/* Elements c .. c + 31 of any keys; zeros where there are none. */
FA_NOINLINE void split_keys(const struct key_block *block, size_t key, size_t c, float *parts)
{
    const struct fa_rows *from = block->from;
    const size_t left = less_or_zero(block->cols, c);
    const int64_t at = (int64_t)c * from->col_stride;
    if (few_keys_whole(block, key, c)) {
        split_whole_keys(from->row + key, few_later(from, key), FEW_KEYS, at, parts);
        return;
    }
    for (size_t i = 0; i < FEW_KEYS; i++) {
        vec_f32 x = v_zero_f32(), y = v_zero_f32();
        if (key + i < block->keys) {
            const char *row = from->row[key + i] + at;
            x = load_floats(row, from->col_stride, left);
            if (left > VL_f32) {
                y = load_floats(row + VL_f32 * from->col_stride, from->col_stride, left - VL_f32);
            }
        }
        store_cut(parts + i * TILE_WORDS, FEW_KEYS * TILE_WORDS, x, y);
    }
}

/* sums += the product of one part of FEW_KEYS keys and one of q, turned. */
FA_INLINE void few_scores_step(const size_t i, const float *keys, const float *q)
{
    if (part_step[i].new_b) {
        const float *part = keys + part_step[i].b * FEW_KEYS * TILE_WORDS;
        v_tile_load(FEW_A0, part, TILE_WORDS * sizeof *keys);
        v_tile_load(FEW_A1, part + FEW_TILE_ROWS * TILE_WORDS, TILE_WORDS * sizeof *keys);
    }
    if (part_step[i].new_a) {
        v_tile_load(FEW_B0, q + part_step[i].a * TILE_SIZE, TILE_WORDS * sizeof *q);
    }
    v_tile_multiply(0, FEW_A0, FEW_B0);
    v_tile_multiply(1, FEW_A1, FEW_B0);
}

/* sums += the product of a chunk of FEW_KEYS keys and one of q, turned.  Meanwhile the next chunk
 * of the block is split; NULL: none. */
FA_INLINE void few_scores_chunk(const float *parts, const float *q, const struct key_block *block,
                                const struct split_chunk *next)
{
    const size_t key = next != NULL ? next->key : 0;
    const char *const *row = block->from->row + key, *const *later = few_later(block->from, key);
    finish_stores();
    FA_UNROLL
    for (size_t i = 0; i < STEPS; i++) {
        const size_t first = FEW_KEYS * i / STEPS, end = FEW_KEYS * (i + 1) / STEPS;
        few_scores_step(i, parts, q);
        if (next != NULL) {
            split_whole_keys(row + first, later + first, end - first,
                             (int64_t)(next->col * sizeof(float)),
                             next->parts + first * TILE_WORDS);
        }
    }
}

/* One number of a row of q. */
static inline float join_one(const float *at, bool second)
{
    float lanes[PARTS];
    const char *from = (const char *)at + (second ? sizeof(uint16_t) : 0);
    for (size_t part = 0; part < PARTS; part++) {
        lanes[part] = read_bf16(from + part * TILE_WORDS * sizeof *at);
    }
    return fabsf(lanes[0]) < INFINITY ? lanes[0] + (lanes[1] + lanes[2]) : lanes[0];
}

/* What repair_scores does, from caller memory. */
static void few_repair_scores(const struct key_block *block, const float *q, float *s)
{
    const struct fa_rows *rows = block->from;
    for (size_t key = 0; key < block->keys; key++) {
        if (fabsf(s[key]) < INFINITY) {
            continue;
        }
        s[key] = 0;
        for (size_t c = 0; c < block->cols; c++) {
            const float *at = q + c / TILE_KEYS * PART_WORDS + c % TILE_WORDS;
            const float x = join_one(at, c % TILE_KEYS >= TILE_WORDS);
            const char *from = rows->row[key] + (int64_t)c * rows->col_stride;
            s[key] = fmaf(x, read_f32(from), s[key]);
        }
    }
}

/* s[row][key] from sums[key][16 rows]. */
static void turn_scores(size_t rows, size_t columns, const float *sums, float *s, size_t ld)
{
    for (size_t r = 0; r < rows; r++) {
        for (size_t key = 0; key < columns; key++) {
            s[r * ld + key] = sums[key * FEW_TILE_ROWS + r];
        }
    }
}

/* Scores of keys for more rows of q, which are split. */
static void few_scores_tiles(const struct fa_product *p, const struct key_block *block)
{
    _Alignas(64) float turned[FEW_CHUNKS][PARTS * TILE_SIZE];
    _Alignas(64) float parts[2][PARTS * FEW_KEYS * TILE_WORDS];
    _Alignas(64) float sums[WEIGHT_KEYS * FEW_TILE_ROWS];
    const size_t chunks = (block->cols + TILE_KEYS - 1) / TILE_KEYS, depth = chunks * PART_WORDS;
    const size_t columns = p->panels * PANEL;
    const float *q = p->a;

    for (size_t chunk = 0; chunk < chunks; chunk++) {
        turn_chunk(p->rows, q + chunk * PART_WORDS, depth, turned[chunk]);
    }
    if (chunks > 0) {
        split_keys(block, 0, 0, parts[0]);
    }
    size_t at = 0;
    for (size_t key = 0; key < columns; key += FEW_KEYS) {
        v_tile_zero(0);
        v_tile_zero(1);
        for (size_t chunk = 0; chunk < chunks; chunk++, at = 1 - at) {
            const bool same = chunk + 1 < chunks;
            const struct split_chunk next = {
                .key = same ? key : key + FEW_KEYS,
                .col = same ? (chunk + 1) * TILE_KEYS : 0,
                .parts = parts[1 - at],
            };
            if (few_keys_whole(block, next.key, next.col)) {
                few_scores_chunk(parts[at], turned[chunk], block, &next);
                continue;
            }
            few_scores_chunk(parts[at], turned[chunk], block, NULL);
            if (next.key < columns) {
                split_keys(block, next.key, next.col, next.parts);
            }
        }
        v_tile_store(0, sums + key * FEW_TILE_ROWS, FEW_TILE_ROWS * sizeof *sums);
        v_tile_store(1, sums + (key + FEW_TILE_ROWS) * FEW_TILE_ROWS, FEW_TILE_ROWS * sizeof *sums);
    }
    finish_stores();
    turn_scores(p->rows, columns, sums, p->c, p->c_row);
}

/* As many chunks of head_dim as the stack has room for. */
static size_t few_rows_f32x3(size_t head_dim)
{
    return head_dim <= FEW_CHUNKS * TILE_KEYS ? FEW_TILE_ROWS : 0;
}

static void few_scores_f32x3(const struct fa_product *p, size_t cols, size_t keys,
                             const struct fa_rows *from, float factor)
{
    const size_t depth = row_elements_f32x3(cols);
    const struct key_block block = {from, keys, cols};
    FA_ASSERT(factor == 1); /* rows have it */
    (void)factor;
    if (p->rows <= CHAIN_ROWS) {
        few_scores_chains(p, &block);
    } else {
        few_scores_tiles(p, &block);
    }
    for (size_t r = 0; r < p->rows; r++) {
        float *row = (float *)p->c + r * p->c_row;
        if (v_any_nan_f32(probe_scores(row, p->panels * PANEL))) {
            few_repair_scores(&block, (const float *)p->a + r * depth, row);
        }
    }
}

/* A product of weights, which are split, and of values, which are split on the way. */
struct few_values {
    struct key_block block;
    struct weights weights;
    float *sums;
    size_t sums_row;
    /* The least size of values so far. */
    vec_u32 least;
};

/* Pairs [first, end) of the 32 keys of a chunk, of `tiles` times 16 columns; `whole`: all are
 * there, side by side. */
FA_INLINE void split_values(const bool whole, const size_t tiles, struct few_values *v,
                            const struct split_chunk *chunk, size_t first, size_t end)
{
    const struct fa_rows *from = v->block.from;
    const char *const *row = from->row + chunk->key, *const *later = few_later(from, chunk->key);
    vec_u32 least = v->least;
    for (size_t pair = first; pair < end; pair++) {
        const size_t other = pair + TILE_WORDS;
        FA_UNROLL
        for (size_t t = 0; t < tiles; t++) {
            const size_t c = chunk->col + t * VL_f32, cols = less_or_zero(v->block.cols, c);
            const int64_t at = (int64_t)c * from->col_stride;
            if (whole && t % 2 == 0) {
                fetch_later(later[pair], at);
                fetch_later(later[other], at);
            }
            const vec_f32 x = whole ? v_load_f32(row[pair] + at)
                                    : load_value(from, chunk->key + pair, v->block.keys, at, cols);
            const vec_f32 y = whole ? v_load_f32(row[other] + at)
                                    : load_value(from, chunk->key + other, v->block.keys, at, cols);
            least = least_size(least_size(least, x), y);
            store_cut(chunk->parts + t * PARTS * TILE_SIZE + pair * TILE_WORDS, TILE_SIZE, x, y);
        }
    }
    v->least = least;
}

static inline bool few_values_whole(const struct few_values *v, size_t key, size_t end_col)
{
    return key + TILE_KEYS <= v->block.keys && end_col <= v->block.cols &&
           v->block.from->col_stride == (int64_t)sizeof(float);
}

FA_INLINE void split_any_values(const size_t tiles, struct few_values *v, struct split_chunk chunk)
{
    if (few_values_whole(v, chunk.key, chunk.col + tiles * VL_f32)) {
        split_values(true, tiles, v, &chunk, 0, TILE_WORDS);
    } else {
        split_values(false, tiles, v, &chunk, 0, TILE_WORDS);
    }
}

FA_NOINLINE void split_wide(struct few_values *v, struct split_chunk chunk)
{
    split_any_values(FEW_TILES, v, chunk);
}

FA_NOINLINE void split_narrow(struct few_values *v, struct split_chunk chunk)
{
    split_any_values(1, v, chunk);
}

/* sums += the product of one part of the weights and one of the values. */
FA_INLINE void few_values_step(const size_t tiles, const size_t i, const float *weights,
                               size_t stride, const float *values)
{
    const size_t apart = PARTS * TILE_SIZE, bytes = TILE_WORDS * sizeof *values;
    const float *b = values + part_step[i].b * TILE_SIZE;
    if (part_step[i].new_a) {
        v_tile_load(FEW_A0, weights + part_step[i].a * TILE_WORDS, stride * sizeof *weights);
    }
    v_tile_load(FEW_B0, b, bytes);
    v_tile_multiply(0, FEW_A0, FEW_B0);
    if (tiles > 1) {
        v_tile_load(FEW_B1, b + apart, bytes);
        v_tile_multiply(1, FEW_A0, FEW_B1);
    }
    if (tiles > 2) {
        v_tile_load(FEW_B0, b + 2 * apart, bytes);
        v_tile_multiply(2, FEW_A0, FEW_B0);
    }
    if (tiles > 3) {
        v_tile_load(FEW_B1, b + 3 * apart, bytes);
        v_tile_multiply(3, FEW_A0, FEW_B1);
    }
}

/* sums += the product of a chunk of weights and of values, whose parts are given.  Meanwhile the
 * next chunk of values is split; NULL: none. */
FA_INLINE void few_values_chunk(const size_t tiles, struct few_values *v, size_t chunk,
                                const float *parts, const struct split_chunk *next)
{
    const float *weights = v->weights.parts + chunk * PART_WORDS;
    finish_stores();
    FA_UNROLL
    for (size_t i = 0; i < STEPS; i++) {
        few_values_step(tiles, i, weights, v->weights.stride, parts);
        if (next != NULL) {
            split_values(true, tiles, v, next, TILE_WORDS * i / STEPS,
                         TILE_WORDS * (i + 1) / STEPS);
        }
    }
}

FA_INLINE void store_few_sums(const size_t tiles, float *sums, size_t ld)
{
    v_tile_store(0, sums, ld * sizeof *sums);
    if (tiles > 1) {
        v_tile_store(1, sums + VL_f32, ld * sizeof *sums);
    }
    if (tiles > 2) {
        v_tile_store(2, sums + 2 * VL_f32, ld * sizeof *sums);
    }
    if (tiles > 3) {
        v_tile_store(3, sums + 3 * VL_f32, ld * sizeof *sums);
    }
}

/* sums = weights values over all keys, for columns [first, end), `tiles` times 16 of them at a
 * time; `tiles` and `split` are constants. */
FA_INLINE void few_values_tiles(const size_t tiles,
                                void (*split)(struct few_values *, struct split_chunk),
                                struct few_values *v, size_t first, size_t end)
{
    _Alignas(64) float parts[2][FEW_TILES * PARTS * TILE_SIZE];
    const size_t chunks = (v->block.keys + TILE_KEYS - 1) / TILE_KEYS, cols = tiles * VL_f32;
    size_t at = 0;
    if (first < end) {
        split(v, (struct split_chunk){.col = first, .parts = parts[0]});
    }
    for (size_t col = first; col < end; col += cols) {
        v_tile_zero(0);
        v_tile_zero(1);
        v_tile_zero(2);
        v_tile_zero(3);
        for (size_t chunk = 0; chunk < chunks; chunk++, at = 1 - at) {
            const bool same = chunk + 1 < chunks;
            const struct split_chunk next = {
                .key = same ? (chunk + 1) * TILE_KEYS : 0,
                .col = same ? col : col + cols,
                .parts = parts[1 - at],
            };
            if (next.col < end && few_values_whole(v, next.key, next.col + cols)) {
                few_values_chunk(tiles, v, chunk, parts[at], &next);
                continue;
            }
            few_values_chunk(tiles, v, chunk, parts[at], NULL);
            if (next.col < end) {
                split(v, next);
            }
        }
        store_few_sums(tiles, v->sums + col, v->sums_row);
    }
}

/* c = weights values, for more rows.  Returns the least size of values. */
static vec_u32 few_values_wide(const struct fa_product *p, const struct key_block *block)
{
    _Alignas(64) float parts[FEW_TILE_ROWS * WEIGHT_KEYS / TILE_KEYS * PART_WORDS];
    const size_t chunks = (block->keys + TILE_KEYS - 1) / TILE_KEYS;
    const size_t wide = block->cols / (FEW_TILES * VL_f32) * (FEW_TILES * VL_f32);
    struct few_values v = {
        .block = *block,
        .weights = {p->a, p->rows, p->a_stride, parts, chunks * PART_WORDS},
        .sums = p->c,
        .sums_row = p->c_row,
        .least = no_size(),
    };
    for (size_t chunk = 0; chunk < chunks; chunk++) {
        split_weights_of(&v.weights, chunk, 0, p->rows);
    }
    few_values_tiles(FEW_TILES, split_wide, &v, 0, wide);
    few_values_tiles(1, split_narrow, &v, wide, block->cols);
    finish_stores();
    return v.least;
}

/* False where some value is special: values_careful_f32x3 does those. */
static bool few_values_f32x3(const struct fa_product *p, size_t cols, const struct fa_rows *from,
                             void *scratch)
{
    const size_t rows = p->rows, ldacc = p->c_row;
    const struct key_block block = {from, p->depth, cols};
    const float *sums = scratch;
    struct fa_product apart = *p;
    apart.c = scratch;
    const vec_u32 least =
        rows <= CHAIN_ROWS ? few_values_chains(&apart, &block) : few_values_wide(&apart, &block);
    vec_f32 probe = v_zero_f32();
    for (size_t r = 0; r < rows; r++) {
        probe = v_add_f32(probe, probe_scores(sums + r * ldacc, cols));
    }
    if (v_any_nan_f32(probe) || is_special_size(least)) {
        return false;
    }
    for (size_t r = 0; r < rows; r++) {
        for (size_t col = 0; col < cols; col += VL_f32) {
            float *to = (float *)p->c + r * ldacc + col;
            v_store_f32(to, v_add_f32(v_load_f32(to), v_load_f32(sums + r * ldacc + col)));
        }
    }
    return true;
}

#endif
