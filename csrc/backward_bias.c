/* grad_bias: the gradients of scores, added up where the bias was broadcast.
 *
 * A task owns an area of one plane of the bias, the elements of one (batch entry, head) of it,
 * and visits in order all heads that read it: no two tasks write the same element, and every sum
 * has one order.  Scores and products with the values are computed once more, so this pass costs
 * 2 products. */
#include "backward_bias.h"

#include <math.h>
#include <string.h>

#include "backward_tile.h"

/* Rows of an area where the bias has one column: K and V of a key block are packed once for all. */
#define AREA_ROWS (4 * FA_BACKWARD_ROWS)

/* A plane is split by key blocks, or, where all keys read the same column, by tokens. */
static bool by_keys(const struct fa_array *bias) { return bias->col != 0; }

static int64_t tokens_per_area(const struct fa_geometry *g)
{
    return fa_max(1, AREA_ROWS / g->stacked);
}

static int64_t count_areas(const struct fa_geometry *g, const struct fa_array *bias)
{
    if (by_keys(bias)) {
        return fa_max(1, g->key_blocks);
    }
    return bias->row == 0 ? 1 : fa_max(1, fa_ceil_div(g->params->seqlen_q, tokens_per_area(g)));
}

/* Elements of the bias: heads where the bias tells the stacked ones apart, tokens and keys where
 * it tells those apart, else one of each. */
struct area {
    int64_t members, first_token, tokens, first_key, keys;
};

static struct area area_of(const struct fa_geometry *g, const struct fa_array *bias, int64_t number)
{
    struct area area = {.members = bias->head == 0 ? 1 : g->stacked, .tokens = 1, .keys = 1};
    if (by_keys(bias)) {
        area.first_key = number * g->block_k;
        area.keys = fa_min(g->block_k, g->params->seqlen_k - area.first_key);
        area.tokens = bias->row == 0 ? 1 : g->params->seqlen_q;
    } else if (bias->row != 0) {
        area.first_token = number * tokens_per_area(g);
        area.tokens = fa_min(tokens_per_area(g), g->params->seqlen_q - area.first_token);
    }
    return area;
}

/* Where an area is added up. */
struct sums {
    struct area area;
    /* The element of member 0, and of the area's first token and key. */
    char *data;
    /* Bytes from element to element, 0 where the bias has one for all. */
    int64_t head, row, col;
    /* Elements are double, else float. */
    bool wide;
};

static char *plane_of(const struct fa_geometry *g, const struct fa_array *bias, int64_t index)
{
    const struct fa_head_place place = fa_head_place(g, index);
    return (char *)bias->data + fa_entry_offset(g, place.entry, bias->batch) +
           place.first_head * bias->head;
}

/* Whether a head is the first of those that share its plane. */
static bool owns_plane(const struct fa_geometry *g, const struct fa_array *bias, int64_t index)
{
    const struct fa_attention_params *p = g->params;
    int64_t entry = index / g->heads;
    if (bias->head == 0 && index % g->heads > 0) {
        return false;
    }
    for (int64_t i = p->batch_ndim - 1; i >= 0; i--) {
        if (bias->batch[i] == 0 && entry % p->batch_shape[i] > 0) {
            return false;
        }
        entry /= p->batch_shape[i];
    }
    return true;
}

/* The next head in order that shares the plane of this one, whose owner begins the series; -1:
 * there is none. */
static int64_t next_head(const struct fa_geometry *g, const struct fa_array *bias, int64_t index)
{
    const struct fa_attention_params *p = g->params;
    int64_t head = index % g->heads, entry = index / g->heads, rest = entry, apart = 1;
    if (bias->head == 0) {
        if (head + 1 < g->heads) {
            return index + 1;
        }
        head = 0;
    }
    for (int64_t i = p->batch_ndim - 1; i >= 0; i--) {
        const int64_t at = rest % p->batch_shape[i];
        if (bias->batch[i] == 0) {
            if (at + 1 < p->batch_shape[i]) {
                return (entry + apart) * g->heads + head;
            }
            entry -= at * apart; /* from the start again, one further on an axis before */
        }
        rest /= p->batch_shape[i];
        apart *= p->batch_shape[i];
    }
    return -1;
}

int64_t fa_backward_bias_tasks(const struct fa_backward *backward)
{
    const struct fa_geometry *g = &backward->geometry;
    return g->batch * g->heads * count_areas(g, &backward->params->grad_bias);
}

/* to[j] += from[j], stride in elements; both are aligned. */
static void add_floats(float *to, int64_t stride, const float *from, int64_t n)
{
    if (stride == 1) {
        for (int64_t j = 0; j < n; j++) {
            to[j] += from[j];
        }
        return;
    }
    for (int64_t j = 0; j < n; j++) {
        to[j * stride] += from[j];
    }
}

static void add_widened(double *to, int64_t stride, const float *from, int64_t n)
{
    for (int64_t j = 0; j < n; j++) {
        to[j * stride] += (double)from[j];
    }
}

static void add_doubles(double *to, int64_t stride, const double *from, int64_t n)
{
    for (int64_t j = 0; j < n; j++) {
        to[j * stride] += from[j];
    }
}

/* Add the gradients of the scores of some rows, in some columns of the key block that ws holds. */
static void add_gradients(const struct fa_backward_workspace *ws, const struct fa_head_rows *rows,
                          struct fa_key_range columns, const struct sums *sums)
{
    const struct fa_geometry *g = rows->head->geometry;
    const struct area *area = &sums->area;
    const int64_t size = (int64_t)g->ops->size, n = columns.hi - columns.lo;
    const int64_t stride = sums->col / (int64_t)(sums->wide ? sizeof(double) : sizeof(float));
    for (int64_t r = 0; r < rows->count; r++) {
        const int64_t row = rows->first + r;
        void *to = sums->data + fa_row_member(g, row) * sums->head +
                   (fa_row_token(g, row) - area->first_token) * sums->row +
                   (ws->block_key + columns.lo - area->first_key) * sums->col;
        const void *from = ws->gradients + (r * g->score_stride + columns.lo) * size;
        if (size == (int64_t)sizeof(double)) {
            add_doubles(to, stride, from, n);
        } else if (sums->wide) {
            add_widened(to, stride, from, n);
        } else {
            add_floats(to, stride, from, n);
        }
    }
}

/* Add up some rows of a head against the key block at `key`.  False: stopped. */
static bool visit_block(struct fa_job *job, int thread, const struct fa_head_rows *all, int64_t key,
                        const struct sums *sums)
{
    const struct fa_backward *b = job->context;
    const struct fa_geometry *g = &b->geometry;
    const struct fa_head *head = all->head;
    const int64_t keys = fa_min(g->block_k, head->kv_length - key);
    struct fa_backward_workspace ws = fa_backward_workspace_of(b, thread);

    if (keys <= 0) {
        return true;
    }
    fa_backward_pack(b, head, &ws, key, keys);
    for (int64_t r = 0; r < all->count; r += FA_BACKWARD_ROWS) {
        const int64_t count = fa_min(FA_BACKWARD_ROWS, all->count - r);
        const struct fa_head_rows rows = {head, all->first + r, count};
        const struct fa_key_range reach = fa_rows_keys(&rows);
        if (reach.lo >= key + keys || reach.hi <= key) {
            continue;
        }
        if (fa_job_checkpoint(job, thread)) {
            return false;
        }
        fa_load_rows(&ws.forward, &rows);
        fa_backward_load_grad(b, &ws, &rows);
        struct fa_key_range seen = fa_backward_tile(b, &ws, &rows, false);
        seen.hi = fa_min(seen.hi, keys);
        add_gradients(&ws, &rows, seen, sums);
    }
    return true;
}

/* Add up an area of the scores of one head.  False: stopped. */
static bool visit_head(struct fa_job *job, int thread, int64_t head_index, const struct sums *sums)
{
    const struct fa_backward *b = job->context;
    const struct fa_geometry *g = &b->geometry;
    const struct fa_array *bias = &b->params->grad_bias;
    struct fa_head head;
    fa_head_init(&head, g, head_index);
    if (by_keys(bias)) {
        const struct fa_head_rows all = {.head = &head, .count = head.rows};
        return visit_block(job, thread, &all, sums->area.first_key, sums);
    }
    const struct fa_head_rows rows = {
        .head = &head,
        .first = sums->area.first_token * g->stacked,
        .count = bias->row == 0 ? head.rows : sums->area.tokens * g->stacked,
    };
    for (int64_t key = 0; key < head.kv_length; key += g->block_k) {
        if (!visit_block(job, thread, &rows, key, sums)) {
            return false;
        }
    }
    return true;
}

/* The sums are grad_bias itself in a first run that computes in its type or a narrower one.  Else
 * they are memory of the thread, in float64: rounded once at the end, as they may pass the range
 * of float32, or are divided by 2^value_exponent. */
static struct sums sums_of(const struct fa_backward *b, const struct area *area, char *plane,
                           int thread)
{
    const struct fa_array *bias = &b->params->grad_bias;
    const int64_t size = (int64_t)sizeof(double);
    if (b->bias_sums == NULL) {
        return (struct sums){
            .area = *area,
            .data = plane + area->first_token * bias->row + area->first_key * bias->col,
            .head = bias->head,
            .row = bias->row,
            .col = bias->col,
            .wide = b->params->grad_bias_dtype == FA_F64,
        };
    }
    struct sums sums = {
        .area = *area,
        .data = (char *)(b->bias_sums + thread * b->bias_elements),
        .head = bias->head == 0 ? 0 : area->tokens * area->keys * size,
        .row = bias->row == 0 ? 0 : area->keys * size,
        .col = bias->col == 0 ? 0 : size,
        .wide = true,
    };
    memset(sums.data, 0, (size_t)(area->members * area->tokens * area->keys * size));
    return sums;
}

enum fa_status fa_backward_allocate_bias(struct fa_backward *backward)
{
    const struct fa_geometry *g = &backward->geometry;
    const struct area largest = area_of(g, &backward->params->grad_bias, 0);
    int64_t elements = 0, total, bytes = 0;
    if (!g->widened && backward->first == NULL) {
        return FA_OK;
    }
    if (!fa_multiply(largest.members, largest.tokens, &elements) ||
        !fa_multiply(elements, fa_max(largest.keys, 0), &elements) ||
        !fa_multiply(elements, g->num_threads, &total) ||
        !fa_add_bytes(&bytes, total, (int64_t)sizeof(double))) {
        return FA_OVERFLOW;
    }
    backward->bias_elements = elements;
    backward->bias_sums = fa_allocate(bytes);
    return backward->bias_sums == NULL ? FA_NO_MEMORY : FA_OK;
}

static void store_area(const struct fa_backward *b, const struct sums *sums, char *plane)
{
    const struct area *area = &sums->area;
    const struct fa_array *bias = &b->params->grad_bias;
    const size_t size = (size_t)fa_dtype_size(b->params->grad_bias_dtype);
    const int exponent = b->geometry.value_exponent;
    for (int64_t m = 0; m < area->members; m++) {
        for (int64_t i = 0; i < area->tokens; i++) {
            const char *from = sums->data + m * sums->head + i * sums->row;
            char *to = plane + m * bias->head + (area->first_token + i) * bias->row +
                       area->first_key * bias->col;
            for (int64_t j = 0; j < area->keys; j++) {
                const double x = fa_read_number(from + j * sums->col, sizeof x);
                char *at = to + j * bias->col;
                if (exponent == 0 || !isfinite(fa_read_number(at, size))) {
                    fa_write_number(at, ldexp(x, exponent), size);
                }
            }
        }
    }
}

/* Whether no element is infinite or NaN.  Integers tell: in a chain of additions each would wait
 * for the one before. */
static bool are_floats_finite(const float *x, int64_t n)
{
    uint32_t found = 0;
    for (int64_t j = 0; j < n; j++) {
        uint32_t bits;
        memcpy(&bits, x + j, sizeof bits);
        found |= (uint32_t)((bits & UINT32_C(0x7F800000)) == UINT32_C(0x7F800000));
    }
    return found == 0;
}

static bool are_sums_finite(const struct sums *sums)
{
    const struct area *area = &sums->area;
    const size_t size = sums->wide ? sizeof(double) : sizeof(float);
    for (int64_t m = 0; m < area->members; m++) {
        for (int64_t i = 0; i < area->tokens; i++) {
            const char *row = sums->data + m * sums->head + i * sums->row;
            if (!sums->wide && sums->col == (int64_t)sizeof(float)) {
                if (!are_floats_finite((const float *)(const void *)row, area->keys)) {
                    return false;
                }
                continue;
            }
            for (int64_t j = 0; j < area->keys; j++) {
                if (!isfinite(fa_read_number(row + j * sums->col, size))) {
                    return false;
                }
            }
        }
    }
    return true;
}

void fa_backward_bias(struct fa_job *job, int64_t index, int thread)
{
    struct fa_backward *b = job->context;
    const struct fa_geometry *g = &b->geometry;
    const struct fa_array *bias = &b->params->grad_bias;
    const int64_t areas = count_areas(g, bias), owner = index / areas;
    if (!owns_plane(g, bias, owner)) {
        return;
    }
    char *plane = plane_of(g, bias, owner);
    const struct area area = area_of(g, bias, index % areas);
    const struct sums sums = sums_of(b, &area, plane, thread);
    for (int64_t i = owner; i >= 0; i = next_head(g, bias, i)) {
        if (!visit_head(job, thread, i, &sums)) {
            return;
        }
    }
    if (b->first == NULL && !are_sums_finite(&sums)) {
        atomic_store_explicit(&b->any_left, true, memory_order_relaxed);
    }
    if (b->bias_sums != NULL) {
        store_area(b, &sums, plane);
    }
}
