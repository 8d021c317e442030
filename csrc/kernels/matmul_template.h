/* The one matrix product of the library, used for both Q K^T and P V: A broadcast by element, B in
 * packed panels.  Needs DT and a vec_<isa>.h; see names.h.
 *
 * Cost of a register tile per step of depth: NR_VECTORS loads + MR broadcasts for NR_VECTORS * MR
 * fused multiply-adds; with 6 x 2 vectors 8 loads per 12, where the ports allow 2 of each per cycle.
 * Each element is one chain of multiply-adds in order of depth from 0, so its bits depend on no tiling;
 * what it accumulates into is added last, once: over many key blocks the rounding errors of a sum then
 * grow with the block's length plus the number of blocks, not with their product.
 */

/* c[rows][NR] (+)= a[rows][depth] b[depth][NR], rows a constant up to MR
 * Live: rows * NR_VECTORS accumulators, NR_VECTORS columns, one broadcast.  Not unrolled over depth: one
 * step is 24 instructions with AVX2, which 4 a cycle deliver in the 6 cycles that its 12 multiply-adds
 * take, and where it is unrolled GCC 12 spills accumulators (5 % of the whole forward pass). */
FA_INLINE void FN(matmul_tile)(const size_t rows, size_t depth, const REAL *restrict a, size_t lda,
                               const REAL *restrict b, REAL *restrict c, size_t ldc,
                               bool accumulate)
{
    const REAL *row[MR];
    VEC acc[MR][NR_VECTORS];
    FA_UNROLL
    for (size_t i = 0; i < rows; i++) {
        row[i] = a + i * lda;
        FA_UNROLL
        for (size_t j = 0; j < NR_VECTORS; j++) {
            acc[i][j] = V(zero)();
        }
    }
    for (size_t k = 0; k < depth; k++) {
        VEC column[NR_VECTORS];
        FA_UNROLL
        for (size_t j = 0; j < NR_VECTORS; j++) {
            column[j] = V(load)(b + k * NR + j * VL);
        }
        FA_UNROLL
        for (size_t i = 0; i < rows; i++) {
            VEC x = V(broadcast)(row[i] + k);
            FA_UNROLL
            for (size_t j = 0; j < NR_VECTORS; j++) {
                acc[i][j] = V(fma)(x, column[j], acc[i][j]);
            }
        }
    }
    if (accumulate) {
        FA_UNROLL
        for (size_t i = 0; i < rows; i++) {
            FA_UNROLL
            for (size_t j = 0; j < NR_VECTORS; j++) {
                acc[i][j] = V(add)(V(load)(c + i * ldc + j * VL), acc[i][j]);
            }
        }
    }
    FA_UNROLL
    for (size_t i = 0; i < rows; i++) {
        FA_UNROLL
        for (size_t j = 0; j < NR_VECTORS; j++) {
            V(store)(c + i * ldc + j * VL, acc[i][j]);
        }
    }
}

FA_NOINLINE void FN(matmul_tile_full)(size_t depth, const REAL *a, size_t lda, const REAL *b,
                                      REAL *c, size_t ldc, bool accumulate)
{
    FN(matmul_tile)(MR, depth, a, lda, b, c, ldc, accumulate);
}

/* What is left of the rows, and the few rows of decoding: 4, 2 and 1 at a time, whose accumulators cover
 * less of the latency but whose time reading b takes anyway.  Returns how many. */
FA_NOINLINE size_t FN(matmul_tile_part)(size_t rows, size_t depth, const REAL *a, size_t lda,
                                        const REAL *b, REAL *c, size_t ldc, bool accumulate)
{
    if (rows >= 4) {
        FN(matmul_tile)(4, depth, a, lda, b, c, ldc, accumulate);
        return 4;
    }
    if (rows >= 2) {
        FN(matmul_tile)(2, depth, a, lda, b, c, ldc, accumulate);
        return 2;
    }
    FN(matmul_tile)(1, depth, a, lda, b, c, ldc, accumulate);
    return 1;
}

/* Panel outer, row group inner: one panel (depth x NR) stays in L1 for all FA_TILE_Q rows, so B
 * crosses from L2 once per tile: NR elements per FA_TILE_Q * NR multiply-adds. */
static void FN(matmul)(size_t rows, size_t depth, size_t panels, const void *a, size_t lda,
                       const void *b, size_t panel_stride, void *c, size_t ldc, bool accumulate,
                       struct fa_wanted *wanted)
{
    for (size_t p = 0; p < panels; p++) {
        const REAL *panel = (const REAL *)b + p * panel_stride;
        size_t r = 0;
        for (; r + MR <= rows; r += MR) {
            fetch_some(wanted);
            FN(matmul_tile_full)(depth, (const REAL *)a + r * lda, lda, panel,
                                 (REAL *)c + r * ldc + p * NR, ldc, accumulate);
        }
        while (r < rows) {
            fetch_some(wanted);
            r += FN(matmul_tile_part)(rows - r, depth, (const REAL *)a + r * lda, lda, panel,
                                      (REAL *)c + r * ldc + p * NR, ldc, accumulate);
        }
    }
}

static void FN(matmul_skip_zeros)(size_t rows, size_t depth, size_t panels, const void *a,
                                  size_t lda, const void *b, size_t panel_stride, void *c,
                                  size_t ldc)
{
    for (size_t p = 0; p < panels; p++) {
        const REAL *panel = (const REAL *)b + p * panel_stride;
        for (size_t r = 0; r < rows; r++) {
            const REAL *row_a = (const REAL *)a + r * lda;
            REAL *row_c = (REAL *)c + r * ldc + p * NR;
            VEC acc[NR_VECTORS];
            for (size_t j = 0; j < NR_VECTORS; j++) {
                acc[j] = V(zero)();
            }
            for (size_t k = 0; k < depth; k++) {
                if (row_a[k] == 0) {
                    continue;
                }
                for (size_t j = 0; j < NR_VECTORS; j++) {
                    acc[j] = V(fma)(V(set)(row_a[k]), V(load)(panel + k * NR + j * VL), acc[j]);
                }
            }
            for (size_t j = 0; j < NR_VECTORS; j++) {
                V(store)(row_c + j * VL, V(add)(V(load)(row_c + j * VL), acc[j]));
            }
        }
    }
}
