// The target's part of softmax.h's formula, written once for host and device: which labels count,
// the mass q_c of a class, and the mean. With class weights w, e = label_smoothing and C classes,
//
//     q_c = own_c t_c + even_c      own_c = (1 - e) w_c      even_c = (e / C) w_c
//
// where t_c is a probability, or 1 in the class of the label and 0 in all others. own_c and even_c
// are rounded products: the same numbers wherever they are met, and with one class a p - q is 0.
#pragma once

#include "types.h"

namespace fastopt {

// A row whose label is ignored has loss and gradient 0. One out of range is refused where its value
// can be asked for; on a GPU it makes them NaN, and counts for nothing in the mean's divisor.
FASTOPT_RULE bool in_range(int64_t label, int64_t classes) { return 0 <= label && label < classes; }
FASTOPT_RULE bool counts(int64_t label, int64_t ignore_index, int64_t classes) {
  return label != ignore_index && in_range(label, classes);
}

// q_c of a class with probability t. V: float, double or a vector of them.
template <class V>
FASTOPT_RULE V probability_mass(V t, V own, V even) {
  return own * t + even;
}

// total: the weights of the labels that count, or the rows of probabilities. Weights that add up to
// 0 divide by 0 as in torch, part by part: next to label smoothing's part the true classes' 0 / 0
// makes everything NaN.
FASTOPT_RULE double mean_of(double value, double total, bool smoothed) {
  return total == 0 && smoothed ? static_cast<double>(__builtin_nanf("")) : value / total;
}

}  // namespace fastopt
