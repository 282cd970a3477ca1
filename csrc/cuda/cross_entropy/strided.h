// Classes apart in memory: p.lanes threads side by side run over rows and loop over classes, twice
// where the gradient follows; few rows are side by side, so the second read comes from cache. The
// block's other threads divide the classes.
//
// A thread takes kAdjacent rows whose elements lie side by side in memory: one access for all of
// them, and one reckoning of addresses.
#pragma once

#include "common.h"

namespace fastopt::gpu {

template <class T, class TT, bool kMass>
struct Strided : CrossEntropy<T, TT, kMass> {
  using Base = CrossEntropy<T, TT, kMass>;
  using Base::Base, Base::kLabels, Base::p, Base::weight;
  using Base::begin_block, Base::end_block, Base::row_of, Base::rows;
  using Base::close_row, Base::gradient_of, Base::label_at, Base::load_true_logit;
  using Base::logit_gradient, Base::write_results;
  using typename Base::A, typename Base::End, typename Base::Gradient, typename Base::Row;
  using typename Base::Stats;

  // Of a thread, under way at once. (With 8 float64 of two rows, sm_100 spills.)
  static constexpr int kStridedClasses = kMass || sizeof(A) == 8 ? 4 : 8;

  template <int kAdjacent>
  FASTOPT_MEMBER void strided() {
    begin_block();
    const int lane = thread_index() % p.lanes;
    const Parts parts{thread_index() / p.lanes, block_size() / p.lanes};
    const int64_t tile = static_cast<int64_t>(p.lanes) * kAdjacent;
    for (int64_t first = block_index() * tile; first < rows(); first += grid_size() * tile) {
      const int64_t r = first + lane * kAdjacent;
      strided_rows<kAdjacent>(r < rows() ? r : rows() - kAdjacent, r < rows(), parts);
    }
    end_block();
  }

  struct Parts {  // the threads that share a row's classes
    int mine, count;
  };

  // visit(Shape, c) over this thread's classes, up to kStridedClasses in a row.
  template <class F>
  FASTOPT_MEMBER void for_my_classes(const Parts& parts, const F& visit) const {
    const int classes = static_cast<int>(p.classes);
    int c = parts.mine * kStridedClasses;
    for (; c + kStridedClasses <= classes; c += parts.count * kStridedClasses)
      visit(Shape<1, kStridedClasses>{}, c);
    const int left = classes - c;  // what is left of the row, for one of the threads
    if (left <= 0) return;
    if constexpr (kStridedClasses > 4) {
      if (left & 4) visit(Shape<1, 4>{}, c);
    }
    if (left & 2) visit(Shape<1, 2>{}, c + (left & 4));
    if (left & 1) visit(Shape<1, 1>{}, c + (left & 6));
  }

  // Elements of adjacent rows: one access.
  template <class U, int kAdjacent>
  struct alignas(kAdjacent * sizeof(U)) Adjacent {
    U of_row[kAdjacent];
  };
  template <int kAdjacent, class U, class S>
  FASTOPT_MEMBER static void load_adjacent(S shape, const U* from, int64_t step,
                                           Acc<U> (*out)[S::count]) {
    Adjacent<U, kAdjacent> found[shape.count];
    for (int k = 0; k < shape.count; ++k, from += step)
      found[k] = *reinterpret_cast<const Adjacent<U, kAdjacent>*>(from);
    for (int k = 0; k < shape.count; ++k)
      for (int v = 0; v < kAdjacent; ++v) out[v][k] = to_acc(found[k].of_row[v]);
  }

  template <int kAdjacent>
  FASTOPT_MEMBER void strided_rows(int64_t r, bool live, const Parts& parts) {
    int64_t label[kAdjacent];
    for (int v = 0; v < kAdjacent; ++v) label[v] = label_at(r + v);
    const int64_t batch = p.positions == 1 ? r : r / p.positions;
    const int64_t position = p.positions == 1 ? 0 : r % p.positions;
    const auto start = [&](const Strides& strides) {
      return batch * strides.batch + position * strides.position;
    };
    const T* const logits = static_cast<const T*>(p.logits) + start(p.logits_strides);
    const TT* target = nullptr;
    if constexpr (!kLabels)
      target = static_cast<const TT*>(p.probabilities) + start(p.target_strides);

    const auto load = [&](auto shape, int c, auto* x, auto* q) {
      const int64_t step = p.logits_strides.cls;
      load_adjacent<kAdjacent>(shape, logits + c * step, step, x);
      if constexpr (!kLabels) {
        const int64_t t_step = p.target_strides.cls;
        load_adjacent<kAdjacent>(shape, target + c * t_step, t_step, q);
      }
      if constexpr (kMass) {
        for (int v = 0; v < kAdjacent; ++v)
          for (int k = 0; k < shape.count; ++k) q[v][k] = mass_of_class(q[v][k], c + k);
      }
    };
    Stats stats[kAdjacent];
    Row row[kAdjacent];
    const auto for_rows = [&](const auto& visit) {
      for (int v = 0; v < kAdjacent; ++v) visit(v);
    };
    for_rows([&](int v) { stats[v] = empty_stats<A>(); });
    if (live) {
      for_my_classes(parts, [&](auto shape, int c) {
        A x[kAdjacent][shape.count], q[kAdjacent][shape.count] = {};
        load(shape, c, x, q);
        for_rows([&](int v) { this->add(stats[v], x[v], q[v]); });
      });
    }
    for_rows([&](int v) {  // not before: the logits do not wait for the label
      row[v] = row_of(label[v]);
      load_true_logit(row[v], logits + v);
    });
    End end[kAdjacent];
    for_rows([&](int v) {
      end[v] = close_row(merge_parts(stats[v], parts), row[v]);
      if (live && parts.mine == 0) write_results(r + v, end[v]);
    });
    if (!live || p.grad == nullptr) return;
    Gradient g[kAdjacent];
    bool ignored = true;  // all of them: then nobody asks what they hold
    for_rows([&](int v) {
      g[v] = gradient_of(row[v], end[v]);
      ignored &= row[v].ignored;
    });
    const int64_t at = start(p.grad_strides), step = p.grad_strides.cls;
    for_my_classes(parts, [&](auto shape, int c) {
      A x[kAdjacent][shape.count] = {}, q[kAdjacent][shape.count] = {};
      if (!ignored) load(shape, c, x, q);
      for (int k = 0; k < shape.count; ++k) {
        Adjacent<A, kAdjacent> values;
        for_rows([&](int v) {
          const A value = any_gradient(g[v], row[v], x[v][k], q[v][k], c + k);
          values.of_row[v] = row[v].ignored ? A(0) : value;
        });
        write_adjacent(at + (c + k) * step, values);
      }
    });
  }

  template <int kAdjacent>
  FASTOPT_MEMBER void write_adjacent(int64_t at, const Adjacent<A, kAdjacent>& values) const {
    Adjacent<T, kAdjacent> rounded;
    for (int v = 0; v < kAdjacent; ++v) rounded.of_row[v] = from_acc<T>(values.of_row[v]);
    *reinterpret_cast<Adjacent<T, kAdjacent>*>(static_cast<T*>(p.grad) + at) = rounded;
  }

  // q of class c; t: its probability, if it has one.
  FASTOPT_MEMBER A mass_of_class(A t, int c) const {
    const A keep = static_cast<A>(p.keep), uniform = static_cast<A>(p.uniform);
    const A q = kLabels ? uniform : probability_mass(t, keep, uniform);
    return weight != nullptr ? product(q, weight[c]) : q;
  }

  FASTOPT_MEMBER static A any_gradient(const Gradient& g, const Row& row, A x, A q, int c) {
    const A other = logit_gradient(g, x, q);  // by a select: threads that branch take turns
    return kLabels && c == row.y ? g.of_true : other;
  }

  // A row's statistics from all threads that share it, in one order.
  FASTOPT_MEMBER Stats merge_parts(const Stats& stats, const Parts& parts) {
    if (parts.count == 1) return stats;
    Stats* const all = reinterpret_cast<Stats*>(shared_memory() + block_shared_bytes(sizeof(A)));
    sync_block();  // the row before is through with them
    all[thread_index()] = stats;
    sync_block();
    Stats merged = empty_stats<A>();
    for (int part = 0; part < parts.count; ++part)
      merged = fastopt::merge(merged, all[part * p.lanes + thread_index() % p.lanes]);
    return merged;
  }
};

template <class T, class TT, bool kMass, int kAdjacent>
FASTOPT_KERNEL void FASTOPT_BOUNDS(kStridedThreads, kThreadsPerSm<T> / kStridedThreads)
    cross_entropy_strided(FASTOPT_PARAMS CrossEntropyParams p) {
  Strided<T, TT, kMass>(p).template strided<kAdjacent>();
}

}  // namespace fastopt::gpu
