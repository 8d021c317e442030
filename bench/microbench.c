/* The inner loops alone, on data that stays in L1, beside a loop of multiply-adds on registers only.
 *
 *     make microbench
 *
 * A line per kernel set and element type:
 *   q k^T, p v   the two products of a score tile, as shares of the register-only loop; above 100 % in the tile unit (amx)
 *   softmax      the exponentials included, in cycles per 8 scores
 *   pack k, v    in cycles per 8 elements
 * A cycle is the time of 32 float32 or 16 float64 operations of the register-only loop: what a core with
 * two 256-bit multiply-add pipes does in one.
 *
 * The contenders take turns in short bursts, each between two bursts of the register-only loop, and the median
 * ratio counts, because the clock of a shared core changes from one millisecond to the next.
 */
#define _POSIX_C_SOURCE 200809L

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "geometry.h"
#include "engine.h"
#include "workspace.h"

#define TURNS 200
/* Calls per burst, and rounds of the register-only loop: 50 to 100 us, long against reading the clock, short
 * against a time slice. */
#define CALLS 16
#define FMA_ROUNDS 10000

enum loop { FMA, SCORES, VALUES, SOFTMAX, PACK_KEYS, PACK_VALUES, LOOPS };

struct bench {
    const struct fa_engine *engine;
    const struct fa_kernels *kernels;
    enum fa_dtype dtype;
    struct fa_geometry geometry;
    struct fa_workspace ws;
    char *k, *v; /* one block, as a caller's contiguous arrays */
    struct fa_rows keys, values;
};

static double processor_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void run(const struct bench *b, enum loop loop)
{
    const struct fa_engine *engine = b->engine;
    const struct fa_geometry *g = &b->geometry;
    const struct fa_workspace *ws = &b->ws;
    struct fa_wanted nothing = {0};
    const size_t dim = (size_t)g->params->head_dim, block_k = (size_t)g->block_k;
    const size_t rows = (size_t)g->tile_q, depth = (size_t)g->depth;
    const size_t value_panel = (size_t)g->value_depth * engine->nr;
    switch (loop) {
    case SCORES:
        engine->scores(
            &(struct fa_product){
                .rows = rows,
                .depth = depth,
                .panels = block_k / engine->nr,
                .a = ws->q,
                .a_stride = depth,
                .b = ws->k,
                .b_panel = depth * engine->nr,
                .c = ws->scores,
                .c_row = block_k,
            },
            1, &nothing);
        break;
    case VALUES:
        engine->values(
            &(struct fa_product){
                .rows = rows,
                .depth = block_k,
                .panels = dim / engine->nr,
                .a = ws->scores,
                .a_stride = block_k,
                .b = ws->v,
                .b_panel = value_panel,
                .c = ws->split.acc,
                .c_row = dim,
                .accumulate = true,
            },
            &nothing);
        break;
    case SOFTMAX:
        engine->softmax(&(struct fa_softmax){
            .scores = ws->scores,
            .ld = block_k,
            .rows = rows,
            .cols = block_k,
            .factor = 1,
            .state = &ws->split,
            .ldacc = dim,
        });
        break;
    case PACK_KEYS:
        engine->pack_keys(ws->k, block_k, dim, &b->keys);
        break;
    case PACK_VALUES:
        engine->pack_values(ws->v, value_panel, block_k, dim, &b->values);
        break;
    default:
        break;
    }
}

/* How long a call of each loop takes, in operations of the register-only loop that ran right before and after
 * it: the clock of a shared core changes from burst to burst, and both sides of a ratio must see the same.
 * Medians of the turns. */
static int compare(const void *left, const void *right)
{
    const double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

static double burst(const struct bench *b, enum loop loop)
{
    const double start = processor_seconds();
    if (loop == FMA) {
        volatile double sink = fa_multiply_add(b->kernels, b->dtype, FMA_ROUNDS);
        (void)sink;
    } else {
        for (int call = 0; call < CALLS; call++) {
            run(b, loop);
        }
    }
    return processor_seconds() - start;
}

static void measure(const struct bench *b, double operations[LOOPS], double *peak)
{
    static double ratios[LOOPS][TURNS];
    const double round = fa_multiply_add(b->kernels, b->dtype, 1);
    double fastest = INFINITY, before = burst(b, FMA);
    for (int turn = 0; turn < TURNS; turn++) {
        for (int i = 0; i < LOOPS; i++) {
            const double seconds = burst(b, (enum loop)i), after = burst(b, FMA);
            ratios[i][turn] = seconds / ((before + after) / 2);
            before = after;
            fastest = after < fastest ? after : fastest;
        }
    }
    *peak = round * FMA_ROUNDS / fastest;
    for (int i = 0; i < LOOPS; i++) {
        qsort(ratios[i], TURNS, sizeof(double), compare);
        operations[i] = ratios[i][TURNS / 2] * round * FMA_ROUNDS / CALLS;
    }
}

static void fill(char *data, int64_t count, enum fa_dtype dtype)
{
    for (int64_t i = 0; i < count; i++) {
        double x = (double)(rand() % 2001 - 1000) / 1000;
        if (dtype == FA_F32) {
            ((float *)(void *)data)[i] = (float)x;
        } else {
            ((double *)(void *)data)[i] = x;
        }
    }
}

static int report(const struct fa_kernels *kernels, enum fa_dtype dtype, int64_t head_dim)
{
    struct fa_attention_params params = {
        .dtype = dtype,
        .kv_dtype = dtype,
        .num_heads = 1,
        .num_kv_heads = 1,
        .seqlen_q = 4096,
        .seqlen_k = 4096,
        .head_dim = head_dim,
        .head_dim_v = head_dim,
        .num_threads = 1,
    };
    struct bench b = {
        .engine = fa_engine_for(kernels, fa_ops_for(kernels, dtype), &params, FA_FORWARD),
        .kernels = kernels,
        .dtype = dtype,
    };
    int64_t bytes;
    if (fa_geometry_init(&b.geometry, &params, b.engine) != FA_OK ||
        !fa_workspace_bytes(&b.geometry, &bytes)) {
        return 1;
    }
    const int64_t elements = b.geometry.block_k * head_dim;
    char *memory = fa_allocate(bytes);
    b.k = fa_allocate(elements * (int64_t)b.engine->ops->size);
    b.v = fa_allocate(elements * (int64_t)b.engine->ops->size);
    if (memory == NULL || b.k == NULL || b.v == NULL) {
        return 1;
    }
    b.ws = fa_workspace_at(&b.geometry, memory);
    const int64_t size = (int64_t)b.engine->ops->size;
    for (int64_t j = 0; j < b.geometry.block_k; j++) {
        b.ws.k_row[j] = b.k + j * head_dim * size;
        b.ws.v_row[j] = b.v + j * head_dim * size;
    }
    b.keys = (struct fa_rows){.row = b.ws.k_row, .col_stride = size, .dtype = dtype};
    b.values = (struct fa_rows){.row = b.ws.v_row, .col_stride = size, .dtype = dtype};
    fill(b.k, elements, dtype);
    fill(b.v, elements, dtype);
    const size_t rows = (size_t)b.geometry.tile_q;
    b.engine->load_rows(b.ws.q, rows, (size_t)head_dim, &b.keys, 1);
    b.engine->ops->softmax_begin(rows, &b.ws.split, (size_t)head_dim);
    b.engine->enter();
    run(&b, PACK_KEYS);
    run(&b, PACK_VALUES);

    double operations[LOOPS], peak;
    measure(&b, operations, &peak);
    b.engine->leave();
    const double cycle = dtype == FA_F32 ? 32 : 16;
    const double scores = (double)b.geometry.tile_q * (double)b.geometry.block_k;
    const double product = 2 * scores * (double)head_dim;
    printf("%-7s %s  head_dim %3d  %6.1f GFLOP/s  q k^T %5.1f %%  p v %5.1f %%  softmax %5.2f  "
           "pack k %5.2f  pack v %5.2f\n",
           fa_kernels_name(kernels), dtype == FA_F32 ? "float32" : "float64", (int)head_dim,
           peak / 1e9, 100 * product / operations[SCORES], 100 * product / operations[VALUES],
           operations[SOFTMAX] / cycle / (scores / 8),
           operations[PACK_KEYS] / cycle / ((double)elements / 8),
           operations[PACK_VALUES] / cycle / ((double)elements / 8));
    fa_release(memory);
    fa_release(b.k);
    fa_release(b.v);
    return 0;
}

int main(void)
{
    int failed = 0;
    /* The scalar set runs on other pipes: the cycle above is not its own. */
    for (int i = 0; fa_kernels_available(i) != NULL; i++) {
        if (fa_kernels_available(i)->f32->vl == 1) {
            continue;
        }
        if (!fa_kernels_request(fa_kernels_available(i))) {
            fprintf(stderr, "%s: refused\n", fa_kernels_name(fa_kernels_available(i)));
            return 1;
        }
        failed |= report(fa_kernels_available(i), FA_F32, 64);
        failed |= report(fa_kernels_available(i), FA_F32, 128);
        failed |= report(fa_kernels_available(i), FA_F64, 64);
    }
    return failed;
}
