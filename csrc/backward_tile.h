/* Weights and gradients of scores, tile by tile. */
#ifndef FA_BACKWARD_TILE_H
#define FA_BACKWARD_TILE_H

#include "backward_frame.h"

/* Rows [first, first + rows) of a head against the key block whose packed keys and values ws holds and has
 * located: weights and gradients of scores, in ws->weights and ws->gradients, 0 where a key takes no part.  Returns the
 * columns, whole panels, outside of which there is nothing; none: lo == hi.  weights_only: and nothing in
 * ws->gradients. */
struct fa_key_range fa_backward_tile(const struct fa_backward *backward, const struct fa_head *head,
                                     int64_t head_index, struct fa_backward_workspace *ws,
                                     int64_t first, int64_t rows, int64_t block_key,
                                     bool weights_only);

/* Scores of rows [first, first + rows), at most tile_q, against that key block, into ws->weights
 * at row `offset`, and gradients of weights, dropout included, into ws->gradients.  `part`: where
 * they are, as a workspace of the forward pass.  False: no key takes part. */
bool fa_backward_scores(const struct fa_backward *backward, struct fa_tile *tile,
                        struct fa_workspace *part, const struct fa_head *head,
                        struct fa_backward_workspace *ws, int64_t first, int64_t rows,
                        int64_t offset, int64_t block_key, bool weights_only);

/* Rows [first, first + rows) of grad_out into ws->grad_out; where they lie stays in ws->row. */
void fa_backward_load_grad(const struct fa_backward *backward, int64_t head_index,
                           struct fa_backward_workspace *ws, int64_t first, int64_t rows);

/* Pack the keys and values of a block for fa_backward_tile. */
void fa_backward_pack(const struct fa_backward *backward, const struct fa_head *head,
                      struct fa_backward_workspace *ws, int64_t block_key, int64_t keys);

#endif
