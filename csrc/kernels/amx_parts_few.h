/* Both products of float32 for up to 16 rows, as in decoding: keys and values are split in passing, a chunk of 32
 * at a time, and never packed.  The sums are those of amx_parts_matmul.h, in the same order.
 *
 * Scores are computed with keys as the rows of a, in the order in which they lie, and the rows of q, turned, as
 * the columns of b: no key is transposed.  Values are columns of b as they lie.  What is split while the tiles
 * multiply the chunk before is what follows in memory.
 *
 * Cost of 16 elements, whatever the number of rows: 11 operations to split keys; 9 to split values and 1 to look for
 * small ones; and 3 to 5 cycles of the tiles' unit.
 */
#ifndef FA_AMX_PARTS_FEW_H
#define FA_AMX_PARTS_FEW_H

#define FEW_TILE_ROWS 16
#define FEW_KEYS 32 /* keys of a tile of scores: two tiles of 16, whose sums take turns */
#define FEW_TILES 4 /* tiles of 16 columns of values at a time */
#define FEW_CHUNKS 8 /* of head_dim: 256 */
#define TILE_SIZE (TILE_WORDS * TILE_WORDS)

/* The tile registers here: sums 0 to 3, two of a, two of b. */
#define FEW_A0 4
#define FEW_A1 5
#define FEW_B0 6
#define FEW_B1 7

/* Keys ahead of those at work that are asked for, into L1: at most fa_keys_ahead.  Asking for
 * later ones into L2 besides took a quarter longer. */
#define FEW_AHEAD FEW_KEYS

/* 128 bytes of a key that comes soon. */
FA_INLINE void fetch_later(const char *const *row, int64_t at)
{
    fetch_near(row[FEW_AHEAD] + at);
    fetch_near(row[FEW_AHEAD] + at + FA_LINE);
}

/* One chunk of the rows of q as columns: b[part][word][row], zero for rows that are not there. */
static void turn_chunk(size_t rows, const float *q, size_t depth, float *b)
{
    for (size_t part = 0; part < PARTS; part++) {
        vec_f32 square[VL_f32];
        FA_UNROLL
        for (size_t r = 0; r < VL_f32; r++) {
            square[r] = r < rows ? v_load_f32(q + r * depth + part * TILE_WORDS) : v_zero_f32();
        }
        v_transpose_f32(square);
        FA_UNROLL
        for (size_t u = 0; u < TILE_WORDS; u++) {
            v_store_f32(b + part * TILE_SIZE + u * TILE_WORDS, square[u]);
        }
    }
}

/* Where the parts of a chunk go: the first are kept for the large products of all chunks. */
struct few_parts {
    float *first, *others;
};

/* Keys to be split. */
struct few_keys {
    const struct fa_keys *from;
    size_t keys, cols; /* that are there */
};

/* Elements from byte `at` on of some keys that are there, side by side; `more`: so are those to be fetched. */
FA_INLINE void split_whole_keys(const bool more, const char *const *row, size_t count, int64_t at,
                                struct few_parts to)
{
    for (size_t i = 0; i < count; i++) {
        const char *from = row[i] + at;
        if (more) {
            fetch_later(row + i, at);
        }
        store_parts_apart(true, to.first + i * TILE_WORDS, to.others + i * TILE_WORDS,
                          FEW_KEYS * TILE_WORDS, v_load_f32(from),
                          v_load_f32(from + VL_f32 * sizeof(float)));
    }
}

/* The same of any keys, from element c on; zeros where there are none, and behind their last element. */
static void split_other_keys(const struct few_keys *k, size_t key, size_t count, size_t c,
                             struct few_parts to)
{
    const int64_t stride = k->from->col_stride;
    for (size_t i = 0; i < count; i++) {
        vec_f32 x = v_zero_f32(), y = v_zero_f32();
        if (key + i < k->keys) {
            const char *from = k->from->row[key + i] + (int64_t)c * stride;
            x = load_floats(from, stride, k->cols - c);
            if (k->cols - c > VL_f32) {
                y = load_floats(from + VL_f32 * stride, stride, k->cols - c - VL_f32);
            }
        }
        store_parts_apart(true, to.first + i * TILE_WORDS, to.others + i * TILE_WORDS,
                          FEW_KEYS * TILE_WORDS, x, y);
    }
}

/* Elements from c on of the keys that go with step i, of the FEW_KEYS from `key` on. */
FA_NOINLINE void split_keys_beside(const struct few_keys *k, size_t i, size_t key, size_t c,
                                   struct few_parts to)
{
    const size_t first = FEW_KEYS * i / SMALL_STEPS, end = FEW_KEYS * (i + 1) / SMALL_STEPS;
    const char *const *row = k->from->row + key + first;
    const int64_t at = (int64_t)(c * sizeof(float));
    to.first += first * TILE_WORDS;
    to.others += first * TILE_WORDS;
    if (key + end > k->keys || c + TILE_KEYS > k->cols ||
        k->from->col_stride != (int64_t)sizeof(float)) {
        split_other_keys(k, key + first, end - first, c, to);
    } else if (key + end + FEW_AHEAD <= k->from->located) {
        split_whole_keys(true, row, end - first, at, to);
    } else {
        split_whole_keys(false, row, end - first, at, to);
    }
}

/* c += the product of one part of FEW_KEYS keys and one of q, turned. */
FA_INLINE void multiply_few_keys(const bool new_keys, const float *keys, const bool new_q,
                                 const float *q)
{
    if (new_keys) {
        _tile_loadd(FEW_A0, keys, TILE_WORDS * sizeof *keys);
        _tile_loadd(FEW_A1, keys + FEW_TILE_ROWS * TILE_WORDS, TILE_WORDS * sizeof *keys);
    }
    if (new_q) {
        _tile_loadd(FEW_B0, q, TILE_WORDS * sizeof *q);
    }
    _tile_dpbf16ps(0, FEW_A0, FEW_B0);
    _tile_dpbf16ps(1, FEW_A1, FEW_B0);
}

FA_INLINE void few_scores_step(const size_t i, struct few_parts keys, const float *q)
{
    const float *others = keys.others + (small_step[i].b - 1) * FEW_KEYS * TILE_WORDS;
    multiply_few_keys(small_step[i].new_b, small_step[i].b == 0 ? keys.first : others,
                      small_step[i].new_a, q + small_step[i].a * TILE_SIZE);
}

/* One number of a row of q. */
static inline float join_one(const float *at, bool second)
{
    float lanes[PARTS];
    const char *from = (const char *)at + (second ? sizeof(uint16_t) : 0);
    for (size_t part = 0; part < PARTS; part++) {
        lanes[part] = read_bf16(from + part * TILE_WORDS * sizeof *at);
    }
    return lanes[0] + (fabsf(lanes[1]) < INFINITY ? lanes[1] + lanes[2] : lanes[1]);
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

/* s[row][key] of FEW_KEYS keys, from the sums in tiles. */
static void store_few_scores(size_t rows, float *s, size_t ld)
{
    _Alignas(64) float sums[FEW_KEYS * FEW_TILE_ROWS];
    _tile_stored(0, sums, FEW_TILE_ROWS * sizeof *sums);
    _tile_stored(1, sums + FEW_TILE_ROWS * FEW_TILE_ROWS, FEW_TILE_ROWS * sizeof *sums);
    finish_stores();
    for (size_t half = 0; half < FEW_KEYS; half += VL_f32) {
        vec_f32 square[VL_f32];
        FA_UNROLL
        for (size_t i = 0; i < VL_f32; i++) {
            square[i] = v_load_f32(sums + (half + i) * FEW_TILE_ROWS);
        }
        v_transpose_f32(square);
        for (size_t r = 0; r < rows; r++) {
            v_store_f32(s + r * ld + half, square[r]);
        }
    }
}

static void few_scores_parts(size_t rows, size_t cols, size_t keys, size_t columns, const void *q,
                             const struct fa_keys *from, void *s, size_t ld, float factor)
{
    _Alignas(64) float turned[FEW_CHUNKS][PARTS * TILE_SIZE];
    _Alignas(64) float first[2][FEW_CHUNKS][FEW_KEYS * TILE_WORDS];
    _Alignas(64) float others[2][(PARTS - 1) * FEW_KEYS * TILE_WORDS];
    const size_t chunks = (cols + TILE_KEYS - 1) / TILE_KEYS, depth = chunks * PART_WORDS;
    const struct few_keys k = {.from = from, .keys = keys, .cols = cols};
    (void)factor;

    for (size_t chunk = 0; chunk < chunks; chunk++) {
        turn_chunk(rows, (const float *)q + chunk * PART_WORDS, depth, turned[chunk]);
    }
    for (size_t i = 0; chunks > 0 && i < SMALL_STEPS; i++) {
        split_keys_beside(&k, i, 0, 0, (struct few_parts){first[0][0], others[0]});
    }
    size_t at = 0, tile = 0;
    for (size_t key = 0; key < columns; key += FEW_KEYS, tile = 1 - tile) {
        _tile_zero(0);
        _tile_zero(1);
        for (size_t chunk = 0; chunk < chunks; chunk++, at = 1 - at) {
            const bool same = chunk + 1 < chunks;
            const size_t next = same ? chunk + 1 : 0, next_key = same ? key : key + FEW_KEYS;
            const struct few_parts to = {first[same ? tile : 1 - tile][next], others[1 - at]};
            const struct few_parts parts = {first[tile][chunk], others[at]};
            finish_stores();
            FA_UNROLL
            for (size_t i = 0; i < SMALL_STEPS; i++) {
                few_scores_step(i, parts, turned[chunk]);
                if (next_key < columns) {
                    split_keys_beside(&k, i, next_key, next * TILE_KEYS, to);
                }
            }
        }
        for (size_t chunk = 0; chunk < chunks; chunk++) {
            multiply_few_keys(true, first[tile][chunk], true, turned[chunk]);
        }
        store_few_scores(rows, (float *)s + key, ld);
    }
    for (size_t r = 0; r < rows; r++) {
        float *row = (float *)s + r * ld;
        if (v_any_nan_f32(probe_scores(row, columns))) {
            few_repair_scores(&k, (const float *)q + r * depth, row);
        }
    }
}

/* Values of `tiles` times 16 columns to be split: parts[tile][part][pair of keys][16]. */
struct few_values {
    const struct fa_keys *from;
    size_t keys, cols; /* cols: that are there, from the first on */
    int64_t at; /* the first of them, in bytes */
    vec_f32 nearest; /* of each lane so far, to 0 */
};

/* The pairs of keys that go with step i, of the 16 from `key` on; `whole`: all are there, side by side; `more`: so
 * are those to be fetched. */
FA_INLINE void split_values_of(const bool whole, const bool more, const size_t tiles,
                               struct few_values *v, size_t i, size_t key, struct few_parts to)
{
    vec_f32 nearest = v->nearest;
    for (size_t pair = TILE_WORDS * i / SMALL_STEPS; pair < TILE_WORDS * (i + 1) / SMALL_STEPS;
         pair++) {
        const size_t one = key + pair, other = one + TILE_WORDS;
        FA_UNROLL
        for (size_t t = 0; t < tiles; t++) {
            const int64_t at = v->at + (int64_t)(t * VL_f32) * v->from->col_stride;
            const size_t cols = v->cols - t * VL_f32;
            if (more && t % 2 == 0) {
                fetch_later(v->from->row + one, at);
                fetch_later(v->from->row + other, at);
            }
            const vec_f32 x = whole ? v_load_f32(v->from->row[one] + at)
                                    : load_value(v->from, one, v->keys, at, cols);
            const vec_f32 y = whole ? v_load_f32(v->from->row[other] + at)
                                    : load_value(v->from, other, v->keys, at, cols);
            nearest = v_nearer_f32(v_nearer_f32(nearest, x), y);
            store_parts_apart(false, to.first + t * TILE_SIZE + pair * TILE_WORDS,
                              to.others + t * (PARTS - 1) * TILE_SIZE + pair * TILE_WORDS,
                              TILE_SIZE, x, y);
        }
    }
    v->nearest = nearest;
}

FA_INLINE void split_values_beside(const size_t tiles, struct few_values *v, size_t i, size_t key,
                                   struct few_parts to)
{
    const bool whole = key + TILE_KEYS <= v->keys && v->cols >= tiles * VL_f32 &&
                       v->from->col_stride == (int64_t)sizeof(float);
    if (!whole) {
        split_values_of(false, false, tiles, v, i, key, to);
    } else if (key + TILE_KEYS + FEW_AHEAD <= v->from->located) {
        split_values_of(true, true, tiles, v, i, key, to);
    } else {
        split_values_of(true, false, tiles, v, i, key, to);
    }
}

FA_NOINLINE void split_wide(struct few_values *v, size_t i, size_t key, struct few_parts to)
{
    split_values_beside(FEW_TILES, v, i, key, to);
}

FA_NOINLINE void split_narrow(struct few_values *v, size_t i, size_t key, struct few_parts to)
{
    split_values_beside(1, v, i, key, to);
}

/* Whether a value is so small, and yet not 0. */
static bool any_tiny(const struct few_values *v, size_t cols)
{
    uint32_t special = 0;
    for (size_t key = 0; key < v->keys; key++) {
        for (size_t c = 0; c < cols; c += VL_f32) {
            const int64_t at = (int64_t)c * v->from->col_stride;
            special |= special_values(load_value(v->from, key, v->keys, at, cols - c));
        }
    }
    return special != 0;
}

/* c += the product of one part of the weights and one of the values, whose tiles are `apart` words apart. */
FA_INLINE void multiply_few_values(const size_t tiles, const bool new_weights, const float *weights,
                                   size_t stride, const float *b, size_t apart)
{
    const size_t bytes = TILE_WORDS * sizeof *b;
    if (new_weights) {
        _tile_loadd(FEW_A0, weights, stride * sizeof *weights);
    }
    _tile_loadd(FEW_B0, b, bytes);
    _tile_dpbf16ps(0, FEW_A0, FEW_B0);
    if (tiles > 1) {
        _tile_loadd(FEW_B1, b + apart, bytes);
        _tile_dpbf16ps(1, FEW_A0, FEW_B1);
    }
    if (tiles > 2) {
        _tile_loadd(FEW_B0, b + 2 * apart, bytes);
        _tile_dpbf16ps(2, FEW_A0, FEW_B0);
    }
    if (tiles > 3) {
        _tile_loadd(FEW_B1, b + 3 * apart, bytes);
        _tile_dpbf16ps(3, FEW_A0, FEW_B1);
    }
}

FA_INLINE void few_values_step(const size_t tiles, const size_t i, const float *weights,
                               size_t stride, struct few_parts values)
{
    const bool of_first = small_step[i].b == 0;
    const float *others = values.others + (small_step[i].b - 1) * TILE_SIZE;
    multiply_few_values(tiles, small_step[i].new_a, weights + small_step[i].a * TILE_WORDS, stride,
                        of_first ? values.first : others,
                        of_first ? TILE_SIZE : (PARTS - 1) * TILE_SIZE);
}

/* sums[rows][tiles * 16] = weights values over all keys; `tiles` and `split` are constants. */
FA_INLINE void
few_values_tiles(const size_t tiles,
                 void (*split)(struct few_values *, size_t, size_t, struct few_parts),
                 struct few_values *v, const struct weights *w, float *sums, size_t ld)
{
    _Alignas(64) float first[WEIGHT_KEYS / TILE_KEYS][FEW_TILES * TILE_SIZE];
    _Alignas(64) float others[2][FEW_TILES * (PARTS - 1) * TILE_SIZE];
    const size_t chunks = (v->keys + TILE_KEYS - 1) / TILE_KEYS;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t i = 0; i < SMALL_STEPS; i++) {
        split(v, i, 0, (struct few_parts){first[0], others[0]});
    }
    for (size_t chunk = 0; chunk < chunks; chunk++) {
        const struct few_parts parts = {first[chunk], others[chunk % 2]};
        finish_stores();
        FA_UNROLL
        for (size_t i = 0; i < SMALL_STEPS; i++) {
            few_values_step(tiles, i, w->parts + chunk * PART_WORDS, w->stride, parts);
            if (chunk + 1 < chunks) {
                split(v, i, (chunk + 1) * TILE_KEYS,
                      (struct few_parts){first[chunk + 1], others[1 - chunk % 2]});
            }
        }
    }
    for (size_t chunk = 0; chunk < chunks; chunk++) {
        multiply_few_values(tiles, true, w->parts + chunk * PART_WORDS, w->stride, first[chunk],
                            TILE_SIZE);
    }
    _tile_stored(0, sums, ld * sizeof *sums);
    if (tiles > 1) {
        _tile_stored(1, sums + VL_f32, ld * sizeof *sums);
    }
    if (tiles > 2) {
        _tile_stored(2, sums + 2 * VL_f32, ld * sizeof *sums);
    }
    if (tiles > 3) {
        _tile_stored(3, sums + 3 * VL_f32, ld * sizeof *sums);
    }
}

/* False where some value is special: matmul_skip_zeros does those. */
static bool few_values_parts(size_t rows, size_t keys, size_t cols, const void *weights, size_t ldw,
                             const struct fa_keys *from, void *scratch, void *acc, size_t ldacc)
{
    _Alignas(64) float parts[FEW_TILE_ROWS * WEIGHT_KEYS / TILE_KEYS * PART_WORDS];
    const size_t chunks = (keys + TILE_KEYS - 1) / TILE_KEYS, wide = FEW_TILES * VL_f32;
    const struct weights w = {weights, rows, ldw, parts, chunks * PART_WORDS};
    struct few_values v = {.from = from, .keys = keys, .nearest = v_set_f32(1)};
    float *sums = scratch;
    for (size_t chunk = 0; chunk < chunks; chunk++) {
        split_weights_of(&w, chunk, 0, rows);
    }
    for (size_t col = 0; col < cols;) {
        v.at = (int64_t)col * from->col_stride;
        v.cols = cols - col;
        if (v.cols >= wide) {
            few_values_tiles(FEW_TILES, split_wide, &v, &w, sums + col, ldacc);
            col += wide;
        } else {
            few_values_tiles(1, split_narrow, &v, &w, sums + col, ldacc);
            col += VL_f32;
        }
    }
    finish_stores();
    vec_f32 probe = v_zero_f32();
    for (size_t r = 0; r < rows; r++) {
        probe = v_add_f32(probe, probe_scores(sums + r * ldacc, cols));
    }
    if (v_any_nan_f32(probe) ||
        (v_any_gt_f32(v_set_f32(VALUE_LEAST), v.nearest) && any_tiny(&v, cols))) {
        return false;
    }
    for (size_t r = 0; r < rows; r++) {
        for (size_t col = 0; col < cols; col += VL_f32) {
            float *to = (float *)acc + r * ldacc + col;
            v_store_f32(to, v_add_f32(v_load_f32(to), v_load_f32(sums + r * ldacc + col)));
        }
    }
    return true;
}

#endif
