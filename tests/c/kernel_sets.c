/* Every kernel set of a build, without Python: fa_attention, its gradients and its weights over all options, compared with
 * the scalar set, and bit for bit with itself where the library promises the same bits.
 *
 * Linked with all of csrc/ by tests/emulate.py, for this machine or another one.
 * Usage: kernel_sets WHERE [SET...].  WHERE is printed; SETs that must run, all available ones if none.
 * Prints a line per set and last "N passed, N failed"; returns 1 if anything failed.  A digest has three parts, of
 * float32, of float64 and of bfloat16.
 *
 * Tolerance against the scalar set: MAX_GAUGE units, a unit being u K |v| + u |residual| for out (times
 * seqlen_k for softmax over queries, whose weights sum to that) and u (K + |lse|) for lse, where
 * K = 1 + the largest magnitude that a score can have.  Each set is within 4 such units of the true
 * value (tests/gauge.py measures that, with the units of each row).  bfloat16: u is 2^-18, what weights may be
 * off, and out may besides be rounded to the neighbour.  Results of values, scores and biases beyond float32 are
 * compared with exact ones, which this file computes.
 *
 * Every array ends at a page that must not be touched, and every byte around the results is checked.
 */
#define _GNU_SOURCE
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine.h"
#include "fastattn.h"

#define MAX_GAUGE 8.0
#define MAX_SETS 8
#define LENGTH(array) (sizeof(array) / sizeof *(array))

/* ---- cases ---------------------------------------------------------------------------------- */

enum option {
    CAUSAL = 1 << 0,
    WINDOW = 1 << 1,
    MASK = 1 << 2,
    BIAS_F32 = 1 << 3,
    BIAS_F64 = 1 << 4,
    ALIBI = 1 << 5,
    SOFTCAP = 1 << 6,
    SINKS = 1 << 7,
    KV_LENGTHS = 1 << 8,
    SEGMENTS = 1 << 9,
    QUERIES = 1 << 10, /* softmax over queries */
    RESIDUAL = 1 << 11,
    Q_OFFSET = 1 << 12,
    RISING = 1 << 13, /* scores grow with the key: row_max is raised in later blocks */
    INFINITE_V = 1 << 14, /* V holds NaN and infinities */
    SHARED = 1 << 15, /* mask and bias are the same for every batch entry and head */
    /* Beyond the range of an element type; the results are compared with exact ones, not with the scalar set's. */
    LARGE_V = 1 << 16, /* some columns of V hold the largest numbers of their type */
    LARGE_QK = 1 << 17, /* some scores, or sums on the way to them, are beyond float32 */
    LARGE_BIAS = 1 << 18, /* bias at the ends of its type, and ALiBi's slopes beyond float32 */
    LARGE = LARGE_V | LARGE_QK | LARGE_BIAS,
};

struct shape {
    int64_t batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v;
    unsigned options;
};

/* Key blocks are 128 float32 or 64 float64, score tiles 24 rows, panels 2 to 32 columns: sizes lie on
 * both sides of each.  Few are large, because an emulator takes a microsecond for what a CPU does in a
 * nanosecond. */
static const struct shape shapes[] = {
    {1, 1, 1, 1, 1, 1, 1, 0},
    {1, 1, 1, 5, 17, 16, 16, 0},
    {1, 2, 2, 24, 128, 8, 32, 0},
    {1, 2, 1, 25, 129, 5, 33, 0},
    {2, 4, 2, 13, 65, 33, 17, 0},
    {1, 1, 1, 6, 63, 129, 3, 0},
    {1, 1, 1, 3, 40, 300, 5, 0}, /* shorter key blocks */
    {1, 1, 1, 2, 9, 4, 1030, 0}, /* two blocks of columns */
    {1, 1, 1, 7, 31, 0, 6, BIAS_F32},
    {1, 2, 2, 4, 20, 6, 0, SINKS},
    {1, 1, 1, 9, 0, 8, 8, 0},
    {1, 1, 1, 9, 0, 8, 8, QUERIES | RESIDUAL},
    {0, 1, 1, 3, 3, 4, 4, 0},
    {1, 1, 1, 0, 5, 4, 4, QUERIES},
    {1, 1, 1, 50, 300, 12, 20, RISING},
    {1, 2, 1, 30, 290, 16, 16, RISING | CAUSAL},
    {1, 2, 2, 70, 70, 16, 20, CAUSAL},
    {2, 2, 1, 20, 150, 16, 16, CAUSAL},
    {1, 1, 1, 60, 25, 8, 8, CAUSAL}, /* the first rows see no key */
    {1, 2, 1, 60, 60, 8, 18, CAUSAL | Q_OFFSET},
    {1, 2, 2, 90, 200, 8, 9, WINDOW},
    {2, 1, 1, 90, 140, 8, 9, WINDOW | CAUSAL | KV_LENGTHS},
    {2, 2, 1, 40, 140, 10, 12, MASK},
    {2, 2, 2, 26, 131, 9, 7, MASK | SHARED | CAUSAL},
    {1, 3, 1, 27, 140, 10, 12, BIAS_F32},
    {2, 2, 1, 27, 66, 10, 12, BIAS_F64 | SHARED},
    {1, 2, 2, 23, 135, 16, 16, BIAS_F32 | MASK | RISING},
    {2, 4, 2, 31, 140, 8, 8, ALIBI},
    {1, 2, 1, 31, 140, 8, 8, ALIBI | CAUSAL | WINDOW},
    {1, 2, 2, 29, 140, 12, 10, SOFTCAP},
    {1, 2, 1, 29, 90, 12, 10, SOFTCAP | RISING | BIAS_F64 | CAUSAL},
    {1, 4, 2, 19, 140, 8, 8, SINKS},
    {2, 2, 2, 33, 50, 8, 8, SINKS | CAUSAL | KV_LENGTHS | MASK},
    {3, 2, 1, 17, 140, 8, 16, KV_LENGTHS},
    {2, 2, 1, 75, 160, 8, 16, SEGMENTS},
    {2, 2, 2, 50, 160, 8, 10, SEGMENTS | CAUSAL | MASK | BIAS_F32},
    {1, 2, 1, 40, 140, 8, 20, RESIDUAL},
    {2, 2, 2, 26, 70, 9, 33, RESIDUAL | CAUSAL | MASK},
    {1, 2, 1, 26, 140, 8, 20, INFINITE_V},
    {2, 2, 2, 30, 80, 8, 35, INFINITE_V | CAUSAL | MASK},
    {1, 2, 1, 60, 140, 8, 20, QUERIES},
    {2, 2, 2, 33, 66, 9, 17, QUERIES | CAUSAL | RESIDUAL | RISING},
    {2, 2, 1, 45, 135, 8, 8, QUERIES | MASK | BIAS_F32 | KV_LENGTHS},
    {1, 2, 2, 45, 60, 8, 8, QUERIES | SOFTCAP | ALIBI | WINDOW | SEGMENTS},
    {2, 4, 2, 35, 135, 12, 20,
     CAUSAL | WINDOW | MASK | BIAS_F64 | ALIBI | SOFTCAP | SINKS | KV_LENGTHS | SEGMENTS |
         RESIDUAL | Q_OFFSET},
    {1, 2, 1, 33, 140, 40, 36, LARGE_V},
    {1, 4, 2, 1, 1100, 16, 33, LARGE_V}, /* two splits of the keys, read where they lie */
    {1, 2, 2, 26, 1100, 4, 5, LARGE_V | SINKS}, /* and packed */
    {2, 2, 2, 30, 80, 8, 35, LARGE_V | CAUSAL | MASK | RESIDUAL},
    {1, 2, 1, 26, 70, 8, 20, LARGE_V | INFINITE_V | CAUSAL},
    {1, 2, 1, 40, 140, 8, 20, LARGE_V | QUERIES | RESIDUAL},
    {1, 4, 2, 40, 140, 33, 20, LARGE_QK},
    {1, 4, 2, 1, 140, 64, 32, LARGE_QK},
    {2, 2, 2, 27, 66, 10, 12, LARGE_QK | LARGE_V | CAUSAL | MASK | RESIDUAL},
    {1, 2, 2, 30, 70, 9, 12, LARGE_QK | QUERIES},
    {1, 2, 1, 30, 140, 10, 12, LARGE_BIAS | BIAS_F32},
    {1, 2, 2, 1, 140, 32, 32, LARGE_BIAS | BIAS_F64 | ALIBI},
    {2, 2, 1, 30, 66, 10, 12, LARGE_BIAS | BIAS_F64 | CAUSAL | MASK},
    {1, 2, 2, 30, 66, 8, 12, LARGE_BIAS | BIAS_F64 | QUERIES},
    {1, 2, 1, 30, 140, 10, 12, LARGE_BIAS | ALIBI | CAUSAL | LARGE_V},
    {1, 2, 1, 150, 200, 64, 64, 0}, /* enough work for two threads */
    {1, 2, 1, 200, 200, 64, 64, CAUSAL}, /* likewise */
    {1, 2, 2, 150, 200, 64, 64, QUERIES},
};

enum operand {
    Q,
    K,
    V,
    RESIDUALS,
    BIAS,
    SLOPES,
    SINK_LOGITS,
    MASK_BYTES,
    LENGTHS,
    OFFSETS,
    Q_SEGMENTS,
    K_SEGMENTS,
    OUT,
    LSE,
    GRAD_OUT,
    GRAD_Q,
    GRAD_K,
    GRAD_V,
    GRAD_BIAS,
    NUM_OPERANDS,
};

enum kind { KIND_F32, KIND_F64, KIND_INT64, KIND_BYTE, KIND_BF16, KIND_HALF, NUM_KINDS };

static const size_t kind_size[] = {4, 8, 8, 1, 2, 2};

static const char *const kind_name[] = {"float32", "float64", "int64", "byte", "bfloat16", "half"};

/* A uniform number of [-1, 1) that depends on nothing but its coordinates (splitmix64). */
static double uniform(enum operand operand, int64_t b, int64_t h, int64_t i, int64_t j)
{
    uint64_t z = (uint64_t)operand + 1;
    const int64_t at[] = {b, h, i, j};
    for (size_t axis = 0; axis < LENGTH(at); axis++) {
        z = (z + (uint64_t)at[axis]) * 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        z ^= z >> 31;
    }
    return (double)(int64_t)z * 0x1p-63;
}

static int64_t kv_length(const struct shape *s, int64_t b)
{
    int64_t length = s->seqlen_k - 3 - 11 * b;
    return s->options & KV_LENGTHS ? (length > 0 ? length : 0) : s->seqlen_k;
}

static int64_t q_offset(const struct shape *s, int64_t b)
{
    return s->options & Q_OFFSET ? b - s->seqlen_q / 4 : kv_length(s, b) - s->seqlen_q;
}

/* Keys that the mask or the segment ids of every row leave out. */
static bool is_hidden(int64_t key) { return key % 7 == 3; }

static bool takes_no_part(const struct shape *s, int64_t b, int64_t key)
{
    return key >= kv_length(s, b) || ((s->options & (MASK | SEGMENTS)) && is_hidden(key));
}

/* The largest finite number of a type. */
static double largest_of(enum kind kind)
{
    return kind == KIND_F64 ? DBL_MAX : kind == KIND_BF16 ? 0x1.fep127 : FLT_MAX;
}

/* Rows and keys of even kv heads: every third one ordinary, the others such that a product is of some 2^200 and a
 * score between 2^100 and that.  Of odd ones: the first two products are 2^140 and -2^140, the rest are 2^100. */
static double large_score_part(bool cancels, enum operand operand, int64_t i, int64_t j, double x)
{
    if (cancels) {
        return j > 1 ? ldexp(x, 50) : j == 1 && operand == K ? -0x1p70 : 0x1p70;
    }
    return i % 3 == 0 ? x : ldexp(x, 100);
}

/* By rows: ordinary; all of them the lowest number; every other one that; large ones; numbers so large that what
 * float32 has left beside them tells nothing apart. */
static double large_bias(enum kind kind, int64_t i, int64_t j, double x)
{
    const double largest = largest_of(kind);
    switch (i % 5) {
    case 0:
        return -largest;
    case 1:
        return j % 2 ? -largest : 3 * x;
    case 2:
        return ldexp(x, kind == KIND_F64 ? 950 : 127);
    case 3:
        return kind == KIND_F64 ? 3 * x - 0x1p30 : 3 * x;
    default:
        return j % 17 == 16 ? -INFINITY : largest;
    }
}

static double value_of(const struct shape *s, enum operand operand, enum kind kind, int64_t b,
                       int64_t h, int64_t i, int64_t j)
{
    const bool rising = s->options & RISING;
    if ((s->options & SHARED) && (operand == MASK_BYTES || operand == BIAS)) {
        b = h = 0;
    }
    const double x = uniform(operand, b, h, i, j);
    switch (operand) {
    case Q:
        if (s->options & LARGE_QK) {
            return large_score_part(h * s->kv_heads / s->heads % 2, operand, i, j, x);
        }
        return rising ? 6 * x : 2 * x;
    case K:
        if (s->options & LARGE_QK) {
            return large_score_part(h % 2, operand, i, j, x);
        }
        return rising ? x * (1 + 3 * (double)i / (double)s->seqlen_k) : x;
    case V:
        if ((s->options & INFINITE_V) && i % 19 == 7 && j % 5 == 1) {
            return i % 2 ? NAN : x > 0 ? INFINITY : -INFINITY;
        }
        if ((s->options & LARGE_V) && j % 4 != 3) {
            return largest_of(kind) * (j % 4 == 0 ? 1 : j % 4 == 1 ? -1 : x);
        }
        return x;
    case BIAS:
        if (s->options & LARGE_BIAS) {
            return large_bias(kind, i, j, x);
        }
        return (i + j) % 17 == 16 ? -INFINITY : 3 * x;
    case SLOPES:
        if (s->options & LARGE_BIAS) {
            return h % 2 ? 0x1p200 : 0x1p-200;
        }
        return ldexp(1 + (double)b, -(int)h - 1);
    case MASK_BYTES:
        return i % 11 == 4 || is_hidden(j) ? 0 : x > -0.5 ? 1 + (double)(j % 2) : 0;
    case LENGTHS:
        return (double)kv_length(s, b);
    case OFFSETS:
        return (double)q_offset(s, b);
    case Q_SEGMENTS:
        return (double)(i * 3 / s->seqlen_q + b % 2);
    case K_SEGMENTS:
        return is_hidden(i) ? 99 : (double)(i * 3 / s->seqlen_k);
    default:
        return x;
    }
}

/* ---- arrays --------------------------------------------------------------------------------- */

enum layout {
    PLAIN,
    SWAPPED, /* heads inside rows, as a view of (batch, seqlen, heads, head_dim) has them */
    COLUMNS_FIRST, /* rows are the contiguous axis */
    REVERSED, /* every stride negative */
    UNALIGNED, /* odd addresses and strides */
    BROADCAST, /* shared operands stored once, with zero strides */
    NUM_LAYOUTS,
};

static const char *const layout_name[] = {
    "plain",     "heads and rows swapped", "columns first", "negative strides",
    "unaligned", "zero strides",
};

struct array {
    enum kind kind;
    char *mapping;
    size_t mapped;
    char *memory; /* bytes of it, up to the guard page */
    size_t bytes;
    char *data;
    int64_t n[4], stride[4]; /* batch, head, row, column */
};

static void die(const char *what)
{
    perror(what);
    exit(2);
}

#define SENTINEL 0xa5

/* Memory that ends where the next byte is a fault. */
static void map_guarded(struct array *a)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const size_t usable = (a->bytes + page - 1) / page * page;
    a->mapped = usable + page;
    a->mapping = mmap(NULL, a->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (a->mapping == MAP_FAILED || mprotect(a->mapping + usable, page, PROT_NONE) != 0) {
        die("mmap");
    }
    a->memory = a->mapping + usable - a->bytes;
    memset(a->memory, SENTINEL, a->bytes);
}

static void array_init(struct array *a, enum layout layout, enum kind kind, const int64_t n[4])
{
    static const int orders[NUM_LAYOUTS][4] = {
        [PLAIN] = {3, 2, 1, 0},    [SWAPPED] = {3, 1, 2, 0},   [COLUMNS_FIRST] = {2, 3, 1, 0},
        [REVERSED] = {3, 2, 1, 0}, [UNALIGNED] = {3, 2, 1, 0}, [BROADCAST] = {3, 2, 1, 0},
    };
    *a = (struct array){.kind = kind};
    int64_t step = (int64_t)kind_size[kind], first = 0;
    for (int axis = 0; axis < 4; axis++) {
        const int x = orders[layout][axis];
        a->n[x] = n[x];
        a->stride[x] = layout == REVERSED ? -step : step;
        first += layout == REVERSED && n[x] > 0 ? (n[x] - 1) * step : 0;
        step *= n[x];
        if (layout == UNALIGNED && axis == 0) {
            step += 3;
        }
    }
    a->bytes = (size_t)step;
    if (layout == UNALIGNED) {
        a->bytes += 1;
        first = 1;
    }
    map_guarded(a);
    a->data = a->memory + first;
}

static void array_free(struct array *a)
{
    if (a->mapping != NULL) {
        munmap(a->mapping, a->mapped);
    }
}

static char *element(const struct array *a, int64_t b, int64_t h, int64_t i, int64_t j)
{
    return a->data + b * a->stride[0] + h * a->stride[1] + i * a->stride[2] + j * a->stride[3];
}

/* To nearest, ties to even. */
static uint16_t upper_half(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)(isnan(x) ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void write_value(char *p, enum kind kind, double x)
{
    const float f32 = (float)x;
    const int64_t int64 = kind == KIND_INT64 ? (int64_t)x : 0;
    const uint8_t byte = kind == KIND_BYTE ? (uint8_t)x : 0;
    const uint16_t bf16 = upper_half(f32);
    const void *const from[] = {&f32, &x, &int64, &byte, &bf16};
    memcpy(p, from[kind], kind_size[kind]);
}

static double read_real(const char *p, enum kind kind)
{
    float f32;
    double f64;
    if (kind == KIND_F64) {
        memcpy(&f64, p, sizeof f64);
        return f64;
    }
    uint32_t bits = 0;
    if (kind == KIND_BF16) {
        memcpy((char *)&bits, p, kind_size[kind]);
        bits <<= 16;
        memcpy(&f32, &bits, sizeof f32);
    } else {
        memcpy(&f32, p, sizeof f32);
    }
    return (double)f32;
}

/* Loop over the coordinates b, h, i, j of an array. */
#define FOR_EACH(a)                                                                                \
    for (int64_t b = 0; b < (a)->n[0]; b++)                                                        \
        for (int64_t h = 0; h < (a)->n[1]; h++)                                                    \
            for (int64_t i = 0; i < (a)->n[2]; i++)                                                \
                for (int64_t j = 0; j < (a)->n[3]; j++)

/* ---- a call --------------------------------------------------------------------------------- */

struct problem {
    const struct shape *shape;
    enum kind kind, lse_kind; /* of q, k, v, out; of lse */
    struct array arrays[NUM_OPERANDS];
    struct fa_attention_params params;
};

/* An axis of one element is one that the array lacks. */
static int64_t stride_of(const struct array *a, int axis)
{
    return a->n[axis] == 1 ? 0 : a->stride[axis];
}

static struct fa_array array_of(const struct array *a)
{
    return (struct fa_array){
        .data = a->data,
        .batch = {stride_of(a, 0)},
        .head = stride_of(a, 1),
        .row = stride_of(a, 2),
        .col = stride_of(a, 3),
    };
}

/* Give the problem one operand, its values set except for results.  repeat > 1: every head stands for
 * that many. */
static struct fa_array add_operand(struct problem *p, enum operand operand, enum layout layout,
                                   enum kind kind, int64_t heads, int64_t rows, int64_t cols,
                                   int64_t repeat)
{
    const struct shape *s = p->shape;
    struct array *a = &p->arrays[operand];
    const bool stored_once =
        layout == BROADCAST && (s->options & SHARED) && (operand == BIAS || operand == MASK_BYTES);
    const int64_t n[] = {stored_once ? 1 : s->batch, stored_once ? 1 : heads, rows, cols};
    array_init(a, layout, kind, n);
    if (operand < OUT || operand == GRAD_OUT) {
        FOR_EACH(a)
        {
            write_value(element(a, b, h, i, j), kind,
                        value_of(s, operand, kind, b, h / repeat, i, j));
        }
    }
    struct fa_array input = array_of(a);
    if (stored_once) {
        input.batch[0] = input.head = 0;
    }
    return input;
}

static enum kind kind_of_reals(enum fa_dtype dtype)
{
    return dtype == FA_F32 ? KIND_F32 : dtype == FA_F64 ? KIND_F64 : KIND_BF16;
}

static void problem_init(struct problem *p, const struct shape *s, enum fa_dtype dtype,
                         enum layout layout, bool repeat_heads)
{
    const unsigned options = s->options;
    const enum kind kind = kind_of_reals(dtype), lse_kind = kind == KIND_F64 ? KIND_F64 : KIND_F32;
    const enum kind bias_kind = options & BIAS_F64 ? KIND_F64 : KIND_F32;
    const int64_t repeat = repeat_heads ? s->heads / s->kv_heads : 1;
    const int64_t kv_heads = s->kv_heads * repeat;
    const int64_t lq = s->seqlen_q, lk = s->seqlen_k, d = s->head_dim, dv = s->head_dim_v;
    *p = (struct problem){.shape = s, .kind = kind, .lse_kind = lse_kind};
    p->params = (struct fa_attention_params){
        .dtype = dtype,
        .kv_dtype = dtype,
        .bias_dtype = options & BIAS_F64 ? FA_F64 : FA_F32,
        .softmax_axis = options & QUERIES ? FA_SOFTMAX_QUERIES : FA_SOFTMAX_KEYS,
        .batch_ndim = 1,
        .batch_shape = {s->batch},
        .num_heads = s->heads,
        .num_kv_heads = kv_heads,
        .seqlen_q = lq,
        .seqlen_k = lk,
        .head_dim = d,
        .head_dim_v = dv,
        .scale = d > 0 ? 1 / sqrt((double)d) : 0,
        .softcap = options & SOFTCAP ? 2.5 : 0,
        .causal = options & CAUSAL,
        .window_left = options & WINDOW ? 37 : -1,
        .window_right = options & WINDOW ? 5 : -1,
        .num_threads = 1,
        .q = add_operand(p, Q, layout, kind, s->heads, lq, d, 1),
        .k = add_operand(p, K, layout, kind, kv_heads, lk, d, repeat),
        .v = add_operand(p, V, layout, kind, kv_heads, lk, dv, repeat),
    };
    add_operand(p, OUT, layout, kind, s->heads, lq, dv, 1);
    add_operand(p, LSE, layout, lse_kind, s->heads, options & QUERIES ? lk : lq, 1, 1);
    p->params.out = array_of(&p->arrays[OUT]);
    p->params.lse = array_of(&p->arrays[LSE]);

    const struct {
        unsigned option;
        enum operand operand;
        struct fa_array *input;
        enum kind kind;
        int64_t heads, rows, cols;
    } optional[] = {
        {RESIDUAL, RESIDUALS, &p->params.residual, kind, s->heads, lq, dv},
        {BIAS_F32 | BIAS_F64, BIAS, &p->params.bias, bias_kind, s->heads, lq, lk},
        {ALIBI, SLOPES, &p->params.alibi_slopes, KIND_F64, s->heads, 1, 1},
        {SINKS, SINK_LOGITS, &p->params.sinks, KIND_F64, s->heads, 1, 1},
        {MASK, MASK_BYTES, &p->params.mask, KIND_BYTE, s->heads, lq, lk},
        {KV_LENGTHS, LENGTHS, &p->params.kv_lengths, KIND_INT64, 1, 1, 1},
        {Q_OFFSET, OFFSETS, &p->params.q_offset, KIND_INT64, 1, 1, 1},
        {SEGMENTS, Q_SEGMENTS, &p->params.q_segment_ids, KIND_INT64, 1, lq, 1},
        {SEGMENTS, K_SEGMENTS, &p->params.k_segment_ids, KIND_INT64, 1, lk, 1},
    };
    for (size_t x = 0; x < LENGTH(optional); x++) {
        if (options & optional[x].option) {
            *optional[x].input =
                add_operand(p, optional[x].operand, layout, optional[x].kind, optional[x].heads,
                            optional[x].rows, optional[x].cols, 1);
        }
    }
}

static void problem_free(struct problem *p)
{
    for (int x = 0; x < NUM_OPERANDS; x++) {
        array_free(&p->arrays[x]);
    }
}

static void run(const struct fa_attention_params *params, const struct fa_kernels *kernels)
{
    enum fa_status status = fa_attention(params, kernels);
    if (status != FA_OK) {
        fprintf(stderr, "fa_attention: status %d\n", (int)status);
        exit(2);
    }
}

/* What a call gave: out, then lse, contiguous. */
struct result {
    size_t bytes, out_bytes;
    char *data;
};

/* Take the results out of their arrays, and see that nothing else there was written. */
static struct result collect(struct problem *p, bool *surroundings_intact)
{
    struct result result = {0};
    const enum operand operands[] = {OUT, LSE};
    for (size_t x = 0; x < LENGTH(operands); x++) {
        const struct array *a = &p->arrays[operands[x]];
        result.out_bytes = result.bytes;
        result.bytes += (size_t)(a->n[0] * a->n[1] * a->n[2] * a->n[3]) * kind_size[a->kind];
    }
    char *to = result.data = malloc(result.bytes + 1);
    if (to == NULL) {
        die("malloc");
    }
    *surroundings_intact = true;
    for (size_t x = 0; x < LENGTH(operands); x++) {
        const struct array *a = &p->arrays[operands[x]];
        const size_t size = kind_size[a->kind];
        FOR_EACH(a)
        {
            char *from = element(a, b, h, i, j);
            memcpy(to, from, size);
            memset(from, SENTINEL, size);
            to += size;
        }
        for (size_t at = 0; at < a->bytes; at++) {
            *surroundings_intact &= (uint8_t)a->memory[at] == SENTINEL;
        }
    }
    return result;
}

static bool same_bits(struct result x, struct result y)
{
    return x.bytes == y.bytes && memcmp(x.data, y.data, x.bytes) == 0;
}

/* ---- checks --------------------------------------------------------------------------------- */

struct tally {
    const struct fa_kernels *kernels;
    int cases, passed, failed;
    double worst; /* units from the scalar set */
    double worst_large; /* units from exact results, of the cases with LARGE */
    uint64_t digest[NUM_KINDS]; /* of every case's result: equal digests are equal bits */
};

static void check(struct tally *t, const struct problem *p, bool ok, const char *what)
{
    const struct shape *s = p->shape;
    if (ok) {
        t->passed++;
        return;
    }
    t->failed++;
    printf("FAILED %s: %s: %s, case %d, options 0x%x\n", fa_kernels_name(t->kernels), what,
           kind_name[p->kind], (int)(s - shapes), s->options);
}

static void check_same(struct tally *t, struct problem *p, struct result expected, const char *what)
{
    bool intact;
    struct result result = collect(p, &intact);
    check(t, p, same_bits(result, expected), what);
    check(t, p, intact, "bytes around the results");
    free(result.data);
}

/* FNV-1a.  Whether a NaN is negative is nobody's promise. */
static void add_to_digest(struct tally *t, const struct problem *p, struct result result)
{
    uint64_t *digest = &t->digest[p->kind];
    for (size_t at = 0, size; at < result.bytes; at += size) {
        const enum kind kind = at < result.out_bytes ? p->kind : p->lse_kind;
        const bool nan = isnan(read_real(result.data + at, kind));
        size = kind_size[kind];
        for (size_t x = 0; x < size; x++) {
            *digest ^= nan ? 0xff : (uint8_t)result.data[at + x];
            *digest *= 0x100000001b3u;
        }
    }
}

static double largest_norm(const struct array *a)
{
    double largest = 0, sum = 0;
    FOR_EACH(a)
    {
        const double x = read_real(element(a, b, h, i, j), a->kind);
        sum = (j == 0 ? 0 : sum) + x * x;
        largest = fmax(largest, sum);
    }
    return sqrt(largest);
}

/* K of the tolerance against exact results: of scores that float32 computes; and of large_bias in float64, which
 * float32 gives to it. */
#define LARGE_BOUND 64
#define LARGE_BIAS_BOUND 0x1p31

static double large_bound(const struct problem *p)
{
    return p->kind == KIND_F64 && (p->shape->options & LARGE_BIAS) ? LARGE_BIAS_BOUND : LARGE_BOUND;
}

/* K of the tolerance.  Bias and sinks are below 3, slopes at most batch / 2. */
static double score_bound(const struct problem *p)
{
    const struct shape *s = p->shape;
    double bound = 1 + p->params.scale * largest_norm(&p->arrays[Q]) * largest_norm(&p->arrays[K]);
    bound += s->options & (BIAS_F32 | BIAS_F64) ? 3 : 0;
    bound += s->options & SINKS ? 1 : 0;
    bound += s->options & LARGE_BIAS ? large_bound(p) : 0;
    if (s->options & ALIBI) {
        bound += (double)s->batch / 2 * (double)(s->seqlen_q + s->seqlen_k);
    }
    return bound;
}

/* In units, of what is beyond `slack`; infinite where one is NaN, or infinite, and the other is not the same. */
static double distance(double x, double y, double unit, double slack)
{
    if (x == y || (isnan(x) && isnan(y))) {
        return 0;
    }
    return isfinite(x) && isfinite(y) ? fmax(0, fabs(x - y) - slack) / unit : INFINITY;
}

static double unit_roundoff(enum kind kind)
{
    return kind == KIND_F32 ? FLT_EPSILON / 2 : kind == KIND_F64 ? DBL_EPSILON / 2 : 0x1p-18;
}

static void check_close(struct tally *t, const struct problem *p, struct result result,
                        struct result scalar)
{
    const struct shape *s = p->shape;
    const double u = unit_roundoff(p->kind);
    const double bound = score_bound(p);
    const double weight = s->options & QUERIES ? fmax(1, (double)s->seqlen_k) : 1;
    double worst = 0;
    for (size_t at = 0, size; at < result.bytes; at += size) {
        const bool of_out = at < result.out_bytes;
        const enum kind kind = of_out ? p->kind : p->lse_kind;
        const double x = read_real(result.data + at, kind);
        const double y = read_real(scalar.data + at, kind);
        const double slack = kind == KIND_BF16 ? 0x1p-7 * fabs(y) : 0;
        const double unit = of_out ? bound * weight + (s->options & RESIDUAL ? 1 : 0)
                                   : bound + (isfinite(y) ? fabs(y) : 0);
        worst = fmax(worst, distance(x, y, u * unit, slack));
        size = kind_size[kind];
    }
    t->worst = fmax(t->worst, worst);
    check(t, p, worst <= MAX_GAUGE, "distance from the scalar set");
}

/* The score of a row and a key in double, as the specification has it; -inf where the key takes no part.  For the
 * options of the cases with LARGE. */
static double exact_score(const struct problem *p, int64_t b, int64_t h, int64_t i, int64_t j)
{
    const struct shape *s = p->shape;
    const struct array *q = &p->arrays[Q], *k = &p->arrays[K];
    const int64_t kv_head = h * k->n[1] / q->n[1];
    const int64_t distance = i + q_offset(s, b) - j;
    double score = 0;
    if (((s->options & CAUSAL) && distance < 0) ||
        ((s->options & MASK) && *element(&p->arrays[MASK_BYTES], b, h, i, j) == 0)) {
        return -INFINITY;
    }
    for (int64_t c = 0; c < s->head_dim; c++) {
        score += read_real(element(q, b, h, i, c), q->kind) *
                 read_real(element(k, b, kv_head, j, c), k->kind);
    }
    double sum = p->params.scale * score;
    if (s->options & (BIAS_F32 | BIAS_F64)) {
        sum += read_real(element(&p->arrays[BIAS], b, h, i, j), p->arrays[BIAS].kind);
    }
    if (s->options & ALIBI) {
        sum -=
            read_real(element(&p->arrays[SLOPES], b, h, 0, 0), KIND_F64) * fabs((double)distance);
    }
    return sum;
}

/* exp(score - lse) of all scores [rows][cols] of a head in place, each row's (or column's) sum 1; lse may be beyond
 * double beside its sum. */
static void exact_softmax(double *scores, int64_t rows, int64_t cols, int64_t row_step,
                          int64_t col_step, const double *sink, double *lse)
{
    for (int64_t i = 0; i < rows; i++) {
        double max = sink == NULL ? -INFINITY : *sink, sum = 0;
        for (int64_t j = 0; j < cols; j++) {
            max = fmax(max, scores[i * row_step + j * col_step]);
        }
        sum = sink == NULL || max == -INFINITY ? 0 : exp(*sink - max);
        for (int64_t j = 0; j < cols; j++) {
            double *x = scores + i * row_step + j * col_step;
            *x = max == -INFINITY ? 0 : exp(*x - max);
            sum += *x;
        }
        for (int64_t j = 0; j < cols && sum > 0; j++) {
            scores[i * row_step + j * col_step] /= sum;
        }
        lse[i] = max + log(sum);
    }
}

/* Weights [seqlen_q][seqlen_k] of a head, and lse. */
static void exact_weights(const struct problem *p, int64_t b, int64_t h, double *weights,
                          double *lse)
{
    const struct shape *s = p->shape;
    const int64_t lq = s->seqlen_q, lk = s->seqlen_k;
    const bool has_sink = s->options & SINKS;
    const double sink =
        has_sink ? read_real(element(&p->arrays[SINK_LOGITS], 0, h, 0, 0), KIND_F64) : 0;
    for (int64_t i = 0; i < lq; i++) {
        for (int64_t j = 0; j < lk; j++) {
            weights[i * lk + j] = exact_score(p, b, h, i, j);
        }
    }
    if (s->options & QUERIES) {
        exact_softmax(weights, lk, lq, 1, lk, NULL, lse);
    } else {
        exact_softmax(weights, lq, lk, lk, 1, has_sink ? &sink : NULL, lse);
    }
}

/* Distance of an element of the result, in units of the sum of its terms' magnitudes times `bound`.  Values are divided by 2^64: no sum is infinite. */
static double distance_of_sum(const struct problem *p, int64_t b, int64_t h, int64_t i, int64_t c,
                              const double *row_weights, double found, double bound)
{
    const struct shape *s = p->shape;
    const struct array *v = &p->arrays[V];
    const int64_t kv_head = h * v->n[1] / s->heads;
    const double small = 0x1p-64, most = largest_of(p->kind) * small;
    double sum = 0, size = 0;
    for (int64_t j = 0; j < s->seqlen_k; j++) {
        const double w = row_weights[j];
        const double x = w > 0 ? read_real(element(v, b, kv_head, j, c), v->kind) * small : 0;
        sum += w * x;
        size += w * fabs(x);
    }
    if (s->options & RESIDUAL) {
        const double x = read_real(element(&p->arrays[RESIDUALS], b, h, i, c), p->kind) * small;
        sum += x;
        size += fabs(x);
    }
    if (fabs(sum) > most) { /* an average of finite numbers is finite */
        sum = copysign((s->options & QUERIES) || isinf(sum) ? INFINITY : most, sum);
    }
    if (!isfinite(found) || !isfinite(sum)) {
        return distance(found, sum, 1, 0);
    }
    const double slack = p->kind == KIND_BF16 ? 0x1p-8 * fabs(sum) : 0x1p-149 * small;
    const double beyond = fabs(found * small - sum) - slack;
    return beyond > 0 ? beyond / (bound * size) : 0;
}

/* Distance of the results from the specification, computed here in double. */
static void check_exact(struct tally *t, const struct problem *p, struct result result)
{
    const struct shape *s = p->shape;
    const int64_t lq = s->seqlen_q, lk = s->seqlen_k;
    const double bound = unit_roundoff(p->kind) * large_bound(p);
    const char *at = result.data, *lse_at = result.data + result.out_bytes;
    double *weights = calloc((size_t)(lq * lk + lq + lk), sizeof *weights), worst = 0;
    if (weights == NULL) {
        die("calloc");
    }
    double *lse = weights + lq * lk;
    for (int64_t b = 0; b < s->batch; b++) {
        for (int64_t h = 0; h < s->heads; h++) {
            exact_weights(p, b, h, weights, lse);
            for (int64_t i = 0; i < lq; i++) {
                for (int64_t c = 0; c < s->head_dim_v; c++, at += kind_size[p->kind]) {
                    const double found = read_real(at, p->kind);
                    worst =
                        fmax(worst, distance_of_sum(p, b, h, i, c, weights + i * lk, found, bound));
                }
            }
            const int64_t sums = s->options & QUERIES ? lk : lq;
            for (int64_t i = 0; i < sums; i++, lse_at += kind_size[p->lse_kind]) {
                const double found = read_real(lse_at, p->lse_kind);
                const double expected = p->lse_kind == KIND_F32 ? (double)(float)lse[i] : lse[i];
                worst = fmax(worst, distance(found, expected, bound * (1 + fabs(expected)), 0));
            }
        }
    }
    t->worst_large = fmax(t->worst_large, worst);
    check(t, p, worst <= MAX_GAUGE, "distance from the exact results");
    free(weights);
}

/* Rows without a key are 0, or the residual, and lse is their sink, -inf where there is none. */
static void check_empty_rows(struct tally *t, const struct problem *p, struct result result)
{
    const struct array *out = &p->arrays[OUT];
    const size_t size = kind_size[p->kind];
    const char *at = result.data, *lse = result.data + result.out_bytes;
    bool ok = true;
    FOR_EACH(out)
    {
        const bool masked = (p->shape->options & MASK) && i % 11 == 4;
        const bool early = (p->shape->options & CAUSAL) && i + q_offset(p->shape, b) < 0;
        if (masked || early) {
            char expected[8] = {0};
            if (p->shape->options & RESIDUAL) {
                memcpy(expected, element(&p->arrays[RESIDUALS], b, h, i, j), size);
            }
            ok &= memcmp(at, expected, size) == 0;
            const int64_t row = (b * out->n[1] + h) * out->n[2] + i;
            const double found =
                read_real(lse + row * (int64_t)kind_size[p->lse_kind], p->lse_kind);
            const double sink =
                p->shape->options & SINKS
                    ? read_real(element(&p->arrays[SINK_LOGITS], 0, h, 0, 0), KIND_F64)
                    : -INFINITY;
            ok &= (p->shape->options & QUERIES) || found == sink ||
                  fabs(found - sink) <= FLT_EPSILON * fabs(sink);
        }
        at += size;
    }
    check(t, p, ok, "rows without a key");
}

/* NaN of every sort, and infinities. */
static void poison(char *at, enum kind kind, int64_t which)
{
    static const uint32_t f32[] = {0x7fc00000u, 0xffc00000u, 0x7fffffffu, 0x7f800001u,
                                   0xff800001u, 0xffffffffu, 0x7f800000u, 0xff800000u};
    static const uint64_t f64[] = {0x7ff8000000000000u, 0xfff8000000000000u, 0x7fffffffffffffffu,
                                   0x7ff0000000000001u, 0xfff0000000000001u, 0xffffffffffffffffu,
                                   0x7ff0000000000000u, 0xfff0000000000000u};
    static const uint16_t bf16[] = {0x7fc0u, 0xffc0u, 0x7fffu, 0x7f81u,
                                    0xff81u, 0xffffu, 0x7f80u, 0xff80u};
    const size_t x = (size_t)which % LENGTH(f32);
    const void *const from[] = {&f32[x], &f64[x], NULL, NULL, &bf16[x]};
    memcpy(at, from[kind], kind_size[kind]);
}

#define NUM_NANS 6 /* of the patterns above, the first ones */

static void check_poisoned_masked_keys(struct tally *t, struct problem *p, struct result expected)
{
    const enum operand operands[] = {K, V};
    for (size_t x = 0; x < LENGTH(operands); x++) {
        const struct array *a = &p->arrays[operands[x]];
        FOR_EACH(a)
        {
            if (takes_no_part(p->shape, b, i)) {
                poison(element(a, b, h, i, j), a->kind, i + j);
            }
        }
    }
    run(&p->params, t->kernels);
    check_same(t, p, expected, "NaN in keys that take no part");
    for (size_t x = 0; x < LENGTH(operands); x++) {
        const struct array *a = &p->arrays[operands[x]];
        FOR_EACH(a)
        {
            write_value(element(a, b, h, i, j), a->kind,
                        value_of(p->shape, operands[x], a->kind, b, h, i, j));
        }
    }
}

/* A mask of one key range for each query, of bytes that are 2 and then 1: only the latter are not read again. */
static void check_key_ranges(struct tally *t, struct problem *p)
{
    const struct array *a = &p->arrays[MASK_BYTES];
    const int64_t keys = a->n[3] + 1;
    struct result expected = {0};
    bool intact;
    for (int byte = 2; byte >= 1; byte--) {
        FOR_EACH(a)
        {
            const int64_t lo = (b * 5 + i * 3) % keys, hi = (b * 17 + i * 29 + 1) % keys;
            write_value(element(a, b, h, i, j), a->kind, j >= lo && j < hi ? byte : 0);
        }
        run(&p->params, t->kernels);
        if (byte == 2) {
            expected = collect(p, &intact);
        } else {
            check_same(t, p, expected, "mask of key ranges");
        }
    }
    FOR_EACH(a)
    {
        write_value(element(a, b, h, i, j), a->kind,
                    value_of(p->shape, MASK_BYTES, a->kind, b, h, i, j));
    }
    free(expected.data);
}

/* A NaN in a row of q, or in the last key under a causal mask, changes the rows that see it alone. */
static void check_poisoned_row(struct tally *t, struct problem *p, struct result expected,
                               enum operand operand, int64_t which)
{
    const struct shape *s = p->shape;
    const struct array *a = &p->arrays[operand], *out = &p->arrays[OUT];
    const int64_t row = operand == Q ? s->seqlen_q / 2 : s->seqlen_k - 1;
    const size_t size = kind_size[p->kind];
    for (int64_t b = 0; b < a->n[0]; b++) {
        for (int64_t h = 0; h < a->n[1]; h++) {
            poison(element(a, b, h, row, which % a->n[3]), a->kind, which);
        }
    }
    run(&p->params, t->kernels);
    bool intact, others_same = true, seen_is_nan = true;
    struct result result = collect(p, &intact);
    size_t at = 0;
    FOR_EACH(out)
    {
        const int64_t position = i + q_offset(s, b);
        const bool has_key = s->seqlen_k > 0 && (!(s->options & CAUSAL) || position >= 0);
        const bool sees = operand == Q ? i == row && has_key : position >= row;
        /* NaN in one column of v stays in that column. */
        if (sees && (operand != V || j == which % a->n[3])) {
            seen_is_nan &= isnan(read_real(result.data + at, p->kind)) != 0;
        } else if (!sees) {
            others_same &= memcmp(result.data + at, expected.data + at, size) == 0;
        }
        at += size;
    }
    check(t, p, others_same, "rows that see no NaN");
    if (s->options == 0 || s->options == CAUSAL) {
        check(t, p, seen_is_nan, "rows that see a NaN");
    }
    free(result.data);
    for (int64_t b = 0; b < a->n[0]; b++) {
        for (int64_t h = 0; h < a->n[1]; h++) {
            const int64_t j = which % a->n[3];
            write_value(element(a, b, h, row, j), a->kind,
                        value_of(s, operand, a->kind, b, h, row, j));
        }
    }
}

static struct fa_array rows_of(struct fa_array array, int64_t first)
{
    if (array.data != NULL) {
        array.data = (char *)array.data + first * array.row;
    }
    return array;
}

/* Prefill in chunks of `length` rows. */
static void run_in_chunks(const struct problem *p, const struct fa_kernels *kernels, int64_t length)
{
    const struct shape *s = p->shape;
    struct array offsets;
    array_init(&offsets, PLAIN, KIND_INT64, (int64_t[]){s->batch, 1, 1, 1});
    for (int64_t first = 0; first < s->seqlen_q; first += length) {
        struct fa_attention_params chunk = p->params;
        for (int64_t b = 0; b < s->batch; b++) {
            write_value(element(&offsets, b, 0, 0, 0), KIND_INT64,
                        (double)(q_offset(s, b) + first));
        }
        chunk.seqlen_q = s->seqlen_q - first < length ? s->seqlen_q - first : length;
        chunk.q_offset = array_of(&offsets);
        chunk.q = rows_of(chunk.q, first);
        chunk.residual = rows_of(chunk.residual, first);
        chunk.bias = rows_of(chunk.bias, first);
        chunk.mask = rows_of(chunk.mask, first);
        chunk.q_segment_ids = rows_of(chunk.q_segment_ids, first);
        chunk.out = rows_of(chunk.out, first);
        chunk.lse = rows_of(chunk.lse, first);
        run(&chunk, kernels);
    }
    array_free(&offsets);
}

static struct fa_array entry_of(struct fa_array array, int64_t b)
{
    if (array.data != NULL) {
        array.data = (char *)array.data + b * array.batch[0];
    }
    return array;
}

/* Batch entries one by one. */
static void run_by_entry(const struct problem *p, const struct fa_kernels *kernels)
{
    for (int64_t b = 0; b < p->shape->batch; b++) {
        struct fa_attention_params entry = p->params;
        struct fa_array *const inputs[] = {
            &entry.q,
            &entry.k,
            &entry.v,
            &entry.residual,
            &entry.bias,
            &entry.mask,
            &entry.sinks,
            &entry.alibi_slopes,
            &entry.q_offset,
            &entry.kv_lengths,
            &entry.q_segment_ids,
            &entry.k_segment_ids,
        };
        for (size_t x = 0; x < LENGTH(inputs); x++) {
            if (inputs[x] != &entry.sinks) { /* one for all entries */
                *inputs[x] = entry_of(*inputs[x], b);
            }
        }
        entry.out = entry_of(entry.out, b);
        entry.lse = entry_of(entry.lse, b);
        entry.batch_ndim = 0;
        run(&entry, kernels);
    }
}

/* The residual in the very memory of the result. */
static void run_in_place(struct problem *p, const struct fa_kernels *kernels)
{
    const struct array *out = &p->arrays[OUT], *residual = &p->arrays[RESIDUALS];
    FOR_EACH(out)
    {
        memcpy(element(out, b, h, i, j), element(residual, b, h, i, j), kind_size[p->kind]);
    }
    struct fa_attention_params params = p->params;
    params.residual = array_of(out);
    run(&params, kernels);
}

static void check_views(struct tally *t, const struct shape *s, enum fa_dtype dtype,
                        struct result expected)
{
    struct problem p;
    for (int layout = PLAIN + 1; layout < NUM_LAYOUTS; layout++) {
        if (layout != BROADCAST || (s->options & SHARED)) {
            problem_init(&p, s, dtype, (enum layout)layout, false);
            run(&p.params, t->kernels);
            check_same(t, &p, expected, layout_name[layout]);
            problem_free(&p);
        }
    }
    if (s->kv_heads < s->heads) {
        problem_init(&p, s, dtype, PLAIN, true);
        run(&p.params, t->kernels);
        check_same(t, &p, expected, "repeated heads");
        problem_free(&p);
    }
}

static const struct fa_kernels *find_set(const char *name)
{
    for (int i = 0; fa_kernels_available(i) != NULL; i++) {
        if (strcmp(fa_kernels_name(fa_kernels_available(i)), name) == 0) {
            return fa_kernels_available(i);
        }
    }
    fprintf(stderr, "kernel set %s cannot run here\n", name);
    exit(1);
}

/* ---- gradients ------------------------------------------------------------------------------ */

#define DROPOUT_P 0.3

/* Whether the backward pass takes a case, and its gradients are numbers. */
static bool has_gradients(const struct shape *s)
{
    return s->head_dim_v <= FA_MAX_BACKWARD_DIM &&
           !(s->options & (INFINITE_V | LARGE_V | LARGE_QK)) && s->heads > 0;
}

/* Arrays for the gradients of a problem. */
static void add_gradients(struct problem *p, enum layout layout)
{
    const struct shape *s = p->shape;
    const int64_t kv_heads = p->params.num_kv_heads;
    add_operand(p, GRAD_OUT, layout, p->kind, s->heads, s->seqlen_q, s->head_dim_v, 1);
    add_operand(p, GRAD_Q, layout, p->kind, s->heads, s->seqlen_q, s->head_dim, 1);
    add_operand(p, GRAD_K, layout, p->kind, kv_heads, s->seqlen_k, s->head_dim, 1);
    add_operand(p, GRAD_V, layout, p->kind, kv_heads, s->seqlen_k, s->head_dim_v, 1);
    add_operand(p, GRAD_BIAS, PLAIN, p->kind, s->heads, s->seqlen_q, s->seqlen_k, 1);
}

/* The forward pass and the gradients of one problem, contiguous; frees nothing of it. */
static struct result run_backward(struct problem *p, const struct fa_kernels *kernels,
                                  double dropout_p)
{
    static const enum operand gradients[] = {GRAD_Q, GRAD_K, GRAD_V, GRAD_BIAS};
    const bool has_bias = p->params.bias.data != NULL;
    struct fa_attention_params attention = p->params;
    struct result result = {0};
    attention.dropout_p = dropout_p;
    attention.dropout_seed = 0x0123456789abcdefu;
    run(&attention, kernels);
    memset(p->arrays[GRAD_BIAS].memory, 0, p->arrays[GRAD_BIAS].bytes);
    const struct fa_backward_params params = {
        .attention = attention,
        .out = array_of(&p->arrays[OUT]),
        .lse = array_of(&p->arrays[LSE]),
        .grad_out = array_of(&p->arrays[GRAD_OUT]),
        .grad_q = array_of(&p->arrays[GRAD_Q]),
        .grad_k = array_of(&p->arrays[GRAD_K]),
        .grad_v = array_of(&p->arrays[GRAD_V]),
        .grad_dtype = attention.dtype,
        .grad_bias = has_bias ? array_of(&p->arrays[GRAD_BIAS]) : (struct fa_array){0},
        .grad_bias_dtype = attention.dtype,
    };
    const enum fa_status status = fa_attention_backward(&params, kernels);
    if (status != FA_OK) {
        fprintf(stderr, "fa_attention_backward: status %d\n", (int)status);
        exit(2);
    }
    const size_t size = kind_size[p->kind];
    for (size_t x = 0; x < LENGTH(gradients); x++) {
        const struct array *a = &p->arrays[gradients[x]];
        result.bytes += (size_t)(a->n[0] * a->n[1] * a->n[2] * a->n[3]) * size;
    }
    result.out_bytes = result.bytes;
    char *to = result.data = malloc(result.bytes + 1);
    if (to == NULL) {
        die("malloc");
    }
    for (size_t x = 0; x < LENGTH(gradients); x++) {
        const struct array *a = &p->arrays[gradients[x]];
        FOR_EACH(a)
        {
            memcpy(to, element(a, b, h, i, j), size);
            to += size;
        }
    }
    return result;
}

/* A bound of what rounding may do: every gradient is a sum of weights times at most 2 head_dim_v + 1, over the
 * rows or keys that it meets, times at most 8, the largest element of q and k. */
static double gradient_unit(const struct problem *p, double dropout_p)
{
    const struct shape *s = p->shape;
    const double u = p->kind == KIND_F32 ? FLT_EPSILON / 2 : DBL_EPSILON / 2;
    const double over = s->options & QUERIES ? fmax(1, (double)s->seqlen_k) : 1;
    const double rows = fmax(1, (double)s->seqlen_q) * (double)(s->heads / s->kv_heads);
    return u * score_bound(p) * (2 * (double)s->head_dim_v + 1) * 8 * fmax(over, rows) /
           (1 - dropout_p);
}

static void check_same_gradients(struct tally *t, struct problem *p, double dropout_p,
                                 struct result expected, const char *what)
{
    struct result result = run_backward(p, t->kernels, dropout_p);
    check(t, p, same_bits(result, expected), what);
    free(result.data);
}

/* Near the scalar set's, and the same for threads and strides.  Every other case drops weights, and cases take
 * turns at the layouts: an emulator has time for little more. */
static void check_gradients(struct tally *t, const struct shape *s, enum fa_dtype dtype)
{
    const int64_t which = s - shapes;
    const double dropout_p = which % 2 ? DROPOUT_P : 0;
    const enum layout layout = (enum layout)(1 + which / 2 % (BROADCAST - 1));
    struct problem p;
    problem_init(&p, s, dtype, PLAIN, false);
    add_gradients(&p, PLAIN);
    struct result scalar = run_backward(&p, find_set("scalar"), dropout_p);
    struct result result = run_backward(&p, t->kernels, dropout_p);
    const double unit = gradient_unit(&p, dropout_p);
    double worst = 0;
    for (size_t at = 0; at < result.bytes; at += kind_size[p.kind]) {
        worst = fmax(worst, distance(read_real(result.data + at, p.kind),
                                     read_real(scalar.data + at, p.kind), unit, 0));
    }
    check(t, &p, worst <= MAX_GAUGE, "gradients: distance from the scalar set");
    add_to_digest(t, &p, result);
    if (fa_has_openmp()) {
        p.params.num_threads = 2;
        check_same_gradients(t, &p, dropout_p, result, "gradients: two threads");
    }
    problem_free(&p);
    problem_init(&p, s, dtype, layout, false);
    add_gradients(&p, layout);
    check_same_gradients(t, &p, dropout_p, result, layout_name[layout]);
    problem_free(&p);
    free(scalar.data);
    free(result.data);
}

/* ---- weights -------------------------------------------------------------------------------- */

/* Blocks of the map of weights, each way; one, where there are fewer rows or keys. */
#define POOL 3

/* Weights of all heads, or what they are made into, as doubles. */
static double *run_weights(struct problem *p, const struct fa_kernels *kernels,
                           enum fa_weights_form form, int64_t *count)
{
    const struct shape *s = p->shape;
    const size_t size = kind_size[p->lse_kind];
    struct fa_weights_params params = {
        .attention = p->params,
        .form = form,
        .num_rows = s->seqlen_q,
        .num_heads = s->heads,
        .pool_rows = s->seqlen_q < POOL ? 1 : POOL,
        .pool_cols = s->seqlen_k < POOL ? 1 : POOL,
    };
    params.attention.v = params.attention.k;
    params.attention.head_dim_v = 0;
    *count = s->batch * s->heads;
    if (form == FA_WEIGHTS_MEANS) {
        *count *= params.pool_rows * params.pool_cols;
    } else {
        *count *= (form == FA_WEIGHTS_EACH ? s->seqlen_q : 1) * s->seqlen_k;
    }
    params.weights = calloc((size_t)*count + 1, size);
    double *weights = calloc((size_t)*count + 1, sizeof *weights);
    if (params.weights == NULL || weights == NULL) {
        die("calloc");
    }
    if (fa_attention_weights(&params, kernels) != FA_OK) {
        die("fa_attention_weights");
    }
    for (int64_t i = 0; i < *count; i++) {
        weights[i] = read_real((const char *)params.weights + i * (int64_t)size, p->lse_kind);
    }
    free(params.weights);
    return weights;
}

static void check_same_weights(struct tally *t, struct problem *p, enum fa_weights_form form,
                               const double *expected, const char *what)
{
    int64_t count;
    double *weights = run_weights(p, t->kernels, form, &count);
    check(t, p, memcmp(weights, expected, (size_t)count * sizeof *weights) == 0, what);
    free(weights);
}

/* The weights of all rows and keys, to compare with: the scalar set's, or of the cases with LARGE exact ones. */
static double *expected_weights(struct problem *p)
{
    const struct shape *s = p->shape;
    int64_t count;
    double *weights = run_weights(p, find_set("scalar"), FA_WEIGHTS_EACH, &count);
    double *lse = calloc((size_t)(s->seqlen_q + s->seqlen_k + 1), sizeof *lse);
    if (lse == NULL) {
        die("calloc");
    }
    for (int64_t i = 0; (s->options & LARGE) && i < s->batch * s->heads; i++) {
        exact_weights(p, i / s->heads, i % s->heads, weights + i * s->seqlen_q * s->seqlen_k, lse);
    }
    free(lse);
    return weights;
}

/* A sum of weights of block (i, j) of a head's map, cut `rows` x `cols`. */
static double sum_block(const struct shape *s, const double *weights, int64_t i, int64_t rows,
                        int64_t j, int64_t cols)
{
    double sum = 0;
    for (int64_t r = i * s->seqlen_q / rows; r < (i + 1) * s->seqlen_q / rows; r++) {
        for (int64_t c = j * s->seqlen_k / cols; c < (j + 1) * s->seqlen_k / cols; c++) {
            sum += weights[r * s->seqlen_k + c];
        }
    }
    return sum;
}

/* What is summed, against the sums of single weights: in double, but for a tile's rows. */
static void check_sums(struct tally *t, struct problem *p, const double *weights,
                       enum fa_weights_form form)
{
    const struct shape *s = p->shape;
    const int64_t rows = form == FA_WEIGHTS_SUMS || s->seqlen_q < POOL ? 1 : POOL;
    const int64_t cols = form == FA_WEIGHTS_SUMS ? s->seqlen_k : s->seqlen_k < POOL ? 1 : POOL;
    const double u = p->lse_kind == KIND_F32 ? FLT_EPSILON : DBL_EPSILON;
    int64_t count;
    double *summed = run_weights(p, t->kernels, form, &count), worst = 0;
    for (int64_t at = 0; at < count; at++) {
        const int64_t i = at / cols % rows, j = at % cols;
        const double *head = weights + at / (rows * cols) * s->seqlen_q * s->seqlen_k;
        const double number =
            form == FA_WEIGHTS_SUMS
                ? 1
                : (double)((i + 1) * s->seqlen_q / rows - i * s->seqlen_q / rows) *
                      (double)((j + 1) * s->seqlen_k / cols - j * s->seqlen_k / cols);
        const double sum = sum_block(s, head, i, rows, j, cols);
        worst = fmax(worst, distance(summed[at] * number, sum, u * fmax(sum, 1e-30), 0));
    }
    check(t, p, worst <= 40, "sums of weights");
    if (fa_has_openmp()) {
        p->params.num_threads = 2;
        check_same_weights(t, p, form, summed, "sums of weights: two threads");
        p->params.num_threads = 1;
    }
    free(summed);
}

static void check_weights(struct tally *t, const struct shape *s, enum fa_dtype dtype)
{
    const enum layout layout = (enum layout)(1 + (s - shapes) % (BROADCAST - 1));
    int64_t count;
    struct problem p;
    problem_init(&p, s, dtype, PLAIN, false);
    double *expected = expected_weights(&p);
    double *weights = run_weights(&p, t->kernels, FA_WEIGHTS_EACH, &count), worst = 0;
    const double u = p.lse_kind == KIND_F32 ? FLT_EPSILON / 2 : DBL_EPSILON / 2;
    const double bound = s->options & LARGE ? large_bound(&p) : score_bound(&p);
    for (int64_t i = 0; i < count; i++) {
        worst = fmax(worst, distance(weights[i], expected[i], u * bound, 0));
    }
    check(t, &p, worst <= MAX_GAUGE, "weights: distance");
    if (s->seqlen_q > 0 && s->seqlen_k > 0) {
        check_sums(t, &p, weights, FA_WEIGHTS_MEANS);
        check_sums(t, &p, weights, FA_WEIGHTS_SUMS);
    }
    problem_free(&p);
    problem_init(&p, s, dtype, layout, false);
    check_same_weights(t, &p, FA_WEIGHTS_EACH, weights, layout_name[layout]);
    problem_free(&p);
    free(expected);
    free(weights);
}

/* Everything about one case on one kernel set; returns its result. */
static struct result check_case(struct tally *t, const struct shape *s, enum fa_dtype dtype,
                                const struct result *scalar)
{
    struct problem p;
    bool intact;
    problem_init(&p, s, dtype, PLAIN, false);
    run(&p.params, t->kernels);
    struct result result = collect(&p, &intact);
    t->cases++;
    add_to_digest(t, &p, result);
    check(t, &p, intact, "bytes around the results");
    if (s->options & LARGE) {
        check_exact(t, &p, result);
    } else {
        check_close(t, &p, result, *scalar);
    }
    check_empty_rows(t, &p, result);

    run(&p.params, t->kernels);
    check_same(t, &p, result, "run again");
    if (fa_has_openmp()) {
        p.params.num_threads = 2;
        run(&p.params, t->kernels);
        check_same(t, &p, result, "two threads");
        p.params.num_threads = 1;
    }
    run_by_entry(&p, t->kernels);
    check_same(t, &p, result, "batch entries alone");
    if (s->options & RESIDUAL) {
        run_in_place(&p, t->kernels);
        check_same(t, &p, result, "residual in place");
    }
    if (s->options & (MASK | SEGMENTS | KV_LENGTHS)) {
        check_poisoned_masked_keys(t, &p, result);
    }
    if (s->options & MASK) {
        check_key_ranges(t, &p);
    }
    if (!(s->options & QUERIES) && s->seqlen_q > 1) {
        const int64_t chunks[] = {1 + s->seqlen_q / 3, 24};
        for (size_t x = 0; x < LENGTH(chunks); x++) {
            run_in_chunks(&p, t->kernels, chunks[x]);
            check_same(t, &p, result, "prefill in chunks");
        }
    }
    if (!(s->options & QUERIES) && s->batch > 0 && s->head_dim > 0 && s->head_dim_v > 0) {
        const int64_t which = (int64_t)(s - shapes) % NUM_NANS;
        if (s->seqlen_q > 1) {
            check_poisoned_row(t, &p, result, Q, which);
        }
        if ((s->options & CAUSAL) && !(s->options & KV_LENGTHS)) {
            check_poisoned_row(t, &p, result, K, which);
            check_poisoned_row(t, &p, result, V, which);
        }
    }
    problem_free(&p);
    check_views(t, s, dtype, result);
    /* Those of bfloat16 are float32's, rounded: no set has loops of its own for them. */
    if (has_gradients(s) && dtype != FA_BF16) {
        check_gradients(t, s, dtype);
    }
    check_weights(t, s, dtype);
    return result;
}

/* ---- storage: narrow types, pages, packed sequences, splits ---------------------------------- */

/* Sequences of a batch: none, one key, and more than a split of the keys (1024).  Few heads and columns,
 * for the emulators' sake. */
enum {
    STORED = 4,
    LONGEST = 1100,
    STORED_HEADS = 4,
    STORED_KV_HEADS = 2,
    STORED_DIM = 72,
    STORED_DIM_V = 40,
    PAGE = 48,
    PAGES = (LONGEST + PAGE - 1) / PAGE,
};
static const int64_t stored_length[STORED] = {200, 0, LONGEST, 1};

/* Numbers that every type holds exactly: small integers over a power of two, which for FA_I8 is the scale of
 * their key.  So the bits of a narrow type are those of float32. */
static int64_t stored_integer(enum operand operand, int64_t b, int64_t h, int64_t i, int64_t j)
{
    return (int64_t)(100 * uniform(operand, b, h, i, j));
}

static int stored_exponent(int64_t i) { return -5 - (int)(i % 3); }

static void write_stored(char *p, enum fa_dtype dtype, double x)
{
    const float f32 = (float)x;
    uint32_t bits;
    memcpy(&bits, &f32, sizeof bits);
    const uint32_t exponent = bits >> 23 & 0xff, mantissa = bits >> 13 & 0x3ff;
    const uint16_t bf16 = (uint16_t)(bits >> 16);
    const uint16_t f16 =
        (uint16_t)((bits >> 16 & 0x8000) | (x == 0 ? 0 : (exponent - 112) << 10 | mantissa));
    const int8_t i8 = (int8_t)x;
    const void *const from = dtype == FA_F32    ? (const void *)&f32
                             : dtype == FA_F16  ? (const void *)&f16
                             : dtype == FA_BF16 ? (const void *)&bf16
                                                : (const void *)&i8;
    memcpy(p, from, (size_t)fa_dtype_size(dtype));
}

static double read_stored(const char *p, enum fa_dtype dtype)
{
    uint16_t half;
    if (dtype == FA_F32) {
        return read_real(p, KIND_F32);
    }
    memcpy(&half, p, sizeof half);
    if (dtype == FA_BF16) {
        const uint32_t bits = (uint32_t)half << 16;
        float f32;
        memcpy(&f32, &bits, sizeof f32);
        return (double)f32;
    }
    const int exponent = half >> 10 & 31;
    const double magnitude =
        exponent == 0 ? ldexp(half & 1023, -24) : ldexp((half & 1023) + 1024, exponent - 25);
    return half & 0x8000 ? -magnitude : magnitude;
}

static enum kind kind_of(enum fa_dtype dtype)
{
    return dtype == FA_F32 ? KIND_F32 : dtype == FA_I8 ? KIND_BYTE : KIND_HALF;
}

enum placing { IN_ONE_PIECE, IN_PAGES, PACKED, NUM_PLACINGS };

static const char *const placing_name[] = {"in one piece", "pages", "packed sequences"};

struct stored {
    struct array q, k, v, k_scale, v_scale, table, starts[2], lengths, out, lse;
    struct fa_attention_params params;
};

/* Where key i of sequence b is kept: block, slot. */
static void place_key(enum placing placing, int64_t b, int64_t *i, int64_t *block)
{
    *block = placing == IN_ONE_PIECE ? b : 0;
    if (placing == IN_PAGES) {
        *block =
            ((b * PAGES + *i / PAGE) * 7 + 3) % (STORED * PAGES); /* 7 and 4 * 23 share no factor */
        *i %= PAGE;
    } else if (placing == PACKED) {
        for (int64_t before = 0; before < b; before++) {
            *i += stored_length[before];
        }
    }
}

static void add_stored(struct array *a, struct array *scale, enum operand operand,
                       enum placing placing, enum fa_dtype dtype, int64_t width)
{
    int64_t total = 0;
    for (int64_t b = 0; b < STORED; b++) {
        total += stored_length[b];
    }
    const int64_t blocks = placing == PACKED ? 1 : placing == IN_PAGES ? STORED * PAGES : STORED;
    const int64_t slots = placing == PACKED ? total : placing == IN_PAGES ? PAGE : LONGEST;
    array_init(a, PLAIN, kind_of(dtype), (int64_t[]){blocks, STORED_KV_HEADS, slots, width});
    array_init(scale, PLAIN, KIND_F32, (int64_t[]){blocks, STORED_KV_HEADS, slots, 1});
    for (int64_t b = 0; b < STORED; b++) {
        for (int64_t h = 0; h < STORED_KV_HEADS; h++) {
            for (int64_t i = 0; i < stored_length[b]; i++) {
                int64_t block, slot = i;
                place_key(placing, b, &slot, &block);
                const double factor = ldexp(1, stored_exponent(i));
                write_value(element(scale, block, h, slot, 0), KIND_F32, factor);
                for (int64_t j = 0; j < width; j++) {
                    const double x = (double)stored_integer(operand, b, h, i, j);
                    write_stored(element(a, block, h, slot, j), dtype,
                                 dtype == FA_I8 ? x : x * factor);
                }
            }
        }
    }
}

static void stored_init(struct stored *s, enum placing placing, enum fa_dtype dtype,
                        enum fa_dtype kv_dtype, int64_t rows)
{
    const bool packed = placing == PACKED, paged = placing == IN_PAGES;
    const int64_t blocks = packed ? 1 : STORED, tokens = packed ? STORED * rows : rows;
    *s = (struct stored){0};
    array_init(&s->q, PLAIN, kind_of(dtype), (int64_t[]){blocks, STORED_HEADS, tokens, STORED_DIM});
    FOR_EACH(&s->q)
    {
        const int64_t entry = packed ? i / rows : b, row = packed ? i % rows : i;
        write_stored(element(&s->q, b, h, i, j), dtype,
                     ldexp((double)stored_integer(Q, entry, h, row, j), -6));
    }
    add_stored(&s->k, &s->k_scale, K, placing, kv_dtype, STORED_DIM);
    add_stored(&s->v, &s->v_scale, V, placing, kv_dtype, STORED_DIM_V);
    array_init(&s->out, PLAIN, kind_of(dtype),
               (int64_t[]){blocks, STORED_HEADS, tokens, STORED_DIM_V});
    array_init(&s->lse, PLAIN, KIND_F32, (int64_t[]){blocks, STORED_HEADS, tokens, 1});
    array_init(&s->lengths, PLAIN, KIND_INT64, (int64_t[]){STORED, 1, 1, 1});
    array_init(&s->table, PLAIN, KIND_INT64, (int64_t[]){STORED, 1, PAGES, 1});
    array_init(&s->starts[0], PLAIN, KIND_INT64, (int64_t[]){1, 1, STORED + 1, 1});
    array_init(&s->starts[1], PLAIN, KIND_INT64, (int64_t[]){1, 1, STORED + 1, 1});
    int64_t keys = 0;
    for (int64_t b = 0; b <= STORED; b++) {
        write_value(element(&s->starts[0], 0, 0, b, 0), KIND_INT64, (double)(b * rows));
        write_value(element(&s->starts[1], 0, 0, b, 0), KIND_INT64, (double)keys);
        if (b == STORED) {
            break;
        }
        keys += stored_length[b];
        write_value(element(&s->lengths, b, 0, 0, 0), KIND_INT64, (double)stored_length[b]);
        for (int64_t page = 0; page < PAGES; page++) {
            int64_t block, slot = page * PAGE;
            place_key(IN_PAGES, b, &slot, &block);
            write_value(element(&s->table, b, 0, page, 0), KIND_INT64, (double)block);
        }
    }
    s->params = (struct fa_attention_params){
        .dtype = dtype,
        .kv_dtype = kv_dtype,
        .batch_ndim = 1,
        .batch_shape = {STORED},
        .num_heads = STORED_HEADS,
        .num_kv_heads = STORED_KV_HEADS,
        .seqlen_q = tokens,
        .seqlen_k = packed ? keys : LONGEST,
        .head_dim = STORED_DIM,
        .head_dim_v = STORED_DIM_V,
        .scale = 1 / sqrt(STORED_DIM),
        .causal = true,
        .window_left = -1,
        .window_right = -1,
        .num_threads = 1,
        .q = array_of(&s->q),
        .k = array_of(&s->k),
        .v = array_of(&s->v),
        .out = array_of(&s->out),
        .lse = array_of(&s->lse),
    };
    if (kv_dtype == FA_I8) {
        s->params.k_scale = array_of(&s->k_scale);
        s->params.v_scale = array_of(&s->v_scale);
    }
    if (packed) {
        s->params.q_starts = (const int64_t *)(const void *)s->starts[0].data;
        s->params.k_starts = (const int64_t *)(const void *)s->starts[1].data;
        struct fa_array *const inputs[] = {&s->params.q, &s->params.k, &s->params.v};
        for (size_t x = 0; x < LENGTH(inputs); x++) {
            inputs[x]->batch[0] = 0;
        }
        s->params.out.batch[0] = s->params.lse.batch[0] = 0;
    } else {
        s->params.kv_lengths = array_of(&s->lengths);
    }
    if (paged) {
        s->params.page_table = array_of(&s->table);
        s->params.page_size = PAGE;
    }
}

static void stored_free(struct stored *s)
{
    struct array *const arrays[] = {&s->q,         &s->k,         &s->v,       &s->k_scale,
                                    &s->v_scale,   &s->table,     &s->lengths, &s->out,
                                    &s->starts[0], &s->starts[1], &s->lse};
    for (size_t x = 0; x < LENGTH(arrays); x++) {
        array_free(arrays[x]);
    }
}

/* The set whose float32 operations serve narrow storage, bit for bit: amx has others for float32 alone. */
static const struct fa_kernels *set_of_narrow(const struct fa_kernels *kernels)
{
    return strcmp(fa_kernels_name(kernels), "amx") == 0 ? find_set("avx512") : kernels;
}

/* Compare with the float32 call in one piece: the same bits from float32 queries, one rounding away from
 * 16-bit ones.  bfloat16 may have products of its own: weights are 2^-18 off there, and lse 2^-20. */
static bool stored_agrees(const struct stored *s, const struct stored *expected, bool packed,
                          int64_t rows)
{
    const enum fa_dtype dtype = s->params.dtype;
    const double unit = dtype == FA_F16 ? 0x1p-11 : 0x1p-8;
    bool ok = true;
    FOR_EACH(&expected->out)
    {
        const int64_t entry = packed ? 0 : b, row = packed ? b * rows + i : i;
        const char *want = element(&expected->out, b, h, i, j);
        const char *got = element(&s->out, entry, h, row, j);
        if (dtype == FA_F32) {
            ok &= memcmp(got, want, sizeof(float)) == 0;
        } else {
            const double x = read_stored(want, FA_F32), y = read_stored(got, dtype);
            ok &= fabs(x - y) <= unit * fabs(x) + (dtype == FA_BF16 ? 0x1p-16 : 0x1p-24);
        }
        if (j == 0) {
            const char *want_lse = element(&expected->lse, b, h, i, 0);
            const char *got_lse = element(&s->lse, entry, h, row, 0);
            const double x = read_real(want_lse, KIND_F32), y = read_real(got_lse, KIND_F32);
            ok &= dtype == FA_BF16 ? x == y || fabs(x - y) <= 0x1p-20 * (1 + fabs(x))
                                   : memcmp(got_lse, want_lse, sizeof(float)) == 0;
        }
    }
    return ok;
}

/* Rows in ones, threes and thirties: read where they lie, or packed; in one task, or one for each split. */
static void check_storage(struct tally *t)
{
    static const struct {
        enum fa_dtype dtype, kv_dtype;
        const char *name;
    } types[] = {
        {FA_F32, FA_F32, "float32"},
        {FA_F32, FA_F16, "float16 beside float32"},
        {FA_F16, FA_F16, "float16"},
        {FA_F32, FA_BF16, "bfloat16 beside float32"},
        {FA_BF16, FA_BF16, "bfloat16"},
        {FA_F32, FA_I8, "int8"},
        {FA_F16, FA_I8, "int8 beside float16"},
    };
    static const int64_t rows[] = {1, 3, 30};
    for (size_t n = 0; n < LENGTH(rows); n++) {
        struct stored same, widened;
        stored_init(&same, IN_ONE_PIECE, FA_F32, FA_F32, rows[n]);
        stored_init(&widened, IN_ONE_PIECE, FA_F32, FA_F32, rows[n]);
        run(&same.params, t->kernels);
        run(&widened.params, set_of_narrow(t->kernels));
        for (size_t x = 0; x < LENGTH(types); x++) {
            const struct stored *expected = types[x].kv_dtype == FA_F32 ? &same : &widened;
            for (int placing = IN_ONE_PIECE; placing < NUM_PLACINGS; placing++) {
                if (placing == PACKED && types[x].dtype != types[x].kv_dtype) {
                    continue; /* not a call that exists */
                }
                struct stored s;
                stored_init(&s, (enum placing)placing, types[x].dtype, types[x].kv_dtype, rows[n]);
                for (int threads = 1; threads <= (fa_has_openmp() ? 3 : 1); threads++) {
                    s.params.num_threads = threads;
                    run(&s.params, t->kernels);
                    if (stored_agrees(&s, expected, placing == PACKED, rows[n])) {
                        t->passed++;
                    } else {
                        t->failed++;
                        printf("FAILED %s: %s, %s, %d rows, %d threads\n",
                               fa_kernels_name(t->kernels), types[x].name, placing_name[placing],
                               (int)rows[n], threads);
                    }
                    memset(s.out.memory, SENTINEL, s.out.bytes);
                    memset(s.lse.memory, SENTINEL, s.lse.bytes);
                }
                stored_free(&s);
                t->cases++;
            }
        }
        stored_free(&same);
        stored_free(&widened);
    }
}

/* Pointers of a table, from byte `first` to its end, that are NULL. */
static int count_null(const void *table, size_t first, size_t bytes)
{
    const char *at = (const char *)table + first, *end = (const char *)table + bytes;
    int count = 0;
    for (; at < end; at += sizeof(void *)) {
        static const char null[sizeof(void *)];
        count += memcmp(at, null, sizeof null) == 0;
    }
    return count;
}

/* No slot is empty, and sizes are what engine.h says of them. */
static void check_tables(struct tally *t)
{
    const struct fa_kernels *kernels = t->kernels;
    const struct fa_tile_ops *const ops[] = {kernels->f32, kernels->f64};
    const struct fa_gradient_engine *const gradients[] = {kernels->gradients_f32,
                                                          kernels->gradients_f64};
    int wrong = count_null(kernels, 0, sizeof *kernels), engines = 0;
    for (; kernels->engines[engines] != NULL; engines++) {
        const struct fa_engine *e = kernels->engines[engines];
        wrong += count_null(e, offsetof(struct fa_engine, takes), sizeof *e);
        wrong += e->name == NULL || (e->ops != kernels->f32 && e->ops != kernels->f64);
        wrong += e->tile_q < FA_MIN_TILE_Q || e->tile_q > FA_MAX_TILE_Q || e->tile_q % e->mr != 0;
        wrong += e->nr % e->ops->vl != 0 || e->row_step == 0;
        wrong += e->multiplies_beside && e->scale_at != FA_SCALE_ROWS;
    }
    for (int i = 0; i < 2; i++) {
        const struct fa_engine *last = kernels->engines[engines - 2 + i];
        wrong += count_null(ops[i], offsetof(struct fa_tile_ops, scale_scores), sizeof *ops[i]);
        wrong += count_null(gradients[i], offsetof(struct fa_gradient_engine, load_rows),
                            sizeof *gradients[i]);
        wrong += last->ops != ops[i] || gradients[i]->ops != ops[i] || gradients[i]->nr != last->nr;
    }
    if (wrong > 0) {
        printf("FAILED %s: %d slots of its tables\n", fa_kernels_name(kernels), wrong);
    }
    t->passed += wrong == 0;
    t->failed += wrong > 0;
}

int main(int argc, char **argv)
{
    struct tally tallies[MAX_SETS];
    int num_sets = 0, passed = 0, failed = 0;
    if (argc < 2 || argc - 2 > MAX_SETS) {
        fprintf(stderr, "usage: kernel_sets WHERE [SET...]\n");
        return 2;
    }
    if (fa_team_init() != FA_OK) {
        die("fa_team_init");
    }
    for (int i = 0; num_sets < MAX_SETS; i++) {
        const struct fa_kernels *kernels =
            argc > 2 ? (i < argc - 2 ? find_set(argv[i + 2]) : NULL) : fa_kernels_available(i);
        if (kernels == NULL) {
            break;
        }
        if (!fa_kernels_request(kernels)) {
            die("fa_kernels_request");
        }
        tallies[num_sets] = (struct tally){.kernels = kernels};
        for (int kind = 0; kind < NUM_KINDS; kind++) {
            tallies[num_sets].digest[kind] = 0xcbf29ce484222325u;
        }
        num_sets++;
    }
    for (size_t x = 0; x < LENGTH(shapes); x++) {
        static const enum fa_dtype dtypes[] = {FA_F32, FA_F64, FA_BF16};
        for (size_t y = 0; y < LENGTH(dtypes); y++) {
            const enum fa_dtype dtype = dtypes[y];
            struct tally reference = {.kernels = find_set("scalar")};
            struct problem p;
            bool intact;
            problem_init(&p, &shapes[x], dtype, PLAIN, false);
            run(&p.params, reference.kernels);
            struct result scalar = collect(&p, &intact);
            problem_free(&p);
            for (int i = 0; i < num_sets; i++) {
                free(check_case(&tallies[i], &shapes[x], dtype, &scalar).data);
            }
            free(scalar.data);
        }
    }
    for (int i = 0; i < num_sets; i++) {
        check_tables(&tallies[i]);
        check_storage(&tallies[i]);
    }
    for (int i = 0; i < num_sets; i++) {
        const struct tally *t = &tallies[i];
        printf("%-7s %d cases, %d checks, %s, %s OpenMP, at most %.2f of %g units from scalar, "
               "%.2f from exact, digest %016llx_%016llx_%016llx\n",
               fa_kernels_name(t->kernels), t->cases, t->passed + t->failed, argv[1],
               fa_has_openmp() ? "with" : "without", t->worst, MAX_GAUGE, t->worst_large,
               (unsigned long long)t->digest[KIND_F32], (unsigned long long)t->digest[KIND_F64],
               (unsigned long long)t->digest[KIND_BF16]);
        passed += t->passed;
        failed += t->failed;
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
