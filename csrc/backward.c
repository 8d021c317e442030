/* Gradients of attention, recomputed block by block (FlashAttention-2, arXiv:2307.08691, section
 * 3.1).
 *
 *   for each row: delta, and its weighing              backward_rows.c, backward_statistics.c
 *   for each task (batch, head, group of key blocks)   threads, one atomic counter
 *     for each key block of the group
 *       pack keys (twice) and values
 *       for each FA_BACKWARD_ROWS rows that may see one of them
 *         weights and gradients of scores              backward_tile.c: 2 products
 *         grad_v += weights^T grad_out
 *         grad_k += gradients^T q
 *         the group's grad_q += gradients k
 *       store grad_k and grad_v
 *     after the head's last group, for each row:
 *       grad_q = sum of the groups' sums               backward_rows.c, backward_sums.c
 *
 * With softmax over the queries a key has v * grad_v as its delta.  So its rows are visited
 * twice, for grad_v and then for all other gradients: 6 products instead of 5.
 *
 * A key block has one writer, and the sums of a row are added in order of key blocks within a
 * group, and of groups: no atomics, and no bit depends on threads.  Beyond the gradients, memory
 * is the sums of grad_q of all groups, for num_threads + 1 heads at most. */
#include <math.h>

#include "backward_bias.h"
#include "backward_rows.h"
#include "backward_statistics.h"
#include "backward_sums.h"
#include "backward_tile.h"
#include "float_mode.h"
#include "mask_ranges.h"

/* The purpose of a visit of rows to a key block. */
enum purpose { EVERYTHING, GRAD_V, THE_REST };

/* A key block of a unit (backward_sums.h), and the head that meets it. */
struct key_block {
    /* The first head of the unit. */
    int64_t unit_head;
    int64_t group;
    /* Keys [key, key + keys) of the arrays. */
    int64_t key, keys;
    const struct fa_head *head;
    /* How many of the keys are valid for the head. */
    int64_t live;
    enum purpose purpose;
    /* Where gradients of its values are added up. */
    char *grad_v;
    /* Sums of grad_q of this head and group; NULL: they are not wanted. */
    char *sums;
    /* A thread's workspace holds its keys and values. */
    bool packed;
};

/* x *= factor, of rows whose elements lie side by side. */
static void multiply_rows(double *x, int64_t stride, int64_t rows, int64_t cols, double factor)
{
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < cols; c++) {
            x[r * stride + c] *= factor;
        }
    }
}

/* Scale grad_out in panels, as fa_backward_load_grad scales its rows. */
static void scale_panels(const struct fa_geometry *g, char *panels, int64_t padded, int64_t rows)
{
    const int64_t nr = (int64_t)g->engine->nr;
    for (int64_t c = 0; c < padded; c += nr) {
        multiply_rows((double *)(void *)panels + c * FA_BACKWARD_ROWS, nr, rows, nr,
                      ldexp(1, -g->value_exponent));
    }
}

/* Rows of q and grad_out, in the forms that the products take. */
static void load_rows(const struct fa_backward *b, struct fa_backward_workspace *ws,
                      const struct fa_head_rows *rows)
{
    const struct fa_geometry *g = &b->geometry;
    const struct fa_attention_params *p = &b->params->attention;
    const size_t count = (size_t)rows->count;
    struct fa_rows from = {
        .row = ws->row, .col_stride = b->params->grad_out.col, .dtype = p->dtype};
    const size_t panel_stride = FA_BACKWARD_ROWS * g->engine->nr;

    fa_load_rows(&ws->forward, rows);
    fa_backward_load_grad(b, ws, rows);
    ws->grad_finite =
        b->engine->pack(ws->grad_out_panels, panel_stride, count, (size_t)p->head_dim_v, &from);
    for (int64_t r = 0; r < rows->count; r++) {
        ws->row[r] = rows->head->q + fa_row_offset(g, &p->q, rows->first + r);
    }
    if (g->value_exponent != 0) {
        scale_panels(g, ws->grad_out_panels, b->padded_v, rows->count);
    }
    from.col_stride = p->q.col;
    ws->q_finite = b->engine->pack(ws->q_panels, panel_stride, count, (size_t)p->head_dim, &from);
}

static void multiply(const struct fa_backward *b, const struct fa_product *product, bool transposed,
                     bool finite)
{
    if (!finite) {
        b->engine->multiply_careful(product, transposed);
    } else if (transposed) {
        b->engine->multiply_transposed(product);
    } else {
        b->engine->multiply(product);
    }
}

/* The products of the rows' weights and gradients of scores, in columns `keys`. */
static void add_products(const struct fa_backward *b, const struct key_block *block,
                         struct fa_backward_workspace *ws, const struct fa_head_rows *rows,
                         struct fa_key_range keys)
{
    const struct fa_geometry *g = &b->geometry;
    const int64_t size = (int64_t)g->ops->size, nr = (int64_t)g->engine->nr;
    const size_t row_panel = FA_BACKWARD_ROWS * (size_t)nr;
    struct fa_product product = {
        .rows = (size_t)(keys.hi - keys.lo),
        .depth = (size_t)rows->count,
        .panels = (size_t)(b->padded_v / nr),
        .a = ws->weights + keys.lo * size,
        .a_stride = (size_t)g->score_stride,
        .b = ws->grad_out_panels,
        .b_panel = row_panel,
        .c = block->grad_v + keys.lo * b->padded_v * size,
        .c_row = (size_t)b->padded_v,
        .accumulate = true,
    };
    const bool needs_v = b->params->grad_v.data != NULL || block->purpose == GRAD_V;
    if (needs_v && block->purpose != THE_REST) {
        multiply(b, &product, true, ws->grad_finite);
    }
    if (block->purpose == GRAD_V) {
        return;
    }
    if (b->params->grad_k.data != NULL) {
        product.panels = (size_t)(b->padded_k / nr);
        product.a = ws->gradients + keys.lo * size;
        product.b = ws->q_panels;
        product.c = ws->grad_k + keys.lo * b->padded_k * size;
        product.c_row = (size_t)b->padded_k;
        multiply(b, &product, true, ws->q_finite);
    }
    if (block->sums != NULL) {
        const int64_t live = fa_min(keys.hi, block->live) - keys.lo;
        product = (struct fa_product){
            .rows = (size_t)rows->count,
            .depth = (size_t)live,
            .panels = (size_t)(b->padded_k / nr),
            .a = ws->gradients + keys.lo * size,
            .a_stride = (size_t)g->score_stride,
            .b = ws->k_values + keys.lo * nr * size,
            .b_panel = (size_t)(g->block_k * nr),
            .c = block->sums + rows->first * b->padded_k * size,
            .c_row = (size_t)b->padded_k,
            .accumulate = true,
            .into_chain = (size_t)keys.lo % FA_CHAIN,
        };
        multiply(b, &product, false, ws->keys_finite);
    }
}

/* Rows of accumulated gradients of keys or values to caller memory. */
static void store_keys(struct fa_backward *b, const struct key_block *block,
                       const struct fa_array *to, const char *acc, int64_t cols, double factor)
{
    const struct fa_geometry *g = &b->geometry;
    const int64_t padded = fa_round_up(cols, (int64_t)g->engine->nr);
    if (to->data == NULL || fa_backward_is_stored(b, block->unit_head)) {
        return;
    }
    char *out = fa_array_of(g, to, block->unit_head, true) + block->key * to->row;
    for (int64_t j = 0; j < block->keys; j++) {
        const struct fa_row_result result = {
            .cols = (size_t)cols,
            .dtype = b->params->grad_dtype,
            .out = out + j * to->row,
            .out_stride = to->col,
            .exponent = g->value_exponent,
            .mends = g->value_exponent != 0,
        };
        if (!g->ops->store_scaled(acc + j * padded * (int64_t)g->ops->size, factor, &result)) {
            fa_backward_leave(b, block->unit_head);
        }
    }
}

static void pack_block(const struct fa_backward *b, struct key_block *block,
                       struct fa_backward_workspace *ws)
{
    const struct fa_geometry *g = &b->geometry;
    if (block->packed) {
        return;
    }
    fa_backward_pack(b, block->head, ws, block->key, block->live);
    ws->keys_finite =
        b->engine->pack(ws->k_values, (size_t)g->block_k * g->engine->nr, (size_t)block->live,
                        (size_t)g->params->head_dim, &ws->forward.keys);
    block->packed = true;
}

/* One key block against all rows of a head.  False: stopped. */
static bool visit_rows(struct fa_job *job, int thread, struct key_block *block,
                       struct fa_backward_workspace *ws)
{
    const struct fa_backward *b = job->context;
    const struct fa_geometry *g = &b->geometry;
    const bool weights_only = block->purpose == GRAD_V;
    for (int64_t first = 0; block->live > 0 && first < block->head->rows;
         first += FA_BACKWARD_ROWS) {
        const int64_t count = fa_min(FA_BACKWARD_ROWS, block->head->rows - first);
        const struct fa_head_rows rows = {block->head, first, count};
        const struct fa_key_range seen = fa_rows_keys(&rows);
        if (seen.lo >= block->key + block->live || seen.hi <= block->key) {
            continue;
        }
        if (fa_job_checkpoint(job, thread)) {
            return false;
        }
        pack_block(b, block, ws);
        load_rows(b, ws, &rows);
        const struct fa_key_range keys = fa_backward_tile(b, ws, &rows, weights_only);
        if (keys.hi <= keys.lo) {
            continue;
        }
        if (g->params->softcap > 0 && !weights_only) {
            const int64_t at = keys.lo * (int64_t)g->ops->size;
            g->ops->scale_gradients(ws->gradients + at, ws->slope + at, (size_t)g->score_stride,
                                    (size_t)count, (size_t)(keys.hi - keys.lo));
        }
        if (g->scales_scores && !weights_only) {
            multiply_rows((double *)(void *)ws->gradients + keys.lo, g->score_stride, count,
                          keys.hi - keys.lo, g->params->scale);
        }
        add_products(b, block, ws, &rows, keys);
    }
    return true;
}

/* The queries that see a key, softmax being over the queries, whatever masks leave of them. */
static int64_t count_queries(const struct fa_head *head, int64_t key)
{
    const struct fa_attention_params *p = head->geometry->params;
    int64_t lo = 0, hi = head->rows;
    if (p->causal) {
        lo = fa_max(lo, key - head->q_offset);
    }
    if (p->window_right >= 0) {
        lo = fa_max(lo, key - p->window_right - head->q_offset);
    }
    if (p->window_left >= 0) {
        hi = fa_min(hi, key + p->window_left - head->q_offset + 1);
    }
    return fa_max(0, hi - lo);
}

/* A key's softmax, as its lse and the forward pass have it. */
struct column {
    double lse;
    /* The forward pass has kept it, so that it needs no statistics. */
    bool is_kept;
    struct fa_weighing kept;
    bool wants_statistics;
};

static struct column column_at(const struct fa_backward *b, const struct key_block *block,
                               int64_t key)
{
    const struct fa_geometry *g = &b->geometry;
    const struct fa_array *lse = &b->params->lse, *kept = &b->params->weighing;
    const char *from = fa_array_of(g, kept, block->head->index, false);
    struct column column = {
        .lse = fa_read_lse(g, fa_array_of(g, lse, block->head->index, false) + key * lse->row),
    };
    column.is_kept = from != NULL && fa_weighing_kept(b, from + key * kept->row, &column.kept);
    column.wants_statistics =
        !column.is_kept && fa_statistics_wanted(b, column.lse, count_queries(block->head, key),
                                                fa_backward_seqlen_k(g, block->head->index));
    return column;
}

/* Find shift and factor of every key of the block; both are 0 behind its last key.  False:
 * stopped. */
static bool weigh_columns(struct fa_job *job, int thread, struct key_block *block,
                          struct fa_backward_workspace *ws)
{
    struct fa_backward *b = job->context;
    const struct fa_geometry *g = &b->geometry, *before = &fa_first_run(b)->geometry;
    const struct fa_doubt doubt = fa_head_doubt(block->head, 0);
    const int64_t size = (int64_t)g->ops->size, size_before = (int64_t)before->ops->size;
    char *excess = fa_first_run(b)->excess + fa_column_at(before, block->head->index, block->key);
    const int64_t at = fa_column_at(g, block->head->index, block->key);
    bool wanted = false;

    for (int64_t j = 0; j < block->live; j++) {
        wanted = wanted || column_at(b, block, block->key + j).wants_statistics;
    }
    if (wanted) {
        pack_block(b, block, ws);
        if (!fa_backward_column_statistics(job, thread, block->head, ws)) {
            return false;
        }
    }
    for (int64_t j = 0; j < g->block_k; j++) {
        struct fa_weighing weighing = {0};
        if (j < block->live) {
            const struct column column = column_at(b, block, block->key + j);
            struct fa_statistics sums = {
                .top = fa_read_real(g, ws->col_max + j * size),
                .total = fa_read_real(g, ws->col_sum + j * size),
            };
            const bool by_sums = column.wants_statistics;
            const bool left = by_sums && (!isfinite(sums.total) ||
                                          fa_is_doubtful(doubt, sums.top, sums.total == 0));
            if (left) {
                fa_backward_leave(b, block->head->index);
            }
            weighing = fa_weigh(b, excess + j * size_before, column.is_kept ? &column.kept : NULL,
                                by_sums ? &sums : NULL, !left, column.lse);
        }
        fa_write_real(g, b->shift + at + j * size, weighing.shift);
        fa_write_real(g, b->factor + at + j * size, weighing.factor);
        fa_write_real(g, b->delta + at + j * size, 0);
    }
    return true;
}

/* Find delta of every key of the block: v . grad_v, less grad_lse.  The product is the one that
 * gives grad_out v^T, so that a key that only one query sees finds the same bits again; only its
 * diagonal is needed. */
static void find_column_deltas(const struct fa_backward *b, const struct key_block *block,
                               struct fa_backward_workspace *ws)
{
    const struct fa_geometry *g = &b->geometry;
    const struct fa_array *grad_lse = &b->params->grad_lse;
    const int64_t size = (int64_t)g->ops->size, nr = (int64_t)g->engine->nr;
    const int64_t dim = g->params->head_dim_v;
    const int64_t at = fa_column_at(g, block->head->index, block->key);
    const char *from = fa_array_of(g, grad_lse, block->head->index, false);

    for (int64_t first = 0; first < block->live; first += nr) {
        const int64_t keys = fa_min(nr, block->live - first);
        const struct fa_product product = {
            .rows = (size_t)keys,
            .depth = (size_t)dim,
            .panels = 1,
            .a = ws->head_grad_v + first * b->padded_v * size,
            .a_stride = (size_t)b->padded_v,
            .b = ws->forward.v + first * dim * size,
            .b_panel = (size_t)(dim * nr),
            .c = ws->value_products,
            .c_row = (size_t)nr,
        };
        b->engine->multiply(&product);
        for (int64_t j = 0; j < keys; j++) {
            double delta = fa_read_real(g, ws->value_products + j * (nr + 1) * size);
            if (from != NULL) {
                const double grad = fa_read_lse(g, from + (block->key + first + j) * grad_lse->row);
                delta -= ldexp(grad, -g->value_exponent);
            }
            fa_write_real(g, b->delta + at + (first + j) * size, delta);
        }
    }
}

/* Visit the rows of one query head, softmax being over the queries: first for gradients of
 * values, which give delta, then for all other gradients.  False: stopped. */
static bool visit_rows_twice(struct fa_job *job, int thread, struct key_block *block,
                             struct fa_backward_workspace *ws)
{
    const struct fa_backward *b = job->context;
    const struct fa_geometry *g = &b->geometry;
    const int64_t elements = g->block_k * b->padded_v;

    if (!weigh_columns(job, thread, block, ws)) {
        return false;
    }
    memset(ws->head_grad_v, 0, (size_t)(elements * (int64_t)g->ops->size));
    block->purpose = GRAD_V;
    block->grad_v = ws->head_grad_v;
    if (!visit_rows(job, thread, block, ws)) {
        return false;
    }
    if (!block->packed) {
        return true; /* no query sees a key of it */
    }
    find_column_deltas(b, block, ws);
    g->ops->add(ws->grad_v, ws->head_grad_v, (size_t)elements);
    block->purpose = THE_REST;
    return visit_rows(job, thread, block, ws);
}

/* Sums of one group of one of a unit's heads. */
static char *sums_of(const struct fa_backward *b, char *unit_sums, int64_t member, int64_t group)
{
    const struct fa_geometry *g = &b->geometry;
    const int64_t bytes = g->rows * b->padded_k * (int64_t)g->ops->size;
    return unit_sums == NULL ? NULL : unit_sums + (member * b->groups + group) * bytes;
}

/* One key block against all heads that read it.  False: stopped. */
static bool visit_key_block(struct fa_job *job, int thread, struct key_block *block,
                            struct fa_backward_workspace *ws, char *unit_sums)
{
    struct fa_backward *b = job->context;
    const struct fa_geometry *g = &b->geometry;
    const struct fa_attention_params *p = &b->params->attention;
    const int64_t size = (int64_t)g->ops->size, members = fa_backward_members(g);
    bool done = true;

    memset(ws->grad_k, 0, (size_t)(g->block_k * b->padded_k * size));
    memset(ws->grad_v, 0, (size_t)(g->block_k * b->padded_v * size));
    block->packed = false;
    for (int64_t i = 0; done && i < members; i++) {
        struct fa_head head;
        block->head = &head;
        block->sums = sums_of(b, unit_sums, i, block->group);
        fa_head_init(&head, g, block->unit_head + i);
        block->live = fa_min(block->keys, head.kv_length - block->key);
        if (fa_over_queries(g)) {
            done = visit_rows_twice(job, thread, block, ws);
        } else {
            block->purpose = EVERYTHING;
            block->grad_v = ws->grad_v;
            done = visit_rows(job, thread, block, ws);
        }
    }
    if (done) {
        store_keys(b, block, &b->params->grad_k, ws->grad_k, p->head_dim, fa_backward_factor(g));
        store_keys(b, block, &b->params->grad_v, ws->grad_v, p->head_dim_v, 1);
    }
    return done;
}

/* Store grad_q of the heads of a unit, after its last group. */
static void store_unit(struct fa_backward *b, struct fa_backward_workspace *ws, int64_t unit,
                       char *unit_sums)
{
    const int64_t members = fa_backward_members(&b->geometry);
    for (int64_t i = 0; i < members && !fa_backward_is_stored(b, unit * members); i++) {
        fa_backward_store_rows(b, unit * members + i, sums_of(b, unit_sums, i, 0), ws->q_panels);
    }
    fa_sums_leave(b->sums, unit);
}

static void run_group(struct fa_job *job, int64_t index, int thread)
{
    struct fa_backward *b = job->context;
    const struct fa_geometry *g = &b->geometry;
    struct fa_backward_workspace ws = fa_backward_workspace_of(b, thread);
    const int64_t members = fa_backward_members(g), unit = index / b->groups;
    const int64_t groups = fa_backward_groups(g, unit * members);
    struct key_block block = {.unit_head = unit * members, .group = index % b->groups};

    if (block.group >= groups || fa_backward_is_done(b, block.unit_head)) {
        return;
    }
    char *unit_sums = b->sums == NULL ? NULL : fa_sums_enter(b->sums, unit, groups);
    for (int64_t i = 0; unit_sums != NULL && i < members; i++) {
        memset(sums_of(b, unit_sums, i, block.group), 0,
               (size_t)(g->rows * b->padded_k * (int64_t)g->ops->size));
    }
    /* Blocks are dealt out in turn, because under a causal mask most rows see the first ones. */
    const int64_t seqlen_k = fa_backward_seqlen_k(g, block.unit_head);
    for (int64_t i = block.group; i * g->block_k < seqlen_k; i += groups) {
        block.key = i * g->block_k;
        block.keys = fa_min(g->block_k, seqlen_k - block.key);
        if (!visit_key_block(job, thread, &block, &ws, unit_sums)) {
            return;
        }
    }
    if (unit_sums != NULL && fa_sums_finish(b->sums, unit)) {
        store_unit(b, &ws, unit, unit_sums);
    }
}

/* Rows of all heads.  Their number fits 64 bits: the geometry has multiplied as much. */
static int64_t count_rows(const struct fa_backward *b)
{
    const struct fa_geometry *g = &b->geometry;
    const int64_t *starts = g->params->q_starts;
    return starts == NULL ? g->batch * g->heads * g->rows
                          : starts[g->batch] * g->stacked * g->heads;
}

static enum fa_status allocate_unit_left(struct fa_backward *b, int64_t units)
{
    int64_t bytes = 0;
    if (!fa_add_bytes(&bytes, units, (int64_t)sizeof *b->unit_left)) {
        return FA_OVERFLOW;
    }
    b->unit_left = fa_allocate(bytes);
    for (int64_t i = 0; b->unit_left != NULL && i < units; i++) {
        atomic_init(b->unit_left + i, false);
    }
    return b->unit_left == NULL ? FA_NO_MEMORY : FA_OK;
}

static enum fa_status allocate(struct fa_backward *b)
{
    const struct fa_geometry *g = &b->geometry;
    const int64_t size = (int64_t)g->ops->size;
    const int64_t rows = count_rows(b);
    const int64_t statistics =
        fa_over_queries(g) ? g->batch * g->heads * g->key_blocks * g->block_k : rows;
    int64_t total, reals = 0, flags = 0;
    if (!fa_backward_workspace_bytes(b) ||
        !fa_multiply(b->workspace_bytes, g->num_threads, &total) ||
        !fa_add_bytes(&reals, statistics, size) ||
        !fa_add_bytes(&flags, fa_over_queries(g) ? 0 : rows, (int64_t)sizeof *b->delta_of_out)) {
        return FA_OVERFLOW;
    }
    b->workspaces = fa_allocate(total);
    b->shift = fa_allocate(reals);
    b->factor = fa_allocate(reals);
    b->delta = fa_allocate(reals);
    b->delta_of_out = fa_allocate(flags);
    if (b->workspaces == NULL || b->shift == NULL || b->factor == NULL || b->delta == NULL ||
        b->delta_of_out == NULL) {
        return FA_NO_MEMORY;
    }
    const int64_t members = fa_backward_members(g), units = g->batch * g->heads / members;
    enum fa_status status = FA_OK;
    if (b->first == NULL) {
        b->excess = fa_allocate(reals);
        status = b->excess == NULL ? FA_NO_MEMORY : allocate_unit_left(b, units);
    }
    if (status == FA_OK && b->params->grad_bias.data != NULL) {
        status = fa_backward_allocate_bias(b);
    }
    return status == FA_OK && b->params->grad_q.data != NULL ? fa_sums_init(b, units, members)
                                                             : status;
}

static enum fa_status run_pass(struct fa_backward *b,
                               void (*run)(struct fa_job *job, int64_t index, int thread),
                               int64_t num_tasks)
{
    const struct fa_attention_params *p = &b->params->attention;
    struct fa_job job = {
        .num_tasks = num_tasks,
        .num_threads = (int)fa_min(b->geometry.num_threads, fa_max(num_tasks, 1)),
        .run = run,
        .context = b,
        .poll = p->poll,
        .poll_arg = p->poll_arg,
    };
    return fa_job_run(&job);
}

static enum fa_status run_passes(struct fa_backward *b)
{
    const struct fa_geometry *g = &b->geometry;
    const struct fa_backward_params *p = b->params;
    const int64_t heads = g->batch * g->heads, row_tasks = heads * fa_backward_row_blocks(g);
    /* With softmax over the queries the main pass finds shift, factor and delta, too. */
    const bool main_pass = fa_over_queries(g) || p->grad_q.data != NULL || p->grad_k.data != NULL ||
                           p->grad_v.data != NULL;
    enum fa_status status =
        fa_over_queries(g) ? FA_OK : run_pass(b, fa_backward_prepare_rows, row_tasks);
    if (status == FA_OK && main_pass) {
        status = run_pass(b, run_group, heads / fa_backward_members(g) * b->groups);
    }
    /* A second run computes it for all heads: their sums may meet in the same elements.  For
     * float64 it mends the elements that it finds not finite. */
    if (status == FA_OK && p->grad_bias.data != NULL &&
        (!atomic_load(&b->any_left) || p->attention.dtype == FA_F64)) {
        status = run_pass(b, fa_backward_bias, fa_backward_bias_tasks(b));
    }
    return status;
}

static enum fa_status run(struct fa_backward *b, const struct fa_kernels *kernels,
                          const struct fa_tile_ops *ops)
{
    const struct fa_attention_params *p = &b->params->attention;
    struct fa_geometry *g = &b->geometry;
    enum fa_status status = fa_geometry_init(g, p, fa_engine_for(kernels, ops, p, FA_AGAIN));
    if (status != FA_OK) {
        return status;
    }
    const bool again = b->first != NULL;
    b->engine = fa_gradients_for(kernels, ops);
    FA_ASSERT(b->engine->nr == g->engine->nr);
    g->value_depth = g->block_k; /* V is packed as rows, by the gradients' engine */
    g->block_q = FA_BACKWARD_ROWS;
    g->scales_scores = fa_scales_scores(p, again);
    g->value_exponent = again && p->dtype == FA_F64 ? FA_AGAIN_EXPONENT : 0;
    /* Products read columns of weights: if rows were a power of two apart, they would share few
     * sets of L1. */
    g->score_stride += FA_LINE / (int64_t)ops->size;
    b->padded_k = fa_round_up(p->head_dim, (int64_t)g->engine->nr);
    b->padded_v = fa_round_up(p->head_dim_v, (int64_t)g->engine->nr);
    if (again) {
        g->ranges = b->first->geometry.ranges;
    } else {
        status = fa_ranges_find(&b->ranges, g);
    }
    b->groups = 1;
    for (int64_t i = 0; i < g->batch && g->heads > 0; i++) {
        b->groups = fa_max(b->groups, fa_backward_groups(g, i * g->heads));
    }
    if (status == FA_OK) {
        status = allocate(b);
    }
    return status == FA_OK ? run_passes(b) : status;
}

static void release(struct fa_backward *b)
{
    fa_release(b->workspaces);
    fa_release(b->shift);
    fa_release(b->factor);
    fa_release(b->delta);
    fa_release(b->delta_of_out);
    fa_release(b->excess);
    fa_release(b->bias_sums);
    fa_release(b->unit_left);
    fa_sums_release(b->sums);
    fa_ranges_release(&b->ranges);
}

/* Float64 computes where the options leave no choice, and in a second run for heads whose softmax
 * or gradients left the range of their type.  A second run for float64 has grad_out and grad_lse
 * divided by 2^value_exponent, and the gradients, which are linear in both, multiplied by it.  It
 * stores only elements that were not finite, because small ones lose bits. */
static enum fa_status compute_gradients(const struct fa_backward_params *params,
                                        const struct fa_kernels *kernels)
{
    const struct fa_attention_params *p = &params->attention;
    struct fa_backward first = {.params = params};
    FA_ASSERT(p->head_dim <= FA_MAX_BACKWARD_DIM && p->head_dim_v <= FA_MAX_BACKWARD_DIM);
    FA_ASSERT(p->kv_dtype == p->dtype && p->page_table.data == NULL);
    enum fa_status status = run(&first, kernels, fa_ops_of_call(kernels, p));
    if (status == FA_OK && atomic_load(&first.any_left)) {
        struct fa_backward second = {.params = params, .first = &first};
        status = run(&second, kernels, kernels->f64);
        release(&second);
    }
    release(&first);
    return status;
}

enum fa_status fa_attention_backward(const struct fa_backward_params *params,
                                     const struct fa_kernels *kernels)
{
    struct fa_float_mode found;
    fa_float_mode_enter(&found);
    const enum fa_status status = compute_gradients(params, kernels);
    fa_float_mode_leave(&found);
    return status;
}
