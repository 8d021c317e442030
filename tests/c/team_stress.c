/* The team under load, also for ThreadSanitizer: callers of every number of threads at once, teams
 * that grow, calls that stop half-way, forks while others call and inside a call.  Each task must
 * run once, on a thread index of its own.
 *
 *     team_stress [no-forks]
 */
#define _POSIX_C_SOURCE 200809L

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "schedule.h"

#define CALLERS 8
#define CALLS 300
#define MOST_TASKS 200
#define MOST_THREADS 9

struct check {
    int64_t number[MOST_TASKS]; /* plain: a race is one that ThreadSanitizer sees */
    atomic_int runs[MOST_TASKS];
    atomic_int inside[MOST_THREADS]; /* tasks under way on a thread index */
    int scratch[MOST_THREADS];
};

static atomic_int failures;

static void expect(bool ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "wrong: %s\n", what);
        atomic_fetch_add(&failures, 1);
    }
}

static void run(struct fa_job *job, int64_t task, int thread)
{
    struct check *check = job->context;
    expect(thread >= 0 && thread < job->num_threads, "thread index");
    expect(atomic_fetch_add(check->inside + thread, 1) == 0, "a thread index used twice");
    check->scratch[thread]++;
    check->number[task] = task * task;
    for (int i = 0; i < 50; i++) {
        if (fa_job_checkpoint(job, thread)) {
            break;
        }
    }
    atomic_fetch_add(check->runs + task, 1);
    atomic_fetch_sub(check->inside + thread, 1);
}

static int stop_at_once(void *unused)
{
    (void)unused;
    return 1;
}

static void call_once(unsigned *seed, bool stopped)
{
    struct check check = {.scratch = {0}};
    struct fa_job job = {
        .num_tasks = rand_r(seed) % MOST_TASKS,
        .num_threads = 1 + rand_r(seed) % MOST_THREADS,
        .run = run,
        .context = &check,
        .poll = stopped ? stop_at_once : NULL,
    };
    const enum fa_status status = fa_job_run(&job);
    expect(status == FA_OK || stopped, "status");
    for (int64_t i = 0; i < job.num_tasks && status == FA_OK; i++) {
        expect(atomic_load(check.runs + i) == 1 && check.number[i] == i * i, "a task");
    }
}

static void *call_often(void *arg)
{
    unsigned seed = (unsigned)(size_t)arg;
    for (int i = 0; i < CALLS; i++) {
        call_once(&seed, i % 16 == 15);
        if (i % 32 == 31) {
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL); /* members go to sleep */
        }
    }
    return NULL;
}

static int fork_in_poll(void *child)
{
    if (*(pid_t *)child < 0) {
        *(pid_t *)child = fork();
    }
    return 0;
}

static void spend_time(struct fa_job *job, int64_t task, int thread)
{
    (void)task;
    for (int i = 0; i < 4000 && !fa_job_checkpoint(job, thread); i++) {
        nanosleep(&(struct timespec){.tv_nsec = 10000}, NULL);
    }
}

/* The child that returns from poll ends its call, and can make others. */
static void fork_inside_a_call(void)
{
    pid_t child = -1;
    struct fa_job job = {.num_tasks = 4,
                         .num_threads = 4,
                         .run = spend_time,
                         .poll = fork_in_poll,
                         .poll_arg = &child};
    const enum fa_status status = fa_job_run(&job);
    if (child == 0) {
        unsigned seed = 7;
        expect(status == FA_FORKED || status == FA_OK, "status in the child");
        for (int i = 0; i < 20; i++) {
            call_once(&seed, false);
        }
        _exit(atomic_load(&failures) == 0 ? 0 : 1);
    }
    int how = 1;
    expect(status == FA_OK, "status in the parent");
    expect(child > 0 && waitpid(child, &how, 0) == child && how == 0, "the child");
}

int main(int argc, char **argv)
{
    pthread_t threads[CALLERS];
    const bool forks = argc < 2 || argv[1][0] != 'n'; /* "no-forks" */
    if (fa_team_init() != FA_OK) {
        return 2;
    }
    for (size_t i = 0; i < CALLERS; i++) {
        if (pthread_create(threads + i, NULL, call_often, (void *)(i + 1)) != 0) {
            return 2;
        }
    }
    for (int i = 0; forks && i < 5; i++) {
        const pid_t child = fork();
        if (child == 0) {
            unsigned seed = (unsigned)i;
            call_once(&seed, false);
            _exit(atomic_load(&failures) == 0 ? 0 : 1);
        }
        int how = 1;
        expect(waitpid(child, &how, 0) == child && how == 0, "a child of a busy process");
    }
    for (size_t i = 0; i < CALLERS; i++) {
        pthread_join(threads[i], NULL);
    }
    if (forks) {
        fork_inside_a_call();
    }
    puts(atomic_load(&failures) == 0 ? "ok" : "failed");
    return atomic_load(&failures) == 0 ? 0 : 1;
}
