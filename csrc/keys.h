/* The keys and values of a block: where they lie, and packed for the products. */
#ifndef FA_KEYS_H
#define FA_KEYS_H

#include "geometry.h"
#include "workspace.h"

/* Find keys [block_key, block_key + keys) and columns [first_col, ...) of their values: ws->keys
 * and ws->values, and whether the type of the keys alone says that they are ordinary (engine.h). */
void fa_locate_keys(const struct fa_head *head, struct fa_workspace *ws, int64_t block_key,
                    int64_t keys, int64_t first_col);

/* Pack the first `keys` of these keys into ws->k, and see whether they are ordinary. */
void fa_pack_keys(const struct fa_head *head, struct fa_workspace *ws, int64_t keys);

/* Pack `cols` columns of their values into ws->v.  Returns whether engine->values may have them. */
bool fa_pack_values(const struct fa_head *head, struct fa_workspace *ws, int64_t keys,
                    int64_t cols);

#endif
