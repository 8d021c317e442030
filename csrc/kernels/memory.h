/* Caller memory: one element of any alignment, and lines asked for ahead of their use. */
#ifndef FA_MEMORY_H
#define FA_MEMORY_H

#include <string.h>

#include "kernels.h"

static inline float read_f32(const void *p)
{
    float x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline double read_f64(const void *p)
{
    double x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline void write_f32(void *p, float x) { memcpy(p, &x, sizeof x); }

static inline void write_f64(void *p, double x) { memcpy(p, &x, sizeof x); }

/* Lines asked for at a time: a core keeps a few dozen misses in flight, drops further requests, and the
 * products' own loads need some. */
#define FETCH_LINES 16

static inline void fetch_some(struct fa_wanted *wanted)
{
    for (int i = 0; i < FETCH_LINES && wanted->next_row < wanted->rows; i++) {
        if (wanted->next_byte < wanted->bytes) {
            __builtin_prefetch(wanted->row[wanted->next_row] + wanted->next_byte);
        }
        wanted->next_byte += FA_LINE;
        if (wanted->next_byte >= wanted->bytes) {
            wanted->next_byte = 0;
            wanted->next_row++;
        }
    }
}

#endif
