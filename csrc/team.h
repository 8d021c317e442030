/* The team: the threads of this process that help callers.  Knows nothing of tasks. */
#ifndef FA_TEAM_H
#define FA_TEAM_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* The work that a caller shares with the team while it works itself. */
struct fa_offer {
    /* Work until nothing is left.  `thread` is from 1 to threads - 1, and no two helpers have the
     * same; the caller is 0. */
    void (*help)(struct fa_offer *offer, int thread);
    void *context;
    /* Threads that may work on it, the caller among them. */
    int threads;

    /* private */
    struct fa_offer *next;
    /* Helpers that have come, with those that have gone. */
    int joined;
    /* Helpers that have come and not gone. */
    atomic_int inside;
    /* Nothing is left to do. */
    atomic_bool closed;
    unsigned era;
};

/* From here on helpers may come, if any are free.  The caller does not wait for helpers. */
void fa_team_offer(struct fa_offer *offer);
/* No more helpers come.  A second call does nothing, nor does one without an offer. */
void fa_team_withdraw(struct fa_offer *offer);
/* Wait for the helpers that came, `nanoseconds` at most.  True: they have gone. */
bool fa_team_wait(struct fa_offer *offer, int64_t nanoseconds);
/* Whether this is a forked child, in which helpers that came before the fork do not exist. */
bool fa_team_lost(const struct fa_offer *offer);

/* Of a clock that is never set. */
int64_t fa_nanoseconds(void);

#endif
