/* The most that this machine can do, for benchmarks to compare with. */
#include "common.h"
#include "fastattn.h"
#include "float_mode.h"
#include "engine.h"
#include "schedule.h"

/* Tasks per thread: a thread that wakes late, or shares its core, leaves most of its tasks to the
 * rest of the team. */
#define FMA_TASKS_PER_THREAD 8
/* Bytes per task of reading: long against taking a task, short against the whole. */
#define READ_TASK_BYTES (1 << 20)

struct fma_probe {
    const struct fa_kernels *kernels;
    enum fa_dtype dtype;
    /* Rounds of a task. */
    int64_t rounds;
};

static void run_fma(struct fa_job *job, int64_t task, int thread)
{
    const struct fma_probe *probe = job->context;
    (void)task;
    (void)thread;
    fa_multiply_add(probe->kernels, probe->dtype, probe->rounds);
}

struct read_probe {
    const uint64_t *data;
    int64_t count;
};

static void run_read(struct fa_job *job, int64_t task, int thread)
{
    const struct read_probe *probe = job->context;
    const int64_t step = READ_TASK_BYTES / (int64_t)sizeof(uint64_t);
    const int64_t begin = task * step, end = fa_min(begin + step, probe->count);
    (void)thread;
    /* Integers, because their sums may be reordered: compilers vectorise this for the baseline,
     * where 16 bytes a cycle are several times what memory delivers to a core. */
    uint64_t sum = 0;
    for (int64_t i = begin; i < end; i++) {
        sum += probe->data[i];
    }
    volatile uint64_t sink = sum;
    (void)sink;
}

static enum fa_status time_job(struct fa_job *job, double *seconds)
{
    struct fa_float_mode found;
    fa_float_mode_enter(&found);
    const int64_t start = fa_nanoseconds();
    const enum fa_status status = fa_job_run(job);
    *seconds = 1e-9 * (double)(fa_nanoseconds() - start);
    fa_float_mode_leave(&found);
    return status;
}

enum fa_status fa_probe_fma(const struct fa_kernels *kernels, enum fa_dtype dtype, int64_t rounds,
                            int num_threads, double *seconds, double *flops)
{
    FA_ASSERT(rounds >= 1 && num_threads >= 1);
    const int64_t num_tasks = (int64_t)FMA_TASKS_PER_THREAD * num_threads;
    struct fma_probe probe = {
        .kernels = kernels,
        .dtype = dtype,
        .rounds = fa_ceil_div(rounds, FMA_TASKS_PER_THREAD),
    };
    struct fa_job job = {
        .num_tasks = num_tasks, .num_threads = num_threads, .run = run_fma, .context = &probe};
    *flops = fa_multiply_add(kernels, dtype, 1) * (double)probe.rounds * (double)num_tasks;
    return time_job(&job, seconds);
}

enum fa_status fa_probe_read(const void *data, int64_t bytes, int num_threads, double *seconds)
{
    FA_ASSERT(bytes >= 0 && num_threads >= 1);
    struct read_probe probe = {.data = data, .count = bytes / (int64_t)sizeof(uint64_t)};
    struct fa_job job = {.num_tasks = fa_ceil_div(bytes, READ_TASK_BYTES),
                         .num_threads = num_threads,
                         .run = run_read,
                         .context = &probe};
    return time_job(&job, seconds);
}
