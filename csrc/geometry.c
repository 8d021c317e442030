#include "geometry.h"

#include <string.h>

/* Bytes of K per block, as they are or packed, whichever is less: with V's equal share half of a
 * 256 KiB L2, the smallest in use.  Where an engine packs keys into 1.5 times as many bytes, L2
 * has 2 MiB.  Long heads halve the block, down to what a register tile of any engine divides. */
#define KEY_BLOCK_BYTES (64 * 1024)
#define MIN_BLOCK_K 32

/* Rows of a task, and bytes of its scaled Q rows and accumulators.  Packing a block of K and V,
 * which waits for the last cache or memory, is shared by the rows of a task; they stream past the
 * packed block, which stays in L2, at 1 byte per cycle and need no cache of their own.  At 768
 * rows packing is 1 % of the time at head_dim 64, at 192 it is 5 (10 at head_dim 128); `make
 * bench` with other values. */
#define MAX_BLOCK_Q 768
#define ROW_BLOCK_BYTES (768 * 1024)

/* Columns of V per task.  Beyond it the scores are computed again per block of columns, so that no
 * buffer grows with head_dim_v; at 1024 that costs at most head_dim / 1024 of the work. */
#define BLOCK_DV 1024

/* Keys per split.  The softmax of a row starts anew at every multiple of it, and the splits are
 * folded in order: so threads may share the keys of a few queries, and no bit depends on whether
 * they do.  K and V of a split are 1 MiB at head_dim 128, 50 us of reading, ten times the cost of
 * a task; in prefill a new start costs 1 / split_k * 20 cycles per row and key. */
#define SPLIT_K 1024

/* Multiply-adds that pay for one more thread: about 80 us at 50 per nanosecond, the time that a
 * sleeping thread takes to wake.  The caller does not wait for it, but smaller gains are not
 * worth the processor time that they cost the rest of the system. */
#define WORK_PER_THREAD 4e6

static int64_t choose_block_k(const struct fa_geometry *g)
{
    int64_t size = (int64_t)g->ops->size;
    int64_t block_k = FA_SCORE_ROW_BYTES / size;
    const int64_t width = fa_max(1, fa_min(g->params->head_dim, g->depth));
    while (block_k > MIN_BLOCK_K && block_k * size > KEY_BLOCK_BYTES / width) {
        block_k /= 2;
    }
    return block_k;
}

/* Blocks of equal size, as few as memory and balance allow.  Few rows stay together and share the
 * keys by splits (plan.c): if they were cut, each block would pack all of K and V. */
static int64_t choose_block_q(const struct fa_geometry *g)
{
    int64_t size = (int64_t)g->ops->size, tile_q = g->tile_q;
    int64_t width = fa_max(1, g->params->head_dim + fa_min(g->params->head_dim_v, g->block_dv));
    int64_t most = fa_min(MAX_BLOCK_Q, fa_max(tile_q, ROW_BLOCK_BYTES / size / width));
    int64_t blocks = fa_ceil_div(g->rows, most);
    if (g->num_threads > 1 && g->rows > FA_MAX_SPLIT_ROWS) {
        int64_t heads = fa_max(1, g->batch * g->heads * g->dv_blocks);
        blocks = fa_max(blocks, fa_ceil_div(FA_TASKS_PER_THREAD * g->num_threads, heads));
    }
    int64_t rows = fa_ceil_div(g->rows, fa_max(1, blocks));
    return fa_min(fa_round_up(rows, tile_q), g->rows);
}

/* Queries or keys of a batch entry. */
static int64_t length_of(const int64_t *starts, int64_t entry, int64_t seqlen)
{
    return starts == NULL ? seqlen : starts[entry + 1] - starts[entry];
}

/* Scores of one head of every batch entry: what the work grows with. */
static double count_scores(const struct fa_geometry *g)
{
    const struct fa_attention_params *p = g->params;
    if (p->q_starts == NULL && p->k_starts == NULL) {
        return (double)g->batch * (double)g->rows * (double)p->seqlen_k;
    }
    double scores = 0;
    for (int64_t i = 0; i < g->batch; i++) {
        scores += (double)length_of(p->q_starts, i, p->seqlen_q) * (double)g->stacked *
                  (double)length_of(p->k_starts, i, p->seqlen_k);
    }
    return scores;
}

/* Threads that the work pays for; task counts may lower it further. */
static int choose_num_threads(const struct fa_geometry *g)
{
    const struct fa_attention_params *p = g->params;
    double work = (double)g->heads * count_scores(g) * (double)(p->head_dim + p->head_dim_v + 1);
    double paid = 1 + work / WORK_PER_THREAD;
    /* Each has a workspace, so no more than there will be. */
    const int most = (int)fa_min(p->num_threads, fa_team_limit());
    return paid < most ? (int)paid : most;
}

bool fa_has_results(const struct fa_attention_params *params)
{
    const bool over_keys = params->softmax_axis == FA_SOFTMAX_KEYS;
    const int64_t sums = over_keys ? params->seqlen_q : params->seqlen_k;
    bool some =
        (params->seqlen_q > 0 && params->head_dim_v > 0) || (params->lse.data != NULL && sums > 0);
    some = some && params->num_heads > 0;
    for (int64_t i = 0; i < params->batch_ndim; i++) {
        some = some && params->batch_shape[i] > 0;
    }
    return some;
}

static int64_t longest(const struct fa_geometry *g, const int64_t *starts, int64_t seqlen)
{
    int64_t length = starts == NULL ? seqlen : 0;
    for (int64_t i = 0; starts != NULL && i < g->batch; i++) {
        length = fa_max(length, starts[i + 1] - starts[i]);
    }
    return length;
}

enum fa_status fa_geometry_init(struct fa_geometry *geometry,
                                const struct fa_attention_params *params,
                                const struct fa_engine *engine)
{
    struct fa_geometry g = {.params = params, .engine = engine, .ops = engine->ops, .batch = 1};
    bool over_keys = params->softmax_axis == FA_SOFTMAX_KEYS;

    FA_ASSERT(params->num_heads >= 0 && params->num_kv_heads >= 0);
    FA_ASSERT(params->num_heads == 0 || params->num_heads % params->num_kv_heads == 0);
    FA_ASSERT(params->batch_ndim >= 0 && params->batch_ndim <= FA_MAX_BATCH_DIMS);
    FA_ASSERT(params->num_threads >= 1);
    FA_ASSERT(engine->tile_q >= FA_MIN_TILE_Q && engine->tile_q <= FA_MAX_TILE_Q);

    g.stacked =
        over_keys && params->num_kv_heads > 0 ? params->num_heads / params->num_kv_heads : 1;
    g.heads = over_keys ? params->num_kv_heads : params->num_heads;
    g.of_key_heads = over_keys;
    for (int64_t i = 0; i < params->batch_ndim; i++) {
        if (!fa_multiply(g.batch, params->batch_shape[i], &g.batch)) {
            return FA_OVERFLOW;
        }
    }
    /* The task index and every padded size stay below 2^63. */
    int64_t heads, tasks, padded;
    if (!fa_multiply(g.batch, g.heads, &heads) ||
        !fa_multiply(params->seqlen_q, g.stacked, &g.rows) ||
        !fa_multiply(fa_max(heads, 1), fa_max(g.rows, params->seqlen_k), &tasks) ||
        !fa_multiply(params->head_dim, 4 * FA_MAX_TILE_Q, &padded) ||
        !fa_multiply(fa_max(tasks, 1), fa_ceil_div(params->head_dim_v, BLOCK_DV) + 1, &padded) ||
        !fa_multiply(fa_max(g.rows, params->seqlen_k), 4 * FA_MAX_TILE_Q, &padded)) {
        return FA_OVERFLOW;
    }
    g.rows = longest(&g, params->q_starts, params->seqlen_q) * g.stacked;
    g.widened = g.ops->size > (size_t)fa_dtype_size(FA_F32) && params->dtype != FA_F64;
    g.depth = (int64_t)engine->row_elements((size_t)params->head_dim);
    g.tile_q = (int64_t)engine->tile_q;
    g.block_k = choose_block_k(&g);
    g.value_depth = (int64_t)engine->value_elements((size_t)g.block_k);
    g.score_stride = g.block_k;
    g.block_dv = fa_min(BLOCK_DV, fa_round_up(params->head_dim_v, (int64_t)engine->nr));
    /* head_dim_v 0 still has an lse to compute. */
    g.dv_blocks = g.block_dv == 0 ? 1 : fa_ceil_div(params->head_dim_v, g.block_dv);
    g.split_k = SPLIT_K;
    g.key_blocks = fa_ceil_div(params->seqlen_k, g.block_k);
    g.num_threads = choose_num_threads(&g);
    g.block_q = choose_block_q(&g);
    *geometry = g;
    return FA_OK;
}

void fa_geometry_choose(struct fa_geometry *geometry, const int64_t *heads, int64_t num_heads,
                        const int64_t *rows, int64_t num_rows)
{
    geometry->stacked = 1;
    geometry->heads = num_heads;
    geometry->of_key_heads = false;
    geometry->chosen_heads = heads;
    geometry->rows = num_rows;
    geometry->chosen_rows = rows;
    geometry->num_threads = choose_num_threads(geometry);
    geometry->block_q = choose_block_q(geometry);
}

/* Rows of a head up to which the work around a tile shows; longer heads have the tiles of the
 * engine, which leave more of L1.  `python -m fastattn bench --filter short` with other numbers. */
#define MOST_FITTED_ROWS (8 * FA_MAX_TILE_Q)

void fa_geometry_fit_tiles(struct fa_geometry *geometry)
{
    const int64_t rows = geometry->rows, own = (int64_t)geometry->engine->tile_q;
    if (geometry->params->softmax_axis == FA_SOFTMAX_KEYS && rows > own && own < FA_MAX_TILE_Q &&
        rows <= MOST_FITTED_ROWS) {
        const int64_t even = fa_ceil_div(rows, fa_ceil_div(rows, FA_MAX_TILE_Q));
        geometry->tile_q = fa_min(fa_round_up(even, (int64_t)geometry->engine->mr), FA_MAX_TILE_Q);
    }
}

/* Where head `head`, row `row` of a batch entry begins whose coordinates are in `at`; NULL stays
 * NULL. */
static char *locate(const struct fa_array *array, const int64_t *at, int64_t ndim, int64_t head,
                    int64_t row)
{
    char *p = array->data;
    for (int64_t i = 0; p != NULL && i < ndim; i++) {
        p += at[i] * array->batch[i];
    }
    return p == NULL ? NULL : p + head * array->head + row * array->row;
}

struct fa_head_place fa_head_place(const struct fa_geometry *geometry, int64_t index)
{
    const struct fa_attention_params *p = geometry->params;
    const int64_t head = index % geometry->heads;
    const int64_t first_head =
        geometry->chosen_heads == NULL ? head * geometry->stacked : geometry->chosen_heads[head];
    const bool of_keys = geometry->of_key_heads;
    return (struct fa_head_place){
        .entry = index / geometry->heads,
        .first_head = first_head,
        .kv_head = of_keys ? head : first_head / (p->num_heads / p->num_kv_heads),
    };
}

int64_t fa_entry_offset(const struct fa_geometry *geometry, int64_t entry, const int64_t *batch)
{
    const struct fa_attention_params *p = geometry->params;
    int64_t offset = 0;
    for (int64_t i = p->batch_ndim - 1; i >= 0; i--) {
        offset += entry % p->batch_shape[i] * batch[i];
        entry /= p->batch_shape[i];
    }
    return offset;
}

char *fa_array_of(const struct fa_geometry *geometry, const struct fa_array *array,
                  int64_t head_index, bool of_keys)
{
    const struct fa_attention_params *p = geometry->params;
    const struct fa_head_place place = fa_head_place(geometry, head_index);
    const int64_t *starts = of_keys ? p->k_starts : p->q_starts;
    const int64_t head = of_keys ? place.kv_head : place.first_head;
    return array->data == NULL
               ? NULL
               : (char *)array->data + fa_entry_offset(geometry, place.entry, array->batch) +
                     head * array->head + (starts == NULL ? 0 : starts[place.entry] * array->row);
}

char *fa_row_of(const struct fa_geometry *geometry, const struct fa_array *array,
                int64_t head_index, int64_t row)
{
    char *data = fa_array_of(geometry, array, head_index, false);
    return data == NULL ? NULL : data + fa_row_offset(geometry, array, row);
}

/* Point a head at the ranges of its batch entry, whose coordinates are in `at`. */
static void find_ranges(struct fa_head *head, const int64_t *at)
{
    const struct fa_ranges *ranges = head->geometry->ranges;
    const int64_t n = head->geometry->params->batch_ndim;
    const uint8_t replaced = (uint8_t)*locate(&ranges->replaced, at, n, 0, 0);
    if (replaced == 0) {
        return;
    }
    head->key_ranges =
        (const struct fa_key_range *)(const void *)locate(&ranges->keys, at, n, 0, 0);
    head->range_step = ranges->keys.row / (int64_t)sizeof *head->key_ranges;
    head->mask = (replaced & FA_BY_MASK) != 0 ? NULL : head->mask;
    head->bias = (replaced & FA_BY_BIAS) != 0 ? NULL : head->bias;
}

void fa_head_init(struct fa_head *head, const struct fa_geometry *geometry, int64_t index)
{
    const struct fa_attention_params *p = geometry->params;
    const int64_t n = p->batch_ndim;
    int64_t at[FA_MAX_BATCH_DIMS];
    const struct fa_head_place place = fa_head_place(geometry, index);
    const int64_t entry = place.entry, first_head = place.first_head, kv_head = place.kv_head;
    int64_t rest = entry;

    FA_ASSERT(index >= 0 && index < geometry->batch * geometry->heads);
    for (int64_t i = n - 1; i >= 0; i--) {
        at[i] = rest % p->batch_shape[i];
        rest /= p->batch_shape[i];
    }
    const int64_t q_start = p->q_starts == NULL ? 0 : p->q_starts[entry];
    const int64_t k_start = p->k_starts == NULL ? 0 : p->k_starts[entry];
    const bool paged = p->page_table.data != NULL;
    const int64_t kv_ndim = paged ? 0 : n; /* pages have no batch axis of their own */
    *head = (struct fa_head){
        .geometry = geometry,
        .index = index,
        .entry = entry,
        .first_head = first_head,
        .q = locate(&p->q, at, n, first_head, q_start),
        .k = locate(&p->k, at, kv_ndim, kv_head, k_start),
        .v = locate(&p->v, at, kv_ndim, kv_head, k_start),
        .k_scale = locate(&p->k_scale, at, kv_ndim, kv_head, 0),
        .v_scale = locate(&p->v_scale, at, kv_ndim, kv_head, 0),
        .page_table = locate(&p->page_table, at, n, 0, 0),
        .bias = locate(&p->bias, at, n, first_head, 0),
        .mask = locate(&p->mask, at, n, first_head, 0),
        .residual = locate(&p->residual, at, n, first_head, q_start),
        .alibi_slopes = locate(&p->alibi_slopes, at, n, first_head, 0),
        .sinks = locate(&p->sinks, at, 0, first_head, 0),
        .q_segment_ids = locate(&p->q_segment_ids, at, n, 0, 0),
        .k_segment_ids = locate(&p->k_segment_ids, at, n, 0, 0),
        .out = locate(&p->out, at, n, first_head, q_start),
        .lse = locate(&p->lse, at, n, first_head, q_start),
        .weighing = locate(&p->weighing, at, n, first_head, q_start),
        .exact = locate(&p->exact, at, n, first_head, q_start),
    };
    const char *length = locate(&p->kv_lengths, at, n, 0, 0);
    const char *offset = locate(&p->q_offset, at, n, 0, 0);
    const int64_t seqlen_q = length_of(p->q_starts, entry, p->seqlen_q);
    head->rows = seqlen_q * geometry->stacked;
    head->kv_length =
        length == NULL ? length_of(p->k_starts, entry, p->seqlen_k) : fa_read_int64(length);
    head->q_offset = offset == NULL ? head->kv_length - seqlen_q : fa_read_int64(offset);
    FA_ASSERT(head->kv_length >= 0 && head->kv_length <= p->seqlen_k);
    if (geometry->ranges != NULL) {
        find_ranges(head, at);
    }
}

struct fa_key_range fa_position_keys(const struct fa_head *head, int64_t token)
{
    const struct fa_attention_params *p = head->geometry->params;
    const int64_t position = token + head->q_offset;
    struct fa_key_range keys = {.lo = 0, .hi = head->kv_length};
    if (p->causal) {
        keys.hi = fa_min(keys.hi, position + 1);
    }
    if (p->window_right >= 0) {
        keys.hi = fa_min(keys.hi, position + p->window_right + 1);
    }
    if (p->window_left >= 0) {
        keys.lo = fa_max(keys.lo, position - p->window_left);
    }
    keys.hi = fa_max(keys.hi, 0);
    keys.lo = fa_min(keys.lo, keys.hi);
    return keys;
}

struct fa_key_range fa_token_keys(const struct fa_head *head, int64_t token)
{
    return head->key_ranges == NULL ? fa_position_keys(head, token)
                                    : head->key_ranges[token * head->range_step];
}

static struct fa_key_range intersect(struct fa_key_range a, struct fa_key_range b)
{
    return (struct fa_key_range){.lo = fa_max(a.lo, b.lo), .hi = fa_min(a.hi, b.hi)};
}

struct fa_rows_keys fa_rows_keys_of(const struct fa_head_rows *rows, struct fa_key_range keys)
{
    const struct fa_head *head = rows->head;
    const struct fa_geometry *g = head->geometry;
    const int64_t first = fa_row_token(g, rows->first);
    const int64_t last = fa_row_token(g, rows->first + rows->count - 1);
    if (head->range_step == 0) { /* the last row has the greatest lo, the first the least hi */
        const struct fa_key_range low = fa_token_keys(head, first);
        const struct fa_key_range high = fa_token_keys(head, last);
        return (struct fa_rows_keys){
            .any = intersect((struct fa_key_range){low.lo, high.hi}, keys),
            .all = intersect((struct fa_key_range){high.lo, low.hi}, keys),
        };
    }
    const int64_t *chosen = g->chosen_rows == NULL ? NULL : g->chosen_rows + rows->first;
    const int64_t tokens = chosen == NULL ? last - first + 1 : rows->count;
    struct fa_rows_keys of = {.any = {.lo = keys.hi, .hi = keys.lo}, .all = keys};
    for (int64_t i = 0; i < tokens; i++) {
        const int64_t token = chosen == NULL ? first + i : chosen[i];
        const struct fa_key_range seen = intersect(head->key_ranges[token], keys);
        of.all = intersect(of.all, seen);
        if (seen.lo < seen.hi) {
            of.any.lo = fa_min(of.any.lo, seen.lo);
            of.any.hi = fa_max(of.any.hi, seen.hi);
        }
    }
    return of;
}

struct fa_key_range fa_rows_keys(const struct fa_head_rows *rows)
{
    const struct fa_key_range all = {.lo = 0, .hi = rows->head->kv_length};
    const struct fa_key_range keys = fa_rows_keys_of(rows, all).any;
    return (struct fa_key_range){.lo = fa_min(keys.lo, keys.hi), .hi = keys.hi};
}
