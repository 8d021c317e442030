/* Weights made visible: those of chosen rows, means of blocks of them, or sums over the queries,
 * without a matrix of seqlen_q x seqlen_k.
 *
 *   for each task (batch, head, rows of the result)                  threads, one atomic counter
 *     for each stretch of block_q rows of q
 *       for each key block, each tile of tile_q rows
 *         scores; row_max and row_sum kept up                        first pass: statistics
 *       for each key block, each tile
 *         the same scores; weights in place, relative to row_max     second pass
 *         times 1 / row_sum: stored, or summed into cells
 *     store the cells
 *
 * Softmax over the queries has the statistics of all queries from column_softmax.c, and the
 * second pass only.  Products are two, as many as attention has.
 *
 * The result is rows of cells.  A task has whole rows of it, and stores them when it has summed
 * them.  Where the queries of one row are many, tasks share them, and their sums, kept apart, are
 * added in order at the end.  The queries of a task depend on sizes alone, and every cell is a
 * sum in order of key blocks and tiles: of at most tile_q weights in the workspace's type, then
 * in double.  So no bit depends on threads.
 *
 * Rows whose scores left the range of float32 are given back, as in forward.c, and a second run
 * computes them by the operations of float64: rows that are stored by themselves one by one,
 * summed rows with all that their task sums.  Of a softmax over the queries, columns are given
 * back one by one, or with all that is summed of their head. */
#include <math.h>
#include <string.h>

#include "float_mode.h"
#include "column_softmax.h"
#include "keys.h"
#include "mask_ranges.h"
#include "scores.h"

/* Queries of a task: q stays in the cache while both passes read it, and a block of keys is
 * packed once for each pass. */
#define MOST_ROWS 768
#define ROW_BYTES (512 * 1024)
/* Stretches that the queries of a head are cut into, if that leaves LEAST_ROWS in each. */
#define STRETCHES 16
#define LEAST_ROWS 96

/* Bytes of cells that a task's own rows of the result may have, if they are more than one row. */
#define CELL_BYTES (1024 * 1024)

struct weights {
    const struct fa_weights_params *params;
    struct fa_geometry geometry;
    /* The result of a head: so many rows of so many cells; FA_WEIGHTS_EACH has no cells. */
    int64_t result_rows, result_cols;
    /* A task has the queries of `together` of these rows, or one of `shares` of the queries of
     * one. */
    int64_t together, shares;
    int64_t tasks_per_head, num_tasks;
    int64_t thread_bytes;
    char *workspaces;
    /* Cells [batch * heads][result_rows][shares], if there is more than one share. */
    double *shared;
    /* [batch * heads][rows]: rows that were given back, a row of a task for all that the task
     * sums; NULL if none may be. */
    uint8_t *given_back;
    atomic_bool any_given_back;
    /* Softmax over the queries: the statistics of all queries. */
    struct fa_columns columns;
    struct fa_geometry column_geometry;
    /* Of a first run. */
    struct fa_ranges ranges;
    /* NULL, or the first run.  A second run computes the rows and columns that the first gave
     * back. */
    struct weights *first;
};

/* One thread's buffers. */
struct buffers {
    struct fa_workspace ws;
    /* [block_q]: maximum and sum of each row, in base 2. */
    double *top, *total;
    /* real [block_q]: the factor of each row in the second pass. */
    char *factor;
    /* real [block_k]: sums over some rows of a tile. */
    char *column_sums;
    /* [together][result_cols] */
    double *cells;
    /* The rows that ws.q holds: block_q of a task, or fewer. */
    struct fa_head_rows rows;
};

struct task {
    struct fa_head head;
    int64_t first_result_row, result_rows;
    /* Rows [begin, end) of the head. */
    int64_t begin, end;
    /* The cells of these rows of the result; NULL: each weight is stored. */
    double *cells;
};

static bool over_queries(const struct weights *w)
{
    return w->params->attention.softmax_axis == FA_SOFTMAX_QUERIES;
}

static bool sums(const struct weights *w) { return w->params->form != FA_WEIGHTS_EACH; }

/* The block that element i of n is in, of m blocks; and the first element of block i. */
static int64_t block_of(int64_t i, int64_t n, int64_t m) { return ((i + 1) * m - 1) / n; }

static int64_t block_begin(int64_t i, int64_t n, int64_t m) { return i * n / m; }

/* A thread's buffers, or with memory->base NULL their bytes. */
static void take_buffers(struct fa_memory *memory, const struct weights *w, struct buffers *to)
{
    const struct fa_geometry *g = &w->geometry;
    const int64_t size = (int64_t)g->ops->size, own = w->shares == 1 && sums(w) ? w->together : 0;
    fa_take_workspace(memory, g, &to->ws);
    to->top = fa_take(memory, g->block_q, 1, (int64_t)sizeof *to->top);
    to->total = fa_take(memory, g->block_q, 1, (int64_t)sizeof *to->total);
    to->factor = fa_take(memory, g->block_q, 1, size);
    to->column_sums = fa_take(memory, g->block_k, 1, size);
    to->cells = fa_take(memory, own, w->result_cols, (int64_t)sizeof *to->cells);
}

/* ---- first pass ---- */

/* Fold the statistics of the rows over one more split of the keys.  In double, as there are few
 * folds. */
static void fold_rows(const struct fa_geometry *g, struct buffers *to)
{
    const int64_t size = (int64_t)g->ops->size, vl = (int64_t)g->ops->vl;
    const struct fa_state *state = &to->ws.split;
    for (int64_t r = 0; r < to->rows.count; r++) {
        const char *lanes = (const char *)state->row_sum + r * vl * size;
        const double max = fa_read_real(g, (const char *)state->row_max + r * size);
        double sum = 0;
        for (int64_t i = 0; i < vl; i++) {
            sum += fa_read_real(g, lanes + i * size);
        }
        if (sum != 0) { /* a key takes part */
            const double top = max > to->top[r] ? max : to->top[r];
            to->total[r] = to->total[r] * exp2(to->top[r] - top) + sum * exp2(max - top);
            to->top[r] = top;
        }
    }
}

/* Scores of the tile become weights relative to row_max. */
static void weigh_rows(const struct fa_tile *tile, struct fa_workspace *ws)
{
    const struct fa_geometry *g = tile->head->geometry;
    const int64_t group = tile->group, size = (int64_t)g->ops->size;
    char *scores = fa_tile_score_data(tile, ws);
    for (int64_t r = 0; r < tile->rows; r += group) {
        const struct fa_key_range keys = fa_group_keys(tile, r);
        const struct fa_state state = fa_state_from(g, &ws->split, tile->row_offset + r);
        g->ops->softmax_update(scores + (r * g->score_stride + keys.lo) * size,
                               (size_t)g->score_stride, (size_t)fa_min(group, tile->rows - r),
                               (size_t)fa_round_up(keys.hi - keys.lo, (int64_t)g->engine->nr),
                               &state, (size_t)g->block_dv);
    }
}

/* ---- second pass ---- */

/* In rows whose softmax is NaN, scores of keys that take part become NaN, and the rest stays at
 * -inf. */
static void spoil_rows(const struct fa_tile *tile, struct buffers *of)
{
    const struct fa_geometry *g = tile->head->geometry;
    const int64_t size = (int64_t)g->ops->size;
    char *scores = fa_tile_score_data(tile, &of->ws);
    for (int64_t r = 0; r < tile->rows; r++) {
        if (isnan(of->total[tile->row_offset + r])) {
            char *row = scores + r * g->score_stride * size;
            for (int64_t j = 0; j < tile->columns; j++) {
                const double score = fa_read_real(g, row + j * size);
                fa_write_real(g, row + j * size, score == -INFINITY ? score : NAN);
            }
        }
    }
}

/* Add sums of the columns of a tile, from key `key` on, to a row of cells. */
static void add_to_cells(const struct weights *w, const char *column_sums, int64_t key,
                         int64_t keys, double *cells)
{
    const struct fa_geometry *g = &w->geometry;
    const int64_t n = g->params->seqlen_k, m = w->result_cols, size = (int64_t)g->ops->size;
    if (m == n) {
        for (int64_t j = 0; j < keys; j++) {
            cells[key + j] += fa_read_real(g, column_sums + j * size);
        }
        return;
    }
    int64_t cell = block_of(key, n, m), stop = block_begin(cell + 1, n, m);
    int64_t rest = (cell + 1) * n % m; /* of that division: the next ones are additions */
    for (int64_t j = 0; j < keys; cell++) {
        double sum = 0;
        for (; j < fa_min(keys, stop - key); j++) {
            sum += fa_read_real(g, column_sums + j * size);
        }
        cells[cell] += sum;
        stop += n / m + (rest + n % m >= m);
        rest = (rest + n % m) % m;
    }
}

/* Sum rows [r, r + rows) of the tile into cells: rows of one row of the result together. */
static void sum_group(const struct weights *w, const struct task *task, const struct fa_tile *tile,
                      struct buffers *of, int64_t r, int64_t rows)
{
    const struct fa_geometry *g = &w->geometry;
    const struct fa_key_range keys = fa_group_keys(tile, r);
    const int64_t size = (int64_t)g->ops->size, n = g->rows, m = w->result_rows;
    const int64_t columns = fa_round_up(keys.hi - keys.lo, (int64_t)g->engine->nr);
    const char *weights = fa_tile_score_data(tile, &of->ws);
    const int64_t end = r + rows;
    while (keys.lo < keys.hi && r < end) {
        const int64_t result_row = block_of(tile->first_row + r, n, m);
        const int64_t stop = fa_min(end, block_begin(result_row + 1, n, m) - tile->first_row);
        g->ops->sum_rows(of->column_sums, weights + (r * g->score_stride + keys.lo) * size,
                         (size_t)g->score_stride, (size_t)(stop - r), (size_t)columns,
                         of->factor + (tile->row_offset + r) * size);
        add_to_cells(w, of->column_sums, tile->block_key + tile->begin + keys.lo, keys.hi - keys.lo,
                     task->cells + (result_row - task->first_result_row) * w->result_cols);
        r = stop;
    }
}

static bool is_given_back(const struct weights *first, int64_t head_index, int64_t row)
{
    return first->given_back[head_index * first->geometry.rows + row] != 0;
}

/* The second run stores what the first gave back. */
static bool stores_row(const struct weights *w, int64_t head_index, int64_t row)
{
    if (over_queries(w)) { /* which has columns of that kind */
        return true;
    }
    return w->first != NULL ? is_given_back(w->first, head_index, row)
                            : w->given_back == NULL || !is_given_back(w, head_index, row);
}

/* Store a row of weights; in a second run over columns, only columns that the first run gave
 * back. */
static void store_columns(const struct weights *w, int64_t head_index, const char *weights,
                          struct fa_key_range keys, char *out, double factor)
{
    const struct fa_geometry *g = &w->geometry;
    const int64_t out_size = fa_dtype_size(fa_lse_dtype(g->params));
    if (w->first == NULL || !over_queries(w)) {
        const struct fa_row_result result = {
            .cols = (size_t)(keys.hi - keys.lo),
            .dtype = fa_lse_dtype(g->params),
            .out = out,
            .out_stride = out_size,
        };
        g->ops->store_scaled(weights, factor, &result);
        return;
    }
    const struct fa_geometry *before = &w->first->column_geometry;
    const char *inverse = w->first->columns.col_inverse + fa_column_offset(before, head_index, 0) +
                          keys.lo * (int64_t)before->ops->size;
    for (int64_t j = 0; j < keys.hi - keys.lo; j++) {
        if (isnan(fa_read_real(before, inverse + j * (int64_t)before->ops->size))) {
            fa_write_lse(g, out + j * out_size,
                         factor * fa_read_real(g, weights + j * (int64_t)g->ops->size));
        }
    }
}

static void store_group(const struct weights *w, const struct task *task,
                        const struct fa_tile *tile, struct buffers *of, int64_t r, int64_t rows)
{
    const struct fa_geometry *g = &w->geometry;
    const struct fa_key_range keys = fa_group_keys(tile, r);
    const int64_t size = (int64_t)g->ops->size;
    const int64_t out_size = fa_dtype_size(fa_lse_dtype(g->params));
    const int64_t first_key = tile->block_key + tile->begin;
    const struct fa_key_range stored = {first_key + keys.lo, first_key + keys.hi};
    const char *weights = fa_tile_score_data(tile, &of->ws);
    for (int64_t i = r; i < r + rows; i++) {
        const int64_t row = tile->first_row + i;
        const int64_t place = w->params->places == NULL ? row : w->params->places[row];
        const int64_t at = (task->head.index * g->rows + place) * w->result_cols + stored.lo;
        if (!stores_row(w, task->head.index, row)) {
            continue;
        }
        store_columns(w, task->head.index, weights + (i * g->score_stride + keys.lo) * size, stored,
                      (char *)w->params->weights + at * out_size,
                      fa_read_real(g, of->factor + (tile->row_offset + i) * size));
    }
}

static void use_tile(const struct weights *w, const struct task *task, const struct fa_tile *tile,
                     struct buffers *of)
{
    const struct fa_geometry *g = &w->geometry;
    /* Rows whose weights are added up in the workspace's type: positions alone say how many. */
    const int64_t group = tile->use_range ? (int64_t)g->engine->mr : tile->rows;
    if (over_queries(w)) {
        const struct fa_columns *columns = &w->columns;
        const int64_t at = fa_column_offset(g, task->head.index, tile->block_key / g->block_k) +
                           tile->begin * (int64_t)g->ops->size;
        g->ops->column_weights(fa_tile_score_data(tile, &of->ws), (size_t)g->score_stride,
                               (size_t)tile->rows, (size_t)tile->columns, columns->col_max + at,
                               columns->col_inverse + at);
    } else {
        spoil_rows(tile, of);
        weigh_rows(tile, &of->ws);
    }
    for (int64_t r = 0; r < tile->rows; r += group) {
        const int64_t rows = fa_min(group, tile->rows - r);
        if (task->cells != NULL) {
            sum_group(w, task, tile, of, r, rows);
        } else {
            store_group(w, task, tile, of, r, rows);
        }
    }
}

/* ---- tasks ---- */

/* Visit some keys with the rows of the buffers.  use: it is the second pass.  False: stopped. */
static bool visit_keys(struct fa_job *job, int thread, const struct task *task, struct buffers *of,
                       struct fa_key_range keys, bool use)
{
    const struct weights *w = job->context;
    const struct fa_geometry *g = &w->geometry;
    struct fa_workspace *ws = &of->ws;
    const bool few = fa_are_few(g, of->rows.count);
    for (int64_t key = keys.lo / g->block_k * g->block_k; key < keys.hi; key += g->block_k) {
        bool ready = false;
        if (fa_job_checkpoint(job, thread)) {
            return false;
        }
        for (int64_t r = 0; r < of->rows.count; r += g->tile_q) {
            const struct fa_head_rows rows = fa_tile_rows(&of->rows, r);
            const struct fa_head_rows next = fa_tile_rows(&of->rows, r + g->tile_q);
            struct fa_tile tile;
            if (!fa_tile_init(&tile, ws, &rows, r, key)) {
                continue;
            }
            if (!ready) {
                const int64_t count = fa_min(g->block_k, keys.hi - key);
                fa_locate_keys(&task->head, ws, key, count, 0);
                if (!few) {
                    fa_pack_keys(&task->head, ws, count);
                }
                ready = true;
            }
            fa_want_bias(ws, &next, key);
            fa_tile_scores(&tile, ws, false);
            if (use) {
                use_tile(w, task, &tile, of);
            } else {
                weigh_rows(&tile, ws);
            }
        }
    }
    return true;
}

/* Find maximum and sum of each row, without its sink.  False: stopped. */
static bool find_statistics(struct fa_job *job, int thread, const struct task *task,
                            struct buffers *of)
{
    const struct weights *w = job->context;
    const struct fa_geometry *g = &w->geometry;
    const struct fa_key_range keys = fa_rows_keys(&of->rows);
    for (int64_t r = 0; r < of->rows.count; r++) {
        of->top[r] = -INFINITY;
        of->total[r] = 0;
    }
    for (int64_t lo = keys.lo / g->split_k * g->split_k; lo < keys.hi; lo += g->split_k) {
        const struct fa_key_range split = {
            .lo = fa_max(lo, keys.lo),
            .hi = fa_min(lo + g->split_k, keys.hi),
        };
        g->ops->softmax_begin((size_t)of->rows.count, &of->ws.split, (size_t)g->block_dv);
        if (!visit_keys(job, thread, task, of, split, false)) {
            return false;
        }
        fold_rows(g, of);
    }
    return true;
}

/* Prepare the second pass: row_max, and the factor of what exp2 leaves.  No score is so far above
 * row_max that row_max would rise: the first pass has seen all scores.  Rows that left the range
 * are given back. */
static void prepare_rows(struct weights *w, struct buffers *of)
{
    const struct fa_geometry *g = &w->geometry;
    const struct fa_head *head = of->rows.head;
    const struct fa_doubt doubt = fa_head_doubt(head, 0);
    const int64_t size = (int64_t)g->ops->size;
    double sink = -INFINITY;
    if (head->sinks != NULL) {
        memcpy(&sink, head->sinks, sizeof sink);
        sink *= FA_LOG2_E;
    }
    for (int64_t r = 0; r < of->rows.count; r++) {
        const double top = of->top[r], max = sink > top ? sink : top, weight = exp2(top - max);
        const bool empty = of->total[r] == 0; /* no key takes part, nor a NaN */
        const bool doubtful = fa_is_doubtful(doubt, top, empty);
        if (w->given_back != NULL && (doubtful || !isfinite(of->total[r]))) {
            w->given_back[head->index * g->rows + of->rows.first + r] = 1;
            atomic_store_explicit(&w->any_given_back, true, memory_order_relaxed);
        }
        if (!empty) {
            of->total[r] = of->total[r] * weight + exp2(sink - max);
        }
        /* Where no score is more than -inf, and where spoil_rows leaves none, these do for all. */
        const bool plain = !empty && !isnan(of->total[r]);
        fa_write_real(g, (char *)of->ws.split.row_max + r * size, plain ? top : 0);
        fa_write_real(g, of->factor + r * size, plain ? weight / of->total[r] : 1);
    }
}

/* Whether one of the rows was given back. */
static bool any_given_back(const struct weights *w, const struct fa_head_rows *rows)
{
    for (int64_t r = 0; w->given_back != NULL && r < rows->count; r++) {
        if (is_given_back(w, rows->head->index, rows->first + r)) {
            return true;
        }
    }
    return false;
}

/* Compute rows [first, first + rows) of the task, at most block_q.  False: stopped, or given back
 * with all that the task sums. */
static bool run_rows(struct fa_job *job, int thread, const struct task *task, struct buffers *of,
                     int64_t first, int64_t rows)
{
    struct weights *w = job->context;
    of->rows = (struct fa_head_rows){&task->head, first, rows};
    fa_load_rows(&of->ws, &of->rows);
    if (over_queries(w)) {
        for (int64_t r = 0; r < rows; r++) {
            fa_write_real(&w->geometry, of->factor + r * (int64_t)w->geometry.ops->size, 1);
        }
    } else {
        if (!find_statistics(job, thread, task, of)) {
            return false;
        }
        prepare_rows(w, of);
        if (sums(w) && any_given_back(w, &of->rows)) {
            return false;
        }
    }
    return visit_keys(job, thread, task, of, fa_rows_keys(&of->rows), true);
}

/* Store the cells of one row of the result. */
static void store_cells(const struct weights *w, int64_t head_index, int64_t result_row,
                        const double *cells)
{
    const struct fa_geometry *g = &w->geometry;
    const int64_t n = g->params->seqlen_k, m = w->result_cols;
    const int64_t size = fa_dtype_size(fa_lse_dtype(g->params));
    const int64_t rows = block_begin(result_row + 1, g->rows, w->result_rows) -
                         block_begin(result_row, g->rows, w->result_rows);
    char *out = (char *)w->params->weights + (head_index * w->result_rows + result_row) * m * size;
    for (int64_t i = 0; i < m; i++) {
        double number = 1;
        if (w->params->form == FA_WEIGHTS_MEANS) {
            number = (double)rows * (double)(block_begin(i + 1, n, m) - block_begin(i, n, m));
        }
        fa_write_lse(g, out + i * size, cells[i] / number);
    }
}

/* Within a head the rows that see the most keys under a causal mask come first. */
static void find_task(const struct weights *w, int64_t index, struct buffers *of, struct task *task)
{
    const struct fa_geometry *g = &w->geometry;
    const int64_t within = w->tasks_per_head - 1 - index % w->tasks_per_head;
    const int64_t share = within % w->shares, m = w->result_rows;
    fa_head_init(&task->head, g, index / w->tasks_per_head);
    task->first_result_row = within / w->shares * w->together;
    task->result_rows = fa_min(w->together, m - task->first_result_row);
    const int64_t begin = block_begin(task->first_result_row, g->rows, m);
    const int64_t rows =
        block_begin(task->first_result_row + task->result_rows, g->rows, m) - begin;
    task->begin = begin + block_begin(share, rows, w->shares);
    task->end = begin + block_begin(share + 1, rows, w->shares);
    task->cells = NULL;
    if (sums(w)) {
        task->cells = of->cells;
        if (w->shares > 1) {
            const int64_t row = task->head.index * m + task->first_result_row;
            task->cells = w->shared + (row * w->shares + share) * w->result_cols;
        }
    }
}

/* Whether a run has nothing to do for a task: the first has done it, or has left all of it to the
 * second. */
static bool is_done(const struct weights *w, const struct task *task)
{
    const struct weights *first = w->first == NULL ? w : w->first;
    if (over_queries(w)) {
        const bool given = first->columns.head_given_back != NULL &&
                           first->columns.head_given_back[task->head.index];
        return w->first != NULL ? !given : given && sums(w);
    }
    const struct fa_head_rows rows = {&task->head, task->begin, task->end - task->begin};
    return w->first != NULL && !any_given_back(first, &rows);
}

static void run_task(struct fa_job *job, int64_t index, int thread)
{
    struct weights *w = job->context;
    const struct fa_geometry *g = &w->geometry;
    struct fa_memory memory = {.base = w->workspaces + thread * w->thread_bytes};
    struct buffers of;
    struct task task;
    bool whole = true;
    take_buffers(&memory, w, &of);
    find_task(w, index, &of, &task);
    if (is_done(w, &task)) {
        return;
    }
    if (task.cells != NULL) {
        memset(task.cells, 0, (size_t)(task.result_rows * w->result_cols) * sizeof *task.cells);
    }
    g->engine->enter();
    for (int64_t row = task.begin; whole && row < task.end; row += g->block_q) {
        whole = run_rows(job, thread, &task, &of, row, fa_min(g->block_q, task.end - row));
    }
    g->engine->leave();
    for (int64_t i = 0; whole && sums(w) && w->shares == 1 && i < task.result_rows; i++) {
        store_cells(w, task.head.index, task.first_result_row + i, task.cells + i * w->result_cols);
    }
}

/* Store the rows of the result whose sums several tasks have shared. */
static void store_shared(const struct weights *w)
{
    const int64_t rows = w->geometry.batch * w->geometry.heads * w->result_rows;
    const int64_t cols = w->result_cols;
    for (int64_t row = 0; row < rows; row++) {
        double *cells = w->shared + row * w->shares * cols;
        for (int64_t share = 1; share < w->shares; share++) {
            for (int64_t i = 0; i < cols; i++) {
                cells[i] += cells[share * cols + i];
            }
        }
        store_cells(w, row / w->result_rows, row % w->result_rows, cells);
    }
}

/* ---- a call ---- */

/* Cut the rows into tasks, and so every sum, by sizes alone. */
static bool choose_tasks(struct weights *w)
{
    struct fa_geometry *g = &w->geometry;
    const int64_t tile_q = g->tile_q, n = g->rows, m = w->result_rows;
    const int64_t row_bytes = fa_max(1, g->params->head_dim) * (int64_t)g->ops->size;
    int64_t most = fa_max(fa_min(MOST_ROWS, ROW_BYTES / row_bytes) / tile_q * tile_q, tile_q);
    int64_t cells, unused;
    g->block_q = fa_min(most, fa_round_up(fa_max(LEAST_ROWS, fa_ceil_div(n, STRETCHES)), tile_q));
    w->together = fa_max(1, g->block_q / fa_ceil_div(n, m));
    w->shares = 1;
    if (sums(w)) {
        const int64_t cell_bytes = w->result_cols * (int64_t)sizeof(double);
        w->together = fa_max(1, fa_min(w->together, CELL_BYTES / cell_bytes));
        /* As many sums as numbers that STRETCHES rows of the map have, at most. */
        if (!fa_multiply(m, w->result_cols, &cells)) {
            return false;
        }
        const int64_t affordable = fa_max(1, STRETCHES * fa_max(n, g->params->seqlen_k) / cells);
        w->shares = fa_min(fa_max(1, n / m / g->block_q), affordable);
    }
    w->tasks_per_head = fa_ceil_div(m, w->together) * w->shares;
    return fa_multiply(g->batch * g->heads, w->tasks_per_head, &w->num_tasks) &&
           fa_multiply(n + 1, m, &unused) &&
           fa_multiply(g->params->seqlen_k + 1, w->result_cols, &unused);
}

static enum fa_status allocate_shared(struct weights *w)
{
    int64_t numbers, bytes = 0;
    if (!sums(w) || w->shares == 1) {
        return FA_OK;
    }
    if (!fa_multiply(w->geometry.batch * w->geometry.heads * w->result_rows, w->shares, &numbers) ||
        !fa_multiply(numbers, w->result_cols, &numbers) ||
        !fa_add_bytes(&bytes, numbers, (int64_t)sizeof *w->shared)) {
        return FA_OVERFLOW;
    }
    w->shared = fa_allocate(bytes);
    return w->shared == NULL ? FA_NO_MEMORY : FA_OK;
}

static enum fa_status allocate(struct weights *w)
{
    const struct fa_geometry *g = &w->geometry;
    struct fa_memory counted = {.ok = true};
    struct buffers unused;
    int64_t total, rows, bytes = 0;
    enum fa_status status = FA_OK;
    take_buffers(&counted, w, &unused);
    w->thread_bytes = counted.bytes;
    if (!counted.ok || !fa_multiply(w->thread_bytes, g->num_threads, &total) ||
        !fa_multiply(g->batch * g->heads, g->rows, &rows) || !fa_add_bytes(&bytes, rows, 1)) {
        return FA_OVERFLOW;
    }
    w->workspaces = fa_allocate(total);
    if (w->workspaces == NULL) {
        return FA_NO_MEMORY;
    }
    if (w->first == NULL && !g->widened) {
        w->given_back = fa_allocate(bytes);
        if (w->given_back == NULL) {
            return FA_NO_MEMORY;
        }
        memset(w->given_back, 0, (size_t)rows);
    }
    if (w->first == NULL) {
        status = allocate_shared(w);
    }
    if (status == FA_OK && over_queries(w)) {
        w->column_geometry = *g;
        w->column_geometry.rows = g->params->seqlen_q;
        w->column_geometry.chosen_rows = NULL;
        w->columns = (struct fa_columns){
            .geometry = &w->column_geometry,
            .workspaces = w->workspaces,
            .workspace_bytes = w->thread_bytes,
            .gives_back = w->given_back != NULL,
            .first = w->first == NULL ? NULL : &w->first->columns,
        };
        status = fa_columns_allocate(&w->columns);
    }
    return status;
}

static enum fa_status run(struct weights *w)
{
    const struct fa_geometry *g = &w->geometry;
    struct fa_job job = {
        .num_threads = g->num_threads,
        .poll = g->params->poll,
        .poll_arg = g->params->poll_arg,
    };
    enum fa_status status = allocate(w);
    if (status == FA_OK && over_queries(w)) {
        status = fa_column_softmax(&w->columns);
    }
    if (status != FA_OK) {
        return status;
    }
    job.context = w;
    job.run = run_task;
    job.num_tasks = w->num_tasks;
    job.num_threads = (int)fa_min(g->num_threads, fa_max(job.num_tasks, 1));
    return fa_job_run(&job);
}

static void release(struct weights *w)
{
    fa_release(w->workspaces);
    fa_release(w->given_back);
    fa_columns_release(&w->columns);
    fa_ranges_release(&w->ranges);
}

static enum fa_status init_geometry(struct weights *w, const struct fa_engine *engine)
{
    const struct fa_weights_params *p = w->params;
    struct fa_geometry *g = &w->geometry;
    enum fa_status status = fa_geometry_init(g, &p->attention, engine);
    if (status == FA_OK && w->first != NULL) {
        g->ranges = w->first->geometry.ranges;
    } else if (status == FA_OK && p->rows == NULL && !sums(w)) {
        /* Chosen queries may be few of many; and ranges would decide which rows are added up. */
        status = fa_ranges_find(&w->ranges, g);
    }
    if (status == FA_OK) {
        const int num_threads = g->num_threads;
        fa_geometry_choose(g, p->heads, p->num_heads, p->rows, p->num_rows);
        if (over_queries(w)) { /* whose statistics are of all queries */
            g->num_threads = num_threads;
        }
    }
    return status;
}

static enum fa_status run_again(struct weights *first, const struct fa_kernels *kernels)
{
    struct weights again = {
        .params = first->params,
        .result_rows = first->result_rows,
        .result_cols = first->result_cols,
        .together = first->together,
        .shares = first->shares,
        .tasks_per_head = first->tasks_per_head,
        .num_tasks = first->num_tasks,
        .shared = first->shared,
        .first = first,
    };
    enum fa_status status = init_geometry(
        &again, fa_engine_for(kernels, kernels->f64, &first->params->attention, FA_AGAIN));
    if (status == FA_OK) {
        again.geometry.block_q = first->geometry.block_q;
        again.geometry.num_threads = first->geometry.num_threads;
        again.geometry.scales_scores = fa_scales_scores(&first->params->attention, true);
        status = run(&again);
    }
    release(&again);
    return status;
}

static bool has_results(const struct fa_weights_params *p)
{
    const struct fa_attention_params *a = &p->attention;
    bool some = p->num_heads > 0 && p->num_rows > 0 && a->seqlen_k > 0;
    for (int64_t i = 0; i < a->batch_ndim; i++) {
        some = some && a->batch_shape[i] > 0;
    }
    return some;
}

static enum fa_status compute(const struct fa_weights_params *params,
                              const struct fa_kernels *kernels)
{
    const struct fa_attention_params *a = &params->attention;
    const struct fa_engine *engine =
        fa_engine_for(kernels, fa_ops_of_call(kernels, a), a, FA_AGAIN);
    struct weights w = {
        .params = params, .result_rows = params->num_rows, .result_cols = a->seqlen_k};
    FA_ASSERT(a->head_dim_v == 0 && a->page_table.data == NULL && a->q_starts == NULL);
    FA_ASSERT(a->dropout_p == 0);
    if (!has_results(params)) {
        return FA_OK;
    }
    if (params->form == FA_WEIGHTS_MEANS) {
        FA_ASSERT(params->pool_rows >= 1 && params->pool_rows <= params->num_rows);
        FA_ASSERT(params->pool_cols >= 1 && params->pool_cols <= a->seqlen_k);
        w.result_rows = params->pool_rows;
        w.result_cols = params->pool_cols;
    } else if (params->form == FA_WEIGHTS_SUMS) {
        w.result_rows = 1;
    }
    enum fa_status status = init_geometry(&w, engine);
    w.geometry.scales_scores = fa_scales_scores(a, false);
    if (status == FA_OK && !choose_tasks(&w)) {
        status = FA_OVERFLOW;
    }
    if (status == FA_OK) {
        status = run(&w);
    }
    if (status == FA_OK &&
        (atomic_load(&w.any_given_back) || atomic_load(&w.columns.any_given_back))) {
        status = run_again(&w, kernels);
    }
    if (status == FA_OK && w.shared != NULL) {
        store_shared(&w);
    }
    fa_release(w.shared);
    release(&w);
    return status;
}

enum fa_status fa_attention_weights(const struct fa_weights_params *params,
                                    const struct fa_kernels *kernels)
{
    struct fa_float_mode found;
    fa_float_mode_enter(&found);
    const enum fa_status status = compute(params, kernels);
    fa_float_mode_leave(&found);
    return status;
}
