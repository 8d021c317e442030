/* Both products of float32 in the tile unit: six products of bfloat16 parts for one of numbers
 * (f32x3_parts.h), in the tiles of bf16_matmul.h.
 *
 * The order of sums is that of bf16_matmul.h, with six products for each chunk of 32: a row's bits
 * depend on no neighbour.  Infinities and NaN of q and keys spoil only scores of their own rows and
 * columns, which are computed again; special values are cleared, and added one by one where they
 * weigh anything.
 *
 * Cost of 32 rows and a panel per chunk: 384 cycles of products, where the same core's
 * multiply-adds of float32 take 1024; 256 rows of a and b are loaded, two a cycle, in the shadow of
 * them.  Weights are split on the way: 18 operations for 32.
 */
#ifndef FA_F32X3_MATMUL_H
#define FA_F32X3_MATMUL_H

#define WEIGHT_KEYS                                                                                \
    FA_MAX_BLOCK_K_F32 /* weights of a block are split at a time: 24 KiB for 32 rows */
_Static_assert(WEIGHT_KEYS % TILE_KEYS == 0, "a block of keys is a whole number of tiles");

/* Chunks of head_dim that are summed in the tiles, 256 elements: 48 roundings of a sum, where a
 * chain of FA_CHAIN takes 64.  The sums of later ones are added to the scores by vectors.  A block
 * of keys has fewer. */
#define SUM_CHUNKS 8

/* The six products of parts of a chunk, by part of a and part of b.  The last is the large one, 2^7
 * times the others at least: the first chunk's sums of the small ones are rounded at their own
 * size.  From one to the next only one operand is loaded anew. */
#define STEPS 6
_Static_assert(SUM_CHUNKS *STEPS <= FA_CHAIN,
               "a sum in tiles is rounded as often as a chain at most");
_Static_assert(WEIGHT_KEYS <= SUM_CHUNKS * TILE_KEYS, "values of a block are summed in the tiles");
static const struct {
    uint8_t a, b;
    bool new_a, new_b;
} part_step[STEPS] = {
    {2, 0, true, true},  {1, 0, true, false}, {1, 1, false, true},
    {0, 1, true, false}, {0, 2, false, true}, {0, 0, false, true},
};

FA_INLINE void multiply_step(const size_t i, const bool lower, const float *a, size_t a_stride,
                             const float *b)
{
    if (part_step[i].new_b) {
        load_b(b + part_step[i].b * TILE_WORDS * PANEL);
    }
    if (part_step[i].new_a) {
        load_a(lower, a + part_step[i].a * TILE_WORDS, a_stride);
    }
    multiply(lower);
}

/* c += sums[rows][PANEL], in a panel of the product. */
static void add_sums(const struct fa_product *p, const float *sums, size_t panel)
{
    for (size_t r = 0; r < p->rows; r++) {
        float *to = (float *)p->c + r * p->c_row + panel * PANEL;
        FA_UNROLL
        for (size_t col = 0; col < PANEL; col += VL_f32) {
            v_store_f32(to + col,
                        v_add_f32(v_load_f32(to + col), v_load_f32(sums + r * PANEL + col)));
        }
    }
}

/* A product under way, step by step: the tile unit works through a step in 64 cycles, on the
 * side, if what comes between two steps fits the core's window of instructions. */
struct tile_work {
    const struct fa_product *product;
    size_t chunks, panel, chunk, step;
    /* [TILES_Q][PANEL] */
    float *sums;
};

static inline struct tile_work begin_work(const struct fa_product *p, size_t chunks, float *sums)
{
    return (struct tile_work){
        .product = p, .chunks = chunks, .panel = chunks > 0 ? 0 : p->panels, .sums = sums};
}

/* The next step.  Which parts it loads is a constant of each, hence the cases. */
FA_INLINE void advance_tiles(const bool lower, struct tile_work *work)
{
    const struct fa_product *p = work->product;
    if (work->panel >= p->panels) {
        return;
    }
    const float *a = (const float *)p->a + work->chunk * PART_WORDS;
    const float *b =
        (const float *)p->b + work->panel * p->b_panel + work->chunk * PART_WORDS * PANEL;
    switch (work->step) {
    case 0:
        if (work->chunk % SUM_CHUNKS == 0) {
            clear_sums(lower);
        }
        multiply_step(0, lower, a, p->a_stride, b);
        break;
    case 1:
        multiply_step(1, lower, a, p->a_stride, b);
        break;
    case 2:
        multiply_step(2, lower, a, p->a_stride, b);
        break;
    case 3:
        multiply_step(3, lower, a, p->a_stride, b);
        break;
    case 4:
        multiply_step(4, lower, a, p->a_stride, b);
        break;
    default:
        multiply_step(5, lower, a, p->a_stride, b);
        break;
    }
    if (++work->step < STEPS) {
        return;
    }
    work->step = 0;
    const bool last = ++work->chunk == work->chunks;
    if (!last && work->chunk % SUM_CHUNKS != 0) {
        return;
    }
    if (work->chunk <= SUM_CHUNKS) {
        store_sums(lower, (float *)p->c + work->panel * PANEL, p->c_row);
    } else {
        store_sums(lower, work->sums, PANEL);
        finish_stores();
        add_sums(p, work->sums, work->panel);
    }
    if (last) {
        work->chunk = 0;
        work->panel++;
    }
}

/* One panel, c[rows][PANEL] = a b, of a depth that is summed in the tiles; a and b are split. */
FA_INLINE void multiply_panel(const bool lower, const struct fa_product *p)
{
    const float *a = p->a, *b = p->b;
    clear_sums(lower);
    for (size_t k = 0; k < p->depth; k += PART_WORDS) {
        FA_UNROLL
        for (size_t i = 0; i < STEPS; i++) {
            multiply_step(i, lower, a + k, p->a_stride, b + k * PANEL);
        }
    }
    store_sums(lower, p->c, p->c_row);
}

static void multiply_rows(const struct fa_product *p)
{
    if (p->rows > UPPER_ROWS) {
        multiply_panel(true, p);
    } else {
        multiply_panel(false, p);
    }
}

/* Scores that infinities and NaN made NaN, or that overflowed on the way, by multiply-adds in
 * order: those of 16 columns of b for one row of a. */
static vec_f32 plain_scores(size_t chunks, const float *a, const float *b)
{
    vec_f32 sum = v_zero_f32();
    for (size_t chunk = 0; chunk < chunks; chunk++) {
        for (size_t half = 0; half < 2; half++) {
            float x[VL_f32];
            v_store_f32(x, join_parts(a, TILE_WORDS, half == 1));
            for (size_t u = 0; u < TILE_WORDS; u++) {
                const vec_f32 y = join_parts(b + u * PANEL, TILE_WORDS * PANEL, half == 1);
                sum = v_fma_f32(v_set_f32(x[u]), y, sum);
            }
        }
        a += PART_WORDS;
        b += PART_WORDS * PANEL;
    }
    return sum;
}

/* NaN where any of the scores of a row is not finite. */
static inline vec_f32 probe_scores(const float *c, size_t columns)
{
    vec_f32 probe = v_zero_f32();
    for (size_t j = 0; j < columns; j += VL_f32) {
        probe = v_fma_f32(v_load_f32(c + j), v_zero_f32(), probe);
    }
    return probe;
}

static void repair_scores(const struct fa_product *p, size_t chunks)
{
    for (size_t r = 0; r < p->rows; r++) {
        float *c = (float *)p->c + r * p->c_row;
        if (!v_any_nan_f32(probe_scores(c, p->panels * PANEL))) {
            continue;
        }
        for (size_t j = 0; j < p->panels * PANEL; j += VL_f32) {
            const vec_f32 found = v_load_f32(c + j);
            if (v_any_nan_f32(v_mul_f32(found, v_zero_f32()))) {
                const float *b = (const float *)p->b + j / PANEL * p->b_panel + j % PANEL;
                const vec_f32 plain =
                    plain_scores(chunks, (const float *)p->a + r * p->a_stride, b);
                v_store_f32(c + j,
                            v_select_lt_f32(v_abs_f32(found), v_set_f32(INFINITY), found, plain));
            }
        }
    }
}

static inline size_t fewer(size_t x, size_t y) { return x < y ? x : y; }

static void multiply_scores_f32x3(const struct fa_product *p, struct fa_wanted *wanted)
{
    _Alignas(64) float sums[TILES_Q * PANEL];
    const size_t most = SUM_CHUNKS * PART_WORDS;
    finish_stores();
    for (size_t panel = 0; panel < p->panels; panel++) {
        struct fa_product sum = *p;
        sum.b = (const float *)p->b + panel * p->b_panel;
        sum.c = (float *)p->c + panel * PANEL;
        fetch_some(wanted);
        for (size_t k = 0; k == 0 || k < p->depth; k += most) {
            sum.depth = fewer(p->depth - k, most);
            multiply_rows(&sum);
            if (k > 0) {
                finish_stores();
                add_sums(p, sums, panel);
            }
            sum.a = (const float *)sum.a + most;
            sum.b = (const float *)sum.b + most * PANEL;
            sum.c = sums;
            sum.c_row = PANEL;
        }
    }
    finish_stores();
    repair_scores(p, p->depth / PART_WORDS);
}

static void scores_f32x3(const struct fa_product *p, float factor, struct fa_wanted *wanted)
{
    FA_ASSERT(factor == 1); /* rows have it */
    (void)factor;
    multiply_scores_f32x3(p, wanted);
}

static void advance_both(void *work) { advance_tiles(true, work); }
static void advance_upper(void *work) { advance_tiles(false, work); }

/* softmax_update of one score tile, and multiply_scores_f32x3 of the next, in turns. */
FA_INLINE void softmax_rows_beside(const struct fa_softmax *x, void (*advance)(void *),
                                   struct tile_work *work)
{
    softmax_all_rows_f32(x, advance, work);
    while (work->panel < work->product->panels) {
        advance(work);
    }
}

static void softmax_f32x3(const struct fa_softmax *x)
{
    const struct fa_product *product = x->beside;
    FA_ASSERT(x->factor == 1); /* rows have it */
    if (product == NULL) {
        softmax_update_f32(x->scores, x->ld, x->rows, x->cols, x->state, x->ldacc);
        return;
    }
    _Alignas(64) float sums[TILES_Q * PANEL];
    const size_t chunks = product->depth / PART_WORDS;
    struct tile_work work = begin_work(product, chunks, sums);
    if (chunks == 0) {
        multiply_scores_f32x3(product, x->wanted);
    }
    for (size_t panel = 0; panel < product->panels; panel++) {
        fetch_some(x->wanted);
    }
    if (product->rows > UPPER_ROWS) {
        softmax_rows_beside(x, advance_both, &work);
    } else {
        softmax_rows_beside(x, advance_upper, &work);
    }
    finish_stores();
    repair_scores(product, chunks);
}

/* Weights to be split: parts[row][chunk][PARTS][16]. */
struct weights {
    const float *from;
    size_t rows, from_stride;
    float *parts;
    size_t stride;
};

FA_INLINE void split_weights_of(const struct weights *w, size_t chunk, size_t first, size_t rows)
{
    for (size_t r = first; r < first + rows && r < w->rows; r++) {
        const float *from = w->from + r * w->from_stride + chunk * TILE_KEYS;
        vec_f32 x[PARTS], y[PARTS];
        round_parts(v_load_f32(from), x);
        round_parts(v_load_f32(from + TILE_WORDS), y);
        store_parts(w->parts + r * w->stride + chunk * PART_WORDS, TILE_WORDS, x, y);
    }
}

/* The first panel: between the products of a chunk the weights of the next are split. */
FA_INLINE void multiply_first(const bool lower, size_t chunks, const struct weights *w,
                              const float *b, float *c)
{
    const size_t rows = (TILES_Q + STEPS - 1) / STEPS;
    clear_sums(lower);
    split_weights_of(w, 0, 0, w->rows);
    for (size_t chunk = 0; chunk < chunks; chunk++) {
        finish_stores();
        FA_UNROLL
        for (size_t i = 0; i < STEPS; i++) {
            multiply_step(i, lower, w->parts + chunk * PART_WORDS, w->stride,
                          b + chunk * PART_WORDS * PANEL);
            if (chunk + 1 < chunks) {
                split_weights_of(w, chunk + 1, i * rows, rows);
            }
        }
    }
    store_sums(lower, c, PANEL);
}

/* c += weights values.  The sums start from 0 and are added last, as in matmul_template.h: those of
 * a panel while the products of the next are under way. */
static void values_f32x3(const struct fa_product *p, struct fa_wanted *wanted)
{
    _Alignas(64) float parts[TILES_Q * WEIGHT_KEYS / TILE_KEYS * PART_WORDS];
    _Alignas(64) float sums[2][TILES_Q * PANEL];
    const size_t chunks = (p->depth + TILE_KEYS - 1) / TILE_KEYS;
    const struct weights w = {p->a, p->rows, p->a_stride, parts, chunks * PART_WORDS};
    if (chunks == 0) {
        return;
    }
    for (size_t panel = 0; panel < p->panels; panel++) {
        const float *b = (const float *)p->b + panel * p->b_panel;
        fetch_some(wanted);
        if (panel > 0) {
            multiply_rows(&(struct fa_product){
                .rows = p->rows,
                .depth = w.stride,
                .a = parts,
                .a_stride = w.stride,
                .b = b,
                .c = sums[panel % 2],
                .c_row = PANEL,
            });
        } else if (p->rows > UPPER_ROWS) {
            multiply_first(true, chunks, &w, b, sums[0]);
        } else {
            multiply_first(false, chunks, &w, b, sums[0]);
        }
        finish_stores();
        if (panel > 0) {
            add_sums(p, sums[(panel - 1) % 2], panel - 1);
        }
    }
    if (p->panels > 0) {
        add_sums(p, sums[(p->panels - 1) % 2], p->panels - 1);
    }
}

/* The values of a panel with 0 in place of the special ones. */
static void clear_special_parts(size_t chunks, const float *b, float *plain)
{
    for (size_t row = 0; row < chunks * TILE_WORDS; row++) {
        const size_t at = row / TILE_WORDS * PART_WORDS * PANEL + row % TILE_WORDS * PANEL;
        for (size_t col = at; col < at + PANEL; col += VL_f32) {
            const vec_f32 x = join_parts(b + col, TILE_WORDS * PANEL, false);
            const vec_f32 y = join_parts(b + col, TILE_WORDS * PANEL, true);
            const vec_f32 plain_x = v_only_lanes_f32(x, ~special_values(x));
            const vec_f32 plain_y = v_only_lanes_f32(y, ~special_values(y));
            store_cut(plain + col, TILE_WORDS * PANEL, plain_x, plain_y);
        }
    }
    finish_stores();
}

/* What special values of a panel add to c, in order of keys, where a weight is not 0. */
static void add_special_parts(const struct fa_product *p, const float *b, float *c)
{
    for (size_t key = 0; key < p->depth; key++) {
        const float *row = b + key / TILE_KEYS * PART_WORDS * PANEL + key % TILE_WORDS * PANEL;
        for (size_t col = 0; col < PANEL; col += VL_f32) {
            const vec_f32 value =
                join_parts(row + col, TILE_WORDS * PANEL, key % TILE_KEYS >= TILE_WORDS);
            const uint32_t special = special_values(value);
            for (size_t r = 0; special != 0 && r < p->rows; r++) {
                const float weight = ((const float *)p->a)[r * p->a_stride + key];
                float *to = c + r * p->c_row + col;
                if (weight != 0) {
                    const vec_f32 sum = v_load_f32(to);
                    const vec_f32 more = v_fma_f32(v_set_f32(weight), value, sum);
                    v_store_f32(to, v_blend_lanes_f32(sum, more, special));
                }
            }
        }
    }
}

/* The same products as values_f32x3, of all values but the special ones; these follow one by one.
 * So the bits of a row do not depend on special values that weigh 0 in it. */
static void values_careful_f32x3(const struct fa_product *p)
{
    _Alignas(64) float plain[WEIGHT_KEYS / TILE_KEYS * PART_WORDS * PANEL];
    const size_t chunks = (p->depth + TILE_KEYS - 1) / TILE_KEYS;
    struct fa_wanted nothing = {0};
    for (size_t panel = 0; panel < p->panels; panel++) {
        const float *b = (const float *)p->b + panel * p->b_panel;
        struct fa_product of_panel = *p;
        of_panel.b = plain;
        of_panel.c = (float *)p->c + panel * PANEL;
        of_panel.panels = 1;
        clear_special_parts(chunks, b, plain);
        values_f32x3(&of_panel, &nothing);
        add_special_parts(p, b, of_panel.c);
    }
}

#endif
