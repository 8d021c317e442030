/* Every float32 in [2^-12, 20], and as many float64 spread over the same range, through the tanh of one kernel
 * set, against tanhl() of the C library.
 *
 * Compiled by tests/test_exp2.py with the kernel set's own flags and -DVEC_HEADER="vec_<isa>.h".
 * Usage: tanh_exhaustive PART PARTS [STEP], as exp2_exhaustive.
 * Prints "max_ulp <error> at <x>" of either type and returns 0, or returns 1 where one is above 1.5.
 * Smaller numbers, of which tanh is x to less than a tenth of an ulp, and special values are checked by name.
 */
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include VEC_HEADER
#define DT f32
#include "names.h"
#include "constants.h"
#include "exp2_template.h"
#include "tanh_template.h"
#undef DT
#define DT f64
#include "exp2_template.h"
#include "tanh_template.h"
#include "ulp.h"

#define MAX_ULP 1.5

struct worst {
    double ulps, x;
};

/* `unit`: ulps of the type that a float32 has. */
static void compare(struct worst *worst, double x, double y, double unit)
{
    const long double truth = tanhl((long double)x);
    const double error =
        (double)fabsl((long double)y - truth) * ulps_per_unit((double)truth) * unit;
    if (!(error <= worst->ulps)) {
        *worst = (struct worst){error, x};
    }
}

static float tanh_single(float x)
{
    float y[VL_f32];
    v_store_f32(y, tanh_f32(v_set_f32(x)));
    return y[VL_f32 - 1];
}

static double tanh_double(double x)
{
    double y[VL_f64];
    v_store_f64(y, tanh_f64(v_set_f64(x)));
    return y[VL_f64 - 1];
}

/* Results that are exact. */
static bool specials_are_right(void)
{
    const double same[] = {0.0, -0.0, 0x1p-100, -0x1p-100, 0x1p-60};
    const double one[] = {20, 21, 1e30, INFINITY};
    bool right = true;
    for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
        right = right && tanh_single((float)same[i]) == (float)same[i];
        right = right && copysign(1, (double)tanh_single((float)same[i])) == copysign(1, same[i]);
        right = right && tanh_double(same[i]) == same[i];
    }
    for (size_t i = 0; i < sizeof one / sizeof *one; i++) {
        right = right && tanh_single((float)one[i]) == 1 && tanh_single((float)-one[i]) == -1;
        right = right && tanh_double(one[i]) == 1 && tanh_double(-one[i]) == -1;
    }
    return right && isnan(tanh_single(NAN)) && isnan(tanh_double(NAN));
}

int main(int argc, char **argv)
{
    if (argc != 3 && argc != 4) {
        fprintf(stderr, "usage: tanh_exhaustive PART PARTS [STEP]\n");
        return 2;
    }
    const uint64_t first = bits_of(0x1p-12f), count = (uint64_t)bits_of(20.0f) - first + 1;
    const uint64_t part = strtoull(argv[1], NULL, 10), parts = strtoull(argv[2], NULL, 10);
    const uint64_t step = argc == 4 ? strtoull(argv[3], NULL, 10) : 1;
    const uint64_t begin = first + count * part / parts, end = first + count * (part + 1) / parts;
    struct worst single = {0}, twice = {0};

    for (uint64_t bits = begin; bits < end; bits += step * VL_f32) {
        float x[VL_f32], y[VL_f32];
        double wide[VL_f64], of_wide[VL_f64];
        for (int lane = 0; lane < VL_f32; lane++) {
            const uint64_t pattern = bits + (uint64_t)lane;
            x[lane] = float_of((uint32_t)(pattern < end ? pattern : end - 1));
        }
        v_store_f32(y, tanh_f32(v_load_f32(x)));
        for (int lane = 0; lane < VL_f32; lane++) {
            compare(&single, (double)x[lane], (double)y[lane], 1);
        }
        /* Low bits that differ from one to the next. */
        for (int lane = 0; lane < VL_f64; lane++) {
            wide[lane] =
                (double)x[lane] * (1 + 0x1p-25 * (double)(bits * 2654435761u % 1021) / 1021);
        }
        v_store_f64(of_wide, tanh_f64(v_load_f64(wide)));
        for (int lane = 0; lane < VL_f64; lane++) {
            compare(&twice, wide[lane], of_wide[lane], 0x1p29);
        }
    }
    printf("max_ulp %.6f at %a, float64 %.6f at %a\n", single.ulps, single.x, twice.ulps, twice.x);
    return !(specials_are_right() && single.ulps <= MAX_ULP && twice.ulps <= MAX_ULP);
}
