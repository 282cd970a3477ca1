// What the kernels for all layouts share: what a row's label says, the target masses, the online
// sums, the loss and the gradient from a row's statistics.
#pragma once

#include "lanes.h"
#include "params.h"
#include "rules/softmax.h"
#include "rules/target.h"
#include "words.h"

namespace fastopt::gpu {

// exp(d) for d <= 0, as exact as results of type T can show.
template <class T>
FASTOPT_DEVICE Acc<T> exp_for(Acc<T> d) {
  if constexpr (sizeof(T) == 2) {
    return exp_approximate(d);
  } else {
    return scalar_exp(d);
  }
}

template <class A>
FASTOPT_DEVICE A not_a_number() {
  return static_cast<A>(__builtin_nanf(""));
}

// ---- what all rows share ----

// Whether the gradient is held in units; not where the mean's divisor already makes it inf or NaN.
FASTOPT_DEVICE bool waits(const CrossEntropyParams& p, double upstream) {
  return p.in_units && upstream - upstream == 0;
}
FASTOPT_DEVICE float scale_of(const CrossEntropyParams& p) {
  return half_gradient_scale(p.largest_mass != nullptr ? *p.largest_mass : 1.0f);
}

FASTOPT_DEVICE double total_weight(const CrossEntropyParams& p) {
  if (p.weight_parts != nullptr) return sum_of_parts(p.weight_parts, p.weight_part_count);
  return static_cast<double>(p.batch * p.positions);
}

// At the start of a block's shared memory.
template <class A>
struct BlockShared {
  RowStats<A> of_warp[2][kMaxWarps];  // two rows' worth: one barrier a row is enough
  double losses[kMaxWarps];
  RowConstants<A> constants;
};

struct ClassIndex {};  // stands for the storage type of the target where it holds labels
template <class TT>
constexpr bool kIsClassIndex = false;
template <>
constexpr bool kIsClassIndex<ClassIndex> = true;

// ---- one combination of logits type T, target type TT and options ----
// kMass: every class carries target mass q_c (probabilities, or label smoothing).
template <class T, class TT, bool kMass>
struct CrossEntropy {
  using A = Acc<T>;
  using Stats = RowStats<A>;
  using End = RowEnd<A>;
  static constexpr bool kLabels = kIsClassIndex<TT>;
  static constexpr int kSize = static_cast<int>(sizeof(Words) / sizeof(T));

  const CrossEntropyParams& p;
  const A* const weight = static_cast<const A*>(p.weight);
  BlockShared<A>& shared = *reinterpret_cast<BlockShared<A>*>(shared_memory());
  double loss_sum = 0;  // of the rows whose loss this thread wrote

  static_assert(sizeof(BlockShared<A>) <= block_shared_bytes(sizeof(A)), "the plan reserves it");

  FASTOPT_MEMBER explicit CrossEntropy(const CrossEntropyParams& params) : p(params) {}

  FASTOPT_MEMBER int64_t rows() const { return p.batch * p.positions; }

  FASTOPT_MEMBER int64_t offset(const Strides& strides, int64_t row) const {
    return row_offset(strides, row, p.positions);
  }

  // What all rows share: the reduction's factor, and the mass that label smoothing gives a row. One
  // warp adds up the partial sums for the block.
  FASTOPT_MEMBER void begin_block() {
    if (thread_index() < kWarpSize) {
      RowConstants<double> constants = p.constants;
      if (p.smoothing_parts != nullptr)
        constants.smoothing_mass = sum_of_parts(p.smoothing_parts, p.smoothing_part_count);
      double& upstream = constants.upstream;
      if (p.mean && p.grad != nullptr) upstream = mean_of(1.0, total_weight(p), p.uniform > 0);
      if (waits(p, upstream)) upstream = static_cast<double>(scale_of(p));
      if (thread_index() == 0) shared.constants = rounded_to<A>(constants);
    }
    sync_block();
  }

  FASTOPT_MEMBER void end_block() {
    const double sum = sum_of_block(loss_sum, shared.losses);
    if (p.loss_parts != nullptr && thread_index() == 0) p.loss_parts[block_index()] = sum;
  }

  struct Row {
    int y = -1;            // the label, where it counts and is in range
    T true_logit{};        // x_y, converted by whoever needs it: nobody waits for it before
    bool ignored = false;  // counts for nothing
    bool invalid = false;  // becomes NaN: its label is out of range
  };
  FASTOPT_MEMBER int64_t label_at(int64_t r) const {
    if constexpr (kLabels) return r < rows() ? p.labels[r] : 0;
    return 0;
  }
  FASTOPT_MEMBER Row row_of(int64_t label) const {
    Row row;
    if constexpr (kLabels) {
      row.ignored = label == p.ignore_index;
      const bool inside = 0 <= label && label < p.classes;
      row.invalid = !row.ignored && !inside;
      if (!row.ignored && inside) row.y = static_cast<int>(label);
    }
    return row;
  }
  FASTOPT_MEMBER void load_true_logit(Row& row, const T* logits) const {
    if (row.y >= 0) row.true_logit = logits[row.y * p.logits_strides.cls];
  }

  // The true class's own mass (1 - e) w_y, and its q_y, which adds its share of the smoothing.
  FASTOPT_MEMBER A true_mass(int y) const {
    const A keep = static_cast<A>(p.keep);
    return weight != nullptr && y >= 0 ? product(keep, weight[y]) : keep;
  }
  FASTOPT_MEMBER A total_mass(int y) const {
    if constexpr (!kMass) return true_mass(y);
    const A uniform = static_cast<A>(p.uniform);
    return true_mass(y) + (weight != nullptr ? product(uniform, weight[y]) : uniform);
  }

  // q of n classes, from t[t_at] (probabilities) and w[w_at] (class weights, or null) on. The
  // weight is multiplied last: one product for both parts of q_c.
  template <int n, Cache kCache>
  FASTOPT_MEMBER void masses(const TT* t, int64_t t_at, bool t_aligned, const A* w, int64_t w_at,
                             bool w_aligned, A* q) const {
    const A keep = static_cast<A>(p.keep), uniform = static_cast<A>(p.uniform);
    if constexpr (kLabels) {
      for (int i = 0; i < n; ++i) q[i] = uniform;
    } else {
      load_some<n, kCache>(t + t_at, t_aligned, q);
      for (int i = 0; i < n; ++i) q[i] = probability_mass(q[i], keep, uniform);
    }
    if (w != nullptr) {
      A factor[n];
      load_some<n, Cache::keep>(w + w_at, w_aligned, factor);
      for (int i = 0; i < n; ++i) q[i] = product(q[i], factor[i]);
    }
  }

  // Takes n more logits (overwritten) and their masses into account.
  template <int n>
  FASTOPT_MEMBER static void add(Stats& stats, A (&x)[n], const A (&q)[n]) {
    A max = stats.max;
    for (int i = 0; i < n; ++i) max = larger(x[i], max);
    stats = rebase(stats, max);
    add_below_max(stats, x, q);
  }
  // The same where stats.max is at least as large as any of them.
  template <int n>
  FASTOPT_MEMBER static void add_below_max(Stats& stats, A (&x)[n], const A (&q)[n]) {
    const A base = stats_base(stats.max);
    A dot = 0, mass = 0;
    for (int i = 0; i < n; ++i) {
      const A d = x[i] - base;
      x[i] = exp_for<T>(d);
      if constexpr (kMass) {
        dot += d == A(0) ? A(0) : q[i] * d;  // not inf * 0
        mass += q[i];
      }
    }
    // Small terms meet one another before they meet a sum that has outgrown their last digits.
    for (int width = n / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) x[i] += x[i + width];
    stats.sum += x[0];
    stats.dot += dot;
    stats.mass += mass;
  }

  // From a row's merged statistics to its end.
  FASTOPT_MEMBER End close_row(Stats stats, const Row& row) const {
    if (row.ignored) {
      stats = ignored_row<A>();
    } else {
      stats = fastopt::finish(stats);
      if constexpr (kLabels)
        stats = add_true_class(stats, to_acc(row.true_logit), true_mass(row.y), shared.constants);
      if (row.invalid) stats.sum = not_a_number<A>();
    }
    return end_row(stats, scalar_log(stats.sum), shared.constants);
  }

  // By one thread of those that share the row.
  FASTOPT_MEMBER void write_results(int64_t r, const End& end) {
    if (p.row_loss != nullptr) static_cast<A*>(p.row_loss)[r] = end.loss;
    loss_sum += static_cast<double>(end.loss);
  }

  // Everything that a row's gradient needs. The difference a p - q is taken before the products
  // with `up` and before rounding: softmax rounded to half precision first would leave nothing of
  // p_y - 1 on a confident row.
  struct Gradient {
    A up, max, factor;
    A of_true;  // the true class's
  };
  FASTOPT_MEMBER Gradient gradient_of(const Row& row, const End& end) const {
    Gradient g{row.ignored ? A(0) : shared.constants.upstream, end.max, end.factor, 0};
    if (kLabels && row.y >= 0) {
      const A softmax_mass = g.factor * exp_for<T>(to_acc(row.true_logit) - g.max);
      g.of_true = true_gradient(g.up, softmax_mass, total_mass(row.y));
    }
    return g;
  }
  // up (a p_c - q_c) for a class that is not the true one; q: its mass, where kMass.
  FASTOPT_MEMBER static A logit_gradient(const Gradient& g, A x, A q) {
    if constexpr (kMass) return g.up * (g.factor * exp_for<T>(x - g.max) - q);
    return g.up * g.factor * exp_for<T>(x - g.max);
  }
};

// Threads that the registers must leave room for.
template <class T>
constexpr int kThreadsPerSm = threads_per_sm(sizeof(T));

}  // namespace fastopt::gpu
