/* The memory for sums of grad_q, of a few units at a time. */
#ifndef FA_BACKWARD_SUMS_H
#define FA_BACKWARD_SUMS_H

#include "backward_frame.h"

/* A unit is the heads that one task of each group works on: a key head, or, with softmax over the
 * queries, all heads that share it.  Its sums, real [heads of it][groups][rows][padded_k], exist
 * from its first task on until its last has added and stored them. */
enum fa_status fa_sums_init(struct fa_backward *backward, int64_t units, int64_t heads_per_unit);
void fa_sums_release(struct fa_sums *sums);
/* The sums of a unit, for one of its tasks; their contents are arbitrary.  `tasks`: how many
 * tasks the unit has. */
char *fa_sums_enter(struct fa_sums *sums, int64_t unit, int64_t tasks);
/* Note that a task of the unit is done.  True: it is the last, and is to call fa_sums_leave when
 * it needs the sums no more. */
bool fa_sums_finish(struct fa_sums *sums, int64_t unit);
void fa_sums_leave(struct fa_sums *sums, int64_t unit);

#endif
