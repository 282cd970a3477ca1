// SGD on GPU, below fastopt/gpu_step.py, which calls this through ctypes. Not a torch op: those can
// be called by anyone, and a table of addresses cannot be checked.
#include "cuda/sgd.h"

// Launches the step on `stream` of `device`. Returns null, or why it could not.
extern "C" __attribute__((visibility("default"))) const char* fastopt_sgd_run_cuda(
    const fastopt::gpu::SgdStep* step, int device, cudaStream_t stream) noexcept {
  using namespace fastopt::gpu;
  // This library links a CUDA runtime of its own, which need not know of torch's choice.
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const bool launched = share_out(*step, [stream](const SgdShare& share, int64_t grid) {
    sgd_kernel<<<static_cast<unsigned>(grid), kSgdThreads, kSgdSharedBytes, stream>>>(share);
    return cudaPeekAtLastError() == cudaSuccess;
  });
  return launched ? nullptr : cudaGetErrorString(cudaGetLastError());
}
