/* One element of caller memory, of any alignment. */
#ifndef FA_MEMORY_H
#define FA_MEMORY_H

#include <string.h>

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

#endif
