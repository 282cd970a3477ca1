// The seam between torch and the CPU SGD kernels: plain structs, no torch type.
#pragma once

#include <cstdint>

#include "levels.h"

namespace fastopt {

enum class SgdElement : int8_t { float32, float64, bfloat16, float16 };

// The hyperparameters of one parameter group; fastopt/optim.py fills them in before every step.
struct SgdGroup {
  double lr, weight_decay, momentum, dampening;
  double nesterov, maximize;  // 0 or 1
  double served;              // 0: torch's path takes the parameters of this group
};

// One parameter: its memory, which is `numel` elements in the same order in all three.
struct SgdRow {
  void* param;
  void* grad;
  void* momentum_buffer;  // null without momentum
  int64_t numel;
  int64_t first_block;  // rows are cut into blocks of kSgdBlock elements; where this one's begin
  int32_t group;
  SgdElement element;
  bool first_step;  // the buffer receives its first gradient
};

constexpr int64_t kSgdBlock = 64;  // whole cache lines in every type

struct SgdStep {
  const SgdRow* rows;
  int64_t count;
  const SgdGroup* groups;
  bool unscale;  // multiply the gradients by inv_scale first, in memory too
  double inv_scale;
};

// The kernels of one SIMD level: blocks [begin, end) of the step, the first of them in `row`.
#define FASTOPT_DECLARE_SGD(level)                                                        \
  namespace level {                                                                       \
  void sgd_blocks(const SgdStep& step, int64_t row, int64_t begin, int64_t end) noexcept; \
  }
FASTOPT_FOR_EACH_LEVEL(FASTOPT_DECLARE_SGD)
#undef FASTOPT_DECLARE_SGD

}  // namespace fastopt
