/* What makes weights of scores: what the forward pass kept, lse, or the sums of the softmax once
 * more. */
#ifndef FA_BACKWARD_STATISTICS_H
#define FA_BACKWARD_STATISTICS_H

#include "backward_frame.h"

/* Whether a softmax over `scores` scores, one of `softmaxes`,
 * needs its own, because lse is not exact enough for its weights. */
bool fa_statistics_wanted(const struct fa_backward *backward, double lse, int64_t scores,
                          int64_t softmaxes);
/* How a softmax is weighed: as the forward pass kept it, by its statistics, or by lse if there
 * are none or lse is not theirs.  It is not where the caller merged attention over more keys than
 * those of this call, and means the gradients of that; with what the forward pass kept, nothing
 * is merged.  kept, of: each may be NULL.  excess: its own, in the first run's array.  sure: the
 * statistics are to be believed.  A second run's total becomes that of all keys. */
struct fa_weighing fa_weigh(const struct fa_backward *backward, char *excess,
                            const struct fa_weighing *kept, struct fa_statistics *of, bool sure,
                            double lse);
/* A sink, a base-2 score or -inf, joins the total; its weight, by statistics or, where they are
 * NULL, by lse. */
void fa_statistics_add_sink(struct fa_statistics *of, double sink);
double fa_sink_weight(const struct fa_statistics *of, double lse, double sink);
/* That of a row, or of a key with softmax over the queries, as the forward pass kept it.  False:
 * it is not there, or not of the scores that this run computes. */
bool fa_weighing_kept(const struct fa_backward *backward, const char *at, struct fa_weighing *kept);
/* The weight of a sink, a base-2 score or -inf, beside it. */
double fa_kept_sink_weight(const struct fa_weighing *kept, double sink);
/* Those of the rows from `first` on, FA_BACKWARD_ROWS at most, that are wanted; the others' are
 * arbitrary.  Without sinks.  False: stopped. */
bool fa_backward_row_statistics(struct fa_job *job, int thread, struct fa_backward_workspace *ws,
                                const struct fa_head_rows *rows, const bool *wanted,
                                struct fa_statistics *of);
/* Those of all keys of the block that ws holds: top and total, into ws->col_max and ws->col_sum.
 * False: stopped. */
bool fa_backward_column_statistics(struct fa_job *job, int thread, const struct fa_head *head,
                                   struct fa_backward_workspace *ws);

#endif
