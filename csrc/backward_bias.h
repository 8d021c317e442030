/* The gradient of the bias. */
#ifndef FA_BACKWARD_BIAS_H
#define FA_BACKWARD_BIAS_H

#include "backward_frame.h"

/* A task: an area of a plane of the bias; and how many tasks there are. */
void fa_backward_bias(struct fa_job *job, int64_t index, int thread);
int64_t fa_backward_bias_tasks(const struct fa_backward *backward);

/* Allocate bias_sums for a run that needs them. */
enum fa_status fa_backward_allocate_bias(struct fa_backward *backward);

#endif
