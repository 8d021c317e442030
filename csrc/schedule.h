/* Tasks on threads: order, cancellation, forks.  Knows nothing of attention. */
#ifndef FA_SCHEDULE_H
#define FA_SCHEDULE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "fastattn.h"
#include "team.h"

/* Tasks [0, num_tasks), handed out in order from one counter: callers number them in descending
 * cost, so that the threads finish within one small task of each other. */
struct fa_job {
    int64_t num_tasks;
    /* `thread` is less than that, however many threads the team has. */
    int num_threads;
    void (*run)(struct fa_job *job, int64_t task, int thread);
    void *context;
    int (*poll)(void *poll_arg);
    void *poll_arg;

    /* private */
    _Atomic int64_t next;
    atomic_bool stop;
    /* poll has asked to stop. */
    bool interrupted;
    /* The time of the next poll, as fa_nanoseconds tells it. */
    int64_t next_poll;
    struct fa_offer offer;
};

/* Run every task, each once, on at most num_threads threads, the caller among them.
 * FA_INTERRUPTED, FA_FORKED: some tasks did not run or did not finish. */
enum fa_status fa_job_run(struct fa_job *job);

/* For `run` to call every millisecond or so: true when the task should be given up. */
bool fa_job_checkpoint(struct fa_job *job, int thread);

#endif
