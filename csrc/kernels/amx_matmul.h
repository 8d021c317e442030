/* Both products by tiles.  c has FA_TILE_Q = 16 + 8 rows and a panel of 2 x 16 columns: four tiles of
 * accumulators, two of a and two of b are all eight.  Rows come as 8, 16 or 24; what is computed beyond those
 * asked for is never looked at.
 *
 * The order of sums is given by the chunks of 32 that meet in one product, which lie at absolute positions of
 * head_dim and of the keys: a row's bits depend on no neighbour.  A chunk without weights adds zeros, so it
 * may be left out.
 *
 * Cost of 24 rows and a panel per chunk: 48 cycles of products; 32 rows of b and 24 of a are loaded, two a
 * cycle, in the shadow of them.
 */
#ifndef FA_AMX_MATMUL_H
#define FA_AMX_MATMUL_H

/* Which tiles a number of rows takes.  `lower`: where the 8-row tiles begin. */
struct tile_rows {
    bool upper, lower;
    size_t lower_row;
};

static inline struct tile_rows tile_rows_of(size_t rows)
{
    return (struct tile_rows){
        .upper = rows > LOWER_ROWS,
        .lower = rows <= LOWER_ROWS || rows > UPPER_ROWS,
        .lower_row = rows > UPPER_ROWS ? UPPER_ROWS : 0,
    };
}

/* c += a b for all tiles.  A product takes a cycle per row of a, but 16 where its b is not that of the product
 * before: so those of 8 rows follow those of 16. */
FA_INLINE void multiply(const bool upper, const bool lower)
{
    if (upper) {
        _tile_dpbf16ps(UPPER_C0, UPPER_A, B0);
    }
    if (lower) {
        _tile_dpbf16ps(LOWER_C0, LOWER_A, B0);
    }
    if (upper) {
        _tile_dpbf16ps(UPPER_C1, UPPER_A, B1);
    }
    if (lower) {
        _tile_dpbf16ps(LOWER_C1, LOWER_A, B1);
    }
}

/* c[rows][PANEL] = a[rows][depth] b[depth][PANEL], a and b in pairs. */
FA_INLINE void score_panel(const bool upper, const bool lower, const struct fa_product *p,
                           const float *b, float *c, size_t lower_row)
{
    const float *a = p->a, *a_lower = a + lower_row * p->a_stride;
    const size_t a_bytes = p->a_stride * sizeof *a, c_bytes = p->c_row * sizeof *c;
    if (upper) {
        _tile_zero(UPPER_C0);
        _tile_zero(UPPER_C1);
    }
    if (lower) {
        _tile_zero(LOWER_C0);
        _tile_zero(LOWER_C1);
    }
    for (size_t k = 0; k < p->depth; k += TILE_WORDS) {
        _tile_loadd(B0, b + k * PANEL, PANEL * sizeof *b);
        _tile_loadd(B1, b + k * PANEL + TILE_WORDS, PANEL * sizeof *b);
        if (upper) {
            _tile_loadd(UPPER_A, a + k, a_bytes);
        }
        if (lower) {
            _tile_loadd(LOWER_A, a_lower + k, a_bytes);
        }
        multiply(upper, lower);
    }
    if (upper) {
        _tile_stored(UPPER_C0, c, c_bytes);
        _tile_stored(UPPER_C1, c + TILE_WORDS, c_bytes);
    }
    if (lower) {
        c += lower_row * p->c_row;
        _tile_stored(LOWER_C0, c, c_bytes);
        _tile_stored(LOWER_C1, c + TILE_WORDS, c_bytes);
    }
}

static void matmul_scores_bf16(const struct fa_product *p, struct fa_wanted *wanted)
{
    const struct tile_rows rows = tile_rows_of(p->rows);
    finish_stores();
    for (size_t panel = 0; panel < p->panels; panel++) {
        const float *b = (const float *)p->b + panel * p->b_panel;
        float *c = (float *)p->c + panel * PANEL;
        fetch_some(wanted);
        if (rows.upper && rows.lower) {
            score_panel(true, true, p, b, c, UPPER_ROWS);
        } else if (rows.upper) {
            score_panel(true, false, p, b, c, 0);
        } else {
            score_panel(false, true, p, b, c, 0);
        }
    }
    if (p->factor != 1) {
        multiply_scores(p->c, p->c_row, p->rows, p->panels * PANEL, v_set_f32(p->factor));
    }
}

/* c[rows][PANEL] += a[rows][chunks] b[chunks][PANEL]: a is weights, split in two, b values in pairs. */
FA_INLINE void value_panel(const bool upper, const bool lower, const struct fa_product *p,
                           const float *b, float *c, size_t lower_row)
{
    const float *a = p->a, *a_lower = a + lower_row * p->a_stride;
    const size_t a_bytes = p->a_stride * sizeof *a, c_bytes = p->c_row * sizeof *c;
    float *c_lower = c + lower_row * p->c_row;
    if (upper) {
        _tile_loadd(UPPER_C0, c, c_bytes);
        _tile_loadd(UPPER_C1, c + TILE_WORDS, c_bytes);
    }
    if (lower) {
        _tile_loadd(LOWER_C0, c_lower, c_bytes);
        _tile_loadd(LOWER_C1, c_lower + TILE_WORDS, c_bytes);
    }
    for (size_t key = 0; key < p->depth; key += TILE_KEYS) {
        _tile_loadd(B0, b, PANEL * sizeof *b);
        _tile_loadd(B1, b + TILE_WORDS, PANEL * sizeof *b);
        for (size_t part = 0; part < 2; part++) {
            if (upper) {
                _tile_loadd(UPPER_A, a + key + part * TILE_WORDS, a_bytes);
            }
            if (lower) {
                _tile_loadd(LOWER_A, a_lower + key + part * TILE_WORDS, a_bytes);
            }
            multiply(upper, lower);
        }
        b += TILE_WORDS * PANEL;
    }
    if (upper) {
        _tile_stored(UPPER_C0, c, c_bytes);
        _tile_stored(UPPER_C1, c + TILE_WORDS, c_bytes);
    }
    if (lower) {
        _tile_stored(LOWER_C0, c_lower, c_bytes);
        _tile_stored(LOWER_C1, c_lower + TILE_WORDS, c_bytes);
    }
}

static void add_panel(const struct fa_product *p, const float *b, float *c)
{
    const struct tile_rows rows = tile_rows_of(p->rows);
    finish_stores();
    if (rows.upper && rows.lower) {
        value_panel(true, true, p, b, c, UPPER_ROWS);
    } else if (rows.upper) {
        value_panel(true, false, p, b, c, 0);
    } else {
        value_panel(false, true, p, b, c, 0);
    }
}

static void matmul_values_bf16(const struct fa_product *p, struct fa_wanted *wanted)
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

/* The same products as matmul_values_bf16, of all values but the special ones; these follow one by one.  So the
 * bits of a row do not depend on special values that weigh 0 in it. */
static void matmul_skip_zeros_bf16(const struct fa_product *p, bool transposed)
{
    (void)transposed;
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
