/* 2^x on vectors.  Needs DT and a vec_<isa>.h; see names.h.
 *
 * x = n + i / 2^B + f, B the bits of the set's table, |f| <= 2^-(B + 1), all exact: adding 1.5 *
 * 2^(mantissa bits - B) rounds x to a multiple of 2^-B, and the low bits of the sum are n and i.
 * V(exp2_scale) makes s = 2^(n + i / 2^B) of them, by a table of 2^(i / 2^B) in a register, or for
 * B = 0 by a shift.  Then 2^f = 1 + f P(f) and 2^x = s + (s f) P(f): one rounding beyond the
 * table's own.  2^0 is exactly 1.  One step of range reduction is exact in base 2: no split
 * constants.  A NaN survives in f, whatever s became.
 *
 * A table saves the terms that its bits make needless: multiply-adds, which compete for the pipes
 * that the products need, against a permutation and an addition, which have pipes of their own.
 *
 * Domain: x <= 100.  Below EXP2_MIN the result is exactly 0 (-inf included): such a weight is under
 * 2^-104 of its row's largest, and stopping there keeps products with it out of the subnormals.
 * NaN gives NaN.  Error: at most 1 ulp of float32 over [-104, 0], exhaustively
 * (tests/test_exp2.py); float64: the table's 0.44 ulp and the last rounding's 0.5.
 *
 * Coefficients: interpolation of (2^f - 1) / f at the Chebyshev nodes of [-2^-(B+1), 2^-(B+1)] in
 * 50 digits.  Relative error in float32 9.2e-9 (B = 0, degree 6 in all: degree 5 leaves 7.5e-8,
 * above 1 ulp), 3.4e-10 (B = 3, degree 4), 2.4e-9 (B = 4, degree 3); in float64 8.5e-18 (B = 0,
 * degree 11), 5e-18 (B = 3, degree 7).  Cost, float32: 1 add, 2 sub (avx512: 1 vreduce), B = 4: 2
 * fma, 1 mul, 1 fma, permutation, shift, integer add, compare = 11 operations (avx512: 10), 4 of
 * them on the multiply-add pipes; B = 0: 13, and 7 of them.
 */

static inline VEC FN(exp2)(VEC x)
{
    const REAL *c = FN(exp2_coef);
    const VEC round = V(set)(FN(EXP2_ROUND));
    VEC t = V(add)(x, round);
    VEC f = V(exp2_rest)(x, t, round);
    VEC scale = V(exp2_scale)(t);
    VEC p = V(set)(c[FN(EXP2_TERMS) - 1]);
    for (int i = FN(EXP2_TERMS) - 2; i >= 0; i--) {
        p = V(fma)(p, f, V(set)(c[i]));
    }
    return V(keep_ge)(x, V(set)(EXP2_MIN), V(fma_exact)(p, V(mul)(f, scale), scale));
}
