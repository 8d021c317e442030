/* What the machine could do at most: multiply-adds on registers only.  Needs DT and a vec_<isa>.h;
 * see names.h.
 *
 * x = x * factor + x, because no compiler may shorten that chain without -ffast-math and no
 * instruction set needs a move for it (NEON overwrites the addend, x86 any operand); different
 * starting values, because equal chains would become one.  Twelve chains or more: 2 pipes x 5
 * cycles of latency, or, where multiplying and adding are two instructions, 2 pipes x 6.
 */
static double FN(probe_fma)(int64_t rounds, double factor)
{
    enum { ROWS = MR * NR_VECTORS < 12 ? 12 / NR_VECTORS : MR };
    const VEC vector_factor = V(set)((REAL)factor);
    VEC acc[ROWS][NR_VECTORS];
    FA_UNROLL
    for (size_t i = 0; i < ROWS; i++) {
        FA_UNROLL
        for (size_t j = 0; j < NR_VECTORS; j++) {
            acc[i][j] = V(set)((REAL)(i * NR_VECTORS + j + 1));
        }
    }
    for (int64_t n = 0; n < rounds; n++) {
        FA_UNROLL
        for (size_t i = 0; i < ROWS; i++) {
            FA_UNROLL
            for (size_t j = 0; j < NR_VECTORS; j++) {
                acc[i][j] = V(fma)(acc[i][j], vector_factor, acc[i][j]);
            }
        }
    }
    VEC sum = V(zero)();
    FA_UNROLL
    for (size_t i = 0; i < ROWS; i++) {
        FA_UNROLL
        for (size_t j = 0; j < NR_VECTORS; j++) {
            sum = V(add)(sum, acc[i][j]);
        }
    }
    REAL lanes[VL];
    V(store)(lanes, sum);
    volatile REAL sink = lanes[0]; /* so that the chains count as used */
    (void)sink;
    return 2.0 * ROWS * NR_VECTORS * VL;
}
