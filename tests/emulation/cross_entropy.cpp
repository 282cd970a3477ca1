// The CUDA kernels of cross-entropy with their plan, on the CPU: entry points for ctypes
// (tests/test_cross_entropy_cuda.py). Sources and launch order are the launcher's own.
#include "cuda/cross_entropy.h"

#include <exception>
#include <string>

using namespace fastopt;
using namespace fastopt::gpu;

namespace {

thread_local std::string failure;

// 0, or 1 with the reason in `failure`.
template <class F>
int guarded(const F& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    failure = error.what();
    return 1;
  }
}

}  // namespace

extern "C" {

// Mirrors the class of the same name in the test.
struct EmulatedCall {
  int64_t batch, classes, positions;
  int64_t logits_strides[3], target_strides[3], grad_strides[3];
  int64_t logits_type, target_type, loss_type;
  int64_t ignore_index;
  double smoothing;
  int64_t mean;
  int64_t in_units;
  // device limits
  int64_t sm_count, shared_per_block, shared_per_sm, clusters;
  int64_t descending;
  const void *logits, *probabilities, *weight;
  const float* largest_mass;
  const int64_t* labels;
  void *row_loss, *grad, *loss;
  float* unit;
  double* workspace;  // exactly as long as the launcher has it
};

struct EmulatedPlan {
  int64_t kernel, held, threads, lanes, adjacent, cluster, slice, shared_bytes, blocks;
  int64_t workspace_doubles;
};

const char* fastopt_failure() { return failure.c_str(); }

static Strides strides_of(const int64_t* s) { return {s[0], s[1], s[2]}; }

static CrossEntropyParams params_of(const EmulatedCall& call) {
  CrossEntropyParams p{};
  p.batch = call.batch;
  p.classes = call.classes;
  p.positions = call.positions;
  p.logits_type = static_cast<Element>(call.logits_type);
  p.target_type = static_cast<Element>(call.target_type);
  p.logits = call.logits;
  p.logits_strides = strides_of(call.logits_strides);
  p.labels = call.labels;
  p.probabilities = call.probabilities;
  p.target_strides = strides_of(call.target_strides);
  p.ignore_index = call.ignore_index;
  p.keep = 1 - call.smoothing;
  p.uniform = call.classes > 0 ? call.smoothing / static_cast<double>(call.classes) : 0;
  p.known_smoothing = call.smoothing;
  p.row_loss = call.row_loss;
  p.grad = call.grad;
  p.grad_strides = strides_of(call.grad_strides);
  p.weight = call.weight;
  p.mean = call.mean != 0;
  p.loss = call.loss;
  p.loss_type = static_cast<Element>(call.loss_type);
  p.in_units = call.in_units != 0;
  p.largest_mass = call.largest_mass;
  p.unit = call.unit;
  return p;
}

static CrossEntropyPlan plan_of(const EmulatedCall& call) {
  return plan_cross_entropy(shape_of(params_of(call)), {call.sm_count, call.shared_per_block,
                                                        call.shared_per_sm, call.clusters != 0});
}

int fastopt_plan(const EmulatedCall* call, EmulatedPlan* out) {
  return guarded([&] {
    const CrossEntropyPlan plan = plan_of(*call);
    *out = {static_cast<int64_t>(plan.kernel),
            plan.held,
            plan.threads,
            plan.lanes,
            plan.adjacent,
            plan.cluster,
            plan.slice,
            plan.shared_bytes,
            plan.blocks,
            workspace_doubles(plan)};
  });
}

int fastopt_cross_entropy(const EmulatedCall* call) {
  return guarded([&] {
    const auto launch = [&](auto kernel, int64_t blocks, int threads, int64_t shared_bytes,
                            int cluster, const CrossEntropyParams& p) {
      emulate(blocks, threads, shared_bytes, cluster, call->descending != 0, [=] { kernel(p); });
    };
    launch_cross_entropy(params_of(*call), plan_of(*call), call->workspace, launch);
  });
}

int fastopt_scale(const EmulatedCall* call, int64_t smoothed, const void* factor,
                  int64_t factor_type, int64_t blocks) {
  return guarded([&] {
    const CrossEntropyParams problem = params_of(*call);
    const ScaleParams p{problem, smoothed != 0, factor, static_cast<Element>(factor_type)};
    with_element(problem.logits_type, [&](auto element) {
      using T = typename decltype(element)::type;
      emulate(blocks, kParcelThreads, 0, 1, call->descending != 0,
              [=] { cross_entropy_scale<T>(p); });
    });
  });
}
}
