// SGD on GPU, below fastopt/sgd/launch.py, which calls this through ctypes. Not a torch op: those
// can be called by anyone, and a table of addresses cannot be checked.
#include "cuda/library.h"
#include "cuda/sgd.h"

const void* fastopt::gpu::the_sgd_kernel() {
  return reinterpret_cast<const void*>(&sgd_kernel<LargeSgdShare>);
}

// Launches the step on `stream` of `device`. Returns null, or why it could not.
extern "C" __attribute__((visibility("default"))) const char* fastopt_sgd_run_cuda(
    const fastopt::SgdLaunch* step, int device, cudaStream_t stream) noexcept {
  using namespace fastopt::gpu;
  // This library links a CUDA runtime of its own, which need not know of torch's choice.
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  share_out(*step, [&](const auto& share, int64_t grid) {
    using Share = std::decay_t<decltype(share)>;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid));
    config.blockDim = dim3(kSgdThreads);
    config.dynamicSmemBytes = kSgdSharedBytes;
    config.stream = stream;
    void* arguments[] = {const_cast<Share*>(&share)};
    // Says what became of this launch; the runtime's last error may be another call's.
    error =
        cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(&sgd_kernel<Share>), arguments);
    return error == cudaSuccess;
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
