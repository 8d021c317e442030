/* How weights come from scores: by numbers that the forward pass kept, by lse, or by the sums of
 * the softmax once more. */
#ifndef FA_BACKWARD_STATISTICS_H
#define FA_BACKWARD_STATISTICS_H

#include "backward_frame.h"

/* Whether a softmax over `scores` scores, one of `softmaxes`, needs its own statistics, because
 * lse is not exact enough for its weights. */
bool fa_statistics_wanted(const struct fa_backward *backward, double lse, int64_t scores,
                          int64_t softmaxes);
/* How a softmax is weighed: as the forward pass kept it; by its statistics; or by lse, where
 * there are no statistics or lse is not theirs.  lse is not theirs where the caller merged
 * attention over more keys than those of this call, and means the gradients of all of them; with
 * what the forward pass kept, nothing is merged.  `kept` and `of` are nullable.  excess: the
 * place of the softmax in the array of the first run.  sure: the statistics are to be believed.
 * In a second run the total becomes that of all keys. */
struct fa_weighing fa_weigh(const struct fa_backward *backward, char *excess,
                            const struct fa_weighing *kept, struct fa_statistics *of, bool sure,
                            double lse);
/* Let a sink, a base-2 score or -inf, join the total; and the weight of the sink, by statistics
 * or, where they are NULL, by lse. */
void fa_statistics_add_sink(struct fa_statistics *of, double sink);
double fa_sink_weight(const struct fa_statistics *of, double lse, double sink);
/* The weighing of a row, or of a key with softmax over the queries, as the forward pass kept it.
 * False: it is not there, or not of the scores that this run computes. */
bool fa_weighing_kept(const struct fa_backward *backward, const char *at, struct fa_weighing *kept);
/* The weight of a sink, a base-2 score or -inf, beside a softmax that was kept. */
double fa_kept_sink_weight(const struct fa_weighing *kept, double sink);
/* Statistics of the rows that are wanted, without sinks, of FA_BACKWARD_ROWS rows at most; those
 * of other rows are arbitrary.  False: stopped. */
bool fa_backward_row_statistics(struct fa_job *job, int thread, struct fa_backward_workspace *ws,
                                const struct fa_head_rows *rows, const bool *wanted,
                                struct fa_statistics *of);
/* Statistics of all keys of the block that ws holds: top and total, into ws->col_max and
 * ws->col_sum.  False: stopped. */
bool fa_backward_column_statistics(struct fa_job *job, int thread, const struct fa_head *head,
                                   struct fa_backward_workspace *ws);

#endif
