// What every cross-entropy kernel is told, on CPU and GPU alike: a plain struct, no torch type.
#pragma once

#include "types.h"

namespace fastopt {

// Element strides of a tensor seen as (batch, class, position): (N, C) has one position a batch
// entry, (N, C, d1, ...) has d1 * ... of them.
struct Strides {
  int64_t batch, cls, position;
};

struct CrossEntropyProblem {
  int64_t batch, classes, positions;  // rows = batch * positions; row r = (r / positions, r % ...)
  Element logits_type;
  Element target_type;  // of probabilities

  const void* logits;
  Strides logits_strides;
  const int64_t* labels;      // one class index per row, or null
  const void* probabilities;  // or null
  Strides target_strides;     // of probabilities
  int64_t ignore_index;
  // q of the formula, with e = label_smoothing and C = classes.
  double keep;     // 1 - e
  double uniform;  // e / C

  // Forward results, one per row in the accumulation type; null: not wanted. The recomputing
  // backward reads row_max and row_sum instead of writing them.
  void* row_loss;
  void* row_max;
  void* row_sum;

  // Backward: d loss / d logits, or d loss / d target when target_gradient. Null: not wanted.
  void* grad;
  Strides grad_strides;
  bool target_gradient;
  bool recompute;            // row_max and row_sum are given: no forward sweep
  const void* row_upstream;  // upstream gradient per row, accumulation type, or null
};

}  // namespace fastopt
