/* The table of kernel sets.  Selection is the caller's: it asks once, at import, and passes the
 * pointer down; nothing here remembers it. */
#include <stdbool.h>
#include <stddef.h>

#include "cpu_features.h"
#include "kernels/kernel_sets.h"

static bool always(void) { return true; }

/* Best first.  kernels == NULL: a name we know that this build leaves out. */
static const struct entry {
    const char *name;
    const struct fa_kernels *kernels;
    bool (*runs_here)(void);
    bool (*request)(void);
} table[] = {
#ifdef FA_HAVE_AMX
    {"amx", &fa_kernels_amx, fa_cpu_has_amx, fa_request_amx},
#else
    {"amx", NULL, NULL, NULL},
#endif
#ifdef FA_HAVE_AVX512
    {"avx512", &fa_kernels_avx512, fa_cpu_has_avx512, always},
#else
    {"avx512", NULL, NULL, NULL},
#endif
#ifdef FA_HAVE_AVX2
    {"avx2", &fa_kernels_avx2, fa_cpu_has_avx2, always},
#else
    {"avx2", NULL, NULL, NULL},
#endif
#ifdef FA_HAVE_NEON
    {"neon", &fa_kernels_neon, always, always}, /* part of the aarch64 baseline */
#else
    {"neon", NULL, NULL, NULL},
#endif
    {"scalar", &fa_kernels_scalar, always, always},
};

#define TABLE_LENGTH (sizeof table / sizeof table[0])

const struct fa_kernels *fa_kernels_available(int index)
{
    for (size_t i = 0; i < TABLE_LENGTH; i++) {
        if (table[i].kernels != NULL && table[i].runs_here() && index-- == 0) {
            return table[i].kernels;
        }
    }
    return NULL;
}

bool fa_kernels_request(const struct fa_kernels *kernels)
{
    for (size_t i = 0; i < TABLE_LENGTH; i++) {
        if (table[i].kernels == kernels) {
            return table[i].request();
        }
    }
    return false;
}

const char *fa_kernels_known_name(int index)
{
    return index >= 0 && (size_t)index < TABLE_LENGTH ? table[index].name : NULL;
}

const char *fa_kernels_name(const struct fa_kernels *kernels) { return kernels->name; }

const char *fa_engine_name(const struct fa_kernels *kernels, int index)
{
    for (int i = 0; kernels->engines[i] != NULL; i++) {
        if (i == index) {
            return kernels->engines[i]->name;
        }
    }
    return NULL;
}
