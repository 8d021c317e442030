/* Float32 numbers as bit patterns, and errors in units of their last place. */
#ifndef FA_TEST_ULP_H
#define FA_TEST_ULP_H

#include <stdint.h>
#include <string.h>

static inline float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* 1 / (distance of neighbouring floats at `truth`), `truth` in the normal range: 2^(23 - exponent). */
static inline double ulps_per_unit(double truth)
{
    uint64_t bits;
    memcpy(&bits, &truth, sizeof bits);
    bits = ((uint64_t)(2 * 1023 + 23) - (bits >> 52)) << 52;
    double result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

#endif
