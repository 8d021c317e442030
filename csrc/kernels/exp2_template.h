/* 2^x on vectors.  Needs DT and a vec_<isa>.h; see names.h.
 *
 * x = n + f, n the nearest integer, |f| <= 1/2, both exact: adding 1.5 * 2^(mantissa bits) rounds x to
 * an integer that the low bits of the sum hold; the exponent bias is added with it, so that a shift
 * makes them 2^n.  2^f = 1 + f P(f), so that 2^0 is exactly 1.  One step of range reduction is exact in
 * base 2: no split constants.  2^n is a factor, not an integer added to the exponent, because a NaN
 * survives the product.
 *
 * Domain: x <= 100.  Below EXP2_MIN the result is exactly 0 (-inf included): such a weight is under
 * 2^-104 of its row's largest, and stopping there keeps products with it out of the subnormals.  NaN
 * gives NaN.  Error: at most 1 ulp of float32 over [-104, 0], exhaustively (tests/test_exp2.py).
 *
 * Coefficients: interpolation of (2^f - 1) / f at the Chebyshev nodes of [-1/2, 1/2] in 50 digits,
 * relative error 5.1e-9 (degree 6 in all: degree 5 leaves 7.5e-8, above 1 ulp) and 8.5e-18 (degree 11).
 * Cost, float32: 1 add, 2 sub, 6 fma, 1 mul, shift, compare, and = 13 operations.
 */

static inline VEC FN(exp2)(VEC x)
{
    const REAL *c = FN(exp2_coef);
    const VEC round = V(set)(FN(EXP2_ROUND));
    VEC t = V(add)(x, round);
    VEC f = V(sub)(x, V(sub)(t, round));
    VEC p = V(set)(c[FN(EXP2_TERMS) - 1]);
    for (int i = FN(EXP2_TERMS) - 2; i >= 0; i--) {
        p = V(fma)(p, f, V(set)(c[i]));
    }
    p = V(fma_exact)(p, f, V(set)(1));
    return V(keep_ge)(x, V(set)(EXP2_MIN), V(mul)(p, V(power)(t)));
}
