/* Dropout of weights: which are kept depends on their place alone.  Needs philox.h; see names.h.
 *
 * The random word of a key is word key % 4 of philox(key / 4, query, head, batch entry), each
 * modulo 2^32; a weight is dropped where it is below dropout_p * 2^32.
 */

/* Keys drawn at a time. */
#define DROPOUT_KEYS (4 * PHILOX_COUNTERS)

static void FN(dropout_factors)(void *factors, size_t n, const struct fa_dropout *dropout,
                                int64_t key)
{
    REAL *dst = factors;
    const REAL kept = (REAL)dropout->kept;
    const uint32_t threshold = dropout->threshold;
    const int64_t end = key + (int64_t)n;
    for (int64_t first = key / 4 * 4; first < end; first += DROPOUT_KEYS) {
        uint32_t words[4][PHILOX_COUNTERS];
        REAL drawn[DROPOUT_KEYS];
        philox(words, (uint32_t)(first / 4), dropout->query, dropout->head, dropout->entry,
               dropout->seed);
        /* Straight loops: compilers interleave the four words with vector instructions. */
        for (int i = 0; i < PHILOX_COUNTERS; i++) {
            drawn[4 * i] = words[0][i] < threshold ? 0 : kept;
            drawn[4 * i + 1] = words[1][i] < threshold ? 0 : kept;
            drawn[4 * i + 2] = words[2][i] < threshold ? 0 : kept;
            drawn[4 * i + 3] = words[3][i] < threshold ? 0 : kept;
        }
        const int64_t lo = first > key ? first : key;
        const int64_t hi = first + DROPOUT_KEYS < end ? first + DROPOUT_KEYS : end;
        memcpy(dst + (lo - key), drawn + (lo - first), (size_t)(hi - lo) * sizeof(REAL));
    }
}

/* x *= factor, and exactly 0 where the factor is, whatever x is. */
static void FN(apply_dropout)(void *x, const void *factors, size_t n)
{
    for (size_t l = 0; l < n; l += VL) {
        VEC factor = V(load)((const REAL *)factors + l);
        VEC scaled = V(mul)(V(load)((REAL *)x + l), factor);
        V(store)((REAL *)x + l, V(select_lt)(V(zero)(), factor, scaled, V(zero)()));
    }
}
