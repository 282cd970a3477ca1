// SGD on GPU: every parameter of every group in one launch, one pass over parameter, gradient and
// momentum buffer. Moves 20 bytes per float32 parameter with momentum (reads three, writes two), 12
// without; a first step does not read the buffer. The arithmetic is csrc/rules/sgd.h: float32 for
// half precision and float32, float64 for float64, one rounding per stored value.
//
// The table of addresses travels by value in the kernel's parameters: no copy to the device, and a
// CUDA graph keeps its own. What can change between two replays of a graph is read on the device:
// options that are tensors, GradScaler's scale and flag, and which buffers hold a value already.
//
// Rows are cut into chunks of equal bytes, chunks are dealt to the blocks in turn. Same bits every
// run: an element belongs to one thread. Compiled by nvcc (sgd.cu) and, with FASTOPT_EMULATED, by
// g++ (tests/emulation/sgd.cpp).
#pragma once

#include <algorithm>

#include "cuda/primitives.h"
#include "host/sgd_table.h"
#include "rules/sgd.h"

namespace fastopt::gpu {

constexpr int kSgdThreads = 256;
// 1024 threads on a processor, each with 48 bytes of loads under way: 48 KB, where bandwidth times
// latency is some 35 KB on an H200 (4.8 TB/s, 1 us, 132 processors). Reckoned, not measured.
constexpr int kSgdBlocksPerProcessor = 4;
constexpr int kSgdChunkBytes = 16384;  // of the parameter: four 16-byte accesses a thread

// One launch's share of a step, in two sizes: at most 32,764 bytes, what a kernel takes as
// parameters; and 4 KB for few parameters, as every launch copies all of them to the device.
template <int kSgdRows, int kSgdGroups>
struct SgdShare {
  static constexpr int kMostRows = kSgdRows, kMostGroups = kSgdGroups;
  struct Row {
    void* param;
    const void* grad;
    void* momentum_buffer;
    uint64_t numel : 48;
    uint64_t group : 8;
    uint64_t element : 8;
  } rows[kSgdRows];
  uint32_t first_chunk[kSgdRows];  // where a row's chunks begin
  int32_t count;
  SgdGroup groups[kSgdGroups];
  int64_t chunks;
  int32_t* started;
  uint32_t* arrived;
  const float* grad_scale;
  const float* found_inf;
};
using SmallSgdShare = SgdShare<96, 8>;
using LargeSgdShare = SgdShare<870, 32>;
static_assert(sizeof(LargeSgdShare::Row) == 32 && sizeof(SgdGroup) == 40, "packed");
static_assert(sizeof(SmallSgdShare) <= 4096, "the limit before CUDA 12.1");
static_assert(sizeof(LargeSgdShare) <= 32764, "the limit of sm_70 and later, from CUDA 12.1 on");

// Multiply-adds by name: contraction by the compiler would be free to fuse the product that the
// rule wants rounded.
struct SgdMath {
#if defined(__CUDA_ARCH__)
  static FASTOPT_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
  static FASTOPT_DEVICE double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
#else
  static inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#endif
};

// to_acc and from_acc, by the GPU's own instructions for half precision: the rules' bit arithmetic
// would take more instructions an element than memory leaves time for (some 60 at 10 bytes each on
// an H200). Same values; only the payload of a NaN differs.
template <class T>
FASTOPT_DEVICE Acc<T> widen(T x) {
  return to_acc(x);
}
template <class T>
FASTOPT_DEVICE T narrow(Acc<T> x) {
  return from_acc<T>(x);
}
#if defined(__CUDA_ARCH__)
template <>
FASTOPT_DEVICE float widen(Half x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
template <>
FASTOPT_DEVICE Half narrow<Half>(float x) {
  Half half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(x));
  return half;
}
#if __CUDA_ARCH__ >= 800
template <>
FASTOPT_DEVICE BFloat16 narrow<BFloat16>(float x) {
  BFloat16 half;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half.bits) : "f"(x));
  return half;
}
#endif
#endif

FASTOPT_DEVICE double read_option(const SgdGroup& group, SgdOption option) {
  const void* const address = group.options[option].address;
  switch (group.source[option]) {
    case SgdSource::float32:
      return *static_cast<const float*>(address);
    case SgdSource::float64:
      return *static_cast<const double*>(address);
    case SgdSource::bfloat16:
      return to_acc(*static_cast<const BFloat16*>(address));
    case SgdSource::float16:
      return to_acc(*static_cast<const Half*>(address));
    default:
      return group.options[option].value;
  }
}

// What all elements of a row have in common.
template <class T>
struct SgdUpdate {
  SgdOptions<Acc<T>> options;
  Acc<T> inv_scale;
  bool nesterov, decay, maximize, unscale;
};

template <Momentum kMomentum, class T>
FASTOPT_DEVICE void update_element(T& param, T grad, T& buffer, const SgdUpdate<T>& update) {
  Acc<T> p = widen(param);
  Acc<T> g = widen(grad);
  Acc<T> b = widen(buffer);
  if (update.unscale) g *= update.inv_scale;
  if (update.maximize) g = -g;
  // Every thread of the block goes the same way, which costs nothing beside the memory.
  constexpr bool kHasBuffer = kMomentum != Momentum::none;
  if (kHasBuffer && update.nesterov) {
    if (update.decay) {
      sgd_element<kMomentum, kHasBuffer, true, SgdMath>(p, g, b, update.options);
    } else {
      sgd_element<kMomentum, kHasBuffer, false, SgdMath>(p, g, b, update.options);
    }
  } else if (update.decay) {
    sgd_element<kMomentum, false, true, SgdMath>(p, g, b, update.options);
  } else {
    sgd_element<kMomentum, false, false, SgdMath>(p, g, b, update.options);
  }
  if (kHasBuffer) buffer = narrow<T>(b);
  param = narrow<T>(p);
}

template <class T>
union SgdVector {
  static constexpr int kCount = sizeof(Words) / sizeof(T);
  Words words;
  T element[kCount];
};

// One chunk, by the whole block: elements up to the first 16-byte boundary, vectors, the rest. All
// loads come before the stores of the same elements: a gradient may be its own parameter.
template <Momentum kMomentum, class T>
FASTOPT_DEVICE void update_chunk(T* param, const T* grad, T* buffer, int count,
                                 const SgdUpdate<T>& update) {
  using Vector = SgdVector<T>;
  constexpr bool kReadsBuffer = kMomentum == Momentum::running;
  const auto misalignment = [](const void* p) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(p) % sizeof(Words));
  };
  const int off = misalignment(param);
  const bool together =
      off == misalignment(grad) && (kMomentum == Momentum::none || off == misalignment(buffer));
  int head = off == 0 ? 0 : static_cast<int>((sizeof(Words) - off) / sizeof(T));
  if (!together || head > count) head = count;
  const int vectors = (count - head) / Vector::kCount;

  for (int i = thread_index(); i < vectors; i += kSgdThreads) {
    const int at = head + i * Vector::kCount;
    Vector p, g, b;
    p.words = load_words(param + at);
    g.words = load_words_streaming(grad + at);  // parameters and buffers may stay in L2
    b.words = kReadsBuffer ? load_words(buffer + at) : Words{};
#pragma unroll
    for (int j = 0; j < Vector::kCount; ++j) {
      update_element<kMomentum, T>(p.element[j], g.element[j], b.element[j], update);
    }
    if (kMomentum != Momentum::none) store_words(buffer + at, b.words);
    store_words(param + at, p.words);
  }

  const int body = vectors * Vector::kCount;
  for (int i = thread_index(); i < count - body; i += kSgdThreads) {
    const int at = i < head ? i : i + body;
    T p = param[at];
    T b = kReadsBuffer ? buffer[at] : T{};
    update_element<kMomentum, T>(p, grad[at], b, update);
    if (kMomentum != Momentum::none) buffer[at] = b;
    param[at] = p;
  }
}

// One chunk of a row.
template <class T, class Share>
FASTOPT_DEVICE void update_row(const Share& share, int index, int64_t chunk) {
  using A = Acc<T>;
  const typename Share::Row& row = share.rows[index];
  const SgdGroup& group = share.groups[row.group];
  const double momentum = read_option(group, kMomentum);
  const double weight_decay = read_option(group, kWeightDecay);
  SgdUpdate<T> update;
  update.options = {static_cast<A>(-read_option(group, kLr)), static_cast<A>(momentum),
                    static_cast<A>(1 - read_option(group, kDampening)),
                    static_cast<A>(weight_decay)};
  update.unscale = share.grad_scale != nullptr;
  // As GradScaler unscales: by the reciprocal, rounded to float32.
  update.inv_scale =
      update.unscale ? static_cast<float>(1 / static_cast<double>(*share.grad_scale)) : 1.0f;
  update.nesterov = group.nesterov;
  update.decay = weight_decay != 0;  // before rounding, as torch decides it
  update.maximize = group.maximize;

  constexpr int64_t kChunk = kSgdChunkBytes / sizeof(T);
  const int64_t begin = chunk * kChunk;
  const int64_t left = static_cast<int64_t>(row.numel) - begin;
  const int count = static_cast<int>(left < kChunk ? left : kChunk);
  T* const param = static_cast<T*>(row.param) + begin;
  const T* const grad = static_cast<const T*>(row.grad) + begin;
  if (row.momentum_buffer == nullptr || momentum == 0) {
    update_chunk<Momentum::none, T>(param, grad, param, count, update);
    return;
  }
  T* const buffer = static_cast<T*>(row.momentum_buffer) + begin;
  if (share.started[index] == 0) {
    update_chunk<Momentum::first, T>(param, grad, buffer, count, update);
  } else {
    update_chunk<Momentum::running, T>(param, grad, buffer, count, update);
  }
}

// The row of a chunk: the last that begins at or before it. Rows without chunks begin where the
// next one does.
template <class Share>
FASTOPT_DEVICE int find_row(const Share& share, uint32_t chunk) {
  int low = 0;
  int high = share.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (share.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class Share>
FASTOPT_KERNEL void FASTOPT_BOUNDS(kSgdThreads, kSgdBlocksPerProcessor)
    sgd_kernel(FASTOPT_PARAMS Share share) {
  if (share.found_inf != nullptr && *share.found_inf != 0) return;  // NaN too
  for (int64_t chunk = block_index(); chunk < share.chunks; chunk += grid_size()) {
    const int index = find_row(share, static_cast<uint32_t>(chunk));
    const int64_t own = chunk - share.first_chunk[index];
    switch (static_cast<SgdElement>(share.rows[index].element)) {
      case SgdElement::float32:
        update_row<float>(share, index, own);
        break;
      case SgdElement::float64:
        update_row<double>(share, index, own);
        break;
      case SgdElement::bfloat16:
        update_row<BFloat16>(share, index, own);
        break;
      case SgdElement::float16:
        update_row<Half>(share, index, own);
        break;
    }
  }

  // A row's blocks must all have seen that this was its first step before anybody says it is over.
  bool* const last = reinterpret_cast<bool*>(shared_memory());
  sync_block();
  if (thread_index() == 0) *last = is_last_block(share.arrived);
  sync_block();
  if (!*last) return;
  for (int i = thread_index(); i < share.count; i += kSgdThreads) {
    const typename Share::Row& row = share.rows[i];
    if (row.numel != 0 && row.momentum_buffer != nullptr &&
        read_option(share.groups[row.group], kMomentum) != 0) {
      share.started[i] = 1;
    }
  }
}

constexpr int kSgdSharedBytes = 16;

// Cuts a step into shares that fit into a kernel's parameters and hands each to launch(share,
// grid), which returns whether to go on.
template <class Share, class Launch>
bool share_out_as(const SgdLaunch& step, const Launch& launch) {
  Share share;
  for (int64_t i = 0; i < step.count;) {
    share.count = 0;
    share.chunks = 0;
    share.started = step.started + i;
    share.arrived = step.arrived;
    share.grad_scale = step.grad_scale;
    share.found_inf = step.found_inf;
    int32_t groups[Share::kMostGroups];  // of the step, by their place in the share
    int group_count = 0;
    for (; i < step.count && share.count < Share::kMostRows; ++i) {
      const SgdRow& row = step.rows[i];
      typename Share::Row& own = share.rows[share.count];
      own = {};
      share.first_chunk[share.count] = static_cast<uint32_t>(share.chunks);
      if (row.numel > 0) {
        int32_t* const end = groups + group_count;
        int32_t* const group = std::find(groups, end, row.group);
        if (group == end) {
          if (group_count == Share::kMostGroups) break;
          share.groups[group_count++] = step.groups[row.group];
          *group = row.group;
        }
        const int bytes = row.element == SgdElement::float64   ? 8
                          : row.element == SgdElement::float32 ? 4
                                                               : 2;
        const int64_t chunk = kSgdChunkBytes / bytes;
        own.param = row.param;
        own.grad = row.grad;
        own.momentum_buffer = row.momentum_buffer;
        own.numel = static_cast<uint64_t>(row.numel);
        own.group = static_cast<uint64_t>(group - groups);
        own.element = static_cast<uint64_t>(row.element);
        share.chunks += (row.numel + chunk - 1) / chunk;
      }
      ++share.count;
    }
    const int64_t grid = std::min(share.chunks, step.processors * kSgdBlocksPerProcessor);
    if (grid > 0 && !launch(share, grid)) return false;
  }
  return true;
}

template <class Launch>
bool share_out(const SgdLaunch& step, const Launch& launch) {
  const bool few =
      step.count <= SmallSgdShare::kMostRows && step.group_count <= SmallSgdShare::kMostGroups;
  return few ? share_out_as<SmallSgdShare>(step, launch)
             : share_out_as<LargeSgdShare>(step, launch);
}

}  // namespace fastopt::gpu
