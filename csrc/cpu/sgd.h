// The seam between torch and the CPU SGD kernels: a plain struct, no torch type.
#pragma once

#include "host/sgd_table.h"
#include "levels.h"

namespace fastopt {

// Rows are cut into blocks of so many elements: whole cache lines in every type.
constexpr int64_t kSgdBlock = 64;

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
