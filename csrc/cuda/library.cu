// What the CUDA library as a whole knows of itself. For fastopt/backends.py, through ctypes.
#include <initializer_list>

#include "cuda/library.h"

// For fastopt/backends.py, which finds it in the file: loading the library would register its
// kernels.
extern "C" {
__attribute__((visibility("default"))) extern const char fastopt_version[] =
    "fastopt_version=" FASTOPT_VERSION;
}

// The GPUs that there is code for, as setup.py was told them ("80 90 100"); the last also as PTX,
// which runs on all newer ones.
extern "C" __attribute__((visibility("default"))) const char* fastopt_cuda_archs() {
  return FASTOPT_CUDA_ARCHS;
}

// Null, or why this library's kernels cannot run on `device`: a driver too old for the toolkit that
// built them or for their PTX says so here, before a call depends on it. The thread's current
// device stays what it was.
extern "C" __attribute__((visibility("default"))) const char* fastopt_cuda_why_not(
    int device) noexcept {
  // Loading a kernel is what a capture under way would forbid in its stricter modes.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  int before = device;
  cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
  const bool exchanged = error == cudaSuccess;
  if (error == cudaSuccess) error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  for (const void* kernel :
       {fastopt::gpu::a_cross_entropy_kernel(), fastopt::gpu::the_sgd_kernel()})
    if (cudaFuncAttributes ignored; error == cudaSuccess)
      error = cudaFuncGetAttributes(&ignored, kernel);
  if (before != device) cudaSetDevice(before);
  if (exchanged) cudaThreadExchangeStreamCaptureMode(&mode);
  cudaGetLastError();  // else a later call of this library would report what was answered here
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
