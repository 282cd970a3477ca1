// What the CUDA library as a whole knows of itself.

// For fastopt/ops.py, which finds it in the file: loading the library would register its kernels.
extern "C" {
__attribute__((visibility("default"))) extern const char fastopt_version[] =
    "fastopt_version=" FASTOPT_VERSION;
}

// The GPUs that there is code for, as setup.py was told them ("80 90 100"); the last also as PTX,
// which runs on all newer ones. For fastopt/ops.py, through ctypes.
extern "C" __attribute__((visibility("default"))) const char* fastopt_cuda_archs() {
  return FASTOPT_CUDA_ARCHS;
}
