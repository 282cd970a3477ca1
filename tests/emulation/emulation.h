// The primitives of csrc/cuda/primitives.h on the CPU: every thread of a block (of all blocks of a
// cluster) is a fiber that runs until it waits for others. What would hang or be undefined on a
// GPU throws: a thread that ends while others wait for it, a misaligned 16-byte access. Fresh
// shared memory holds NaN bits. Fibers run in ascending or descending order between two waits:
// results that depend on it lack a barrier.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define FASTOPT_KERNEL static
#define FASTOPT_DEVICE static inline
#define FASTOPT_MEMBER inline
#define FASTOPT_BOUNDS(...)
#define FASTOPT_PARAMS const

namespace fastopt::gpu {

constexpr int kWarp = 32;

enum class Wait { nothing, warp, block, cluster, done };

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  ucontext_t context;  // where it begins
  jmp_buf jump;        // where it goes on
  bool begun;
  std::unique_ptr<char[]> stack;
  int thread, rank;  // in its block; of its block in the cluster
  Wait wait = Wait::nothing;
  int shuffles = 0;
  std::vector<Copy> copies;  // under way
};

struct alignas(16) Slot {
  char bytes[16];
};

// What runs now. One launch at a time: no OS threads here.
struct Emulator {
  static constexpr size_t kStackBytes = 256 << 10;

  int64_t grid = 0, block = 0;
  int threads = 0, cluster = 1;
  bool descending = false;
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<Slot[]>> shared;  // of each block of the cluster
  std::vector<Slot> slots;                      // two per thread, for shuffles
  Fiber* current = nullptr;
  ucontext_t scheduler;
  jmp_buf scheduler_jump;
  std::function<void()> kernel;
  std::exception_ptr failure;

  void run_cluster() {
    const int count = threads * cluster;
    fibers.resize(count);
    slots.assign(2 * count, Slot{});
    for (int i = 0; i < count; ++i) {
      Fiber& f = fibers[i];
      if (!f.stack) f.stack.reset(new char[kStackBytes]);
      f.thread = i % threads;
      f.rank = i / threads;
      f.wait = Wait::nothing;
      f.shuffles = 0;
      f.copies.clear();
      f.begun = false;
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = kStackBytes;
      f.context.uc_link = &scheduler;
      makecontext(&f.context, &Emulator::start, 0);
    }
    for (bool alive = true; alive;) {
      alive = false;
      bool moved = false;
      for (int i = 0; i < count; ++i) {
        Fiber& f = fibers[descending ? count - 1 - i : i];
        if (f.wait != Wait::nothing) continue;
        moved = true;
        resume(f);
        if (failure) std::rethrow_exception(failure);
      }
      for (int first = 0; first < count; first += kWarp) release(Wait::warp, first, kWarp);
      for (int first = 0; first < count; first += threads) release(Wait::block, first, threads);
      release(Wait::cluster, 0, count);
      bool ready = false;
      for (const Fiber& f : fibers) {
        alive |= f.wait != Wait::done;
        ready |= f.wait == Wait::nothing;
      }
      if (alive && !ready && !moved)
        throw std::runtime_error("deadlock: threads wait for others that ended or wait elsewhere");
    }
  }

  void release(Wait kind, int first, int count) {
    for (int i = first; i < first + count; ++i)
      if (fibers[i].wait != kind) return;
    for (int i = first; i < first + count; ++i) fibers[i].wait = Wait::nothing;
  }

  void wait(Wait kind) {
    current->wait = kind;
    leave(/*ends=*/false);
  }

#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;

  void resume(Fiber& f) {
    current = &f;
    void* own = nullptr;
    __sanitizer_start_switch_fiber(&own, f.stack.get(), kStackBytes);
    jump_to(f);
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
  }
  void leave(bool ends) {
    void* own = nullptr;
    __sanitizer_start_switch_fiber(ends ? nullptr : &own, scheduler_stack, scheduler_stack_bytes);
    jump_back();
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
  }
  void entered() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  }
#else
  void resume(Fiber& f) {
    current = &f;
    jump_to(f);
  }
  void leave(bool) { jump_back(); }
  void entered() {}
#endif

  // A fiber begins by its context and goes on by jumps: a context switch asks the kernel for the
  // signal mask, thousands of times in a launch.
  void jump_to(Fiber& f) {
    if (_setjmp(scheduler_jump) != 0) return;
    if (f.begun) _longjmp(f.jump, 1);
    f.begun = true;
    swapcontext(&scheduler, &f.context);
  }
  void jump_back() {
    if (_setjmp(current->jump) == 0) _longjmp(scheduler_jump, 1);
  }

  static void start();
};

inline Emulator emulator;

inline void Emulator::start() {
  emulator.entered();
  try {
    emulator.kernel();
  } catch (...) {
    emulator.failure = std::current_exception();
  }
  emulator.current->wait = Wait::done;
  emulator.leave(/*ends=*/true);
}

// kernel<<<grid, threads, shared_bytes>>>, in clusters of `cluster` blocks.
inline void emulate(int64_t grid, int threads, int64_t shared_bytes, int cluster, bool descending,
                    std::function<void()> kernel) {
  if (threads % kWarp != 0 || threads > 1024 || grid % cluster != 0 || shared_bytes > (227 << 10))
    throw std::runtime_error("a GPU would refuse this launch");
  Emulator& e = emulator;
  e.grid = grid;
  e.threads = threads;
  e.cluster = cluster;
  e.descending = descending;
  e.kernel = std::move(kernel);
  e.failure = nullptr;
  const size_t slots = static_cast<size_t>(shared_bytes + 15) / 16;
  for (e.block = 0; e.block < grid; e.block += cluster) {
    e.shared.clear();
    for (int rank = 0; rank < cluster; ++rank) {
      e.shared.emplace_back(new Slot[slots]);  // of this size exactly: ASan sees its end
      if (slots > 0) memset(static_cast<void*>(e.shared.back().get()), 0xff, slots * 16);
    }
    e.run_cluster();
  }
}

FASTOPT_DEVICE int thread_index() { return emulator.current->thread; }
FASTOPT_DEVICE int block_size() { return emulator.threads; }
FASTOPT_DEVICE int64_t block_index() { return emulator.block + emulator.current->rank; }
FASTOPT_DEVICE int64_t grid_size() { return emulator.grid; }

FASTOPT_DEVICE void sync_block() { emulator.wait(Wait::block); }
FASTOPT_DEVICE void sync_warp() { emulator.wait(Wait::warp); }

template <class V>
FASTOPT_DEVICE V shuffle_xor(V value, int mask) {
  static_assert(sizeof(V) <= sizeof(Slot), "a shuffle moves up to 16 bytes here");
  Fiber& f = *emulator.current;
  const int own = f.rank * emulator.threads + f.thread;
  const int half = f.shuffles++ % 2 * static_cast<int>(emulator.fibers.size());
  memcpy(&emulator.slots[half + own], &value, sizeof(V));
  emulator.wait(Wait::warp);
  memcpy(&value, &emulator.slots[half + (own ^ mask)], sizeof(V));
  return value;
}

FASTOPT_DEVICE char* shared_memory() { return emulator.shared[emulator.current->rank][0].bytes; }

FASTOPT_DEVICE int cluster_rank() { return emulator.current->rank; }
FASTOPT_DEVICE void sync_cluster() { emulator.wait(Wait::cluster); }
template <class V>
FASTOPT_DEVICE V* shared_of(V* own, int rank) {
  const ptrdiff_t at = reinterpret_cast<char*>(own) - shared_memory();
  return reinterpret_cast<V*>(emulator.shared[rank][0].bytes + at);
}

FASTOPT_DEVICE bool is_last_block(uint32_t* counter) {
  const bool last = ++*counter == static_cast<uint32_t>(emulator.grid);
  if (last) *counter = 0;
  return last;
}

struct alignas(16) Words {
  uint32_t word[4];
};
FASTOPT_DEVICE void check_alignment(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0)
    throw std::runtime_error("misaligned 16-byte access");
}
FASTOPT_DEVICE Words load_words(const void* p) {
  check_alignment(p);
  Words w;
  memcpy(&w, p, sizeof(w));
  return w;
}
FASTOPT_DEVICE void store_words(void* p, Words w) {
  check_alignment(p);
  memcpy(p, &w, sizeof(w));
}
FASTOPT_DEVICE Words load_words_streaming(const void* p) { return load_words(p); }
FASTOPT_DEVICE void store_words_streaming(void* p, Words w) { store_words(p, w); }

// Nothing arrives before it is waited for: a missing wait shows.
FASTOPT_DEVICE void copy_words_async(void* to_shared, const void* from) {
  check_alignment(to_shared);
  check_alignment(from);
  emulator.current->copies.push_back({to_shared, from});
}
FASTOPT_DEVICE void wait_for_copies() {
  for (const Copy& copy : emulator.current->copies) memcpy(copy.to, copy.from, sizeof(Words));
  emulator.current->copies.clear();
}

FASTOPT_DEVICE float exp_approximate(float x) { return std::exp(x); }

}  // namespace fastopt::gpu
