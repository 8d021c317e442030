/* The memory for sums of grad_q: of a few units at a time.
 *
 * Tasks are handed out in order.  So a unit that has begun and is not done has a task under way,
 * or is the unit whose tasks are handed out next: there are no more than num_threads + 1.  Few
 * buffers stay in cache, and the system maps them once; with sums of all heads, page faults alone
 * were 8 % of the time of (1, 12, 2048, 64). */
#include "backward_sums.h"

#include <pthread.h>

struct unit {
    /* Below 0: the unit has no slot. */
    int slot;
    /* Tasks that are not done. */
    int64_t tasks;
};

struct fa_sums {
    pthread_mutex_t mutex;
    struct unit *units;
    /* [slots] */
    bool *taken;
    int slots;
    char *memory;
    int64_t slot_bytes;
};

enum fa_status fa_sums_init(struct fa_backward *backward, int64_t units, int64_t heads_per_unit)
{
    const struct fa_geometry *g = &backward->geometry;
    const int64_t slots = fa_max(1, fa_min(units, g->num_threads + 1));
    int64_t elements, slot_bytes = 0, memory, unit_bytes = 0, taken = 0, own = 0;
    if (!fa_multiply(g->rows, backward->groups, &elements) ||
        !fa_multiply(elements, heads_per_unit, &elements) ||
        !fa_multiply(elements, backward->padded_k, &elements) ||
        !fa_add_bytes(&slot_bytes, elements, (int64_t)g->ops->size) ||
        !fa_multiply(slot_bytes, slots, &memory) ||
        !fa_add_bytes(&unit_bytes, units, (int64_t)sizeof(struct unit)) ||
        !fa_add_bytes(&taken, slots, (int64_t)sizeof(bool)) ||
        !fa_add_bytes(&own, 1, (int64_t)sizeof(struct fa_sums))) {
        return FA_OVERFLOW;
    }
    struct fa_sums *sums = fa_allocate(own);
    if (sums == NULL) {
        return FA_NO_MEMORY;
    }
    *sums = (struct fa_sums){
        .mutex = PTHREAD_MUTEX_INITIALIZER,
        .units = fa_allocate(unit_bytes),
        .taken = fa_allocate(taken),
        .slots = (int)slots,
        .memory = fa_allocate(memory),
        .slot_bytes = slot_bytes,
    };
    if (sums->units == NULL || sums->taken == NULL || sums->memory == NULL) {
        fa_sums_release(sums);
        return FA_NO_MEMORY;
    }
    for (int64_t i = 0; i < units; i++) {
        sums->units[i] = (struct unit){.slot = -1};
    }
    for (int i = 0; i < sums->slots; i++) {
        sums->taken[i] = false;
    }
    backward->sums = sums;
    return FA_OK;
}

void fa_sums_release(struct fa_sums *sums)
{
    if (sums == NULL) {
        return;
    }
    fa_release(sums->units);
    fa_release(sums->taken);
    fa_release(sums->memory);
    pthread_mutex_destroy(&sums->mutex);
    fa_release(sums);
}

char *fa_sums_enter(struct fa_sums *sums, int64_t unit, int64_t tasks)
{
    struct unit *u = &sums->units[unit];
    pthread_mutex_lock(&sums->mutex);
    if (u->slot < 0) {
        int slot = 0;
        while (sums->taken[slot]) {
            slot++;
            FA_ASSERT(slot < sums->slots);
        }
        sums->taken[slot] = true;
        *u = (struct unit){.slot = slot, .tasks = tasks};
    }
    char *memory = sums->memory + u->slot * sums->slot_bytes;
    pthread_mutex_unlock(&sums->mutex);
    return memory;
}

bool fa_sums_finish(struct fa_sums *sums, int64_t unit)
{
    pthread_mutex_lock(&sums->mutex);
    const bool last = --sums->units[unit].tasks == 0;
    pthread_mutex_unlock(&sums->mutex);
    return last;
}

void fa_sums_leave(struct fa_sums *sums, int64_t unit)
{
    pthread_mutex_lock(&sums->mutex);
    sums->taken[sums->units[unit].slot] = false;
    pthread_mutex_unlock(&sums->mutex);
}
