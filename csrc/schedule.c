#define _POSIX_C_SOURCE 200809L

#include "schedule.h"

#include <errno.h>
#include <pthread.h>
#include <unistd.h>

#include "common.h"

#ifdef _OPENMP
#include <omp.h>
#endif

/* Nanoseconds between two looks at the poll callback: short against the half second that a Ctrl-C may
 * take, long against the microseconds that taking Python's lock costs. */
#define POLL_INTERVAL 50000000L
#define SECOND 1000000000L

/* Looks at the counter before the caller sleeps between looks, while others finish their last task:
 * tasks end within microseconds of each other in most calls. */
#define SPINS_BEFORE_SLEEP 20000
#define SLEEP_NANOSECONDS 200000L

static struct timespec later(struct timespec t, long nanoseconds)
{
    t.tv_nsec += nanoseconds;
    t.tv_sec += t.tv_nsec / SECOND;
    t.tv_nsec %= SECOND;
    return t;
}

static bool is_before(struct timespec a, struct timespec b)
{
    return a.tv_sec != b.tv_sec ? a.tv_sec < b.tv_sec : a.tv_nsec < b.tv_nsec;
}

static void poll_when_due(struct fa_job *job)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (is_before(now, job->next_poll)) {
        return;
    }
    job->next_poll = later(now, POLL_INTERVAL);
    if (job->poll(job->poll_arg) != 0) {
        atomic_store(&job->stop, true);
    }
}

bool fa_job_checkpoint(struct fa_job *job, int thread)
{
    if (thread == 0 && job->poll_in_team) {
        poll_when_due(job);
    }
    return atomic_load_explicit(&job->stop, memory_order_relaxed);
}

static void work(struct fa_job *job, int thread)
{
    while (!fa_job_checkpoint(job, thread)) {
        int64_t task = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
        if (task >= job->num_tasks) {
            break;
        }
        job->run(job, task, thread);
        atomic_fetch_add_explicit(&job->finished, 1, memory_order_release);
    }
}

#ifdef _OPENMP

/* The caller has no task left but others have: keep answering Ctrl-C, which the barrier at the end of
 * a parallel region would not. */
static void wait_for_others(struct fa_job *job)
{
    for (int64_t spins = 0; atomic_load(&job->finished) < job->num_tasks; spins++) {
        if (fa_job_checkpoint(job, 0)) {
            return;
        }
        if (spins > SPINS_BEFORE_SLEEP) {
            nanosleep(&(struct timespec){.tv_nsec = SLEEP_NANOSECONDS}, NULL);
        }
    }
}

static void run_team(struct fa_job *job)
{
#pragma omp parallel num_threads(job->num_threads)
    {
        int thread = omp_get_thread_num();
        work(job, thread);
        if (thread == 0 && job->poll_in_team) {
            wait_for_others(job);
        }
    }
}

/* A child of fork() inherits libgomp's thread pool but not its threads, and would wait for them for
 * ever.  A thread that is new in the child has no pool yet and gets a fresh one, so the child's teams
 * are led by such a thread while the caller waits and polls. */
static atomic_bool in_forked_child;

static void note_fork(void) { atomic_store(&in_forked_child, true); }

enum fa_status fa_watch_fork(void)
{
    return pthread_atfork(NULL, NULL, note_fork) == 0 ? FA_OK : FA_NO_MEMORY;
}

struct carrier {
    struct fa_job *job;
    pthread_mutex_t mutex;
    pthread_cond_t done_changed;
    bool done;
};

static void *lead_team(void *arg)
{
    struct carrier *carrier = arg;
    run_team(carrier->job);
    pthread_mutex_lock(&carrier->mutex);
    carrier->done = true;
    pthread_cond_signal(&carrier->done_changed);
    pthread_mutex_unlock(&carrier->mutex);
    return NULL;
}

static enum fa_status run_team_in_child(struct fa_job *job)
{
    struct carrier carrier = {
        .job = job, .mutex = PTHREAD_MUTEX_INITIALIZER, .done_changed = PTHREAD_COND_INITIALIZER};
    pthread_t leader;
    job->poll_in_team = false;
    if (pthread_create(&leader, NULL, lead_team, &carrier) != 0) {
        return FA_NO_THREAD;
    }
    pthread_mutex_lock(&carrier.mutex);
    while (!carrier.done) {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        struct timespec until = later(now, POLL_INTERVAL);
        int error = pthread_cond_timedwait(&carrier.done_changed, &carrier.mutex, &until);
        if (error == ETIMEDOUT && job->poll != NULL) {
            pthread_mutex_unlock(&carrier.mutex);
            poll_when_due(job);
            pthread_mutex_lock(&carrier.mutex);
        }
    }
    pthread_mutex_unlock(&carrier.mutex);
    pthread_join(leader, NULL);
    return FA_OK;
}

static enum fa_status run_parallel(struct fa_job *job)
{
    if (atomic_load(&in_forked_child)) {
        return run_team_in_child(job);
    }
    run_team(job);
    return FA_OK;
}

bool fa_has_openmp(void) { return true; }

int fa_openmp_max_threads(void) { return omp_get_max_threads(); }

#else

static enum fa_status run_parallel(struct fa_job *job)
{
    work(job, 0);
    return FA_OK;
}

enum fa_status fa_watch_fork(void) { return FA_OK; }

bool fa_has_openmp(void) { return false; }

int fa_openmp_max_threads(void) { return 1; }

#endif

enum fa_status fa_job_run(struct fa_job *job)
{
    enum fa_status status = FA_OK;
    atomic_init(&job->next, 0);
    atomic_init(&job->finished, 0);
    atomic_init(&job->stop, false);
    job->poll_in_team = job->poll != NULL;
    clock_gettime(CLOCK_MONOTONIC, &job->next_poll);
    job->next_poll = later(job->next_poll, POLL_INTERVAL);

    if (job->num_threads > 1) {
        status = run_parallel(job);
    } else {
        work(job, 0);
    }
    if (status == FA_OK && atomic_load(&job->stop)) {
        status = FA_INTERRUPTED;
    }
    return status;
}
