/* Names for a template being instantiated: before including one, a kernel file defines DT as f32 or
 * f64 and includes a vec_<isa>.h.  The bodies are then ordinary static functions, FN(matmul) being
 * matmul_f32, which compilers, debuggers and disassemblers see as such. */
#ifndef FA_NAMES_H
#define FA_NAMES_H

#include "engine.h"

#define FA_PASTE_(a, b) a##b
#define FA_PASTE(a, b) FA_PASTE_(a, b)
#define FA_STRING_(x) #x
#define FA_STRING(x) FA_STRING_(x)

typedef float real_f32;
typedef double real_f64;

#define FN(name) FA_PASTE(FA_PASTE(name, _), DT)
#define REAL FN(real)
#define VEC FN(vec)
#define V(op) FN(FA_PASTE(v_, op))
#define VL FN(VL)
#define MR FN(MR)
/* Columns of the register tile, in vectors and in elements. */
#define NR_VECTORS FN(NR_VECTORS)
#define NR (NR_VECTORS * VL)
#define SOFTMAX_ROWS FN(SOFTMAX_ROWS)
#define FEW_ROWS FN(FEW_ROWS)

/* Unroll the next loop fully, early: arrays of vectors indexed by it then live in registers.  GCC
 * 12 unrolls such loops by itself only after it has given the arrays stack slots. */
#if defined(__clang__)
#define FA_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define FA_UNROLL _Pragma("GCC unroll 16")
#else
#define FA_UNROLL
#endif

/* Largest finite values, for telling infinities apart without a call. */
#define MAX_f32 3.402823466e+38f
#define MAX_f64 1.7976931348623157e+308
#define REAL_MAX FN(MAX)

/* What makes an element that is not ordinary infinite, and a value that is too large (engine.h). */
#define ORDINARY_PROBE_f32 0x1p75f
#define ORDINARY_PROBE_f64 0x1p524
#define ORDINARY_PROBE FN(ORDINARY_PROBE)
#define VALUE_PROBE_f32 0x1p32f
#define VALUE_PROBE_f64 0x1p64
#define VALUE_PROBE FN(VALUE_PROBE)
_Static_assert(75 + FA_ORDINARY_EXPONENT == 128, "ORDINARY_PROBE_f32");
_Static_assert(524 + FA_ORDINARY_EXPONENT_F64 == 1024, "ORDINARY_PROBE_f64");
_Static_assert(32 + FA_VALUE_EXPONENT_F32 == 128, "VALUE_PROBE_f32");
_Static_assert(64 + FA_VALUE_EXPONENT_F64 == 1024, "VALUE_PROBE_f64");

#define BIAS_LIMIT_f32 ((float)FA_BIAS_LIMIT_F32)
#define BIAS_LIMIT_f64 FA_BIAS_LIMIT_F64
#define BIAS_LIMIT FN(BIAS_LIMIT)

/* The type of caller memory that is the element type itself. */
#define COMPUTED_f32 FA_F32
#define COMPUTED_f64 FA_F64
#define COMPUTED FN(COMPUTED)

/* Whether narrower types are computed in the element type. */
#define WIDENS_f32 1
#define WIDENS_f64 0
#define WIDENS FN(WIDENS)

/* The types of caller memory that are computed in the element type: all of them, but those that
 * only the second run widens. */
#define STORAGE_TYPES_f32(CASE) CASE(FA_F16) CASE(FA_BF16) CASE(FA_I8) CASE(FA_F32)
#define STORAGE_TYPES_f64(CASE) CASE(FA_F64)
#define STORAGE_TYPES FN(STORAGE_TYPES)

#if defined(__GNUC__)
/* For a body with an argument that every caller gives as a constant: each call is a version of its
 * own. */
#define FA_INLINE static inline __attribute__((always_inline))
/* For a loop whose registers are its own, and that is looked for in the disassembly. */
#define FA_NOINLINE static __attribute__((noinline))
#else
#define FA_INLINE static inline
#define FA_NOINLINE static
#endif

#endif
