// Softmax cross-entropy on CUDA devices: launches on the current stream, and the registration of
// the ops whose schemas stand in fastopt/ops.py.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "call.h"
#include "cuda/library.h"

namespace fastopt {
namespace {

using gpu::DeviceLimits;

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Launches on the current stream of one device.
struct Launcher {
  torch::stable::accelerator::DeviceGuard guard;
  const DeviceLimits& limits;
  cudaStream_t stream;

  static const DeviceLimits& limits_of(int32_t device) {
    static const std::vector<DeviceLimits> all = [] {
      int count = 0;
      STD_CUDA_CHECK(cudaGetDeviceCount(&count));
      std::vector<DeviceLimits> limits;
      // The device and the code that runs there have to know clusters: code compiled for sm_80
      // takes every block for a cluster of its own, on later devices too.
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

STABLE_TORCH_LIBRARY_IMPL(fastopt, CUDA, library) {
  register_cross_entropy<gpu::Call<Launcher>>(library);
}

}  // namespace

const void* gpu::a_cross_entropy_kernel() {
  return reinterpret_cast<const void*>(&cross_entropy_finish);
}

}  // namespace fastopt
