/* Masks that leave each query one range of keys, as padding, causal masks, windows and packed
 * documents do: found once in a call, before its tasks are planned.  The range then stands for the
 * mask, which no tile reads again. */
#ifndef FA_MASK_RANGES_H
#define FA_MASK_RANGES_H

#include "geometry.h"

/* Look for ranges in mask and bias, and point geometry->ranges at `ranges` if there are any.  A
 * bias is a mask where its elements are 0 and -inf.  Runs on geometry->num_threads threads.
 * fa_ranges_release is to follow, whatever the status. */
enum fa_status fa_ranges_find(struct fa_ranges *ranges, struct fa_geometry *geometry);
void fa_ranges_release(struct fa_ranges *ranges);

/* Bytes that fa_ranges_find allocates.  False: they leave int64. */
bool fa_ranges_bytes(const struct fa_geometry *geometry, int64_t *bytes);

/* Whether ranges stand for the mask, or the bias, of every batch entry. */
bool fa_ranges_replace(const struct fa_geometry *geometry, enum fa_masked_by by);

#endif
