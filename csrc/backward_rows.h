/* Row by row: shift, factor and delta before the main pass, grad_q after it. */
#ifndef FA_BACKWARD_ROWS_H
#define FA_BACKWARD_ROWS_H

#include "backward_frame.h"

/* A task of the pass that finds shift, factor and delta of every row. */
void fa_backward_prepare_rows(struct fa_job *job, int64_t index, int thread);

/* grad_q of a head from the sums of its groups, each of rows times padded_k elements, g->rows
 * apart.  scratch has room for padded_k elements. */
void fa_backward_store_rows(struct fa_backward *backward, int64_t head_index, const char *sums,
                            char *scratch);

#endif
