/* Both products in the tile unit.  c has TILES_Q = 16 + 16 rows and a panel of 2 x 16 columns: four
 * tiles of accumulators, two of a and two of b are all eight.  Up to 16 rows take the upper two;
 * what is computed beyond the rows asked for is never looked at.
 *
 * The order of sums is given by the chunks of 32 that meet in one product, which lie at absolute
 * positions of head_dim and of the keys: a row's bits depend on no neighbour.  A chunk without
 * weights adds zeros, so it may be left out.
 *
 * Cost of 32 rows and a panel per chunk: 64 cycles of products; 32 rows of b and 32 of a are
 * loaded, two a cycle, in the shadow of them.
 */
#ifndef FA_BF16_MATMUL_H
#define FA_BF16_MATMUL_H

/* c += a b for the tiles of c: the upper two, or all. */
FA_INLINE void multiply(const bool lower)
{
    v_tile_multiply(UPPER_C0, UPPER_A, B0);
    if (lower) {
        v_tile_multiply(LOWER_C0, LOWER_A, B0);
    }
    v_tile_multiply(UPPER_C1, UPPER_A, B1);
    if (lower) {
        v_tile_multiply(LOWER_C1, LOWER_A, B1);
    }
}

FA_INLINE void load_b(const float *b)
{
    v_tile_load(B0, b, PANEL * sizeof *b);
    v_tile_load(B1, b + TILE_WORDS, PANEL * sizeof *b);
}

FA_INLINE void load_a(const bool lower, const float *a, size_t a_stride)
{
    v_tile_load(UPPER_A, a, a_stride * sizeof *a);
    if (lower) {
        v_tile_load(LOWER_A, a + UPPER_ROWS * a_stride, a_stride * sizeof *a);
    }
}

FA_INLINE void clear_sums(const bool lower)
{
    v_tile_zero(UPPER_C0);
    v_tile_zero(UPPER_C1);
    if (lower) {
        v_tile_zero(LOWER_C0);
        v_tile_zero(LOWER_C1);
    }
}

FA_INLINE void load_sums(const bool lower, const float *c, size_t c_row)
{
    v_tile_load(UPPER_C0, c, c_row * sizeof *c);
    v_tile_load(UPPER_C1, c + TILE_WORDS, c_row * sizeof *c);
    if (lower) {
        v_tile_load(LOWER_C0, c + UPPER_ROWS * c_row, c_row * sizeof *c);
        v_tile_load(LOWER_C1, c + UPPER_ROWS * c_row + TILE_WORDS, c_row * sizeof *c);
    }
}

FA_INLINE void store_sums(const bool lower, float *c, size_t c_row)
{
    v_tile_store(UPPER_C0, c, c_row * sizeof *c);
    v_tile_store(UPPER_C1, c + TILE_WORDS, c_row * sizeof *c);
    if (lower) {
        v_tile_store(LOWER_C0, c + UPPER_ROWS * c_row, c_row * sizeof *c);
        v_tile_store(LOWER_C1, c + UPPER_ROWS * c_row + TILE_WORDS, c_row * sizeof *c);
    }
}

/* c[rows][PANEL] = a[rows][depth] b[depth][PANEL], a and b in pairs. */
FA_INLINE void score_panel(const bool lower, const struct fa_product *p, const float *b, float *c)
{
    const float *a = p->a;
    clear_sums(lower);
    for (size_t k = 0; k < p->depth; k += TILE_WORDS) {
        load_b(b + k * PANEL);
        load_a(lower, a + k, p->a_stride);
        multiply(lower);
    }
    store_sums(lower, c, p->c_row);
}

static void scores_bf16(const struct fa_product *p, float factor, struct fa_wanted *wanted)
{
    finish_stores();
    for (size_t panel = 0; panel < p->panels; panel++) {
        const float *b = (const float *)p->b + panel * p->b_panel;
        float *c = (float *)p->c + panel * PANEL;
        fetch_some(wanted);
        if (p->rows > UPPER_ROWS) {
            score_panel(true, p, b, c);
        } else {
            score_panel(false, p, b, c);
        }
    }
    if (factor != 1) {
        multiply_scores(p->c, p->c_row, p->rows, p->panels * PANEL, v_set_f32(factor));
    }
}

/* c[rows][PANEL] += a[rows][chunks] b[chunks][PANEL]: a is weights, split in two, b values in
 * pairs. */
FA_INLINE void value_panel(const bool lower, const struct fa_product *p, const float *b, float *c)
{
    const float *a = p->a;
    load_sums(lower, c, p->c_row);
    for (size_t key = 0; key < p->depth; key += TILE_KEYS) {
        load_b(b);
        for (size_t part = 0; part < 2; part++) {
            load_a(lower, a + key + part * TILE_WORDS, p->a_stride);
            multiply(lower);
        }
        b += TILE_WORDS * PANEL;
    }
    store_sums(lower, c, p->c_row);
}

static void add_panel(const struct fa_product *p, const float *b, float *c)
{
    finish_stores();
    if (p->rows > UPPER_ROWS) {
        value_panel(true, p, b, c);
    } else {
        value_panel(false, p, b, c);
    }
}

static void values_bf16(const struct fa_product *p, struct fa_wanted *wanted)
{
    for (size_t panel = 0; panel < p->panels; panel++) {
        fetch_some(wanted);
        add_panel(p, (const float *)p->b + panel * p->b_panel, (float *)p->c + panel * PANEL);
    }
}

/* Weight of a key of a row of split weights. */
static inline float split_weight(const float *row, size_t key)
{
    const char *pair = (const char *)(row + key / TILE_KEYS * TILE_KEYS + key % TILE_WORDS);
    const char *high = pair + (key % TILE_KEYS >= TILE_WORDS ? sizeof(uint16_t) : 0);
    return read_bf16(high) + read_bf16(high + TILE_WORDS * sizeof *row);
}

/* The values of a chunk with 0 in place of the special ones. */
static void clear_special(const float *b, float *plain)
{
    for (size_t at = 0; at < TILE_WORDS * PANEL; at += TILE_WORDS) {
        const vec_u16 x = v_load_u16(b + at);
        v_store_u16(plain + at, v_clear_u16(x, v_special_u16(x)));
    }
}

/* What special values of a chunk add to c, in order, where a weight is not 0. */
static void add_special(const struct fa_product *p, size_t key, const float *b, float *c)
{
    for (size_t at = 0; at < TILE_WORDS * PANEL; at += TILE_WORDS) {
        const uint32_t special = v_special_u16(v_load_u16(b + at));
        for (size_t lane = 0; special != 0 && lane < TILE_KEYS; lane++) {
            if ((special >> lane & 1) == 0) {
                continue;
            }
            const float value = read_bf16((const char *)(b + at) + lane * sizeof(uint16_t));
            const size_t col = at % PANEL + lane / 2;
            const size_t of = key + at / PANEL + lane % 2 * TILE_WORDS;
            for (size_t r = 0; r < p->rows; r++) {
                const float weight = split_weight((const float *)p->a + r * p->a_stride, of);
                if (weight != 0) {
                    c[r * p->c_row + col] += weight * value;
                }
            }
        }
    }
}

/* The same products as values_bf16, of all values but the special ones; these follow one by one.
 * So the bits of a row do not depend on special values that weigh 0 in it. */
static void values_careful_bf16(const struct fa_product *p)
{
    for (size_t panel = 0; panel < p->panels; panel++) {
        const float *b = (const float *)p->b + panel * p->b_panel;
        float *c = (float *)p->c + panel * PANEL;
        for (size_t key = 0; key < p->depth; key += TILE_KEYS) {
            float plain[TILE_WORDS * PANEL];
            struct fa_product chunk = *p;
            chunk.depth = TILE_KEYS;
            chunk.a = (const float *)p->a + key;
            clear_special(b + key / 2 * PANEL, plain);
            add_panel(&chunk, plain, c);
        }
        for (size_t key = 0; key < p->depth; key += TILE_KEYS) {
            add_special(p, key, b + key / 2 * PANEL, c);
        }
    }
}

#endif
