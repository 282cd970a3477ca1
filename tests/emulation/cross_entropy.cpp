// The CUDA kernels of cross-entropy on the CPU, registered as the ops of a library of their own,
// fastopt_emulated (tests/emulated.py): launcher, plan and kernels are those of the CUDA library,
// but for the device, which is what the test says.
#include "cuda/cross_entropy/call.h"

using namespace fastopt;
using namespace fastopt::gpu;

namespace {

DeviceLimits limits;
bool descending;

struct Launcher {
  static const DeviceLimits& limits_of(int32_t) { return limits; }
  explicit Launcher(int32_t) {}

  template <class Params>
  void operator()(void (*kernel)(Params), int64_t blocks, int threads, int64_t shared_bytes,
                  int cluster, const Params& p) const {
    emulate(blocks, threads, shared_bytes, cluster, descending, [=] { kernel(p); });
  }
};

struct PlanOut {
  int64_t kernel, held, threads, lanes, adjacent, cluster, slice, shared_bytes, blocks;
};

PlanOut visible(const CrossEntropyPlan& plan) {
  return {static_cast<int64_t>(plan.kernel),
          plan.held,
          plan.threads,
          plan.lanes,
          plan.adjacent,
          plan.cluster,
          plan.slice,
          plan.shared_bytes,
          plan.blocks};
}

PlanOut last_plan;

struct EmulatedCall : Call<Launcher> {
  using Call::Call;

  Tensor loss(ScalarType type) {
    merge_positions();
    last_plan = rows > 0 ? visible(plan_cross_entropy(shape_of(p), limits)) : PlanOut{};
    return Call::loss(type);
  }
};

STABLE_TORCH_LIBRARY_IMPL(fastopt_emulated, CPU, library) {
  register_cross_entropy<EmulatedCall>(library);
}

}  // namespace

#define FASTOPT_VISIBLE extern "C" __attribute__((visibility("default")))

// What later calls run on: a device, and the order of its threads.
FASTOPT_VISIBLE void fastopt_set_device(int64_t sm_count, int64_t shared_per_block,
                                        int64_t shared_per_sm, bool clusters, bool backwards) {
  limits = {sm_count, shared_per_block, shared_per_sm, clusters};
  descending = backwards;
}

FASTOPT_VISIBLE void fastopt_last_plan(PlanOut* out) { *out = last_plan; }

// The plan of a call with contiguous classes. Types: those of fastopt::Element; target -1: labels.
FASTOPT_VISIBLE void fastopt_plan(int64_t rows, int64_t classes, int64_t logits_type,
                                  int64_t target_type, bool gradient, PlanOut* out) {
  CrossEntropyShape shape{};
  shape.rows = rows;
  shape.classes = classes;
  shape.logit_bytes = bytes_of(static_cast<Element>(logits_type));
  shape.target_bytes = target_type < 0 ? 0 : bytes_of(static_cast<Element>(target_type));
  shape.contiguous_classes = true;
  shape.reads_twice = gradient;
  *out = visible(plan_cross_entropy(shape, limits));
}
