// What the CUDA library as a whole knows of itself.

// The GPUs that there is code for, as setup.py was told them ("80 90 100"); the last also as PTX,
// which runs on all newer ones. For fastopt/ops.py, through ctypes.
extern "C" __attribute__((visibility("default"))) const char* fastopt_cuda_archs() {
  return FASTOPT_CUDA_ARCHS;
}
