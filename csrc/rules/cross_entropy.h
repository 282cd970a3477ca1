// What every cross-entropy kernel is told, on CPU and GPU alike: a plain struct, no torch type.
#pragma once

#include "softmax.h"

namespace fastopt {

// Element strides of a tensor seen as (batch, class, position): (N, C) has one position a batch
// entry, (N, C, d1, ...) has d1 * ... of them.
struct Strides {
  int64_t batch, cls, position;
};

FASTOPT_RULE int64_t row_offset(const Strides& strides, int64_t row, int64_t positions) {
  if (positions == 1) return row * strides.batch;  // a division is not free
  return row / positions * strides.batch + row % positions * strides.position;
}

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
  RowConstants<double> constants;

  void* row_loss;  // one per row in the accumulation type; null: not wanted
  void* grad;      // d loss / d logits; null: not wanted
  Strides grad_strides;
};

// Gradients of float16 logits wait for their upstream factor (a GradScaler's 65536, say) as
// multiples of a unit: a p - q is at most twice the row's sum of |q|, and most of its elements are
// far below what float16 holds. A power of two takes the largest possible sum of a call's masses to
// [2^13, 2^14): nothing overflows, and the least is lost below.
FASTOPT_RULE float half_gradient_scale(float largest) {
  if (!(largest > 0 && largest < __builtin_inff())) return 1.0f;
  const int exponent = static_cast<int>(bit_cast<uint32_t>(largest) >> 23);  // 127 for [1, 2)
  const int scale = 127 + 13 - (exponent - 127);
  return bit_cast<float>(static_cast<uint32_t>(scale < 254 ? scale > 1 ? scale : 1 : 254) << 23);
}

// A saved gradient times an upstream gradient that may be inf or NaN: 0 in rows that are ignored,
// and inf - inf, as in torch's formula, wherever a class has mass.
template <class A>
FASTOPT_RULE A times_upstream(A grad, A factor, bool ignored, bool has_mass) {
  if (ignored) return A(0);
  return has_mass ? grad * factor + (factor - factor) : grad * factor;
}

}  // namespace fastopt
