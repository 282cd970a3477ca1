// One call of the cross-entropy kernels for GPUs: what they are told, and in which order they run.
// The back end of host/cross_entropy.h for CUDA, and for the emulation in the tests.
//
// Nothing here waits for the device or reads its values: every call can be captured in a graph.
#pragma once

#include <optional>

#include "dispatch.h"
#include "host/cross_entropy.h"

namespace fastopt::gpu {

// Launcher: limits_of(device), and for one device launches in the order of its current stream:
// launch(kernel, blocks, threads, shared_bytes, cluster, params).
template <class Launcher>
struct Call : CrossEntropyCall<CrossEntropyParams> {
  Call(const Tensor& logits_in, const Tensor& target_in, const CrossEntropyOptions& options)
      : CrossEntropyCall(logits_in, target_in, options) {
    check(p.classes <= kMaxClasses, "logits may have at most 2^30 classes");
    p.weight = weight ? weight->const_data_ptr() : nullptr;
    p.mean = reduction == kMean;
  }

  Tensor unit(const std::optional<Tensor>& largest_mass) {
    check(p.grad != p.logits || logits.numel() == 0, "grad_logits must not be logits on a GPU");
    const Tensor unit = empty_scalar(ScalarType::Float);
    p.unit = static_cast<float*>(unit.mutable_data_ptr());
    p.in_units = p.logits_type == Element::float16;
    if (largest_mass) p.largest_mass = static_cast<const float*>(largest_mass->const_data_ptr());
    return unit;
  }

  Tensor loss(ScalarType type) {
    p.loss_type = element_of(type);
    const Tensor loss = reduction == kNone ? empty_rows() : empty_scalar(type);
    (reduction == kNone ? p.row_loss : p.loss) = loss.mutable_data_ptr();
    run();
    return loss.scalar_type() == type ? loss : torch::stable::to(loss, type);
  }

  // By one factor, which is read on the device: 1 costs a launch and nothing more.
  static void scale(const CrossEntropyCall<CrossEntropyProblem>& call, const Tensor& factor,
                    bool smoothed) {
    check(factor.numel() == 1, "factor must be one number");
    const ScaleParams p{call.p, smoothed, factor.const_data_ptr(),
                        element_of(factor.scalar_type())};
    const int32_t device = call.place.index;
    const int64_t blocks = scale_blocks(call.rows * call.p.classes, Launcher::limits_of(device));
    const Launcher launch(device);
    with_element(call.p.logits_type, [&](auto element) {
      using T = typename decltype(element)::type;
      launch(&cross_entropy_scale<T>, blocks, kParcelThreads, 0, 1, p);
    });
  }

 private:
  Tensor empty_scalar(ScalarType type) const { return empty_strided({}, {}, type, place); }

  // The workspace goes back to torch's allocator at once: it gives it to later work of this stream
  // only.
  void run() {
    merge_positions();
    CrossEntropyPlan plan{};
    if (rows > 0) plan = plan_cross_entropy(shape_of(p), Launcher::limits_of(place.index));
    const Tensor workspace =
        empty_strided({workspace_doubles(plan)}, {1}, ScalarType::Double, place);
    launch_cross_entropy(p, plan, static_cast<double*>(workspace.mutable_data_ptr()),
                         Launcher(place.index));
  }
};

}  // namespace fastopt::gpu
