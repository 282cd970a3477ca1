// What the CPU kernels of cross-entropy share: the target masses, the loss class by class, and the
// choice of an instantiation. For the units that are compiled once per SIMD level.
//
// Accumulation in float32 (float64 for float64), one rounding at the store. Row losses are added
// up in float64. Ignored rows are never read and get gradient 0.
#pragma once

#include "cpu/simd.h"
#include "params.h"
#include "rules/softmax.h"
#include "rules/target.h"

namespace fastopt {
namespace FASTOPT_LEVEL {
namespace {

struct ClassIndex {};  // stands for the storage type of the target where it holds labels

template <class T>
constexpr bool kIsClassIndex = false;
template <>
constexpr bool kIsClassIndex<ClassIndex> = true;

// One combination of logits type T, target type TT and options. kMass: every class carries target
// mass q_c (probabilities, or label smoothing); kWeight: that mass is weighted.
template <class T, class TT, bool kMass, bool kWeight>
struct CrossEntropy {
  using A = Acc<T>;
  using V = Vec<A>;
  // A few numbers a row: float64 keeps a - q_c right.
  using Stats = RowStats<double>;
  using End = RowEnd<double>;
  static constexpr int kL = kLanes<A>;
  static constexpr bool kLabels = kIsClassIndex<TT>;

  const CrossEntropyParams& p;
  const T* const logits = static_cast<const T*>(p.logits);
  const TT* const probabilities = static_cast<const TT*>(p.probabilities);
  const A* const true_masses = static_cast<const A*>(p.true_masses);
  const A* const smoothing_masses = static_cast<const A*>(p.smoothing_masses);
  A* const row_loss = static_cast<A*>(p.row_loss);
  const A keep = static_cast<A>(p.keep);
  const A uniform = static_cast<A>(p.uniform);
  const RowConstants<A> constants = rounded_to<A>(p.constants);

  explicit CrossEntropy(const CrossEntropyParams& params) : p(params) {}

  int64_t offset(const Strides& strides, int64_t row) const {
    return row_offset(strides, row, p.positions);
  }

  // The label of a row, or -1 where it is ignored. The launcher has refused labels out of range;
  // testing again here keeps reads in bounds whatever another thread writes meanwhile.
  int64_t label(int64_t row) const {
    const int64_t y = p.labels[row];
    return counts(y, p.ignore_index, p.classes) ? y : -1;
  }

  // The true class's own mass (1 - e) w_y, and its q_y, which adds its share of the smoothing.
  A true_mass(int64_t y) const { return true_masses != nullptr ? true_masses[y] : keep; }
  A total_mass(int64_t y) const {
    if constexpr (kMass) return true_mass(y) + (kWeight ? smoothing_masses[y] : uniform);
    return true_mass(y);
  }

  A true_gradient(A softmax_mass, int64_t y) const {
    return fastopt::true_gradient(constants.upstream, softmax_mass, total_mass(y));
  }

  // The loss of a row from sum_c q_c (log(sum) - (x_c - max)), a term for each class that has mass,
  // as torch adds them up. y: its label, as the sweep has read it.
  double loss_by_class(int64_t r, int64_t y, double max, double sum) const {
    const T* const x = logits + offset(p.logits_strides, r);
    const auto term = [&](int64_t c, A q) {
      const double d = static_cast<double>(to_acc(x[c * p.logits_strides.cls])) - max;
      return static_cast<double>(q) * (scalar_log(sum) - d);
    };
    double loss = 0;
    if constexpr (kLabels) loss = term(y, true_mass(y));
    for (int64_t c = 0; kMass && c < p.classes; ++c) {
      A q = kWeight ? smoothing_masses[c] : uniform;
      if constexpr (!kLabels) {
        const TT* const t = probabilities + offset(p.target_strides, r);
        const A own = kWeight ? true_masses[c] : keep;
        q = probability_mass<A>(to_acc(t[c * p.target_strides.cls]), own, q);
      }
      loss += term(c, q);
    }
    return end_loss(loss, max, scalar_log(sum), p.constants);
  }
};

// run(Kernel<...>(p)) with the combination that the params ask for.
template <template <class, class, bool, bool> class Kernel, class T, class TT, class F>
void with_options(const CrossEntropyParams& p, const F& run) {
  const bool mass = !kIsClassIndex<TT> || p.uniform > 0;
  if (mass && p.true_masses != nullptr) {
    run(Kernel<T, TT, true, true>(p));
  } else if (mass) {
    run(Kernel<T, TT, true, false>(p));
  } else if constexpr (kIsClassIndex<TT>) {
    run(Kernel<T, TT, false, false>(p));
  }
}

template <template <class, class, bool, bool> class Kernel, class F>
void with_kernel(const CrossEntropyParams& p, const F& run) {
  with_element(p.logits_type, [&](auto element) {
    using T = typename decltype(element)::type;
    if (p.labels != nullptr) {
      with_options<Kernel, T, ClassIndex>(p, run);
    } else if (p.target_type == p.logits_type) {
      with_options<Kernel, T, T>(p, run);
    } else {  // the launcher lets float32 probabilities through with half precision logits
      with_options<Kernel, T, Acc<T>>(p, run);
    }
  });
}

}  // namespace
}  // namespace FASTOPT_LEVEL
}  // namespace fastopt
