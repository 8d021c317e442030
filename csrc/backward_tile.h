/* Weights and gradients of scores, tile by tile. */
#ifndef FA_BACKWARD_TILE_H
#define FA_BACKWARD_TILE_H

#include "backward_frame.h"

/* Weights and gradients of scores of some rows, FA_BACKWARD_ROWS at most, against the key block
 * that ws holds: in ws->weights and ws->gradients, 0 where a key takes no part.  ws holds the
 * rows and their grad_out, too.  weights_only: nothing in ws->gradients.  Returns the columns,
 * whole panels, outside of which there is nothing; lo == hi if there is none. */
struct fa_key_range fa_backward_tile(const struct fa_backward *backward,
                                     struct fa_backward_workspace *ws,
                                     const struct fa_head_rows *rows, bool weights_only);

/* Set up the tile of the rows from the r-th of them on, and compute its scores, and the factors
 * of its dropout: ws->forward.scores is ws->weights at row r.  False: no key takes part. */
bool fa_backward_scores(struct fa_tile *tile, struct fa_backward_workspace *ws,
                        const struct fa_head_rows *rows, int64_t r);

/* Gradients of the weights of that tile, dropout included.  Returns where the first of row 0 is in
 * ws->gradients. */
char *fa_backward_weight_gradients(const struct fa_backward *backward, const struct fa_tile *tile,
                                   struct fa_backward_workspace *ws);

/* Rows of grad_out into ws->grad_out; where they lie stays in ws->row. */
void fa_backward_load_grad(const struct fa_backward *backward, struct fa_backward_workspace *ws,
                           const struct fa_head_rows *rows);

/* Pack keys [block_key, block_key + keys) and their values for these functions. */
void fa_backward_pack(const struct fa_backward *backward, const struct fa_head *head,
                      struct fa_backward_workspace *ws, int64_t block_key, int64_t keys);

#endif
