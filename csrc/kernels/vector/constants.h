/* Polynomial coefficients of exp2_template.h and tanh_template.h, lowest power first; how they were
 * obtained stands there. */
#ifndef FA_CONSTANTS_H
#define FA_CONSTANTS_H

/* Smallest argument with a non-zero power, in both element types (see exp2_template.h). */
#define EXP2_MIN (-104)

/* Coefficients of 2^f for |f| <= 2^-(table bits + 1), see exp2_template.h; a vec_<isa>.h says how
 * many bits of the exponent's fraction its table takes. */
#if EXP2_TABLE_BITS_f32 == 4
#define EXP2_TERMS_f32 3
static const float exp2_coef_f32[EXP2_TERMS_f32] = {
    0x1.62e430p-1f,
    0x1.ebff92p-3f,
    0x1.c6b29ap-5f,
};
#elif EXP2_TABLE_BITS_f32 == 3
#define EXP2_TERMS_f32 4
static const float exp2_coef_f32[EXP2_TERMS_f32] = {
    0x1.62e430p-1f,
    0x1.ebfbe0p-3f,
    0x1.c6bb7ap-5f,
    0x1.3b2fc4p-7f,
};
#elif EXP2_TABLE_BITS_f32 == 0
#define EXP2_TERMS_f32 6
static const float exp2_coef_f32[EXP2_TERMS_f32] = {
    0x1.62e430p-1f, 0x1.ebfbe0p-3f,  0x1.c6af6cp-5f,
    0x1.3b2a54p-7f, 0x1.5f0890p-10f, 0x1.44138ap-13f,
};
#else
#error "no float32 coefficients for this EXP2_TABLE_BITS_f32"
#endif

#if EXP2_TABLE_BITS_f64 == 3
#define EXP2_TERMS_f64 7
static const double exp2_coef_f64[EXP2_TERMS_f64] = {
    0x1.62e42fefa39efp-1,  0x1.ebfbdff82c6c5p-3,  0x1.c6b08d704a11fp-5,  0x1.3b2ab6f1f1910p-7,
    0x1.5d87fe72ac65ep-10, 0x1.430deca12d584p-13, 0x1.ffd1f6633bd3ap-17,
};
#elif EXP2_TABLE_BITS_f64 == 0
#define EXP2_TERMS_f64 11
static const double exp2_coef_f64[EXP2_TERMS_f64] = {
    0x1.62e42fefa39efp-1,  0x1.ebfbdff82c598p-3,  0x1.c6b08d704a0c2p-5,  0x1.3b2ab6fba1ddap-7,
    0x1.5d87fe78a5276p-10, 0x1.430913096fd9fp-13, 0x1.ffcbfc670dcd4p-17, 0x1.62bfd47773353p-20,
    0x1.b524fae627834p-24, 0x1.e6063f7217bc6p-28, 0x1.e9d3fe3952179p-32,
};
#else
#error "no float64 coefficients for this EXP2_TABLE_BITS_f64"
#endif

/* Adding it rounds to a multiple of 2^-(table bits), which the low bits of the sum then hold;
 * without a table they hold the exponent bias too. */
#define EXP2_ROUND_f32                                                                             \
    (0x1.8p23f / (1 << EXP2_TABLE_BITS_f32) + (EXP2_TABLE_BITS_f32 == 0 ? 127 : 0))
#define EXP2_ROUND_f64                                                                             \
    (0x1.8p52 / (1 << EXP2_TABLE_BITS_f64) + (EXP2_TABLE_BITS_f64 == 0 ? 1023 : 0))

#define TANH_TERMS_f32 8
static const float tanh_coef_f32[TANH_TERMS_f32] = {
    -0x1.555556p-2f, 0x1.1110f2p-3f, -0x1.ba117cp-5f,  0x1.65a7c4p-6f,
    -0x1.1d02d6p-7f, 0x1.a45278p-9f, -0x1.e42e30p-11f, 0x1.2b7582p-13f,
};

#define TANH_TERMS_f64 16
static const double tanh_coef_f64[TANH_TERMS_f64] = {
    -0x1.5555555555555p-2,  0x1.11111111110b9p-3,  -0x1.ba1ba1ba1453ep-5,  0x1.664f4880d2a47p-6,
    -0x1.226e3519865dfp-7,  0x1.d6d3c538d0bbep-9,  -0x1.7da2bdc3daa27p-10, 0x1.3551ae34bdfffp-11,
    -0x1.f5211730ee038p-13, 0x1.94981e5bdbe6fp-14, -0x1.42090e21d3d28p-15, 0x1.ea19b73b128d8p-17,
    -0x1.4eb911dcd9788p-18, 0x1.7238a0a7e22b6p-20, -0x1.1ab979c0ab58cp-22, 0x1.b028f6cb72ebfp-26,
};

#endif
