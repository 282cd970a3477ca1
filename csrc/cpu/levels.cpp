#include "levels.h"

#include <cstdlib>
#include <cstring>

namespace fastopt {
namespace {

Level detect_level() {
#if defined(FASTOPT_ONE_LEVEL)
  return Level::FASTOPT_ONE_LEVEL;
#else
  Level best = Level::baseline;
  __builtin_cpu_init();
  // What -march=x86-64-v3 and -v4 let the compiler assume.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2")) {
    best = Level::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      best = Level::avx512;
    }
  }
  const char* cap = std::getenv("FASTOPT_SIMD");
  if (cap != nullptr) {
    if (std::strcmp(cap, "baseline") == 0) return Level::baseline;
    if (std::strcmp(cap, "avx2") == 0 && best == Level::avx512) return Level::avx2;
  }
  return best;
#endif
}

}  // namespace

Level active_level() {
  static const Level level = detect_level();
  return level;
}

}  // namespace fastopt

// For fastopt/backends.py, which finds it in the file: loading the library would register its
// kernels.
extern "C" {
__attribute__((visibility("default"))) extern const char fastopt_version[] =
    "fastopt_version=" FASTOPT_VERSION;
}

// For `python -m fastopt` and the tests, through ctypes.
extern "C" __attribute__((visibility("default"))) const char* fastopt_simd_level() {
  switch (fastopt::active_level()) {
    case fastopt::Level::avx512:
      return "avx512";
    case fastopt::Level::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}
