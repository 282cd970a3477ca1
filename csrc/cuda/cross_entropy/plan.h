// Which kernel a cross-entropy call takes and how it is launched: a pure function of shapes, types
// and the device, so that tests walk through all of it without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rules/types.h"

namespace fastopt::gpu {

// What the plan needs to know of a device (cudaDeviceProp has it all).
struct DeviceLimits {
  int64_t sm_count;
  int64_t shared_per_block;  // bytes, with opt-in
  int64_t shared_per_sm;     // bytes
  bool clusters;             // sm_90 on
};

struct CrossEntropyShape {
  int64_t rows, classes;
  int64_t logit_bytes;      // of one logit
  int64_t target_bytes;     // of one probability; 0 with labels
  bool contiguous_classes;  // in every tensor
  bool reads_twice;         // gradient in forward: statistics first, then the logits again
  bool pairs;               // rows 2i and 2i + 1 lie side by side in every tensor, as one access
};

enum class CrossEntropyKernel : int32_t { packed, rows, strided };

struct CrossEntropyPlan {
  CrossEntropyKernel kernel;
  bool held;             // rows: the row waits in shared memory for its second use
  int threads;           // of a block
  int lanes;             // rows: threads of a block that share a row;
                         // strided: threads side by side, the others divide the classes
  int adjacent;          // strided: rows of one thread, 1 or 2
  int cluster;           // rows: blocks that share a row
  int64_t slice;         // rows: classes of one block of the cluster; packed: rows of a tile
  int64_t shared_bytes;  // of a block
  int64_t blocks;        // a multiple of cluster
};

// A row's classes are counted in 32 bits.
constexpr int64_t kMaxClasses = int64_t{1} << 30;
constexpr int kMaxThreads = 512;
constexpr int kWarpSize = 32;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;
// packed: bytes of a row that one thread deals with by itself. Longer rows leave an SM too few
// threads beside their tiles.
constexpr int64_t kPackedRowBytes = 512;
// packed: bytes of a thread under way at once, and the rows of one thread that may make them up.
constexpr int64_t kPackedLoad = 64, kPackedRows = 16;
constexpr int kPackedThreads = 128;
constexpr int64_t kPackedBlocks = 3;  // on an SM, one computes while others load or store
// Rows shared by one warp hide one another's latency: a block is only a parcel of them.
constexpr int kParcelThreads = 256;
// rows: 16-byte vectors of one lane. What a row costs beside its logits (its label, the merging of
// the lanes, its loss) is some 500 instructions of every warp that takes part, once for all rows
// that share the warp: few lanes with many vectors each, down to lanes that read whole 128-byte
// lines, unless rows are too few to give an SM its 1024 threads. A lane whose row is held has it
// all under way at once and wants less of it. Numbers by measurement
// (bench/results/gpu-nvidia-h200-cuda).
constexpr int64_t kMostVectors = 128;       // read once
constexpr int64_t kMostHeldVectors = 20;    // held by a block
constexpr int64_t kMostParcelVectors = 16;  // held by a warp
constexpr int64_t kFewParcelVectors = 8;    // held by part of a warp
constexpr int64_t kFewestVectors = 4;
constexpr int64_t kFewestLanes = 8;
// Blocks take several rows where there are more of them than this many waves fill: what a block
// begins and ends with is paid once for all of them, and the sums of the blocks' losses stay few.
// Blocks that hold rows differ more in how long they take: more waves even that out.
constexpr int64_t kWaves = 4, kHeldWaves = 16;
// Threads of an SM that the registers leave room for, 64 registers each (float64: 128).
constexpr int64_t threads_per_sm(int64_t logit_bytes) { return logit_bytes == 8 ? 512 : 1024; }
// held: as much shared memory for each of two blocks, so that one computes or stores while the
// other loads. A row that needs more of every block of a cluster is read twice, the second time
// from L2: where a whole cluster waits for its slowest block that is faster (262144 classes in
// float32 on an H200: 62 against 51 % of a copy's speed). The SM keeps 1 KB of every block for
// itself.
constexpr int64_t kHeldBlocks = 2;
constexpr int64_t kReservedShared = 1024;
constexpr int kMaxCluster = 8;  // what every device with clusters can run
// strided: threads of a block, and the fewest rows side by side that fill a memory transaction.
constexpr int kStridedThreads = 256;
constexpr int kMinStridedLanes = 32;
// Sums over labels and over weights: at most this many partial sums, which every block adds up.
// With all of a thread's items under way, 256 blocks keep 4 MB of labels under way.
constexpr int kMaxParts = 256;
constexpr int kSumThreads = 256;
constexpr int kSumItems = 8;  // of one thread, before another block takes part

// What the kernels keep in shared memory before what they hold (BlockShared in common.h):
// four numbers for each warp, twice, a float64 for each warp, and four more.
FASTOPT_RULE constexpr int64_t block_shared_bytes(int64_t accumulate_bytes) {
  return 2 * kMaxWarps * 4 * accumulate_bytes + kMaxWarps * 8 + 32;
}

FASTOPT_RULE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t next_power_of_two(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

inline int sum_blocks(int64_t items) {
  return static_cast<int>(
      std::clamp<int64_t>(ceil_div(items, kSumThreads * kSumItems), 1, kMaxParts));
}

// Scaling a gradient in place: 8 blocks fill an SM's 2048 threads.
inline int64_t scale_blocks(int64_t count, const DeviceLimits& device) {
  constexpr int64_t kLogitsPerThread = 32;
  return std::min(ceil_div(count, kParcelThreads * kLogitsPerThread), device.sm_count * 8);
}

// Shared memory for `classes` of a tensor: its vectors, and the shift to where they are aligned.
FASTOPT_RULE constexpr int64_t held_bytes(int64_t classes, int64_t element_bytes) {
  return element_bytes == 0 ? 0 : ceil_div(classes * element_bytes, 16) * 16 + 16;
}

// packed: elements from row to row in shared memory, of rows of whole words: an odd number of
// words, so that the rows' words fall into different banks.
FASTOPT_RULE constexpr int packed_pitch(int classes, int per_word) {
  return (classes / per_word | 1) * per_word;
}
// packed: shared memory for a tile of one tensor, wherever between two words it begins.
FASTOPT_RULE constexpr int64_t packed_bytes(int64_t rows, int64_t classes, int64_t element_bytes) {
  const int64_t row = classes * element_bytes;
  const int64_t apart = row % 16 == 0 ? (row / 16 | 1) * 16 : row;
  return element_bytes == 0 ? 0 : ceil_div(rows * apart, 16) * 16 + 16;
}

inline CrossEntropyPlan plan_packed(const CrossEntropyShape& shape, const DeviceLimits& device,
                                    int64_t fixed_bytes) {
  CrossEntropyPlan plan{};
  plan.kernel = CrossEntropyKernel::packed;
  plan.cluster = plan.lanes = 1;
  const int64_t row_bytes =
      std::max<int64_t>(shape.classes * (shape.logit_bytes + shape.target_bytes), 1);
  const int64_t comfortable = device.shared_per_sm / kPackedBlocks - kReservedShared;
  const auto bytes_of = [&](int64_t rows) {
    return fixed_bytes + packed_bytes(rows, shape.classes, shape.logit_bytes) +
           packed_bytes(rows, shape.classes, shape.target_bytes);
  };
  plan.threads = kPackedThreads;
  while (plan.threads > kWarpSize && bytes_of(plan.threads) > comfortable) plan.threads /= 2;
  int64_t each = std::clamp<int64_t>(kPackedLoad / row_bytes, 1, kPackedRows);
  // Few rows: a tile for every SM first.
  while (each > 1 && (bytes_of(plan.threads * each) > comfortable ||
                      shape.rows < device.sm_count * plan.threads * each)) {
    each /= 2;
  }
  while (plan.threads > kWarpSize && shape.rows < device.sm_count * plan.threads) plan.threads /= 2;
  plan.slice = plan.threads * each;
  plan.shared_bytes = bytes_of(plan.slice);
  const int64_t per_sm =
      std::min<int64_t>(threads_per_sm(shape.logit_bytes) / plan.threads,
                        device.shared_per_sm / (plan.shared_bytes + kReservedShared));
  plan.blocks = std::min(ceil_div(shape.rows, plan.slice),
                         device.sm_count * std::max<int64_t>(per_sm, 1) * kWaves);
  return plan;
}

inline CrossEntropyPlan plan_strided(const CrossEntropyShape& shape, const DeviceLimits& device,
                                     int64_t fixed_bytes, int64_t accumulate_bytes) {
  CrossEntropyPlan plan{};
  plan.kernel = CrossEntropyKernel::strided;
  plan.threads = kStridedThreads;
  // Half the accesses and half the reckoning of addresses, where half the threads fill the device.
  plan.adjacent = shape.pairs && shape.rows >= 2 * kStridedThreads * 4 * device.sm_count ? 2 : 1;
  const int64_t items = ceil_div(shape.rows, plan.adjacent);
  // As wide as fills the device; few rows leave threads over to divide the classes.
  plan.lanes = kStridedThreads;
  while (plan.lanes > kMinStridedLanes && ceil_div(items, plan.lanes) < 4 * device.sm_count &&
         shape.classes >= 4 * (kStridedThreads / plan.lanes)) {
    plan.lanes /= 2;
  }
  plan.cluster = 1;
  plan.shared_bytes = fixed_bytes + kStridedThreads * 4 * accumulate_bytes;
  const int64_t per_sm = threads_per_sm(shape.logit_bytes) / kStridedThreads;
  plan.blocks = std::min(ceil_div(items, plan.lanes), device.sm_count * per_sm * kWaves);
  return plan;
}

inline CrossEntropyPlan plan_rows(const CrossEntropyShape& shape, const DeviceLimits& device,
                                  int64_t fixed_bytes) {
  CrossEntropyPlan plan{};
  plan.kernel = CrossEntropyKernel::rows;
  const int64_t per_vector = 16 / shape.logit_bytes;
  const auto slice_of = [&](int64_t cluster) {
    // Whole vectors, so that the blocks of a cluster see the same alignment.
    return ceil_div(ceil_div(shape.classes, cluster), 16) * 16;
  };
  int64_t spread = 1;  // over as many times the lanes
  const auto lanes_of = [&](int64_t cluster) {
    const int64_t vectors = ceil_div(slice_of(cluster), per_vector) * spread;
    const auto lanes = [&](int64_t of_one) { return next_power_of_two(ceil_div(vectors, of_one)); };
    int64_t fewest = kFewestLanes, most = kMaxThreads, wanted = lanes(kMostVectors);
    if (shape.reads_twice && vectors <= kWarpSize * kMostParcelVectors) {
      wanted = lanes(kFewParcelVectors);
      most = kWarpSize;
    } else if (shape.reads_twice) {
      wanted = lanes(kMostHeldVectors);
      fewest = 2 * kWarpSize;
    }
    if (cluster > 1) {  // no parcel
      fewest = 2 * kWarpSize;
      most = kMaxThreads;
    }
    return static_cast<int>(std::clamp(wanted, fewest, most));
  };
  const auto groups_of = [&](int64_t cluster) {
    return lanes_of(cluster) <= kWarpSize ? kParcelThreads / lanes_of(cluster) : 1;
  };
  const auto bytes_of = [&](int64_t cluster) {
    return fixed_bytes + groups_of(cluster) * (held_bytes(slice_of(cluster), shape.logit_bytes) +
                                               held_bytes(slice_of(cluster), shape.target_bytes));
  };
  const int64_t largest = device.clusters ? kMaxCluster : 1;
  const int64_t comfortable = device.shared_per_sm / kHeldBlocks - kReservedShared;

  // Parcels of rows that do not fit together become blocks of one.
  const int64_t fill = device.sm_count * threads_per_sm(shape.logit_bytes);
  while (lanes_of(1) * kFewestVectors * per_vector < shape.classes && lanes_of(1) < kMaxThreads &&
         (shape.rows * lanes_of(1) < fill ||
          (shape.reads_twice && groups_of(1) > 1 && bytes_of(1) > comfortable))) {
    spread *= 2;
  }
  plan.cluster = 1;
  if (shape.reads_twice) {
    while (bytes_of(plan.cluster) > std::min(comfortable, device.shared_per_block) &&
           plan.cluster < largest) {
      plan.cluster *= 2;
    }
    plan.held =
        bytes_of(plan.cluster) <= (plan.cluster > 1 ? comfortable : device.shared_per_block);
  }
  // Fewer rows than half the SMs: more blocks share a row, as long as each has half a load.
  constexpr int64_t kHalfLoad = kMaxThreads * kFewestVectors / 2;
  while (plan.cluster < largest && 2 * shape.rows * plan.cluster <= device.sm_count &&
         slice_of(2 * plan.cluster) >= kHalfLoad * per_vector) {
    plan.cluster *= 2;
  }
  plan.slice = slice_of(plan.cluster);
  plan.lanes = lanes_of(plan.cluster);
  const int groups = groups_of(plan.cluster);
  plan.threads = plan.lanes * groups;
  plan.shared_bytes = plan.held ? bytes_of(plan.cluster) : fixed_bytes;
  const int64_t per_sm = std::max<int64_t>(
      1, std::min<int64_t>(threads_per_sm(shape.logit_bytes) / plan.threads,
                           device.shared_per_sm / (plan.shared_bytes + kReservedShared)));
  const int64_t waves = plan.held ? kHeldWaves : kWaves;
  const int64_t clusters = std::min(ceil_div(shape.rows, groups),
                                    ceil_div(device.sm_count * per_sm * waves, plan.cluster));
  plan.blocks = clusters * plan.cluster;
  return plan;
}

inline CrossEntropyPlan plan_cross_entropy(const CrossEntropyShape& shape,
                                           const DeviceLimits& device) {
  const int64_t accumulate_bytes = shape.logit_bytes == 8 ? 8 : 4;
  const int64_t fixed_bytes = block_shared_bytes(accumulate_bytes);
  if (!shape.contiguous_classes) return plan_strided(shape, device, fixed_bytes, accumulate_bytes);
  if (shape.classes * (shape.logit_bytes + shape.target_bytes) <= kPackedRowBytes)
    return plan_packed(shape, device, fixed_bytes);
  return plan_rows(shape, device, fixed_bytes);
}

}  // namespace fastopt::gpu
