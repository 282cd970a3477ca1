// Which instantiations a call takes, and in which order: for the launcher and the emulation alike.
#pragma once

#include <algorithm>

#include "finish.h"
#include "packed.h"
#include "rows.h"
#include "scale.h"
#include "strided.h"
#include "sums.h"

namespace fastopt::gpu {

// Whether positions 2i and 2i + 1 of every class are one aligned access.
inline bool pairs_up(const void* data, int64_t element_bytes, const Strides& strides) {
  return strides.position == 1 && strides.cls % 2 == 0 && strides.batch % 2 == 0 &&
         reinterpret_cast<uintptr_t>(data) % (2 * element_bytes) == 0;
}

// What the plan asks about a call.
inline CrossEntropyShape shape_of(const CrossEntropyParams& p) {
  const bool labels = p.probabilities == nullptr;
  CrossEntropyShape shape{};
  shape.rows = p.batch * p.positions;
  shape.classes = p.classes;
  shape.logit_bytes = bytes_of(p.logits_type);
  shape.target_bytes = labels ? 0 : bytes_of(p.target_type);
  shape.contiguous_classes = p.logits_strides.cls == 1 && (labels || p.target_strides.cls == 1) &&
                             (p.grad == nullptr || p.grad_strides.cls == 1);
  shape.reads_twice = p.grad != nullptr;
  shape.pairs = p.positions % 2 == 0 &&
                pairs_up(p.logits, bytes_of(p.logits_type), p.logits_strides) &&
                (labels || pairs_up(p.probabilities, bytes_of(p.target_type), p.target_strides)) &&
                (p.grad == nullptr || pairs_up(p.grad, bytes_of(p.logits_type), p.grad_strides));
  return shape;
}

// Of device memory, for the partial sums.
inline int64_t workspace_doubles(const CrossEntropyPlan& plan) {
  return 2 * kMaxParts + plan.blocks;
}

template <class T, class TT, bool kMass, class Launch>
void launch_plan(const CrossEntropyParams& p, const CrossEntropyPlan& plan, const Launch& launch) {
  const auto run = [&](auto kernel) {
    launch(kernel, plan.blocks, plan.threads, plan.shared_bytes, plan.cluster, p);
  };
  switch (plan.kernel) {
    case CrossEntropyKernel::packed:
      return run(&cross_entropy_packed<T, TT, kMass>);
    case CrossEntropyKernel::rows:
      return plan.held ? run(&cross_entropy_rows<T, TT, kMass, true>)
                       : run(&cross_entropy_rows<T, TT, kMass, false>);
    case CrossEntropyKernel::strided:
      return plan.adjacent == 2 ? run(&cross_entropy_strided<T, TT, kMass, 2>)
                                : run(&cross_entropy_strided<T, TT, kMass, 1>);
  }
}

// launch(kernel, blocks, threads, shared_bytes, cluster, params) in the order of the stream: the
// whole call. `workspace`: workspace_doubles() of device memory.
template <class Launch>
void launch_cross_entropy(CrossEntropyParams p, const CrossEntropyPlan& plan, double* workspace,
                          const Launch& launch) {
  const int64_t rows = p.batch * p.positions;
  p.lanes = plan.lanes;
  p.cluster = plan.cluster;
  p.slice = plan.slice;

  if (p.labels != nullptr && p.mean) {
    p.weight_parts = workspace;
    p.weight_part_count = sum_blocks(rows);
  }
  if (p.labels != nullptr && p.weight != nullptr && p.uniform > 0) {
    p.smoothing_parts = workspace + kMaxParts;
    p.smoothing_part_count = sum_blocks(p.classes);
  }
  const int parts = std::max(p.weight_part_count, p.smoothing_part_count);
  if (parts > 0) {
    const auto kernel = p.logits_type == Element::float64 ? &cross_entropy_sums<double>
                                                          : &cross_entropy_sums<float>;
    launch(kernel, parts, kSumThreads, kMaxWarps * 8, 1, p);
  }

  if (p.loss != nullptr) {
    p.loss_parts = workspace + 2 * kMaxParts;
    p.loss_part_count = plan.blocks;
  }
  if (plan.blocks > 0) {
    with_element(p.logits_type, [&](auto logits) {
      using T = typename decltype(logits)::type;
      if (p.labels != nullptr) {
        if (p.uniform > 0) {
          launch_plan<T, ClassIndex, true>(p, plan, launch);
        } else {
          launch_plan<T, ClassIndex, false>(p, plan, launch);
        }
      } else if (p.target_type == p.logits_type) {
        launch_plan<T, T, true>(p, plan, launch);
      } else {  // the checks let float32 probabilities through with half precision logits
        launch_plan<T, Acc<T>, true>(p, plan, launch);
      }
    });
  }
  if (p.loss != nullptr || p.unit != nullptr || plan.blocks == 0) {
    launch(&cross_entropy_finish, int64_t{1}, kMaxThreads, kMaxWarps * 8, 1, p);
  }
}

}  // namespace fastopt::gpu
