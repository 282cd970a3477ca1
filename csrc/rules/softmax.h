// The arithmetic of softmax cross-entropy, written once: plain inline functions for host and
// device. With q the target mass of a row, a = sum_c q_c, m = max_c x_c and p = softmax(x),
//
//     loss        = a log(sum_c exp(x_c - m)) - sum_c q_c (x_c - m)
//     d loss/dx_c = a p_c - q_c
//
// covers every variant (target.h has q of class indices and of probabilities). z-loss adds z lse^2
// to the loss and 2 z lse to a in the gradient, with lse = m + log(sum_c exp(x_c - m)).
//
// m and the logarithm stay apart: a log-sum-exp that holds m loses the digits of the loss under a
// large common offset of the logits.
#pragma once

#include "types.h"

namespace fastopt {

#if defined(__CUDACC__)
FASTOPT_RULE float scalar_exp(float x) { return ::expf(x); }
FASTOPT_RULE double scalar_exp(double x) { return ::exp(x); }
FASTOPT_RULE float scalar_log(float x) { return ::logf(x); }
FASTOPT_RULE double scalar_log(double x) { return ::log(x); }
#else
FASTOPT_RULE float scalar_exp(float x) { return __builtin_expf(x); }
FASTOPT_RULE double scalar_exp(double x) { return __builtin_exp(x); }
FASTOPT_RULE float scalar_log(float x) { return __builtin_logf(x); }
FASTOPT_RULE double scalar_log(double x) { return __builtin_log(x); }
// glibc 2.29 has an exp and a log that set no errno. Those before compute the same, and let the
// library load wherever torch's own wheels do (glibc 2.28).
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver exp, exp@GLIBC_2.2.5\n.symver log, log@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver exp, exp@GLIBC_2.17\n.symver log, log@GLIBC_2.17");
#endif
#endif

// What one sweep over (a part of) a row leaves. `sum` and `dot` are relative to stats_base(max).
template <class A>
struct alignas(16) alignas(A) RowStats {
  A max;   // max_c x_c
  A sum;   // sum_c exp(x_c - base)
  A dot;   // sum_c q_c (x_c - base)
  A mass;  // sum_c q_c
};

template <class A>
FASTOPT_RULE RowStats<A> empty_stats() {
  return {-static_cast<A>(__builtin_inff()), 0, 0, 0};
}

// exp(x - max) would be NaN in a part of a row that holds nothing but -inf.
template <class A>
FASTOPT_RULE A stats_base(A max) {
  return max == -static_cast<A>(__builtin_inff()) ? A(0) : max;
}

// The same statistics, relative to a maximum that is at least as large.
template <class A>
FASTOPT_RULE RowStats<A> rebase(RowStats<A> stats, A max) {
  if (stats.max == max) return stats;
  const A shift = stats_base(stats.max) - stats_base(max);
  // Nothing summed up, no mass: 0 * inf must not become NaN.
  if (stats.sum != A(0)) stats.sum *= scalar_exp(shift);
  if (stats.mass != A(0)) stats.dot += stats.mass * shift;
  stats.max = max;
  return stats;
}

template <class A>
FASTOPT_RULE RowStats<A> merge(RowStats<A> a, RowStats<A> b) {
  const A max = b.max > a.max ? b.max : a.max;
  a = rebase(a, max);
  b = rebase(b, max);
  return {max, a.sum + b.sum, a.dot + b.dot, a.mass + b.mass};
}

// A whole row of -inf has no softmax: NaN, as in torch.
template <class A>
FASTOPT_RULE RowStats<A> finish(RowStats<A> row) {
  if (row.max == -static_cast<A>(__builtin_inff())) row.sum = static_cast<A>(__builtin_nanf(""));
  return row;
}

// A row that is ignored: its loss and its softmax's factor are exactly 0.
template <class A>
FASTOPT_RULE RowStats<A> ignored_row() {
  return {0, 1, 0, 0};
}

// What all rows of a call share where they end.
template <class A>
struct RowConstants {
  A upstream;        // what gradients are multiplied by: the reduction's factor
  A smoothing_mass;  // sum_c (e / C) w_c
  A lse_square_scale;
};
template <class A>
FASTOPT_RULE RowConstants<A> rounded_to(const RowConstants<double>& of_call) {
  return {static_cast<A>(of_call.upstream), static_cast<A>(of_call.smoothing_mass),
          static_cast<A>(of_call.lse_square_scale)};
}

// What the true class adds to `dot`.
template <class A>
FASTOPT_RULE A true_term(A true_logit, A max, A true_mass) {
  const A d = true_logit - max;
  const A term = true_mass * d;
  return d == A(0) ? A(0) : term;  // an infinite weight's inf * 0 is no NaN
}

// Adds the true class's own mass q_y = (1 - e) w_y to a class-index row. Its mass from smoothing is
// that of all rows: the sweep's own sum has rounding errors.
template <class A>
FASTOPT_RULE RowStats<A> add_true_class(RowStats<A> row, A true_logit, A true_mass,
                                        const RowConstants<A>& constants) {
  row.dot += true_term(true_logit, row.max, true_mass);
  row.mass = constants.smoothing_mass + true_mass;
  return row;
}

// How a row ends: its loss, and its gradient up (factor exp(x_c - max) - q_c), with up the upstream
// gradient times the reduction's factor.
template <class V>
struct RowEnd {
  V loss, max, factor;
};

// V: A, or a vector of it with a row a lane. log_sum: the logarithm of row.sum.
template <class V, class A>
FASTOPT_RULE RowEnd<V> end_row(const RowStats<V>& row, V log_sum,
                               const RowConstants<A>& constants) {
  RowEnd<V> end{row.mass * log_sum - row.dot, row.max, row.mass};
  if (constants.lse_square_scale != A(0)) {
    const V lse = row.max + log_sum, z_lse = constants.lse_square_scale * lse;
    end.loss += z_lse * lse;
    end.factor += z_lse + z_lse;
  }
  end.factor /= row.sum;
  return end;
}

// The same from a loss that was added up class by class.
template <class A>
FASTOPT_RULE A end_loss(A of_classes, A max, A log_sum, const RowConstants<A>& constants) {
  return end_row<A, A>({max, A(1), -of_classes, A(0)}, log_sum, constants).loss;
}

// Whether it may be the formula that made this loss inf or NaN: infinite masses, or such as are too
// large to add up, on logits that are numbers.
template <class A>
FASTOPT_RULE bool is_doubtful(A loss, A sum) {
  return loss - loss != A(0) && sum == sum;
}

// up (a p_y - q_y) of the true class; NaN for an infinite up, where torch has inf - inf.
template <class A>
FASTOPT_RULE A true_gradient(A up, A softmax_mass, A mass) {
  return up * (softmax_mass - mass) + (up - up);
}

}  // namespace fastopt
