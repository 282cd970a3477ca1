"""fastopt's CUDA kernels, compiled with CUDA 13: the library beside this file. fastopt finds it."""
