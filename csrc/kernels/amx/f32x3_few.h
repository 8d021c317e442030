/* Both products of float32 for 3 to 16 rows, as in decoding: keys and values are split in passing, a chunk of 32
 * at a time, and never packed.  The sums are those of f32x3_matmul.h, in the same order; so are those of
 * f32x3_chains.h, for fewer rows.
 *
 * Scores are computed with keys as the rows of a, in the order in which they lie, and the rows of q, turned, as
 * the columns of b: no key is transposed.  Values are columns of b as they lie.  While the tiles multiply one chunk
 * the next is split.
 *
 * Cost of 16 elements, whatever the number of rows: 7 operations to split them, 1 more to look for small values,
 * and 3 to 5 cycles of the tiles' unit, on the side: less than memory takes to deliver them to a core.
 */
#ifndef FA_F32X3_FEW_H
#define FA_F32X3_FEW_H

#define FEW_TILE_ROWS 16
#define FEW_KEYS 32 /* keys of a tile of scores: two tiles of 16, whose sums take turns */
#define FEW_TILES 4 /* tiles of 16 columns of values at a time */
#define TILE_SIZE (TILE_WORDS * TILE_WORDS)

/* The tile registers here: sums 0 to 3, two of a, two of b. */
#define FEW_A0 4
#define FEW_A1 5
#define FEW_B0 6
#define FEW_B1 7

/* Keys ahead of those at work that are asked for, into L2: 24 KiB at head_dim 128, more than memory delivers to a
 * core in the time that it takes to answer.  Asking for them into L1,
 * where fewer misses can be in flight, or for others into L1 besides, took a quarter longer. */
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

/* Keys to be split: parts[part][key of FEW_KEYS][16]. */
struct few_keys {
    const struct fa_rows *from;
    size_t keys, cols; /* that are there */
};

/* Elements from byte `at` on of `count` keys that are there, side by side; later[i]: a key that comes later. */
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
static inline bool few_keys_whole(const struct few_keys *k, size_t key, size_t c)
{
    return key + FEW_KEYS <= k->keys && c + TILE_KEYS <= k->cols &&
           k->from->col_stride == (int64_t)sizeof(float);
}

/* The keys that are asked for while those from `key` on are split: they themselves, where there are no later ones. */
static inline const char *const *few_later(const struct fa_rows *from, size_t key)
{
    return from->row + key + (key + FEW_KEYS + FEW_AHEAD <= from->located ? FEW_AHEAD : 0);
}

/* Elements c .. c + 31 of any keys; zeros where there are none. */
FA_NOINLINE void split_keys(const struct few_keys *k, size_t key, size_t c, float *parts)
{
    const struct fa_rows *from = k->from;
    const int64_t at = (int64_t)c * from->col_stride;
    if (few_keys_whole(k, key, c)) {
        split_whole_keys(from->row + key, few_later(from, key), FEW_KEYS, at, parts);
        return;
    }
    for (size_t i = 0; i < FEW_KEYS; i++) {
        vec_f32 x = v_zero_f32(), y = v_zero_f32();
        if (key + i < k->keys) {
            const char *row = from->row[key + i] + at;
            x = load_floats(row, from->col_stride, k->cols - c);
            if (k->cols - c > VL_f32) {
                y = load_floats(row + VL_f32 * from->col_stride, from->col_stride,
                                k->cols - c - VL_f32);
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

/* sums += the product of a chunk of FEW_KEYS keys and one of q, turned.  `beside`: while elements from c on of those from
 * `key` on are split. */
FA_INLINE void few_scores_chunk(const bool beside, const float *parts, const float *q,
                                const struct fa_rows *from, size_t key, size_t c, float *next)
{
    const char *const *row = from->row + key, *const *later = few_later(from, key);
    finish_stores();
    FA_UNROLL
    for (size_t i = 0; i < STEPS; i++) {
        const size_t first = FEW_KEYS * i / STEPS, end = FEW_KEYS * (i + 1) / STEPS;
        few_scores_step(i, parts, q);
        if (beside) {
            split_whole_keys(row + first, later + first, end - first, (int64_t)(c * sizeof(float)),
                             next + first * TILE_WORDS);
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
static void few_repair_scores(const struct few_keys *k, const float *q, float *s)
{
    for (size_t key = 0; key < k->keys; key++) {
        if (fabsf(s[key]) < INFINITY) {
            continue;
        }
        s[key] = 0;
        for (size_t c = 0; c < k->cols; c++) {
            const float *at = q + c / TILE_KEYS * PART_WORDS + c % TILE_WORDS;
            const float x = join_one(at, c % TILE_KEYS >= TILE_WORDS);
            const char *from = k->from->row[key] + (int64_t)c * k->from->col_stride;
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
static void few_scores_tiles(size_t rows, size_t columns, const float *q, const struct few_keys *k,
                             float *s, size_t ld)
{
    _Alignas(64) float turned[FEW_CHUNKS][PARTS * TILE_SIZE];
    _Alignas(64) float parts[2][PARTS * FEW_KEYS * TILE_WORDS];
    _Alignas(64) float sums[WEIGHT_KEYS * FEW_TILE_ROWS];
    const size_t chunks = (k->cols + TILE_KEYS - 1) / TILE_KEYS, depth = chunks * PART_WORDS;

    for (size_t chunk = 0; chunk < chunks; chunk++) {
        turn_chunk(rows, q + chunk * PART_WORDS, depth, turned[chunk]);
    }
    if (chunks > 0) {
        split_keys(k, 0, 0, parts[0]);
    }
    size_t at = 0;
    for (size_t key = 0; key < columns; key += FEW_KEYS) {
        v_tile_zero(0);
        v_tile_zero(1);
        for (size_t chunk = 0; chunk < chunks; chunk++, at = 1 - at) {
            const bool same = chunk + 1 < chunks;
            const size_t next_key = same ? key : key + FEW_KEYS;
            const size_t next = same ? (chunk + 1) * TILE_KEYS : 0;
            if (few_keys_whole(k, next_key, next)) {
                few_scores_chunk(true, parts[at], turned[chunk], k->from, next_key, next,
                                 parts[1 - at]);
                continue;
            }
            few_scores_chunk(false, parts[at], turned[chunk], k->from, 0, 0, NULL);
            if (next_key < columns) {
                split_keys(k, next_key, next, parts[1 - at]);
            }
        }
        v_tile_store(0, sums + key * FEW_TILE_ROWS, FEW_TILE_ROWS * sizeof *sums);
        v_tile_store(1, sums + (key + FEW_TILE_ROWS) * FEW_TILE_ROWS, FEW_TILE_ROWS * sizeof *sums);
    }
    finish_stores();
    turn_scores(rows, columns, sums, s, ld);
}

/* As many chunks of head_dim as the stack has room for. */
static size_t few_rows_f32x3(size_t head_dim)
{
    return head_dim <= FEW_CHUNKS * TILE_KEYS ? FEW_TILE_ROWS : 0;
}

static void few_scores_f32x3(const struct fa_product *p, size_t cols, size_t keys,
                             const struct fa_rows *from, float factor)
{
    const size_t rows = p->rows, columns = p->panels * PANEL, ld = p->c_row;
    const size_t depth = row_elements_f32x3(cols);
    const struct few_keys k = {.from = from, .keys = keys, .cols = cols};
    const float *q = p->a;
    float *s = p->c;
    FA_ASSERT(factor == 1); /* rows have it */
    (void)factor;
    if (rows <= CHAIN_ROWS) {
        few_scores_chains(rows, cols, keys, columns, q, from, s, ld);
    } else {
        few_scores_tiles(rows, columns, q, &k, s, ld);
    }
    for (size_t r = 0; r < rows; r++) {
        float *row = s + r * ld;
        if (v_any_nan_f32(probe_scores(row, columns))) {
            few_repair_scores(&k, q + r * depth, row);
        }
    }
}

/* Values to be split: parts[tile][part][pair of keys][16]. */
struct few_values {
    const struct fa_rows *from;
    size_t keys, cols;
    vec_u32 least; /* size so far */
};

/* Pairs [first, end) of the 32 keys from `key` on, of `tiles` times 16 columns from `col` on; `whole`: all are there,
 * side by side. */
FA_INLINE void split_values(const bool whole, const size_t tiles, struct few_values *v, size_t key,
                            size_t col, size_t first, size_t end, float *parts)
{
    const char *const *row = v->from->row + key, *const *later = few_later(v->from, key);
    vec_u32 least = v->least;
    for (size_t pair = first; pair < end; pair++) {
        const size_t other = pair + TILE_WORDS;
        FA_UNROLL
        for (size_t t = 0; t < tiles; t++) {
            const size_t c = col + t * VL_f32, cols = less_or_zero(v->cols, c);
            const int64_t at = (int64_t)c * v->from->col_stride;
            if (whole && t % 2 == 0) {
                fetch_later(later[pair], at);
                fetch_later(later[other], at);
            }
            const vec_f32 x = whole ? v_load_f32(row[pair] + at)
                                    : load_value(v->from, key + pair, v->keys, at, cols);
            const vec_f32 y = whole ? v_load_f32(row[other] + at)
                                    : load_value(v->from, key + other, v->keys, at, cols);
            least = least_size(least_size(least, x), y);
            store_cut(parts + t * PARTS * TILE_SIZE + pair * TILE_WORDS, TILE_SIZE, x, y);
        }
    }
    v->least = least;
}

static inline bool few_values_whole(const struct few_values *v, size_t key, size_t end_col)
{
    return key + TILE_KEYS <= v->keys && end_col <= v->cols &&
           v->from->col_stride == (int64_t)sizeof(float);
}

FA_INLINE void split_any_values(const size_t tiles, struct few_values *v, size_t key, size_t col,
                                float *parts)
{
    if (few_values_whole(v, key, col + tiles * VL_f32)) {
        split_values(true, tiles, v, key, col, 0, TILE_WORDS, parts);
    } else {
        split_values(false, tiles, v, key, col, 0, TILE_WORDS, parts);
    }
}

FA_NOINLINE void split_wide(struct few_values *v, size_t key, size_t col, float *parts)
{
    split_any_values(FEW_TILES, v, key, col, parts);
}

FA_NOINLINE void split_narrow(struct few_values *v, size_t key, size_t col, float *parts)
{
    split_any_values(1, v, key, col, parts);
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

/* sums += the product of a chunk of weights and of values.  `beside`: while the values of the 32 keys from `key` on,
 * from `col` on, are split. */
FA_INLINE void few_values_chunk(const bool beside, const size_t tiles, const float *weights,
                                size_t stride, const float *parts, struct few_values *v, size_t key,
                                size_t col, float *next)
{
    finish_stores();
    FA_UNROLL
    for (size_t i = 0; i < STEPS; i++) {
        few_values_step(tiles, i, weights, stride, parts);
        if (beside) {
            split_values(true, tiles, v, key, col, TILE_WORDS * i / STEPS,
                         TILE_WORDS * (i + 1) / STEPS, next);
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

/* sums = weights values over all keys, for columns [first, end), `tiles` times 16 of them at a time; `tiles` and `split`
 * are constants. */
FA_INLINE void few_values_tiles(const size_t tiles,
                                void (*split)(struct few_values *, size_t, size_t, float *),
                                struct few_values *v, const struct weights *w, size_t first,
                                size_t end, float *sums, size_t ld)
{
    _Alignas(64) float parts[2][FEW_TILES * PARTS * TILE_SIZE];
    const size_t chunks = (v->keys + TILE_KEYS - 1) / TILE_KEYS, cols = tiles * VL_f32;
    size_t at = 0;
    if (first < end) {
        split(v, 0, first, parts[0]);
    }
    for (size_t col = first; col < end; col += cols) {
        v_tile_zero(0);
        v_tile_zero(1);
        v_tile_zero(2);
        v_tile_zero(3);
        for (size_t chunk = 0; chunk < chunks; chunk++, at = 1 - at) {
            const float *weights = w->parts + chunk * PART_WORDS;
            const bool same = chunk + 1 < chunks;
            const size_t next_key = same ? (chunk + 1) * TILE_KEYS : 0;
            const size_t next_col = same ? col : col + cols;
            if (next_col < end && few_values_whole(v, next_key, next_col + cols)) {
                few_values_chunk(true, tiles, weights, w->stride, parts[at], v, next_key, next_col,
                                 parts[1 - at]);
                continue;
            }
            few_values_chunk(false, tiles, weights, w->stride, parts[at], v, 0, 0, NULL);
            if (next_col < end) {
                split(v, next_key, next_col, parts[1 - at]);
            }
        }
        store_few_sums(tiles, sums + col, ld);
    }
}

/* sums[rows][cols] = weights values, for more rows.  Returns the least size of values. */
static vec_u32 few_values_wide(size_t rows, size_t keys, size_t cols, const float *weights,
                               size_t ldw, const struct fa_rows *from, float *sums, size_t ld)
{
    _Alignas(64) float parts[FEW_TILE_ROWS * WEIGHT_KEYS / TILE_KEYS * PART_WORDS];
    const size_t chunks = (keys + TILE_KEYS - 1) / TILE_KEYS;
    const size_t wide = cols / (FEW_TILES * VL_f32) * (FEW_TILES * VL_f32);
    const struct weights w = {weights, rows, ldw, parts, chunks * PART_WORDS};
    struct few_values v = {.from = from, .keys = keys, .cols = cols, .least = no_size()};
    for (size_t chunk = 0; chunk < chunks; chunk++) {
        split_weights_of(&w, chunk, 0, rows);
    }
    few_values_tiles(FEW_TILES, split_wide, &v, &w, 0, wide, sums, ld);
    few_values_tiles(1, split_narrow, &v, &w, wide, cols, sums, ld);
    finish_stores();
    return v.least;
}

/* False where some value is special: values_careful_f32x3 does those. */
static bool few_values_f32x3(const struct fa_product *p, size_t cols, const struct fa_rows *from,
                             void *scratch)
{
    const size_t rows = p->rows, keys = p->depth, ldw = p->a_stride, ldacc = p->c_row;
    const float *weights = p->a;
    float *sums = scratch;
    const vec_u32 least = rows <= CHAIN_ROWS
                              ? few_values_chains(rows, keys, cols, weights, ldw, from, sums, ldacc)
                              : few_values_wide(rows, keys, cols, weights, ldw, from, sums, ldacc);
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
