// Softmax cross-entropy on CUDA devices, the side that faces torch: checks, outputs, launches on
// the current stream, and the registration of the ops whose schemas stand in fastopt/ops.py.
//
// Nothing here waits for the device or reads its values: every call can be captured in a graph.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>

#include "cross_entropy.h"
#include "host/cross_entropy_call.h"
#include "library.h"

namespace fastopt {
namespace {

using gpu::CrossEntropyParams;
using gpu::CrossEntropyPlan;
using gpu::DeviceLimits;

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

const DeviceLimits& limits_of(int device) {
  static const std::vector<DeviceLimits> all = [] {
    int count = 0;
    STD_CUDA_CHECK(cudaGetDeviceCount(&count));
    std::vector<DeviceLimits> limits;
    // The device and the code that runs there have to know clusters: code compiled for sm_80 takes
    // every block for a cluster of its own, on later devices too.
    constexpr bool kClustersInCode = FASTOPT_PTX_ARCH >= 90;
    for (int i = 0; i < count; ++i)
      limits.push_back({attribute(cudaDevAttrMultiProcessorCount, i),
                        attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, i),
                        attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, i),
                        kClustersInCode && attribute(cudaDevAttrComputeCapabilityMajor, i) >= 9});
    return limits;
  }();
  return all.at(device);
}

// Launches on the current stream of one device.
struct Launcher {
  torch::stable::accelerator::DeviceGuard guard;
  const DeviceLimits& limits;
  cudaStream_t stream;

  explicit Launcher(int32_t device) : guard(device), limits(limits_of(device)) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
    STD_CUDA_CHECK(cudaSetDevice(device));  // this library links a CUDA runtime of its own
  }

  template <class Params>
  void operator()(void (*kernel)(Params), int64_t blocks, int threads, int64_t shared_bytes,
                  int cluster, const Params& p) const {
    // Kernels that hold rows or tiles of them: as many blocks on an SM as its shared memory takes,
    // and no L1 beside them that the driver might prefer. Always the device's most: another thread
    // may be about to launch the same kernel with more.
    constexpr int64_t kHoldsRows = 8 << 10;
    if (shared_bytes > kHoldsRows) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(limits.shared_per_block)));
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                          cudaSharedmemCarveoutMaxShared));
    }
    cudaLaunchAttribute in_clusters{};
    in_clusters.id = cudaLaunchAttributeClusterDimension;
    in_clusters.val.clusterDim.x = cluster;
    in_clusters.val.clusterDim.y = 1;
    in_clusters.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = &in_clusters;
    config.numAttrs = cluster > 1 ? 1 : 0;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, p));
  }
};

struct Call : CrossEntropyCall<CrossEntropyParams> {
  Call(const Tensor& logits_in, const Tensor& target_in, const std::optional<Tensor>& weight_in,
       int64_t ignore_index, double label_smoothing, int64_t reduction_in)
      : CrossEntropyCall(logits_in, target_in, weight_in, ignore_index, label_smoothing,
                         reduction_in) {
    check(logits.is_cuda(), "every tensor must be on one CUDA device");
    check(p.classes <= gpu::kMaxClasses, "logits may have at most 2^30 classes");
    p.weight = weight ? weight->const_data_ptr() : nullptr;
    p.mean = reduction == kMean;
    p.known_smoothing = smoothing;
  }

  Tensor empty_scalar(ScalarType type) const { return empty_strided({}, {}, type, place); }

  // Runs; the loss as torch would return it.
  Tensor loss(ScalarType type) {
    p.loss_type = element_of(type);
    if (reduction != kNone) {
      Tensor loss = empty_scalar(type);
      p.loss = loss.mutable_data_ptr();
      run();
      return loss;
    }
    Tensor loss = empty_rows();
    p.row_loss = loss.mutable_data_ptr();
    run();
    return type == accumulate ? loss : torch::stable::to(loss, type);
  }

  // In the order of the current stream. The workspace goes back to torch's allocator at once: it
  // gives it to later work of this stream only.
  void run() {
    merge_positions();
    CrossEntropyPlan plan{};
    if (rows > 0) plan = gpu::plan_cross_entropy(gpu::shape_of(p), limits_of(place.index));
    const int64_t doubles = gpu::workspace_doubles(plan);
    const Tensor workspace = empty_strided({doubles}, {1}, ScalarType::Double, place);
    gpu::launch_cross_entropy(p, plan, static_cast<double*>(workspace.mutable_data_ptr()),
                              Launcher(place.index));
  }
};

// ---- the ops ----

Tensor cross_entropy_forward_cuda(Tensor logits, Tensor target, std::optional<Tensor> weight,
                                  int64_t ignore_index, double label_smoothing, int64_t reduction,
                                  ScalarType loss_dtype) {
  Call call(logits, target, weight, ignore_index, label_smoothing, reduction);
  return call.loss(loss_dtype);
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward_backward_cuda(
    Tensor logits, Tensor target, std::optional<Tensor> weight, int64_t ignore_index,
    double label_smoothing, int64_t reduction, ScalarType loss_dtype,
    std::optional<Tensor> largest_mass) {
  Call call(logits, target, weight, ignore_index, label_smoothing, reduction);
  call.check_largest(largest_mass);
  Tensor grad_logits =
      empty_strided(sizes_of(logits), gradient_strides(logits), logits.scalar_type(), call.place);
  call.want_gradient(grad_logits);
  Tensor unit = call.empty_scalar(ScalarType::Float);
  call.p.unit = static_cast<float*>(unit.mutable_data_ptr());
  call.p.in_units = call.p.logits_type == Element::float16;
  if (largest_mass) call.p.largest_mass = static_cast<const float*>(largest_mass->const_data_ptr());
  const Tensor loss = call.loss(loss_dtype);
  return {loss, grad_logits, unit};
}

// grad_logits *= factor, which is read on the device: 1 costs a launch and nothing more.
void cross_entropy_scale_cuda(Tensor grad_logits, Tensor factor, Tensor target,
                              int64_t ignore_index, bool smoothed) {
  check(is_dense(sizes_of(grad_logits),
                 std::vector<int64_t>(grad_logits.strides().begin(), grad_logits.strides().end())),
        "grad_logits must be dense, as the ops return it");
  check(grad_logits.dim() == 0 || view_strides(grad_logits),
        "grad_logits must have a layout of the ops' own");
  Call call(grad_logits, target, std::nullopt, ignore_index, 0, kSum);
  call.check_place({&factor});
  check(factor.numel() == 1, "factor must be one number");
  const int64_t count = grad_logits.numel();
  if (count == 0) return;
  call.want_gradient(grad_logits);
  const gpu::ScaleParams p{call.p, smoothed, factor.const_data_ptr(),
                           element_of(factor.scalar_type())};
  const int32_t device = call.place.index;
  const int64_t blocks = gpu::scale_blocks(count, limits_of(device));
  const Launcher launch(device);
  gpu::with_element(call.p.logits_type, [&](auto element) {
    using T = typename decltype(element)::type;
    launch(&gpu::cross_entropy_scale<T>, blocks, gpu::kParcelThreads, 0, 1, p);
  });
}

STABLE_TORCH_LIBRARY_IMPL(fastopt, CUDA, library) {
  library.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_forward_cuda));
  library.impl("cross_entropy_forward_backward", TORCH_BOX(&cross_entropy_forward_backward_cuda));
  library.impl("cross_entropy_scale_", TORCH_BOX(&cross_entropy_scale_cuda));
}

}  // namespace

const void* gpu::a_cross_entropy_kernel() {
  return reinterpret_cast<const void*>(&cross_entropy_finish<float>);
}

}  // namespace fastopt
