/* Dropout of weights: which are kept depends on their place alone.  Needs a vec_<isa>.h; see names.h.
 *
 * The random word of a key is word key % 4 of philox(key / 4, query, head, batch entry), each modulo 2^32; a
 * weight is dropped where it is below dropout_p * 2^32.  Cost: 20 multiplications for 4 keys, which compilers
 * do in vectors over groups of keys.
 */

/* Groups of 4 keys drawn at a time. */
#define DROPOUT_GROUPS 16

static void FN(dropout_factors)(void *factors, size_t n, const struct fa_dropout *dropout,
                                int64_t key)
{
    REAL *dst = factors;
    const REAL kept = (REAL)dropout->kept;
    const int64_t end = key + (int64_t)n;
    for (int64_t first = key / 4; first * 4 < end; first += DROPOUT_GROUPS) {
        uint32_t words[DROPOUT_GROUPS][4];
        for (int i = 0; i < DROPOUT_GROUPS; i++) {
            const uint32_t counter[4] = {(uint32_t)(first + i), dropout->query, dropout->head,
                                         dropout->entry};
            philox(words[i], counter, dropout->seed);
        }
        const int64_t lo = first * 4 > key ? first * 4 : key;
        const int64_t last = (first + DROPOUT_GROUPS) * 4, hi = last < end ? last : end;
        for (int64_t j = lo; j < hi; j++) {
            const uint32_t word = words[j / 4 - first][j % 4];
            dst[j - key] = word < dropout->threshold ? 0 : kept;
        }
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
