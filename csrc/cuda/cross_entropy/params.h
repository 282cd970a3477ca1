// What the kernels of cross-entropy for GPUs are told: a plain struct, no torch type. Three ways
// through the formula of csrc/rules/softmax.h, chosen by plan.h:
//
//   packed   few classes: a thread a row
//   rows     classes contiguous: lanes of a warp, a block or a cluster of them per row
//   strided  classes apart in memory: lanes run over rows and loop over classes
//
// Before them `sums` adds up what the mean divides by, after them `finish` the losses: partial sums
// in float64, each in an order that depends on nothing but shapes and device. `scale` multiplies a
// saved gradient. Accumulation in float32 (float64 for float64), one rounding at the store. Ignored
// rows count for nothing, whatever they hold, and get gradient 0. A label out of range touches no
// memory: its loss and gradient are NaN.
#pragma once

#include "plan.h"
#include "rules/cross_entropy.h"

namespace fastopt::gpu {

struct CrossEntropyParams : CrossEntropyProblem {
  const void* weight;  // (classes), accumulation type, or null

  // The mean divides by the sum of weight_parts; where targets are probabilities, by the rows.
  bool mean;
  double* weight_parts;  // (weight_part_count) of labels that count, or null
  int weight_part_count;
  // constants.smoothing_mass in parts; null: known to the host.
  double* smoothing_parts;  // (smoothing_part_count)
  int smoothing_part_count;

  // The gradient in multiples of a unit that is written to `unit` (half_gradient_scale).
  bool in_units;
  const float* largest_mass;  // 0-dim, or null: 1
  float* unit;                // 0-dim, or null

  double* loss_parts;  // (blocks) the sum of a block's row losses, or null
  int64_t loss_part_count;
  void* loss;  // 0-dim, loss_type, or null
  Element loss_type;

  // From the plan.
  int lanes, cluster;
  int64_t slice;
};

}  // namespace fastopt::gpu
