/* Forward attention: the loop nest around the kernels.
 *
 *   for each task (batch, head, columns of v, block_q rows)       threads, one atomic counter
 *     load the rows of q, scaled                                  ws->q
 *     for each split of the keys that some row may see            absolute boundaries
 *       for each block of block_k keys                            absolute boundaries
 *         for each tile of tile_q rows
 *           scores = q k^T, options applied                       ws->scores, L1
 *           weights in place; row_max, row_sum and acc kept up    online softmax, ws->split
 *           acc += weights v
 *       fold the split into the rows' total                       ws->total
 *     store acc / row_sum + residual, lse
 *
 * Where rows are few and keys are many, as in decoding, a task is one split: its state stays in
 * memory, and the task that finishes last folds all of them, in order.
 *
 * A row whose scores or sums left the range of float32 is given back instead of stored, and a
 * second run computes it with the operations of float64.  A row of float64 has its values scaled
 * down there, so that an average of finite numbers is finite.  Only the keys that a row attends
 * to decide that.
 *
 * K and V of a block are packed when the first tile needs them: once for block_q rows, which
 * costs 2.5 / block_q + 0.5 / block_q of the products, or three times that where an engine splits
 * operands.  The result of a row depends on its own scores and on boundaries of blocks and splits
 * only, so threads, batch and neighbours leave no trace in its bits. */
#include "forward.h"

#include <math.h>
#include <string.h>

#include "float_mode.h"
#include "keys.h"
#include "mask_ranges.h"
#include "scores.h"

/* A block of keys, as the tiles of a task find it. */
struct block {
    /* Keys [key, key + keys). */
    int64_t key, keys;
    /* The products read its keys and values where they lie. */
    bool few;
    /* It is located, and packed if it is to be. */
    bool ready;
    /* engine->values may have its values.  With `few` that is not known. */
    bool finite;
};

/* acc[tile rows] += weights v */
static void add_weighted_values(const struct fa_tile *tile, struct fa_workspace *ws, int64_t cols,
                                const struct block *block)
{
    const struct fa_geometry *g = tile->head->geometry;
    const struct fa_engine *engine = g->engine;
    const int64_t size = (int64_t)g->ops->size, nr = (int64_t)engine->nr;
    const int64_t group = tile->group;
    const char *weights = fa_tile_score_data(tile, ws);

    for (int64_t r = 0; r < tile->rows; r += group) {
        const struct fa_key_range keys = fa_group_keys(tile, r);
        const struct fa_product product = {
            .rows = (size_t)fa_min(group, tile->rows - r),
            .depth = (size_t)(keys.hi - keys.lo),
            .panels = (size_t)fa_ceil_div(cols, nr),
            .a = weights + (r * g->score_stride + keys.lo) * size,
            .a_stride = (size_t)g->score_stride,
            .b = ws->v +
                 (int64_t)engine->value_elements((size_t)(tile->begin + keys.lo)) * nr * size,
            .b_panel = (size_t)(g->value_depth * nr),
            .c = fa_state_from(g, &ws->split, tile->row_offset + r).acc,
            .c_row = (size_t)g->block_dv,
            .accumulate = true,
            .into_chain = (size_t)(tile->begin + keys.lo) % FA_CHAIN,
        };
        ws->look_at_acc |= block->few || !block->finite;
        if (block->few) {
            const struct fa_rows from = fa_rows_from(&ws->values, tile->begin + keys.lo);
            if (engine->few_values(&product, (size_t)cols, &from, ws->v)) {
                continue;
            }
            fa_pack_values(tile->head, ws, block->keys, cols);
        }
        if (block->finite) {
            engine->values(&product, &ws->wanted);
        } else {
            engine->values_careful(&product);
        }
    }
}

/* Scores of the tile to weights.  beside: a product to compute at the same time, or NULL. */
static void weigh_tile(const struct fa_forward *forward, const struct fa_tile *tile,
                       struct fa_workspace *ws, const struct fa_product *beside)
{
    const struct fa_geometry *g = forward->geometry;
    const struct fa_engine *engine = g->engine;
    const int64_t size = (int64_t)g->ops->size;
    char *scores = fa_tile_score_data(tile, ws);
    if (forward->columns.col_max != NULL) {
        const int64_t key_block = tile->block_key / g->block_k;
        const int64_t at = fa_column_offset(g, tile->head->index, key_block) + tile->begin * size;
        engine->weigh_columns(scores, (size_t)g->score_stride, (size_t)tile->rows,
                              (size_t)tile->columns, forward->columns.col_max + at,
                              forward->columns.col_inverse + at);
        return;
    }
    /* In a cut tile only the keys that some row of the group may see have been computed; the rest
     * weighs 0. */
    const int64_t group = tile->group;
    const float factor = fa_softmax_factor(tile->head);
    FA_ASSERT(beside == NULL || group >= tile->rows); /* once, not once per group */
    for (int64_t r = 0; r < tile->rows; r += group) {
        const struct fa_key_range keys = fa_group_keys(tile, r);
        const struct fa_state state = fa_state_from(g, &ws->split, tile->row_offset + r);
        engine->softmax(&(struct fa_softmax){
            .scores = scores + (r * g->score_stride + keys.lo) * size,
            .ld = (size_t)g->score_stride,
            .rows = (size_t)fa_min(group, tile->rows - r),
            .cols = (size_t)fa_round_up(keys.hi - keys.lo, (int64_t)engine->nr),
            .factor = factor,
            .state = &state,
            .ldacc = (size_t)g->block_dv,
            .beside = beside,
            .wanted = &ws->wanted,
        });
    }
}

/* Scales of integer values, and of values computed again, join the weights after row_sum, which
 * is a sum without scales. */
static void scale_weights(const struct fa_tile *tile, struct fa_workspace *ws)
{
    const struct fa_geometry *g = tile->head->geometry;
    if (ws->values.scale != NULL) {
        ws->look_at_acc = true;
        g->engine->scale_weights(fa_tile_score_data(tile, ws), (size_t)g->score_stride,
                                 (size_t)tile->rows, (size_t)tile->columns,
                                 ws->values.scale + tile->begin);
    }
}

static struct fa_head_rows rows_of(const struct fa_task *task)
{
    return (struct fa_head_rows){&task->head, task->first_row, task->rows};
}

/* The bias of the tile that follows: of the rows from r on, or of the first rows and the next
 * block. */
static void want_next(const struct fa_task *task, struct fa_workspace *ws, int64_t r,
                      int64_t block_key)
{
    if (r == task->rows) {
        r = 0;
        block_key += task->head.geometry->block_k;
    }
    const struct fa_head_rows all = rows_of(task), rows = fa_tile_rows(&all, r);
    fa_want_bias(ws, &rows, block_key);
}

/* Find and pack the keys when the first tile needs them. */
static void prepare_block(struct block *block, const struct fa_task *task, struct fa_workspace *ws)
{
    const struct fa_head *head = &task->head;
    if (block->ready) {
        return;
    }
    fa_locate_keys(head, ws, block->key, block->keys, task->first_col);
    if (!block->few) {
        fa_pack_keys(head, ws, block->keys);
        block->finite = fa_pack_values(head, ws, block->keys, task->cols);
    }
    block->ready = true;
}

/* The first tile from row *r of the task on that a key of the block takes part in. */
static bool find_tile(struct fa_tile *tile, const struct fa_task *task, struct fa_workspace *ws,
                      int64_t block_key, int64_t *r)
{
    const struct fa_head_rows all = rows_of(task);
    for (; *r < all.count; *r += task->head.geometry->tile_q) {
        const struct fa_head_rows rows = fa_tile_rows(&all, *r);
        if (fa_tile_init(tile, ws, &rows, *r, block_key)) {
            return true;
        }
    }
    return false;
}

static void swap_scores(struct fa_workspace *ws)
{
    char *scores = ws->scores;
    ws->scores = ws->scores_ahead;
    ws->scores_ahead = scores;
}

/* One key block against all rows of the task.  Where the softmax multiplies beside, each tile
 * leaves behind the product of the next: `ready`. */
static void attend_block(const struct fa_forward *forward, const struct fa_task *task,
                         struct fa_workspace *ws, int64_t block_key, int64_t keys)
{
    const struct fa_geometry *g = forward->geometry;
    const bool beside = g->engine->multiplies_beside && forward->columns.col_max == NULL;
    struct block block = {.key = block_key, .keys = keys};
    struct fa_tile tile, next;
    int64_t r = 0;
    bool ready = false, more = find_tile(&tile, task, ws, block_key, &r);

    block.few = fa_are_few(g, task->rows);
    while (more) {
        int64_t next_r = r + g->tile_q;
        struct fa_product product;
        prepare_block(&block, task, ws);
        want_next(task, ws, fa_min(next_r, task->rows), block_key);
        fa_tile_scores(&tile, ws, ready);
        /* After the scores of this one, whose mask lies where that of the next will. */
        more = find_tile(&next, task, ws, block_key, &next_r);
        ready = more && beside;
        if (ready) {
            product = fa_tile_product_ahead(&next, ws);
        }
        weigh_tile(forward, &tile, ws, ready ? &product : NULL);
        /* After row_sum: what is dropped stays in the denominator. */
        fa_draw_dropout(&tile, ws);
        fa_apply_dropout(&tile, ws, fa_tile_score_data(&tile, ws), g->engine->drop_weights);
        scale_weights(&tile, ws);
        add_weighted_values(&tile, ws, task->cols, &block);
        if (ready) {
            swap_scores(ws);
        }
        if (more) {
            tile = next;
            r = next_r;
        }
    }
}

/* Keys [lo, hi) of the head against all rows of the task: a new state, in ws->split.  False:
 * stopped. */
static bool attend_keys(struct fa_job *job, int thread, const struct fa_task *task,
                        struct fa_workspace *ws, int64_t lo, int64_t hi)
{
    const struct fa_forward *forward = job->context;
    const struct fa_geometry *g = forward->geometry;
    const struct fa_head_rows rows = rows_of(task);
    const struct fa_key_range keys = fa_rows_keys(&rows);
    hi = fa_min(hi, keys.hi);
    lo = fa_max(lo, keys.lo) / g->block_k * g->block_k;

    g->ops->softmax_begin((size_t)task->rows, &ws->split, (size_t)g->block_dv);
    for (int64_t block = lo; block < hi; block += g->block_k) {
        if (fa_job_checkpoint(job, thread)) {
            return false;
        }
        attend_block(forward, task, ws, block, fa_min(g->block_k, keys.hi - block));
    }
    return true;
}

/* Where the task's first row stands among the rows of all tasks, those of a group in the place of
 * its first. */
static int64_t place_of(const struct fa_forward *forward, const struct fa_task *task)
{
    const int64_t block_q = forward->geometry->block_q;
    return task->first_in_group * block_q + task->first_row % block_q;
}

/* Which rows of the task were given back. */
static uint8_t *given_back_of(const struct fa_forward *forward, const struct fa_task *task)
{
    return forward->given_back + place_of(forward, task);
}

static void give_back(struct fa_forward *forward, const struct fa_task *task, int64_t r,
                      enum fa_stored why)
{
    given_back_of(forward, task)[r] = (uint8_t)why;
    atomic_store_explicit(&forward->any_given_back, true, memory_order_relaxed);
    if (forward->columns.head_given_back != NULL) {
        atomic_store_explicit(forward->columns.head_given_back + task->head.index, true,
                              memory_order_relaxed);
    }
}

/* The bits of a row of the task whose sums left; NULL: there is no memory for bits. */
static uint8_t *columns_of(struct fa_forward *forward, const struct fa_task *task, int64_t r)
{
    const struct fa_geometry *g = forward->geometry;
    uint8_t *columns = atomic_load(&forward->elements_left), *none = NULL;
    if (columns == NULL) {
        int64_t rows, bytes = 0;
        if (fa_multiply(forward->plan.num_tasks, g->block_q, &rows) &&
            fa_add_bytes(&bytes, rows, forward->column_bytes)) {
            columns = fa_allocate(bytes);
        }
        if (columns == NULL) {
            atomic_store(&forward->no_memory, true);
            return NULL;
        }
        memset(columns, 0, (size_t)bytes);
        if (!atomic_compare_exchange_strong(&forward->elements_left, &none, columns)) {
            fa_release(columns);
            columns = none; /* another task was first */
        }
    }
    return columns + (place_of(forward, task) + r) * forward->column_bytes;
}

static enum fa_stored store_row(const struct fa_forward *forward, const struct fa_state *state,
                                const struct fa_row_result *result)
{
    const struct fa_geometry *g = forward->geometry;
    if (forward->columns.col_max != NULL) {
        if (!result->final && result->doubt.from < 0) {
            /* A weight that seems to be 0 does not show that its column was given back. */
            return FA_ROW_LEFT;
        }
        return g->ops->store(fa_state_from(g, state, (int64_t)result->row).acc, result);
    }
    return g->ops->softmax_store(state, (size_t)g->block_dv, result);
}

/* Where the weighing of a row is stored; NULL: nowhere, or it is not known, which is noted there.
 */
static char *weighing_of(const struct fa_forward *forward, const struct fa_head *head, int64_t row)
{
    const struct fa_geometry *g = forward->geometry;
    const struct fa_array *to = &g->params->weighing;
    if (head->weighing == NULL) {
        return NULL;
    }
    char *weighing = head->weighing + fa_row_offset(g, to, row);
    if (!forward->keeps_weighing) {
        fa_forget_weighing(g, weighing);
        return NULL;
    }
    return weighing;
}

/* Fill in the members of a result that belong to one row.  of_softmax: lse and weighing, too. */
static void place_row(const struct fa_forward *forward, const struct fa_task *task, int64_t r,
                      bool of_softmax, struct fa_row_result *result)
{
    const struct fa_geometry *g = forward->geometry;
    const struct fa_attention_params *p = g->params;
    const struct fa_head *head = &task->head;
    const int64_t row = task->first_row + r;
    result->row = (size_t)r;
    result->columns = NULL;
    result->choose = false;
    result->out = head->out + fa_row_offset(g, &p->out, row) + task->first_col * p->out.col;
    if (head->residual != NULL) {
        result->residual = head->residual + fa_row_offset(g, &p->residual, row) +
                           task->first_col * p->residual.col;
    }
    if (head->sinks != NULL) {
        const char *sink = head->sinks + fa_row_offset(g, &p->sinks, row);
        result->sink = fa_read_number(sink, sizeof(double)) * FA_LOG2_E;
    }
    if (head->exact != NULL) {
        result->exact =
            head->exact + fa_row_offset(g, &p->exact, row) + task->first_col * p->exact.col;
    }
    result->lse = NULL;
    result->weighing = NULL;
    if (of_softmax) {
        result->lse = head->lse + fa_row_offset(g, &p->lse, row);
        result->weighing = weighing_of(forward, head, row);
    }
    if (head->alibi_slopes != NULL) {
        result->doubt = fa_head_doubt(head, fa_row_member(g, row));
    }
}

/* Whether the task has the lse of its rows to store. */
static bool has_lse_of(const struct fa_forward *forward, const struct fa_task *task)
{
    return task->head.lse != NULL && task->first_col == 0 && forward->columns.col_max == NULL;
}

/* Store row r of the task, or give it back. */
static void store_one(struct fa_forward *forward, const struct fa_task *task, int64_t r,
                      const struct fa_state *state, struct fa_row_result *result)
{
    struct fa_forward *first = forward->first;
    const enum fa_stored before = first == NULL ? FA_STORED : given_back_of(first, task)[r];
    if (first != NULL && before == FA_STORED) {
        return;
    }
    place_row(forward, task, r, has_lse_of(forward, task) && before != FA_SUMS_LEFT, result);
    if (before == FA_SUMS_LEFT) {
        result->columns = columns_of(first, task, r);
    }
    const enum fa_stored stored = store_row(forward, state, result);
    if (stored != FA_STORED) {
        give_back(forward, task, r, stored);
    }
    if (stored == FA_SUMS_LEFT) {
        result->columns = columns_of(forward, task, r);
        result->choose = true;
        if (result->columns != NULL) {
            store_row(forward, state, result);
        }
    }
}

/* Whether the rows of a task lie at equal distances, and nothing about them is to be looked at
 * one by one. */
static bool stores_tiles(const struct fa_forward *forward, const struct fa_task *task,
                         bool look_at_acc)
{
    const struct fa_geometry *g = forward->geometry;
    const struct fa_head *head = &task->head;
    return g->stacked == 1 && forward->first == NULL && !look_at_acc &&
           forward->columns.col_max == NULL && head->exact == NULL && head->sinks == NULL &&
           (head->weighing == NULL || forward->keeps_weighing);
}

/* look_at_acc: sums of values may have left the range of their type. */
static void store_rows(struct fa_forward *forward, const struct fa_task *task,
                       const struct fa_state *state, bool look_at_acc)
{
    const struct fa_geometry *g = forward->geometry;
    const struct fa_attention_params *p = g->params;
    struct fa_row_result result = {
        .cols = (size_t)task->cols,
        .dtype = p->dtype,
        .lse_dtype = fa_lse_dtype(p),
        .biased = fa_is_biased(g),
        .sink = -INFINITY,
        .exponent = g->value_exponent,
        .final = forward->given_back == NULL,
        .look_at_acc = look_at_acc,
        .averages = p->softmax_axis == FA_SOFTMAX_KEYS && p->dropout_p == 0,
        .doubt = fa_head_doubt(&task->head, 0),
        .out_stride = p->out.col,
        .residual_stride = p->residual.col,
        .exact_stride = p->exact.col,
        .weighing_stride = p->weighing.col,
    };
    const struct fa_row_steps step = {p->out.row, p->residual.row, p->lse.row, p->weighing.row};
    const bool in_tiles = stores_tiles(forward, task, look_at_acc);
    const int64_t many = in_tiles ? g->tile_q : 1;
    for (int64_t r = 0; r < task->rows; r += many) {
        const int64_t rows = fa_min(many, task->rows - r);
        uint32_t left = 1;
        if (in_tiles) {
            place_row(forward, task, r, has_lse_of(forward, task), &result);
            left = g->ops->softmax_store_rows(state, (size_t)g->block_dv, (size_t)rows, &result,
                                              &step);
        }
        for (int64_t i = 0; left != 0; left >>= 1, i++) {
            if (left & 1) {
                store_one(forward, task, r + i, state, &result);
            }
        }
    }
}

/* All splits of the rows' keys, one after another. */
static void run_whole(struct fa_job *job, const struct fa_task *task, struct fa_workspace *ws,
                      int thread)
{
    struct fa_forward *forward = job->context;
    const struct fa_geometry *g = forward->geometry;
    const struct fa_head_rows own = rows_of(task);
    const struct fa_key_range keys = fa_rows_keys(&own);
    const size_t rows = (size_t)task->rows, ldacc = (size_t)g->block_dv;
    const bool one = keys.hi <= keys.lo || keys.lo / g->split_k == (keys.hi - 1) / g->split_k;
    if (one) {
        if (attend_keys(job, thread, task, ws, keys.lo, keys.hi)) {
            store_rows(forward, task, &ws->split, ws->look_at_acc);
        }
        return;
    }
    for (int64_t lo = keys.lo / g->split_k * g->split_k; lo < keys.hi; lo += g->split_k) {
        if (!attend_keys(job, thread, task, ws, lo, lo + g->split_k)) {
            return;
        }
        if (lo <= keys.lo) { /* the first split is the total so far */
            const struct fa_state first = ws->split;
            ws->split = ws->total;
            ws->total = first;
            g->ops->softmax_begin(rows, &ws->rest, ldacc);
        } else {
            g->ops->softmax_fold(rows, &ws->total, &ws->rest, &ws->split, ldacc);
        }
    }
    store_rows(forward, task, &ws->total, ws->look_at_acc);
}

/* One split.  The last task of the group folds all of them, in order, into the first, and stores
 * the rows. */
static void run_split(struct fa_job *job, int64_t index, const struct fa_task *task,
                      struct fa_workspace *ws, int thread)
{
    struct fa_forward *forward = job->context;
    const struct fa_geometry *g = forward->geometry;
    const int64_t lo = task->first_split * g->split_k, first = task->first_in_group;
    char *states = forward->states + first * forward->state_bytes;

    ws->split = fa_state_at(g, g->block_q, forward->states + index * forward->state_bytes);
    if (!attend_keys(job, thread, task, ws, lo, lo + task->splits * g->split_k)) {
        return;
    }
    const int before = atomic_fetch_add_explicit(forward->arrived + first, 1, memory_order_acq_rel);
    if (before + 1 < task->group_size) {
        return;
    }
    const struct fa_state total = fa_state_at(g, g->block_q, states);
    const size_t rows = (size_t)task->rows, ldacc = (size_t)g->block_dv;
    if (task->group_size > 1) {
        g->ops->softmax_begin(rows, &ws->rest, ldacc);
    }
    for (int64_t i = 1; i < task->group_size; i++) {
        const struct fa_state split = fa_state_at(g, g->block_q, states + i * forward->state_bytes);
        g->ops->softmax_fold(rows, &total, &ws->rest, &split, ldacc);
    }
    store_rows(forward, task, &total, true);
}

/* Cut a task down to the rows from the first to the last that was given back.  False: there is
 * none. */
static bool keep_given_back(const struct fa_forward *first, struct fa_task *task)
{
    const uint8_t *given = given_back_of(first, task);
    int64_t lo = 0, hi = task->rows;
    while (lo < hi && given[lo] == 0) {
        lo++;
    }
    while (lo < hi && given[hi - 1] == 0) {
        hi--;
    }
    task->first_row += lo;
    task->rows = hi - lo;
    return lo < hi;
}

static void run_task(struct fa_job *job, int64_t index, int thread)
{
    struct fa_forward *forward = job->context;
    struct fa_task task = fa_plan_task(&forward->plan, index);
    struct fa_workspace ws =
        fa_workspace_at(forward->geometry, forward->workspaces + thread * forward->workspace_bytes);
    if (forward->first != NULL && !keep_given_back(forward->first, &task)) {
        return;
    }
    ws.look_at_acc = forward->columns.col_max != NULL || forward->geometry->params->dropout_p > 0;
    const struct fa_head_rows rows = rows_of(&task);
    forward->geometry->engine->enter();
    fa_load_rows(&ws, &rows);
    if (forward->plan.by_splits) {
        run_split(job, index, &task, &ws, thread);
    } else {
        run_whole(job, &task, &ws, thread);
    }
    forward->geometry->engine->leave();
}

/* Rows that float32 computes may be given back, and rows of float64 whose values are as they are.
 */
static bool gives_back(const struct fa_geometry *g, bool again) { return !again && !g->widened; }

bool fa_forward_count(const struct fa_geometry *geometry, const struct fa_plan *plan, bool again,
                      struct fa_forward_bytes *bytes)
{
    const struct fa_geometry *g = geometry;
    int64_t rows;
    *bytes = (struct fa_forward_bytes){0};
    if (!fa_workspace_bytes(g, &bytes->workspace) ||
        !fa_multiply(bytes->workspace, g->num_threads, &bytes->workspaces) ||
        !fa_multiply(plan->num_tasks, g->block_q, &rows)) {
        return false;
    }
    if (gives_back(g, again) && !fa_add_bytes(&bytes->given_back, rows, 1)) {
        return false;
    }
    if (!plan->by_splits) {
        return true;
    }
    return fa_state_bytes(g, g->block_q, &bytes->state) &&
           fa_multiply(bytes->state, plan->num_tasks, &bytes->states) &&
           fa_add_bytes(&bytes->arrived, plan->num_tasks, (int64_t)sizeof(atomic_int));
}

/* The states of all tasks, where each has one split. */
static enum fa_status allocate_states(struct fa_forward *forward,
                                      const struct fa_forward_bytes *bytes)
{
    forward->state_bytes = bytes->state;
    forward->states = fa_allocate(bytes->states);
    forward->arrived = fa_allocate(bytes->arrived);
    if (forward->states == NULL || forward->arrived == NULL) {
        return FA_NO_MEMORY;
    }
    for (int64_t i = 0; i < forward->plan.num_tasks; i++) {
        atomic_init(forward->arrived + i, 0);
    }
    return FA_OK;
}

static enum fa_status allocate(struct fa_forward *forward)
{
    const struct fa_geometry *g = forward->geometry;
    const bool again = forward->first != NULL;
    enum fa_status status = FA_OK;
    struct fa_forward_bytes bytes;
    if (!fa_forward_count(g, &forward->plan, again, &bytes)) {
        return FA_OVERFLOW;
    }
    forward->workspace_bytes = bytes.workspace;
    forward->workspaces = fa_allocate(bytes.workspaces);
    if (forward->workspaces == NULL) {
        return FA_NO_MEMORY;
    }
    if (gives_back(g, again)) {
        forward->column_bytes = fa_ceil_div(g->block_dv, 8);
        forward->given_back = fa_allocate(bytes.given_back);
        if (forward->given_back == NULL) {
            return FA_NO_MEMORY;
        }
        memset(forward->given_back, 0, (size_t)bytes.given_back);
    }
    if (g->params->softmax_axis == FA_SOFTMAX_QUERIES) {
        forward->columns = (struct fa_columns){
            .geometry = g,
            .workspaces = forward->workspaces,
            .workspace_bytes = bytes.workspace,
            .gives_back = forward->given_back != NULL,
            .keeps_weighing = forward->keeps_weighing,
            .first = again ? &forward->first->columns : NULL,
        };
        status = fa_columns_allocate(&forward->columns);
    }
    return status == FA_OK && forward->plan.by_splits ? allocate_states(forward, &bytes) : status;
}

static enum fa_status run_passes(struct fa_forward *forward)
{
    const struct fa_geometry *g = forward->geometry;
    struct fa_job job = {
        .num_threads = g->num_threads,
        .context = forward,
        .poll = g->params->poll,
        .poll_arg = g->params->poll_arg,
    };
    if (g->params->softmax_axis == FA_SOFTMAX_QUERIES) {
        enum fa_status status = fa_column_softmax(&forward->columns);
        if (status != FA_OK) {
            return status;
        }
    }
    job.run = run_task;
    job.num_tasks = forward->plan.num_tasks;
    job.num_threads = (int)fa_min(g->num_threads, fa_max(job.num_tasks, 1));
    return fa_job_run(&job);
}

static void release(struct fa_forward *forward)
{
    fa_release(forward->workspaces);
    fa_columns_release(&forward->columns);
    fa_release(forward->states);
    fa_release(forward->arrived);
    fa_release(forward->given_back);
    fa_release(forward->elements_left);
}

static enum fa_status run(struct fa_forward *forward)
{
    enum fa_status status = allocate(forward);
    if (status == FA_OK) {
        status = run_passes(forward);
    }
    return status == FA_OK && atomic_load(&forward->no_memory) ? FA_NO_MEMORY : status;
}

/* The rows that `first` gave back, by the same tasks. */
static enum fa_status run_again(struct fa_forward *first, const struct fa_kernels *kernels)
{
    const struct fa_geometry *g = first->geometry;
    struct fa_geometry geometry;
    const struct fa_engine *engine = fa_engine_for(kernels, kernels->f64, g->params, FA_FORWARD);
    enum fa_status status = fa_geometry_init(&geometry, g->params, engine);
    if (status != FA_OK) {
        return status;
    }
    geometry.block_q = g->block_q;
    geometry.num_threads = g->num_threads;
    geometry.ranges = g->ranges;
    geometry.scales_scores = fa_scales_scores(g->params, true);
    geometry.value_exponent = g->params->dtype == FA_F64 ? FA_AGAIN_EXPONENT : 0;
    FA_ASSERT(geometry.dv_blocks == g->dv_blocks && geometry.split_k == g->split_k);
    struct fa_forward forward = {.geometry = &geometry, .plan = first->plan, .first = first};
    forward.plan.geometry = &geometry;
    status = run(&forward);
    release(&forward);
    return status;
}

const struct fa_engine *fa_attention_engine(const struct fa_attention_params *params,
                                            const struct fa_kernels *kernels)
{
    return fa_engine_for(kernels, fa_ops_of_call(kernels, params), params, FA_FORWARD);
}

static enum fa_status attend(const struct fa_attention_params *params,
                             const struct fa_kernels *kernels)
{
    struct fa_geometry geometry;
    struct fa_ranges ranges;
    const struct fa_engine *engine = fa_attention_engine(params, kernels);
    if (!fa_has_results(params)) {
        return FA_OK;
    }
    enum fa_status status = fa_geometry_init(&geometry, params, engine);
    if (status != FA_OK) {
        return status;
    }
    fa_geometry_fit_tiles(&geometry);
    geometry.scales_scores = fa_scales_scores(params, false);
    struct fa_forward forward = {
        .geometry = &geometry,
        .keeps_weighing = engine->ops->size == (size_t)fa_dtype_size(fa_lse_dtype(params)) &&
                          engine == fa_engine_for(kernels, engine->ops, params, FA_AGAIN),
    };
    status = fa_ranges_find(&ranges, &geometry);
    if (status == FA_OK) {
        status = fa_plan_init(&forward.plan, &geometry);
    }
    if (status == FA_OK) {
        status = run(&forward);
    }
    if (status == FA_OK &&
        (atomic_load(&forward.any_given_back) || atomic_load(&forward.columns.any_given_back))) {
        status = run_again(&forward, kernels);
    }
    fa_plan_release(&forward.plan);
    fa_ranges_release(&ranges);
    release(&forward);
    return status;
}

enum fa_status fa_attention(const struct fa_attention_params *params,
                            const struct fa_kernels *kernels)
{
    struct fa_float_mode found;
    fa_float_mode_enter(&found);
    const enum fa_status status = attend(params, kernels);
    fa_float_mode_leave(&found);
    return status;
}
