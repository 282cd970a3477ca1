// Sums and maxima over the lanes of a warp and the threads of a block.
#pragma once

#include "cuda/primitives.h"
#include "plan.h"
#include "rules/softmax.h"

namespace fastopt::gpu {

FASTOPT_DEVICE float larger(float a, float b) {  // b where a is NaN: a maximum never becomes NaN
#if defined(__CUDA_ARCH__)
  return ::fmaxf(a, b);
#else
  return a > b ? a : b;
#endif
}
FASTOPT_DEVICE double larger(double a, double b) {
#if defined(__CUDA_ARCH__)
  return ::fmax(a, b);
#else
  return a > b ? a : b;
#endif
}

// Sums and maxima over `lanes` that lie side by side in a warp (a power of two; all of it where
// more share a row): the same in each of them. Every lane of the warp takes part.
template <class V>
FASTOPT_DEVICE V sum_of_lanes(V value, int lanes = kWarpSize) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2)
    if (mask < lanes) value += shuffle_xor(value, mask);
  return value;
}
template <class A>
FASTOPT_DEVICE A max_of_lanes(A value, int lanes = kWarpSize) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2)
    if (mask < lanes) value = larger(shuffle_xor(value, mask), value);
  return value;
}
template <bool kMass, class A>
FASTOPT_DEVICE RowStats<A> merge_lanes(RowStats<A> stats, int lanes = kWarpSize) {
  stats = rebase(stats, max_of_lanes(stats.max, lanes));
  stats.sum = sum_of_lanes(stats.sum, lanes);
  if constexpr (kMass) {
    stats.dot = sum_of_lanes(stats.dot, lanes);
    stats.mass = sum_of_lanes(stats.mass, lanes);
  }
  return stats;
}

// The sum over a block of at most 32 warps, for its first thread. `scratch`: one per warp.
FASTOPT_DEVICE double sum_of_block(double value, double* scratch) {
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  value = sum_of_lanes(value);
  if (lane == 0) scratch[warp] = value;
  sync_block();
  if (thread_index() == 0)
    for (int i = 1; i < block_size() / kWarpSize; ++i) value += scratch[i];
  return value;
}

// By all lanes of a warp: partial sums of an earlier kernel, in the same order everywhere.
FASTOPT_DEVICE double sum_of_parts(const double* parts, int64_t count) {
  double sum = 0;
  for (int64_t i = thread_index() % kWarpSize; i < count; i += kWarpSize) sum += parts[i];
  return sum_of_lanes(sum);
}

}  // namespace fastopt::gpu
