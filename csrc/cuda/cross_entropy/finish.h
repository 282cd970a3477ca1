// After the other kernels: the loss from the sums of their blocks, and the gradient's unit. One
// block.
#pragma once

#include "common.h"

namespace fastopt::gpu {

FASTOPT_DEVICE void store_scalar(void* p, Element type, double value) {
  switch (type) {
    case Element::float32:
      *static_cast<float*>(p) = static_cast<float>(value);
      return;
    case Element::float64:
      *static_cast<double*>(p) = value;
      return;
    case Element::bfloat16:
      *static_cast<BFloat16*>(p) = from_acc<BFloat16>(static_cast<float>(value));
      return;
    case Element::float16:
      *static_cast<Half*>(p) = from_acc<Half>(static_cast<float>(value));
  }
}

FASTOPT_KERNEL void FASTOPT_BOUNDS(kMaxThreads)
    cross_entropy_finish(FASTOPT_PARAMS CrossEntropyParams p) {
  double* const scratch = reinterpret_cast<double*>(shared_memory());
  double loss = 0;
  for (int64_t i = thread_index(); i < p.loss_part_count; i += block_size())
    loss += p.loss_parts[i];
  loss = sum_of_block(loss, scratch);
  if (thread_index() >= kWarpSize) return;
  const double total = total_weight(p);
  if (thread_index() > 0) return;
  if (p.mean) loss = mean_of(loss, total, p.uniform > 0);
  if (p.unit != nullptr) {
    const double upstream = p.mean ? mean_of(1.0, total, p.uniform > 0) : 1.0;
    const bool in_units = waits(p, upstream);
    *p.unit = in_units ? static_cast<float>(upstream / static_cast<double>(scale_of(p))) : 1.0f;
  }
  if (p.loss != nullptr) store_scalar(p.loss, p.loss_type, loss);
}

}  // namespace fastopt::gpu
