/* Every float32 in [-104, 0] through the exp2 of one kernel set, against exp2() of the C library in
 * double, which is right to a small part of a float's ulp.
 *
 * Compiled by tests/test_exp2.py with the kernel set's own flags and -DVEC_HEADER="vec_<isa>.h".
 * Usage: exp2_exhaustive PART PARTS [STEP].  Part 0 .. PARTS - 1 each cover their share of the bit
 * patterns; with STEP, for emulators, one vector of consecutive patterns in every STEP of them.
 * Prints "max_ulp <error> at <x>" and returns 0, or says what is wrong and returns 1.
 *
 * The error is |y - true| / ulp(true), ulp(true) being the distance of the floats around the true
 * value, so that 0.5 is the best that rounding allows.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include VEC_HEADER
#define DT f32
#include "names.h"
#include "constants.h"
#include "exp2_template.h"
#include "ulp.h"

/* exp2 of one value, in every lane. */
static float exp2_of(float x)
{
    float y[VL];
    v_store_f32(y, exp2_f32(v_set_f32(x)));
    for (int lane = 1; lane < VL; lane++) {
        if (bits_of(y[lane]) != bits_of(y[0])) {
            printf("lanes differ at %a\n", (double)x);
            exit(1);
        }
    }
    return y[0];
}

static int fail(float x, float y, const char *rule)
{
    printf("exp2(%a) is %a, must be %s\n", (double)x, (double)y, rule);
    return 1;
}

/* Arguments whose result is exact. */
static int check_special_values(void)
{
    const float zeros[] = {-0x1.a00002p+6f, -105.0f,  -126.0f,  -150.0f,  -1e4f,
                           -0x1p31f,        -0x1p40f, -3.4e38f, -INFINITY};
    for (size_t i = 0; i < sizeof zeros / sizeof *zeros; i++) {
        float y = exp2_of(zeros[i]);
        if (bits_of(y) != 0) {
            return fail(zeros[i], y, "+0");
        }
    }
    for (int n = -104; n <= 100; n++) {
        float y = exp2_of((float)n);
        if (y != ldexpf(1.0f, n)) {
            return fail((float)n, y, "that power of two");
        }
    }
    if (exp2_of(-0.0f) != 1.0f) {
        return fail(-0.0f, exp2_of(-0.0f), "1");
    }
    const uint32_t nans[] = {0x7fc00000u, 0xffc00000u, 0x7fffffffu, 0x7f800001u, 0xff800001u};
    for (size_t i = 0; i < sizeof nans / sizeof *nans; i++) {
        float y = exp2_of(float_of(nans[i]));
        if (y == y) {
            return fail(float_of(nans[i]), y, "NaN");
        }
    }
    return 0;
}

int main(int argc, char **argv)
{
    if (argc != 3 && argc != 4) {
        fprintf(stderr, "usage: exp2_exhaustive PART PARTS [STEP]\n");
        return 2;
    }
    int wrong = check_special_values();
    /* The patterns of -0 .. -104 are consecutive and ascend in magnitude. */
    const uint64_t first = 0x80000000u, count = (uint64_t)bits_of(-104.0f) - first + 1;
    const uint64_t part = strtoull(argv[1], NULL, 10), parts = strtoull(argv[2], NULL, 10);
    const uint64_t step = argc == 4 ? strtoull(argv[3], NULL, 10) : 1;
    const uint64_t begin = first + count * part / parts, end = first + count * (part + 1) / parts;

    double worst = 0;
    float worst_x = 0;
    for (uint64_t bits = begin; bits < end; bits += step * VL) {
        float x[VL], y[VL];
        for (int lane = 0; lane < VL; lane++) {
            uint64_t pattern = bits + (uint64_t)lane;
            x[lane] = float_of((uint32_t)(pattern < end ? pattern : end - 1));
        }
        v_store_f32(y, exp2_f32(v_load_f32(x)));
        for (int lane = 0; lane < VL; lane++) {
            double truth = exp2((double)x[lane]);
            double error = fabs((double)y[lane] - truth) * ulps_per_unit(truth);
            if (!(error <= worst)) {
                worst = error;
                worst_x = x[lane];
            }
        }
    }
    printf("max_ulp %.6f at %a\n", worst, (double)worst_x);
    return wrong || !(worst <= 1.0);
}
