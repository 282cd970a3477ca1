// The SGD kernel of csrc/cuda/sgd.h on the CPU, for tests/test_sgd_cuda.py.
#define FASTOPT_EMULATED
#include "cuda/sgd.h"

#include <string>

// As fastopt_sgd_run_cuda, with "device" memory on the CPU. `launches` counts the kernel's
// launches.
extern "C" const char* fastopt_sgd_run_emulated(const fastopt::SgdLaunch* step, bool descending,
                                                int64_t* launches) {
  using namespace fastopt::gpu;
  static std::string failure;
  try {
    share_out(*step, [&](const auto& share, int64_t grid) {
      ++*launches;
      emulate(grid, kSgdThreads, kSgdSharedBytes, 1, descending, [&] { sgd_kernel(share); });
      return true;
    });
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
  return nullptr;
}
