// Before the other kernels: partial sums over the labels that count (of their weights), and over
// the smoothing's masses.
#pragma once

#include "lanes.h"
#include "params.h"

namespace fastopt::gpu {

// Blocks beyond the number of one kind's parts have nothing to do for it.
template <class A>
FASTOPT_KERNEL void FASTOPT_BOUNDS(kSumThreads)
    cross_entropy_sums(FASTOPT_PARAMS CrossEntropyParams p) {
  double* const scratch = reinterpret_cast<double*>(shared_memory());
  const A* const weight = static_cast<const A*>(p.weight);
  const int64_t block = block_index();
  if (p.weight_parts != nullptr && block < p.weight_part_count) {
    const int64_t rows = p.batch * p.positions, apart = block_size();
    const int64_t step = p.weight_part_count * apart * kSumItems;
    double sum = 0;
    int count = 0;  // where every label weighs 1
    for (int64_t r = block * apart * kSumItems + thread_index(); r < rows; r += step) {
      int64_t y[kSumItems];  // all under way before the first is looked at
      for (int k = 0; k < kSumItems; ++k)
        y[k] = r + k * apart < rows ? p.labels[r + k * apart] : p.ignore_index;
      for (int k = 0; k < kSumItems; ++k) {
        const bool counts = y[k] != p.ignore_index && y[k] >= 0 && y[k] < p.classes;
        if (weight != nullptr && counts) {
          sum += static_cast<double>(weight[y[k]]);
        } else {
          count += counts;
        }
      }
    }
    sum = sum_of_block(sum + count, scratch);
    if (thread_index() == 0) p.weight_parts[block] = sum;
  }
  sync_block();
  if (p.smoothing_parts != nullptr && block < p.smoothing_part_count) {
    double sum = 0;
    for (int64_t c = block * block_size() + thread_index(); c < p.classes;
         c += static_cast<int64_t>(p.smoothing_part_count) * block_size())
      sum += static_cast<double>(static_cast<A>(p.uniform) * weight[c]);
    sum = sum_of_block(sum, scratch);
    if (thread_index() == 0) p.smoothing_parts[block] = sum;
  }
}

}  // namespace fastopt::gpu
