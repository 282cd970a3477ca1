// A row whose classes lie side by side, or a part of it: one sweep for (max, sum, dot), one for the
// gradient.
#pragma once

#include "common.h"

namespace fastopt {
namespace FASTOPT_LEVEL {
namespace {

// Elements of one step of the online max and sum: read twice, so they have to stay in L1.
constexpr int64_t kChunk = 1024;

template <class A>
FASTOPT_INLINE IntVec<A> lane_index() {
  IntVec<A> lane;
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = i;
  return lane;
}

template <class T>
FASTOPT_INLINE Vec<Acc<T>> load_some(const T* p, int n) {
  return n == kLanes<Acc<T>> ? load(p) : load_tail(p, n, Acc<T>(0));
}
template <class T>
FASTOPT_INLINE void store_some(T* p, Vec<Acc<T>> v, int n) {
  if (n == kLanes<Acc<T>>) {
    store(p, v);
  } else {
    store_tail(p, v, n);
  }
}

template <class T, class TT, bool kMass, bool kWeight>
struct ContiguousRow : CrossEntropy<T, TT, kMass, kWeight> {
  using Base = CrossEntropy<T, TT, kMass, kWeight>;
  using Base::Base, Base::kL, Base::kLabels, Base::p, Base::logits, Base::probabilities;
  using Base::keep, Base::uniform, Base::true_masses, Base::smoothing_masses, Base::constants;
  using Base::label, Base::loss_by_class, Base::offset, Base::row_loss;
  using Base::true_gradient, Base::true_mass;
  using typename Base::A, typename Base::End, typename Base::Stats, typename Base::V;

  // q of the classes c, c + 1, ...; `n` of them (all lanes, but in a tail).
  V mass_at(const TT* t, int64_t c, int n) const {
    V own = splat<A>(keep), shared = splat<A>(uniform);
    if constexpr (kWeight) shared = load_some(smoothing_masses + c, n);
    if constexpr (kLabels) {
      return shared;
    } else {
      if constexpr (kWeight) own = load_some(true_masses + c, n);
      return probability_mass(load_some(t + c, n), own, shared);
    }
  }

  struct Row {
    const T* x;
    const TT* t;
    int64_t y;  // -1: ignored
  };

  // Where the sweep leaves its exponentials, so that the gradient need not compute them again:
  // exp(x_c - bases[c / kChunk]).
  struct Cache {
    A* exps;
    A* bases;
  };

  // Chunk by chunk: its maximum, then its sums relative to the largest maximum so far.
  Stats sweep(const T* x, const TT* t, int64_t begin, int64_t end, const Cache& cache) const {
    Stats row = empty_stats<double>();
    for (int64_t c0 = begin; c0 < end; c0 += kChunk) {
      const int64_t c1 = c0 + kChunk < end ? c0 + kChunk : end;
      const double chunk_max = static_cast<double>(max_of(x, c0, c1));
      row = rebase(row, chunk_max > row.max ? chunk_max : row.max);
      const A base = static_cast<A>(stats_base(row.max));
      if (cache.exps == nullptr) {
        add_chunk<false>(&row, x, t, c0, c1, base, nullptr);
      } else {
        cache.bases[(c0 - begin) / kChunk] = base;
        add_chunk<true>(&row, x, t, c0, c1, base, cache.exps);
      }
    }
    return row;
  }

  static A max_of(const T* x, int64_t begin, int64_t end) {
    const A minus_infinity = -static_cast<A>(__builtin_inff());
    V largest[2] = {splat<A>(minus_infinity), splat<A>(minus_infinity)};
    int64_t c = begin;
    for (; c + 2 * kL <= end; c += 2 * kL) {
      largest[0] = max(largest[0], load(x + c));
      largest[1] = max(largest[1], load(x + c + kL));
    }
    for_each_vector(c, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      largest[0] = max(largest[0], n == kL ? load(x + i) : load_tail(x + i, n, minus_infinity));
    });
    return horizontal_max<A>(max(largest[0], largest[1]));
  }

  struct Part {
    V sum, dot, mass;
    Part operator+(const Part& other) const {
      return {sum + other.sum, dot + other.dot, mass + other.mass};
    }
  };

  // term(c, n) over the classes of a chunk, n at a time. Pairs of pairs of vectors: small terms
  // meet one another before they meet a sum that has grown past their last digits. As many
  // elements at every SIMD level: fewer lanes must not mean longer sums. (Eight vectors of AVX2 are
  // no faster than four, one is 7 % slower.)
  template <class F>
  static __attribute__((always_inline)) Part sum_of(int64_t begin, int64_t end, const F& term) {
    constexpr int kCount = 128 / kVectorBytes;
    Part total{};
    int64_t c = begin;
    for (; c + kCount * kL <= end; c += kCount * kL) total = total + sum_of_pairs<kCount>(c, term);
    for_each_vector(c, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      total = total + term(i, n);
    });
    return total;
  }
  template <int kCount, class F>
  static __attribute__((always_inline)) Part sum_of_pairs(int64_t c, const F& term) {
    if constexpr (kCount == 1) {
      return term(c, kL);
    } else {
      const Part low = sum_of_pairs<kCount / 2>(c, term);
      return low + sum_of_pairs<kCount / 2>(c + kCount / 2 * kL, term);
    }
  }

  // Sums over one chunk.
  template <bool kKeep>
  void add_chunk(Stats* row, const T* x, const TT* t, int64_t begin, int64_t end, A base,
                 A* exps) const {
    const auto part_at = [&](int64_t c, int n) __attribute__((always_inline)) {
      // exp(-inf) = 0 in the lanes past the end.
      const V xv = n == kL ? load(x + c) : load_tail(x + c, n, -static_cast<A>(__builtin_inff()));
      const V d = xv - base;
      Part part{exp_nonpositive(d), V{}, V{}};
      if constexpr (kKeep) store_some(exps + c, part.sum, n);
      if constexpr (kMass) {
        const V q = mass_at(t, c, n);
        part.dot = q * d;
        part.mass = q;
        if (n < kL) {  // past the end d is -inf
          const IntVec<A> inside = lane_index<A>() < n;
          part.dot = inside ? part.dot : V{};
          part.mass = inside ? part.mass : V{};
        }
      }
      return part;
    };
    const Part total = sum_of(begin, end, part_at);
    row->sum += static_cast<double>(horizontal_sum<A>(total.sum));
    if constexpr (kMass) {
      row->dot += static_cast<double>(horizontal_sum<A>(total.dot));
      row->mass += static_cast<double>(horizontal_sum<A>(total.mass));
    }
  }

  // step(c, n): n classes from c on, kL at a time, then the tail.
  template <class F>
  static void for_each_vector(int64_t begin, int64_t end, const F& step) {
    int64_t c = begin;
    for (; c + kL <= end; c += kL) step(c, kL);
    if (c < end) step(c, static_cast<int>(end - c));
  }

  // The difference factor exp(x_c - max) - q_c is taken before the products with up and before
  // rounding: softmax rounded to half precision first would leave nothing of p_y - 1 on a confident
  // row.
  void gradient(T* grad, const Row& row, const End& of_row, int64_t begin, int64_t end,
                const Cache& cache) const {
    const A row_maximum = static_cast<A>(of_row.max);
    const A factor = static_cast<A>(of_row.factor);
    // Before it is written over, where the gradient takes the logits' memory.
    const bool here = kLabels && begin <= row.y && row.y < end;
    const A true_exp = here ? scalar_exp(to_acc(row.x[row.y]) - row_maximum) : A(0);
    if (cache.exps == nullptr) {
      write_gradient<false>(grad, row, row_maximum, factor, begin, end, nullptr);
    } else {
      for (int64_t c0 = begin; c0 < end; c0 += kChunk) {
        const int64_t c1 = c0 + kChunk < end ? c0 + kChunk : end;
        const A base = cache.bases[(c0 - begin) / kChunk];
        const A scaled = base == row_maximum ? factor : factor * scalar_exp(base - row_maximum);
        write_gradient<true>(grad, row, row_maximum, scaled, c0, c1, cache.exps);
      }
    }
    if (here) grad[row.y] = from_acc<T>(true_gradient(factor * true_exp, row.y));
  }

  template <bool kCached>
  void write_gradient(T* grad, const Row& row, A row_maximum, A factor, int64_t begin, int64_t end,
                      const A* exps) const {
    // A member would be read again after every store.
    const A upstream = constants.upstream, scaled = upstream * factor;
    for_each_vector(begin, end, [&](int64_t c, int n) __attribute__((always_inline)) {
      V e;
      if constexpr (kCached) {
        e = load_some(exps + c, n);
      } else {
        e = exp_nonpositive(load_some(row.x + c, n) - row_maximum);
      }
      V g;
      if constexpr (kMass) {
        g = upstream * (factor * e - mass_at(row.t, c, n));
      } else {
        g = scaled * e;
      }
      store_some(grad + c, g, n);
    });
  }

  Row row_at(int64_t r) const {
    Row row{logits + offset(p.logits_strides, r), nullptr, 0};
    if constexpr (kLabels) {
      row.y = label(r);
    } else {
      row.t = probabilities + offset(p.target_strides, r);
    }
    return row;
  }

  // From the sweep's result to the row's end; its loss is written.
  End close_row(const Row& row, int64_t r, Stats stats, double* loss_sum) const {
    stats = finish(stats);
    if constexpr (kLabels) {
      stats = row.y < 0 ? ignored_row<double>()
                        : add_true_class<double>(stats, to_acc(row.x[row.y]), true_mass(row.y),
                                                 p.constants);
    }
    End end = end_row(stats, scalar_log(stats.sum), p.constants);
    if (is_doubtful(end.loss, stats.sum)) end.loss = loss_by_class(r, row.y, stats.max, stats.sum);
    if (row_loss != nullptr) row_loss[r] = static_cast<A>(end.loss);
    *loss_sum += end.loss;
    return end;
  }

  void row_gradient(const Row& row, int64_t r, const End& of_row, int64_t begin, int64_t end,
                    const Cache& cache) const {
    T* const grad = static_cast<T*>(p.grad) + offset(p.grad_strides, r);
    if (kLabels && row.y < 0) {
      memset(grad + begin, 0, sizeof(T) * (end - begin));
    } else {
      gradient(grad, row, of_row, begin, end, cache);
    }
  }
};

}  // namespace
}  // namespace FASTOPT_LEVEL
}  // namespace fastopt
