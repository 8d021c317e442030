/* The one matrix product of the library, used for both Q K^T and P V: A broadcast by element, B in
 * packed panels.  Needs DT and a vec_<isa>.h; see names.h.
 *
 * Cost of a register tile per step of depth: NR_VECTORS loads + MR broadcasts for NR_VECTORS * MR
 * fused multiply-adds; with 6 x 2 vectors 8 loads per 12, where the ports allow 2 of each per
 * cycle.  Each element is a sum of chains of at most FA_CHAIN multiply-adds (engine.h), each in
 * order of depth from 0 and added to c in order, so its bits depend on no tiling.  Rounding errors
 * of a sum whose terms have one sign then grow with the length of a chain plus the number of
 * chains, not with their product.
 *
 * Cost of the end of a chain: MR * NR_VECTORS additions to c, which lies in L1, per FA_CHAIN times
 * as many multiply-adds.  The next chain starts in fresh registers and does not wait for them.
 */

/* c[rows][NR] (+)= a[rows][depth] b[depth][NR]; rows is a constant up to MR.  Live: rows *
 * NR_VECTORS accumulators, NR_VECTORS columns, one broadcast.  Not unrolled over depth: one step is
 * 27 instructions with AVX2 (GCC 12, by objdump -d of the object), which fit into the 6 cycles
 * that its 12 multiply-adds take where a core starts 5 or 6 instructions a cycle.  Where it is
 * unrolled GCC 12 spills accumulators, which costs 5 % of the whole forward pass. */
FA_INLINE void FN(matmul_tile)(const size_t rows, const bool transposed, const struct fa_product *p,
                               const REAL *restrict a, const REAL *restrict b, REAL *restrict c)
{
    const size_t depth = p->depth, a_stride = p->a_stride, c_row = p->c_row;
    const REAL *row[MR];
    size_t k = 0, end = FA_CHAIN - p->into_chain;
    bool add = p->accumulate;
    FA_UNROLL
    for (size_t i = 0; i < rows; i++) {
        row[i] = transposed ? a + i : a + i * a_stride;
    }
    do {
        VEC acc[MR][NR_VECTORS];
        FA_UNROLL
        for (size_t i = 0; i < rows; i++) {
            FA_UNROLL
            for (size_t j = 0; j < NR_VECTORS; j++) {
                acc[i][j] = V(zero)();
            }
        }
        end = end < depth ? end : depth;
        for (; k < end; k++) {
            VEC column[NR_VECTORS];
            FA_UNROLL
            for (size_t j = 0; j < NR_VECTORS; j++) {
                column[j] = V(load)(b + k * NR + j * VL);
            }
            FA_UNROLL
            for (size_t i = 0; i < rows; i++) {
                VEC x = V(broadcast)(row[i] + (transposed ? k * a_stride : k));
                FA_UNROLL
                for (size_t j = 0; j < NR_VECTORS; j++) {
                    acc[i][j] = V(fma)(x, column[j], acc[i][j]);
                }
            }
        }
        if (add) {
            FA_UNROLL
            for (size_t i = 0; i < rows; i++) {
                FA_UNROLL
                for (size_t j = 0; j < NR_VECTORS; j++) {
                    acc[i][j] = V(add)(V(load)(c + i * c_row + j * VL), acc[i][j]);
                }
            }
        }
        FA_UNROLL
        for (size_t i = 0; i < rows; i++) {
            FA_UNROLL
            for (size_t j = 0; j < NR_VECTORS; j++) {
                V(store)(c + i * c_row + j * VL, acc[i][j]);
            }
        }
        add = true;
        end += FA_CHAIN;
    } while (k < depth);
}

FA_NOINLINE void FN(matmul_tile_full)(const struct fa_product *p, const REAL *a, const REAL *b,
                                      REAL *c)
{
    FN(matmul_tile)(MR, false, p, a, b, c);
}

/* Elements of a column of a lie side by side: one pointer reaches all of them. */
FA_NOINLINE void FN(matmul_tile_transposed)(const struct fa_product *p, const REAL *a,
                                            const REAL *b, REAL *c)
{
    FN(matmul_tile)(MR, true, p, a, b, c);
}

/* What is left of the rows: 4, 2 and 1 at a time, whose accumulators cover less of the latency.
 * Returns how many. */
FA_NOINLINE size_t FN(matmul_tile_rest)(size_t rows, bool transposed, const struct fa_product *p,
                                        const REAL *a, const REAL *b, REAL *c)
{
    if (rows >= 4) {
        FN(matmul_tile)(4, transposed, p, a, b, c);
        return 4;
    }
    if (rows >= 2) {
        FN(matmul_tile)(2, transposed, p, a, b, c);
        return 2;
    }
    FN(matmul_tile)(1, transposed, p, a, b, c);
    return 1;
}

/* Whether the next rows are a whole register tile.  2 more than that are two tiles of 4: these take
 * 8 cycles a step with vectors of 8 floats, and 6 and 2 rows take 10. */
static inline bool FN(are_full)(size_t rows) { return rows >= MR && !(MR == 6 && rows == MR + 2); }

/* Panel outer, row group inner: one panel (depth x NR) stays in L1 for all FA_MIN_TILE_Q rows, so B
 * crosses from L2 once per tile: NR elements per FA_MIN_TILE_Q * NR multiply-adds. */
static void FN(matmul)(const struct fa_product *p, struct fa_wanted *wanted)
{
    for (size_t panel = 0; panel < p->panels; panel++) {
        const REAL *b = (const REAL *)p->b + panel * p->b_panel;
        REAL *c = (REAL *)p->c + panel * NR;
        size_t r = 0;
        while (r < p->rows) {
            const REAL *a = (const REAL *)p->a + r * p->a_stride;
            fetch_some(wanted);
            if (FN(are_full)(p->rows - r)) {
                FN(matmul_tile_full)(p, a, b, c + r * p->c_row);
                r += MR;
            } else {
                r += FN(matmul_tile_rest)(p->rows - r, false, p, a, b, c + r * p->c_row);
            }
        }
    }
}

static void FN(matmul_transposed)(const struct fa_product *p)
{
    for (size_t panel = 0; panel < p->panels; panel++) {
        const REAL *b = (const REAL *)p->b + panel * p->b_panel;
        REAL *c = (REAL *)p->c + panel * NR;
        size_t r = 0;
        while (r < p->rows) {
            const REAL *a = (const REAL *)p->a + r;
            if (FN(are_full)(p->rows - r)) {
                FN(matmul_tile_transposed)(p, a, b, c + r * p->c_row);
                r += MR;
            } else {
                r += FN(matmul_tile_rest)(p->rows - r, true, p, a, b, c + r * p->c_row);
            }
        }
    }
}

static void FN(matmul_skip_zeros)(const struct fa_product *p, bool transposed)
{
    for (size_t panel = 0; panel < p->panels; panel++) {
        const REAL *b = (const REAL *)p->b + panel * p->b_panel;
        for (size_t r = 0; r < p->rows; r++) {
            const REAL *a = (const REAL *)p->a + (transposed ? r : r * p->a_stride);
            const size_t step = transposed ? p->a_stride : 1;
            REAL *c = (REAL *)p->c + r * p->c_row + panel * NR;
            size_t k = 0, end = FA_CHAIN - p->into_chain;
            bool add = p->accumulate;
            do {
                VEC acc[NR_VECTORS];
                for (size_t j = 0; j < NR_VECTORS; j++) {
                    acc[j] = V(zero)();
                }
                for (; k < end && k < p->depth; k++) {
                    const REAL x = a[k * step];
                    if (x == 0) {
                        continue;
                    }
                    for (size_t j = 0; j < NR_VECTORS; j++) {
                        acc[j] = V(fma)(V(set)(x), V(load)(b + k * NR + j * VL), acc[j]);
                    }
                }
                for (size_t j = 0; j < NR_VECTORS; j++) {
                    VEC before = add ? V(load)(c + j * VL) : V(zero)();
                    V(store)(c + j * VL, V(add)(before, acc[j]));
                }
                add = true;
                end += FA_CHAIN;
            } while (k < p->depth);
        }
    }
}
