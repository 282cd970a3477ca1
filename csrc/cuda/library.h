// One kernel of each op, to ask the driver about (library.cu).
#pragma once

#include <cuda_runtime.h>

namespace fastopt::gpu {

const void* a_cross_entropy_kernel();  // cross_entropy/launch.cu
const void* the_sgd_kernel();          // sgd.cu

}  // namespace fastopt::gpu
