// Classes contiguous: lanes of a warp, a block or a cluster of them per row. Where the gradient
// follows the loss, the row waits for it in shared memory: one read and one write per logit. A row
// too long for that is read a second time.
#pragma once

#include "common.h"

namespace fastopt::gpu {

template <class T, class TT, bool kMass>
struct Rows : CrossEntropy<T, TT, kMass> {
  using Base = CrossEntropy<T, TT, kMass>;
  using Base::Base, Base::kLabels, Base::kSize, Base::p, Base::shared, Base::weight;
  using Base::begin_block, Base::end_block, Base::offset, Base::row_of, Base::rows;
  using Base::close_row, Base::gradient_of, Base::label_at, Base::load_true_logit;
  using Base::logit_gradient, Base::write_results;
  using typename Base::A, typename Base::End, typename Base::Gradient, typename Base::Row;
  using typename Base::Stats;

  // Vectors of a lane that become accumulators together: 16 registers, half of that where each has
  // its mass beside it. More would not fit in the 64 registers that let 1024 threads share an SM.
  static constexpr int kTogether = (kMass ? 32 : 64) / static_cast<int>(kSize * sizeof(A));
  // Vectors of a lane under way at once, as they lie in memory: with four, 64 KB of an SM's
  // threads, where bandwidth times latency is some 40 KB on an H200. (With masses even two would
  // spill.)
  static constexpr int kVectors = kMass ? kTogether : 4;

  int turn = 0;  // which half of shared.of_warp comes next

  // This block's classes of a row, in memory and, where held, in shared memory.
  struct Slice {
    int begin, count;
    const T* x;
    const TT* t;
    bool t_aligned, w_aligned;  // wherever x is
    const A* w;                 // weights from `begin` on, or null
    int head;                   // classes before x is aligned
  };

  FASTOPT_MEMBER bool shares_block() const { return p.lanes > kWarpSize; }

  FASTOPT_MEMBER void sync_row() const {
    if (shares_block()) {
      sync_block();
    } else {
      sync_warp();
    }
  }

  template <bool kHeld>
  FASTOPT_MEMBER void rows_kernel() {
    begin_block();
    const int lane = thread_index() % p.lanes, group = thread_index() / p.lanes;
    const int64_t groups = block_size() / p.lanes;
    const int rank = p.cluster > 1 ? cluster_rank() : 0;
    // Where this group holds its slice.
    const int64_t x_bytes = held_bytes(p.slice, sizeof(T));
    const int64_t t_bytes = kLabels ? 0 : held_bytes(p.slice, sizeof(TT));
    char* const held =
        shared_memory() + block_shared_bytes(sizeof(A)) + group * (x_bytes + t_bytes);

    const int64_t step = grid_size() / p.cluster * groups;
    int64_t first = block_index() / p.cluster * groups;  // the same in every lane of a warp
    int64_t label = label_at(first + group);
    for (; first < rows(); first += step) {
      const auto live = [&] { return first + group < rows(); };
      const int64_t r = live() ? first + group : rows() - 1;
      Row row = row_of(label);
      label = label_at(first + group + step);  // the next row's, a row's time ahead
      const Slice read = slice_at(r, rank);
      const Slice slice = kHeld ? held_slice(read, held, held + x_bytes) : read;
      Stats stats{};
      if (!row.ignored) {
        if constexpr (kHeld) hold(read, slice, lane);
        load_true_logit(row, row_start(r));
        if constexpr (kHeld) wait_for_copies();
        stats = sweep(slice, lane);
      }
      // Rows that share a warp are merged together, one ignored or not.
      if (!row.ignored || p.lanes < kWarpSize) stats = merge(stats);
      const End end = close_row(stats, row);
      if (live() && lane == 0 && rank == 0) write_results(r, end);
      if (kHeld && !shares_block()) sync_warp();  // the lanes' copies; else merge() was the barrier
      if (p.grad != nullptr && live()) {
        T* const grad = static_cast<T*>(p.grad) + offset(p.grad_strides, r) + slice.begin;
        write_gradient<kHeld>(grad, gradient_of(row, end), row, slice, lane);
      }
      if (kHeld && p.grad != nullptr) sync_row();  // before the next row comes in its place
    }
    if (p.cluster > 1) sync_cluster();  // others may still read this block's of_warp
    end_block();
  }

  FASTOPT_MEMBER const T* row_start(int64_t r) const {
    return static_cast<const T*>(p.logits) + offset(p.logits_strides, r);
  }

  FASTOPT_MEMBER Slice slice_at(int64_t r, int rank) const {
    Slice s{};
    const int classes = static_cast<int>(p.classes), slice = static_cast<int>(p.slice);
    s.begin = rank * slice < classes ? rank * slice : classes;
    s.count = classes - s.begin < slice ? classes - s.begin : slice;
    s.x = row_start(r) + s.begin;
    s.head = head_of(s.x, s.count);
    if constexpr (!kLabels) {
      s.t = static_cast<const TT*>(p.probabilities) + offset(p.target_strides, r) + s.begin;
      s.t_aligned = is_aligned(s.t + s.head);
    }
    if (weight != nullptr) {
      s.w = weight + s.begin;
      s.w_aligned = is_aligned(s.w + s.head);
    }
    return s;
  }

  // The slice in shared memory, aligned there as its logits are in global memory.
  FASTOPT_MEMBER Slice held_slice(Slice s, char* x_memory, char* t_memory) const {
    constexpr int kTargetSize = static_cast<int>(sizeof(Words) / sizeof(TT));
    s.x = reinterpret_cast<T*>(x_memory) + (kSize - s.head % kSize) % kSize;
    if constexpr (!kLabels) {
      s.t = reinterpret_cast<TT*>(t_memory) + (kTargetSize - s.head % kTargetSize) % kTargetSize;
      s.t_aligned = true;
    }
    return s;
  }

  // Every lane copies what it will be the first to read, and goes on before that has arrived.
  FASTOPT_MEMBER void hold(const Slice& from, const Slice& held, int lane) const {
    T* const x = const_cast<T*>(held.x);
    TT* const t = const_cast<TT*>(held.t);
    for_my_elements<kSize, 1>(from.count, from.head, lane, p.lanes, [&](auto shape, int c, int) {
      copy_some<shape.count>(x + c, from.x + c, true);
      if constexpr (!kLabels) copy_some<shape.count>(t + c, from.t + c, from.t_aligned);
    });
  }
  // This lane's statistics of a slice.
  FASTOPT_MEMBER Stats sweep(const Slice& s, int lane) const {
    Stats stats = empty_stats<A>();
    for_my_elements<kSize, kVectors>(
        s.count, s.head, lane, p.lanes, [&](auto shape, int first, int step) {
          if constexpr (shape.size == 1) {
            A x[] = {to_acc(s.x[first])}, q[] = {0};
            if constexpr (kMass)
              this->template masses<1, Cache::keep>(s.t, first, false, s.w, first, false, q);
            this->add(stats, x, q);
          } else {
            constexpr int n = shape.size;
            constexpr int kNow = shape.vectors < kTogether ? shape.vectors : kTogether;
            Words words[shape.vectors];
            for (int i = 0; i < shape.vectors; ++i) words[i] = load_words(s.x + first + i * step);
            for (int i = 0; i < shape.vectors; i += kNow) {
              A x[kNow * n], q[kNow * n] = {};
              for (int k = 0; k < kNow; ++k) {
                unpack<T>(words[i + k], x + k * n);
                if constexpr (kMass) {
                  const int c = first + (i + k) * step;
                  this->template masses<n, Cache::keep>(s.t, c, s.t_aligned, s.w, c, s.w_aligned,
                                                        q + k * n);
                }
              }
              this->add(stats, x, q);
            }
          }
        });
    return stats;
  }

  // The whole row's statistics, the same bits in every thread. Each warp leaves its own in shared
  // memory; after one barrier every warp reads them all, its cluster's too.
  FASTOPT_MEMBER Stats merge(Stats stats) {
    stats = merge_lanes<kMass>(stats, p.lanes);
    if (!shares_block()) return stats;
    const int warps = block_size() / kWarpSize, lane = thread_index() % kWarpSize;
    RowStats<A>* const mine = shared.of_warp[turn];
    turn = 1 - turn;
    if (lane == 0) mine[thread_index() / kWarpSize] = stats;
    if (p.cluster > 1) {
      sync_cluster();
    } else {
      sync_block();
    }
    stats = lane < warps ? mine[lane] : empty_stats<A>();
    if (p.cluster > 1) {
      stats = empty_stats<A>();
      for (int rank = 0; rank < p.cluster; ++rank)  // the same order in every block
        if (lane < warps) stats = fastopt::merge(stats, shared_of(mine, rank)[lane]);
    }
    return merge_lanes<kMass>(stats);
  }

  // The stores are the aligned ones: a gradient that lies otherwise than its logits (they are a
  // view of a larger buffer, say) reads those one by one, from shared memory or a cache.
  template <bool kHeld>
  FASTOPT_MEMBER void write_gradient(T* grad, const Gradient& g, const Row& row, const Slice& s,
                                     int lane) const {
    const int head = head_of(grad, s.count);
    if (row.ignored) {
      const A zeros[kSize] = {};
      return for_my_elements<kSize, 1>(s.count, head, lane, p.lanes, [&](auto shape, int c, int) {
        store_some<shape.count, Cache::stream>(grad + c, true, zeros);
      });
    }
    // Asked once a row, not once a vector; beside masses two loops would need more registers.
    const bool x_aligned = is_aligned(s.x + head);
    if constexpr (kMass) {
      write_elements<kHeld>(grad, g, row, s, head, lane, x_aligned);
    } else if (x_aligned) {
      write_elements<kHeld>(grad, g, row, s, head, lane, true);
    } else {
      write_elements<kHeld>(grad, g, row, s, head, lane, false);
    }
  }
  template <bool kHeld>
  FASTOPT_MEMBER void write_elements(T* grad, const Gradient& g, const Row& row, const Slice& s,
                                     int head, int lane, bool x_aligned) const {
    constexpr Cache kCache = kHeld ? Cache::keep : Cache::stream;
    const bool w_aligned = s.w != nullptr && is_aligned(s.w + head);
    bool t_aligned = false;
    if constexpr (!kLabels) t_aligned = is_aligned(s.t + head);
    for_my_elements<kSize, kMass ? 1 : 2>(
        s.count, head, lane, p.lanes, [&](auto shape, int first, int step) {
          constexpr int n = shape.size;
          A x[shape.count], q[shape.count] = {};
          for (int i = 0; i < shape.vectors; ++i) {
            const int c = first + i * step;
            load_some<n, kCache>(s.x + c, x_aligned, x + i * n);
            if constexpr (kMass)
              this->template masses<n, kCache>(s.t, c, t_aligned, s.w, c, w_aligned, q + i * n);
          }
          for (int i = 0; i < shape.vectors; ++i) {
            const int c = first + i * step;
            A values[n];
            for (int k = 0; k < n; ++k) values[k] = logit_gradient(g, x[i * n + k], q[i * n + k]);
            if constexpr (kLabels) {
              const int at = row.y - s.begin - c;
              if (0 <= at && at < n) {
                for (int k = 0; k < n; ++k) values[k] = k == at ? g.of_true : values[k];
              }
            }
            store_some<n, Cache::stream>(grad + c, true, values);
          }
        });
  }
};

template <class T, class TT, bool kMass, bool kHeld>
FASTOPT_KERNEL void FASTOPT_BOUNDS(kMaxThreads, kThreadsPerSm<T> / kMaxThreads)
    cross_entropy_rows(FASTOPT_PARAMS CrossEntropyParams p) {
  Rows<T, TT, kMass>(p).template rows_kernel<kHeld>();
}

}  // namespace fastopt::gpu
