/* Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four random
 * words from a counter and a seed, without a state, so that a number is the same whoever draws it.
 * Needs a vec_<isa>.h.
 */
#ifndef FA_PHILOX_H
#define FA_PHILOX_H

#include <stdint.h>

/* Counters drawn at a time: two vectors, or as many as fill 16.  The rounds of one are a chain of
 * 10 times 9 cycles; two chains share the multipliers. */
#define PHILOX_COUNTERS (VL_u32 > 8 ? 2 * VL_u32 : 16)

static inline void philox_round(vec_u32 x[4], uint32_t k0, uint32_t k1)
{
    vec_u32 even, odd;
    const vec_u32 even_low = v_mul_u32(x[0], v_set_u32(0xD2511F53u), &even);
    const vec_u32 odd_low = v_mul_u32(x[2], v_set_u32(0xCD9E8D57u), &odd);
    x[0] = v_xor_u32(v_xor_u32(odd, x[1]), v_set_u32(k0));
    x[2] = v_xor_u32(v_xor_u32(even, x[3]), v_set_u32(k1));
    x[1] = odd_low;
    x[3] = even_low;
}

/* words[i][lane] = word i for the counter (first + lane, c1, c2, c3).  A vector of counters costs
 * 10 rounds of 4 multiplications, 6 shifts, 4 blends and 4 xors, for 4 vectors of words. */
static inline void philox(uint32_t words[4][PHILOX_COUNTERS], uint32_t first, uint32_t c1,
                          uint32_t c2, uint32_t c3, uint64_t seed)
{
    uint32_t counters[PHILOX_COUNTERS];
    for (uint32_t lane = 0; lane < PHILOX_COUNTERS; lane++) {
        counters[lane] = first + lane;
    }
    for (int lane = 0; lane < PHILOX_COUNTERS; lane += 2 * VL_u32) {
        const vec_u32 v1 = v_set_u32(c1), v2 = v_set_u32(c2), v3 = v_set_u32(c3);
        vec_u32 x[4] = {v_load_u32(counters + lane), v1, v2, v3};
        vec_u32 y[4] = {v_load_u32(counters + lane + VL_u32), v1, v2, v3};
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
        for (int round = 0; round < 10; round++) {
            philox_round(x, k0, k1);
            philox_round(y, k0, k1);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        for (int i = 0; i < 4; i++) {
            v_store_u32(words[i] + lane, x[i]);
            v_store_u32(words[i] + lane + VL_u32, y[i]);
        }
    }
}

#endif
