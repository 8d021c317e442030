#define _POSIX_C_SOURCE 200809L

#include "schedule.h"

#include <pthread.h>

#include "common.h"
#include "float_mode.h"

/* Nanoseconds between two looks at the poll callback: short against the half second that a Ctrl-C
 * may take, long against the microseconds that taking Python's lock costs. */
#define POLL_INTERVAL INT64_C(50000000)

/* The calling thread ends inside poll, as Python's daemon threads do when the interpreter is
 * finalized: what the helpers work on lies on its stack. */
static void abandon(void *arg)
{
    struct fa_job *job = arg;
    atomic_store(&job->stop, true);
    fa_team_withdraw(&job->offer);
    while (!fa_team_wait(&job->offer, POLL_INTERVAL)) {
    }
}

/* Signal handlers run in poll.  One may change the floating-point mode, and one may fork. */
static void poll_now(struct fa_job *job)
{
    struct fa_float_mode mode;
    int asked;
    fa_float_mode_enter(&mode);
    pthread_cleanup_push(abandon, job);
    asked = job->poll(job->poll_arg);
    pthread_cleanup_pop(0);
    fa_float_mode_leave(&mode);
    job->interrupted = asked != 0;
    if (job->interrupted || fa_team_lost(&job->offer)) {
        atomic_store(&job->stop, true);
    }
}

bool fa_job_checkpoint(struct fa_job *job, int thread)
{
    if (thread == 0 && job->poll != NULL && !job->interrupted) {
        const int64_t now = fa_nanoseconds();
        if (now >= job->next_poll) {
            job->next_poll = now + POLL_INTERVAL;
            poll_now(job);
        }
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
    }
}

static void help(struct fa_offer *offer, int thread) { work(offer->context, thread); }

static void work_with_team(struct fa_job *job)
{
    job->offer.help = help;
    job->offer.context = job;
    job->offer.threads = job->num_threads;
    fa_team_offer(&job->offer);
    work(job, 0);
    fa_team_withdraw(&job->offer);
    while (!fa_team_wait(&job->offer, POLL_INTERVAL)) {
        fa_job_checkpoint(job, 0);
    }
}

enum fa_status fa_job_run(struct fa_job *job)
{
    atomic_init(&job->next, 0);
    atomic_init(&job->stop, false);
    job->interrupted = false;
    job->offer = (struct fa_offer){.threads = 1};
    job->next_poll = fa_nanoseconds() + POLL_INTERVAL;

    if (job->num_threads > 1 && job->num_tasks > 1) {
        work_with_team(job);
    } else {
        work(job, 0);
    }
    if (job->interrupted) {
        return FA_INTERRUPTED;
    }
    return fa_team_lost(&job->offer) ? FA_FORKED : FA_OK;
}
