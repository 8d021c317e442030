/* tanh on vectors, for softcap.  Needs exp2_template.h.
 *
 * Up to 1: x + x^3 P(x^2), because 1 - 2 / (e^2x + 1) cancels there and softcap needs a small
 * *relative* error (it multiplies by the cap).  Above: that formula, with |x| cut at 20, where tanh
 * is 1 in both types; what it subtracts is at most 0.24, and errs by that much of the power's
 * error.  P interpolates (tanh(x) / x - 1) / x^2 at Chebyshev nodes of x^2 in [0, 1]: relative
 * error 1.7e-9 (float32), 4.4e-18 (float64).  Error: at most 1.5 ulp, for every float32 and a dense
 * sample of float64 (tests/test_exp2.py).  Most scores are below their cap: the exponential and the
 * division are left out where no lane needs them.
 */
static inline VEC FN(tanh)(VEC x)
{
    const REAL *c = FN(tanh_coef);
    const VEC one = V(set)(1), limit = V(set)(20);
    VEC a = V(abs)(x);
    VEC z = V(mul)(a, a);
    VEC p = V(set)(c[FN(TANH_TERMS) - 1]);
    for (int i = FN(TANH_TERMS) - 2; i >= 0; i--) {
        p = V(fma)(p, z, V(set)(c[i]));
    }
    VEC small = V(fma)(V(mul)(a, z), p, a);
    if (!V(any_gt)(a, one)) {
        return V(copysign)(small, x);
    }
    VEC cut = V(select_lt)(limit, a, limit, a);
    VEC e = FN(exp2)(V(mul)(cut, V(set)((REAL)(2 * FA_LOG2_E))));
    VEC large = V(sub)(one, V(div)(V(set)(2), V(add)(e, one)));
    return V(copysign)(V(select_lt)(one, a, large, small), x);
}
