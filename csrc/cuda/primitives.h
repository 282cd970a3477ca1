// The few primitives that the CUDA kernels are written in. Under nvcc they are CUDA's own. With
// FASTOPT_EMULATED a block's threads are fibers on the CPU (tests/emulation/emulation.h), so that
// the kernels' own code (tails, indexing, reductions, barriers) runs in tests without a GPU.
// Blocks and grids have one dimension.
#pragma once

#include <cstdint>

#if defined(FASTOPT_EMULATED)
#include "emulation.h"
#else

#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>

#define FASTOPT_KERNEL __global__
#define FASTOPT_DEVICE __device__ __forceinline__
#define FASTOPT_MEMBER __device__ __forceinline__
#define FASTOPT_BOUNDS(...) __launch_bounds__(__VA_ARGS__)
#define FASTOPT_PARAMS const __grid_constant__  // by value, read where it lies: never copied

namespace fastopt::gpu {

FASTOPT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FASTOPT_DEVICE int block_size() { return static_cast<int>(blockDim.x); }
FASTOPT_DEVICE int64_t block_index() { return blockIdx.x; }
FASTOPT_DEVICE int64_t grid_size() { return gridDim.x; }

FASTOPT_DEVICE void sync_block() { __syncthreads(); }
FASTOPT_DEVICE void sync_warp() { __syncwarp(); }

// The value of the lane whose index differs in the bits of `mask`. All 32 lanes take part.
template <class V>
FASTOPT_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The block's dynamic shared memory, 16-byte aligned.
FASTOPT_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char fastopt_shared[];
  return fastopt_shared;
}

// Clusters: up to 8 blocks that run together and reach one another's shared memory. sm_90 on;
// elsewhere every block is a cluster of its own.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
FASTOPT_DEVICE int cluster_rank() {
  return static_cast<int>(cooperative_groups::this_cluster().block_rank());
}
FASTOPT_DEVICE void sync_cluster() { cooperative_groups::this_cluster().sync(); }
template <class V>
FASTOPT_DEVICE V* shared_of(V* own, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(own, rank);
}
#else
FASTOPT_DEVICE int cluster_rank() { return 0; }
FASTOPT_DEVICE void sync_cluster() { __syncthreads(); }
template <class V>
FASTOPT_DEVICE V* shared_of(V* own, int) {
  return own;
}
#endif

// Counts the blocks that have come here, one call a block (by one thread, after sync_block): true
// for the last, which then sees what the others wrote. Leaves the counter at 0 for the next launch.
FASTOPT_DEVICE bool is_last_block(uint32_t* counter) {
  __threadfence();
  const uint32_t arrived = atomicInc(counter, gridDim.x - 1);
  __threadfence();
  return arrived == gridDim.x - 1;
}

// 16 bytes, aligned: one memory transaction a thread.
struct alignas(16) Words {
  uint32_t word[4];
};
FASTOPT_DEVICE Words load_words(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {v.x, v.y, v.z, v.w};
}
FASTOPT_DEVICE void store_words(void* p, Words w) {
  *static_cast<uint4*>(p) = make_uint4(w.word[0], w.word[1], w.word[2], w.word[3]);
}
// For what nobody reads again soon: it leaves L2 first.
FASTOPT_DEVICE Words load_words_streaming(const void* p) {
  const uint4 v = __ldcs(static_cast<const uint4*>(p));
  return {v.x, v.y, v.z, v.w};
}
FASTOPT_DEVICE void store_words_streaming(void* p, Words w) {
  __stcs(static_cast<uint4*>(p), make_uint4(w.word[0], w.word[1], w.word[2], w.word[3]));
}

// Global to shared memory past the registers: all of a row is under way at once. The thread that
// copied sees the bytes after wait_for_copies, the others after a barrier behind that.
FASTOPT_DEVICE void copy_words_async(void* to_shared, const void* from) {
  __pipeline_memcpy_async(to_shared, from, sizeof(Words));
}
FASTOPT_DEVICE void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

// exp(x) to a relative error of 2^-20 down to -10, and of 2^-18 at -80, where the rounded product
// is off by up to 2^-18; what is below 2^-126 becomes 0. Two instructions, where expf takes eight:
// at half precision's two passes over memory the instructions are what limits.
FASTOPT_DEVICE float exp_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
}

}  // namespace fastopt::gpu
#endif
