/* Loaded before libc: pthread_create fails while more than a given number of its threads are alive, as
 * where a container limits processes.  No limit until it is set. */
#define _GNU_SOURCE

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

typedef int create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

static atomic_int limit = 1 << 30, alive;

void few_threads_limit(int threads) { atomic_store(&limit, atomic_load(&alive) + threads); }

struct start {
    void *(*routine)(void *);
    void *arg;
};

static void end(void *unused)
{
    (void)unused;
    atomic_fetch_sub(&alive, 1);
}

static void *begin(void *arg)
{
    struct start start = *(struct start *)arg;
    void *result;
    free(arg);
    pthread_cleanup_push(end, NULL);
    result = start.routine(start.arg);
    pthread_cleanup_pop(1);
    return result;
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*routine)(void *),
                   void *arg)
{
    create *real = (create *)dlsym(RTLD_NEXT, "pthread_create");
    struct start *start = malloc(sizeof *start);
    if (start == NULL || atomic_fetch_add(&alive, 1) >= atomic_load(&limit)) {
        atomic_fetch_sub(&alive, 1);
        free(start);
        return EAGAIN;
    }
    *start = (struct start){routine, arg};
    const int error = real(thread, attributes, begin, start);
    if (error != 0) {
        atomic_fetch_sub(&alive, 1);
        free(start);
    }
    return error;
}
