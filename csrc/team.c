/* One team for the process.  A thread of ours, the host, enters an OpenMP parallel region and
 * stays in it.  So OpenMP makes the threads, by its rules for places, binding and limits, and yet
 * no caller is ever inside a region, whose barrier would neither answer Ctrl-C nor survive a
 * fork, and whose threads spin for milliseconds.  The host, thread 0 of the region, sleeps: its
 * place is the caller's.  All other threads are members, which take offers from a queue.
 *
 *   caller                                        member
 *     fa_team_offer: queue, wake two                find an open offer, join it, wake two more
 *     work                                          help: work until nothing is left
 *     fa_team_withdraw: nobody joins any more       leave
 *     fa_team_wait: for those who joined            spin a little for the next offer, then sleep
 *
 * A member that has not woken when the work is done is not waited for.  A larger team is a new
 * region, when no member works. */
#define _POSIX_C_SOURCE 200809L
#define _DEFAULT_SOURCE /* syscall */

#include "team.h"

#include <time.h>

#include "common.h"
#include "fastattn.h"

int64_t fa_nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

#ifdef _OPENMP

#include <errno.h>
#include <omp.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/syscall.h>
#endif

#include "float_mode.h"

#define SECOND INT64_C(1000000000)

/* Nanoseconds that a member, and a caller at its end, look for what may come before they sleep.
 * Waking takes 40 to 100 us: calls that follow each other closely find the team awake, and what
 * else the program does has the cores after that. */
#define SPIN_TIME 100000
/* Looks between two readings of the clock, about a microsecond of pauses. */
#define LOOKS 20

/* Nanoseconds until threads that could not be had are asked for again. */
#define RETRY_TIME SECOND

/* Threads that a call may have on a machine with fewer CPUs. */
#define LEAST_LIMIT 16

/* Sleepers that a caller, and each member that joins, wakes: all are awake after a few steps, none
 * of which costs the caller more than two system calls. */
#define WAKES 2

/* Bytes of what OpenMP allocates for a region, and for each of its threads, with a reserve: libgomp
 * ends the process where it cannot. */
#define REGION_BYTES (256 * 1024)
#define THREAD_BYTES (16 * 1024)

/* Looks for a thread that has been joined, and nanoseconds between two: it leaves within
 * microseconds unless its core is taken, and 0.1 s is more than a scheduler lets it wait. */
#define GONE_LOOKS 1000
#define GONE_PAUSE 100000

static struct team {
    pthread_mutex_t mutex;
    /* Members sleep on it. */
    pthread_cond_t offered;
    /* The host sleeps on it. */
    pthread_cond_t growth;
    /* Callers sleep on it until their helpers have gone. */
    pthread_cond_t left;
    /* The head of the queue. */
    struct fa_offer *first;
    /* Callers that have an offer in the queue. */
    int callers;
    /* Members. */
    int size;
    int working, spinning, sleeping;
    /* Sleepers that are to wake. */
    int permits;
    /* Callers that sleep. */
    int waiting;
    /* Members of the next region. */
    int wanted;
    /* The host exists, and waits for `ending` or will look at `wanted`. */
    bool hosted;
    /* Members are to leave the region. */
    bool ending;
    /* The next region is on its way. */
    bool growing;
    /* The team does not grow before this time (fa_nanoseconds). */
    int64_t next_growth;
} team;

static const struct team new_team = {
    .mutex = PTHREAD_MUTEX_INITIALIZER,
    .offered = PTHREAD_COND_INITIALIZER,
    .growth = PTHREAD_COND_INITIALIZER,
    .left = PTHREAD_COND_INITIALIZER,
};

/* Changes when there is something for spinning members to look at. */
static atomic_uint news;

/* Forks between the process that loaded the library and this one. */
static atomic_uint era;

/* CPUs of this process, the most threads for a call, and bytes of stack that OpenMP is told to give
 * its threads (0: the default): set at import, before which callers work alone. */
static int cpus, limit = 1;
static size_t stack_bytes;

/* A child of fork() has none of the threads, and locks as they happened to be. */
static void forget_team(void)
{
    atomic_fetch_add(&era, 1);
    team = new_team;
}

/* OMP_STACKSIZE: a number with a unit, kilobytes if it has none. */
static size_t read_stack_bytes(void)
{
    static const char units[] = "BKMG";
    const char *text = getenv("OMP_STACKSIZE");
    char *end;
    if (text == NULL) {
        return 0;
    }
    const unsigned long long number = strtoull(text, &end, 10);
    while (*end == ' ') {
        end++;
    }
    const char upper = (char)(*end >= 'a' && *end <= 'z' ? *end - 'a' + 'A' : *end);
    const char *unit = upper == '\0' ? units + 1 : strchr(units, upper);
    const int shift = unit == NULL ? 0 : 10 * (int)(unit - units);
    return number > SIZE_MAX >> shift ? SIZE_MAX : (size_t)number << shift;
}

enum fa_status fa_team_init(void)
{
    team = new_team;
    stack_bytes = read_stack_bytes();
    cpus = omp_get_num_procs();
    limit = (int)fa_max(LEAST_LIMIT, fa_max(cpus, sysconf(_SC_NPROCESSORS_ONLN)));
    return pthread_atfork(NULL, NULL, forget_team) == 0 ? FA_OK : FA_NO_MEMORY;
}

int fa_team_limit(void) { return limit; }

bool fa_has_openmp(void) { return true; }

int fa_openmp_max_threads(void) { return omp_get_max_threads(); }

/* ---- offers: all with the mutex held ---- */

/* Helpers that an offer has room for.  All callers and members together are no more threads than it
 * asks for: where many call, each works alone. */
static int room(const struct fa_offer *offer)
{
    if (atomic_load_explicit(&offer->closed, memory_order_relaxed)) {
        return 0;
    }
    return (int)fa_min(offer->threads - 1 - offer->joined,
                       offer->threads - team.callers - team.working);
}

static struct fa_offer *find_open(void)
{
    struct fa_offer *offer = team.first;
    while (offer != NULL && room(offer) <= 0) {
        offer = offer->next;
    }
    return offer;
}

/* Permit sleepers to wake, beside those who spin and will see the news.  Returns how many signals
 * are due. */
static int permit_wakes(void)
{
    const struct fa_offer *offer = team.sleeping > 0 ? find_open() : NULL;
    if (offer == NULL || team.ending) {
        return 0;
    }
    const int missing = room(offer) - team.spinning - team.permits;
    const int wakes = (int)fa_max(0, fa_min(WAKES, fa_min(team.sleeping, missing)));
    team.sleeping -= wakes;
    team.permits += wakes;
    return wakes;
}

/* Without the mutex, so that who wakes does not wait for it. */
static void announce(int wakes)
{
    atomic_fetch_add(&news, 1);
    for (int i = 0; i < wakes; i++) {
        pthread_cond_signal(&team.offered);
    }
}

/* ---- members ---- */

static void spin_while(const atomic_uint *value, unsigned old)
{
    const int64_t end = fa_nanoseconds() + SPIN_TIME;
    for (int looks = 1; atomic_load_explicit(value, memory_order_acquire) == old; looks++) {
        if (looks % LOOKS == 0 && fa_nanoseconds() > end) {
            return;
        }
        fa_pause();
    }
}

/* Returns with the mutex held, as it was. */
static void spin_for_news(void)
{
    const unsigned seen = atomic_load(&news);
    team.spinning++;
    pthread_mutex_unlock(&team.mutex);
    spin_while(&news, seen);
    pthread_mutex_lock(&team.mutex);
    team.spinning--;
}

static void sleep_until_permitted(void)
{
    team.sleeping++;
    while (team.permits == 0 && !team.ending) {
        pthread_cond_wait(&team.offered, &team.mutex);
    }
    if (!team.ending) {
        team.permits--;
    }
}

static void help(struct fa_offer *offer)
{
    struct fa_float_mode found;
    const int thread = ++offer->joined;
    atomic_fetch_add(&offer->inside, 1);
    team.working++;
    const int wakes = permit_wakes();
    pthread_mutex_unlock(&team.mutex);
    if (wakes > 0) {
        announce(wakes);
    }
    fa_float_mode_enter(&found);
    offer->help(offer, thread);
    fa_float_mode_leave(&found);
    atomic_store(&offer->closed, true);
    /* The offer is gone once nobody is inside. */
    const bool last = atomic_fetch_sub(&offer->inside, 1) == 1;
    pthread_mutex_lock(&team.mutex);
    team.working--;
    if (last && team.waiting > 0) {
        pthread_cond_broadcast(&team.left);
    }
}

/* A member's life, until the region ends. */
static void serve(void)
{
    bool has_spun = false;
    pthread_mutex_lock(&team.mutex);
    while (!team.ending) {
        struct fa_offer *offer = find_open();
        if (offer != NULL) {
            help(offer);
            has_spun = false;
        } else if (!has_spun && team.callers + team.working + team.spinning < cpus) {
            spin_for_news();
            has_spun = true;
        } else {
            sleep_until_permitted();
        }
    }
    pthread_mutex_unlock(&team.mutex);
}

/* ---- the host ---- */

struct probe {
    pthread_mutex_t *gate;
    pthread_t thread;
    long id;
};

static void *pass_gate(void *arg)
{
    struct probe *probe = arg;
#ifdef __linux__
    probe->id = syscall(SYS_gettid);
#endif
    pthread_mutex_lock(probe->gate);
    pthread_mutex_unlock(probe->gate);
    return NULL;
}

/* Linux counts a thread that was joined until it has left the process. */
static void wait_until_gone(const struct probe *probe)
{
    pthread_join(probe->thread, NULL);
#ifdef __linux__
    for (int i = 0; i < GONE_LOOKS && syscall(SYS_tgkill, getpid(), probe->id, 0) == 0; i++) {
        nanosleep(&(struct timespec){.tv_nsec = GONE_PAUSE}, NULL);
    }
#endif
}

/* How many more threads can be had, `most` at most: so many at once are made, and end.  libgomp
 * ends the process where it cannot make one. */
static int probe_threads(int most)
{
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    pthread_attr_t attributes;
    int made = 0;
    struct probe *probes = calloc((size_t)most, sizeof *probes);
    void *reserve = malloc(REGION_BYTES + (size_t)most * THREAD_BYTES);
    if (probes != NULL && reserve != NULL && pthread_attr_init(&attributes) == 0) {
        if (stack_bytes > 0) {
            /* Where it is refused, OpenMP has the default, too. */
            pthread_attr_setstacksize(&attributes, stack_bytes);
        }
        pthread_mutex_lock(&gate);
        for (; made < most; made++) {
            probes[made].gate = &gate;
            if (pthread_create(&probes[made].thread, &attributes, pass_gate, probes + made) != 0) {
                break;
            }
        }
        pthread_mutex_unlock(&gate);
        for (int i = 0; i < made; i++) {
            wait_until_gone(probes + i);
        }
        pthread_attr_destroy(&attributes);
    }
    free(reserve);
    free(probes);
    return made;
}

/* Thread 0 of a region of members + 1 threads, until the region is to end. */
static void host_region(int members)
{
    pthread_mutex_lock(&team.mutex);
    team.size = members;
    team.growing = false;
    team.hosted = members > 0;
    if (members < team.wanted) {
        team.next_growth = fa_nanoseconds() + RETRY_TIME;
    }
    while (members > 0 && !team.ending) {
        pthread_cond_wait(&team.growth, &team.mutex);
    }
    pthread_mutex_unlock(&team.mutex);
}

static void *host(void *unused)
{
    int members = 0;
    (void)unused;
    do {
        pthread_mutex_lock(&team.mutex);
        const int wanted = team.wanted;
        pthread_mutex_unlock(&team.mutex);
        members += probe_threads(wanted - members);
        pthread_mutex_lock(&team.mutex);
        team.ending = false;
        team.sleeping = team.spinning = team.permits = 0;
        pthread_mutex_unlock(&team.mutex);
        if (members > 0) {
#pragma omp parallel num_threads(members + 1)
            {
                if (omp_get_thread_num() == 0) {
                    members = omp_get_num_threads() - 1;
                    host_region(members);
                } else {
                    serve();
                }
            }
        } else {
            host_region(0);
        }
    } while (members > 0);
    return NULL;
}

/* The host and, from it, the members leave asynchronous signals to the program's own threads. */
static bool start_host(void)
{
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP};
    sigset_t blocked, before;
    pthread_attr_t attributes;
    pthread_t thread;
    if (pthread_attr_init(&attributes) != 0) {
        return false;
    }
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) {
        sigdelset(&blocked, faults[i]);
    }
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    const bool started = pthread_create(&thread, &attributes, host, NULL) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return started;
}

/* With the mutex held.  Makes a team, or a larger one, unless a member works or there was none to
 * be had lately. */
static void grow_to(int members)
{
    if (members <= team.size || team.growing || team.working > 0 ||
        fa_nanoseconds() < team.next_growth) {
        return;
    }
    team.wanted = members;
    team.growing = true;
    if (team.hosted) {
        team.ending = true;
        pthread_cond_broadcast(&team.offered);
        pthread_cond_signal(&team.growth);
        return;
    }
    team.hosted = start_host();
    if (!team.hosted) {
        team.growing = false;
        team.next_growth = fa_nanoseconds() + RETRY_TIME;
    }
}

/* ---- callers ---- */

void fa_team_offer(struct fa_offer *offer)
{
    struct fa_offer **end = &team.first;
    offer->next = NULL;
    offer->joined = 0;
    atomic_init(&offer->inside, 0);
    atomic_init(&offer->closed, false);
    offer->era = atomic_load(&era);
    pthread_mutex_lock(&team.mutex);
    while (*end != NULL) {
        end = &(*end)->next;
    }
    *end = offer;
    team.callers++;
    grow_to((int)fa_min(offer->threads, limit) - 1);
    const int wakes = permit_wakes();
    pthread_mutex_unlock(&team.mutex);
    announce(wakes);
}

void fa_team_withdraw(struct fa_offer *offer)
{
    int wakes = 0;
    pthread_mutex_lock(&team.mutex);
    struct fa_offer **at = &team.first;
    while (*at != NULL && *at != offer) {
        at = &(*at)->next;
    }
    if (*at == offer) {
        *at = offer->next;
        team.callers--;
        wakes = permit_wakes(); /* another caller's may be open now */
    }
    pthread_mutex_unlock(&team.mutex);
    if (wakes > 0) {
        announce(wakes);
    }
}

static bool is_empty(const struct fa_offer *offer)
{
    return atomic_load_explicit(&offer->inside, memory_order_acquire) == 0;
}

bool fa_team_wait(struct fa_offer *offer, int64_t nanoseconds)
{
    if (offer->era != atomic_load(&era)) {
        return true;
    }
    const int64_t end = fa_nanoseconds() + SPIN_TIME;
    while (!is_empty(offer) && fa_nanoseconds() < end) {
        fa_pause();
    }
    if (is_empty(offer)) {
        return true;
    }
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until); /* the only clock of every system's timedwait */
    const int64_t sum = until.tv_nsec + nanoseconds;
    until.tv_sec += sum / SECOND;
    until.tv_nsec = sum % SECOND;
    int error = 0;
    pthread_mutex_lock(&team.mutex);
    team.waiting++;
    while (!is_empty(offer) && error == 0) {
        error = pthread_cond_timedwait(&team.left, &team.mutex, &until);
    }
    team.waiting--;
    pthread_mutex_unlock(&team.mutex);
    return is_empty(offer);
}

bool fa_team_lost(const struct fa_offer *offer)
{
    return offer->era != atomic_load(&era) && !is_empty(offer);
}

#else

enum fa_status fa_team_init(void) { return FA_OK; }

int fa_team_limit(void) { return 1; }

bool fa_has_openmp(void) { return false; }

int fa_openmp_max_threads(void) { return 1; }

void fa_team_offer(struct fa_offer *offer) { (void)offer; }

void fa_team_withdraw(struct fa_offer *offer) { (void)offer; }

bool fa_team_wait(struct fa_offer *offer, int64_t nanoseconds)
{
    (void)offer;
    (void)nanoseconds;
    return true;
}

bool fa_team_lost(const struct fa_offer *offer)
{
    (void)offer;
    return false;
}

#endif
