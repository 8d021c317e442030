/* LD_PRELOAD: allocations that fail on request (glibc).
 *
 * fail_arm(k, min_bytes, forever) makes the k-th allocation from now on of at least min_bytes fail,
 * k = 1, 2, ...; with `forever`, every later one too.  fail_disarm() ends that and returns how many
 * failed.  Covers malloc, calloc, realloc, the aligned ones and anonymous mmap, of all threads.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

static atomic_long countdown, failed;
static atomic_size_t threshold;
static atomic_int armed, failing_forever;

void fail_arm(long k, size_t min_bytes, int forever);
long fail_disarm(void);

void fail_arm(long k, size_t min_bytes, int forever)
{
    atomic_store(&countdown, k);
    atomic_store(&threshold, min_bytes);
    atomic_store(&failing_forever, forever);
    atomic_store(&failed, 0);
    atomic_store(&armed, 1);
}

long fail_disarm(void)
{
    atomic_store(&armed, 0);
    return atomic_load(&failed);
}

static int fails(size_t bytes)
{
    if (!atomic_load(&armed) || bytes < atomic_load(&threshold)) {
        return 0;
    }
    long left = atomic_fetch_sub(&countdown, 1) - 1;
    if (left == 0 || (left < 0 && atomic_load(&failing_forever))) {
        atomic_fetch_add(&failed, 1);
        errno = ENOMEM;
        return 1;
    }
    return 0;
}

void *malloc(size_t bytes) { return fails(bytes) ? NULL : __libc_malloc(bytes); }

void *calloc(size_t count, size_t bytes)
{
    size_t total;
    if (!__builtin_mul_overflow(count, bytes, &total) && fails(total)) {
        return NULL;
    }
    return __libc_calloc(count, bytes);
}

void *realloc(void *old, size_t bytes) { return fails(bytes) ? NULL : __libc_realloc(old, bytes); }

void *memalign(size_t alignment, size_t bytes)
{
    return fails(bytes) ? NULL : __libc_memalign(alignment, bytes);
}

void *aligned_alloc(size_t alignment, size_t bytes) { return memalign(alignment, bytes); }

int posix_memalign(void **result, size_t alignment, size_t bytes)
{
    void *p = memalign(alignment, bytes);
    if (p == NULL) {
        return ENOMEM;
    }
    *result = p;
    return 0;
}

void *mmap(void *address, size_t bytes, int protection, int flags, int file, off_t offset)
{
    if ((flags & MAP_ANONYMOUS) && fails(bytes)) {
        return MAP_FAILED;
    }
    return (void *)syscall(SYS_mmap, address, bytes, protection, flags, file, offset);
}
