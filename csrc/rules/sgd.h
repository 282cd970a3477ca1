// The arithmetic of SGD, written once: one element of one step, for host and device.
//
//     g = grad                              -grad when maximizing
//     g = g + weight_decay * param          when weight_decay != 0
//     b = g                                 first step: undamped
//     b = momentum * b + (1 - dampening) g  later steps
//     g = b, or g + momentum * b            nesterov
//     param = param - lr * g
//
// Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013, as
// torch.optim.SGD states it. Each sum of a product is one fused multiply-add, except that
// momentum * b is rounded by itself: torch's for-loop computes exactly so, and gives these bits.
#pragma once

#include "types.h"

namespace fastopt {

// What becomes of the momentum buffer: there is none, it receives the gradient, it is updated.
enum class Momentum { none, first, running };

// The options of a step, rounded to the accumulation type as torch rounds its scalars.
template <class V>
struct SgdOptions {
  V negative_lr;  // -lr
  V momentum;
  V undamped;  // 1 - dampening
  V weight_decay;
};

// V: float, double or a vector of them. Math::fma(a, b, c) is a * b + c, rounded once where the
// machine can. `buffer` is not read in the first step.
template <Momentum kMomentum, bool kNesterov, bool kWeightDecay, class Math, class V>
FASTOPT_RULE void sgd_element(V& param, V grad, V& buffer, const SgdOptions<V>& options) {
  if (kWeightDecay) grad = Math::fma(options.weight_decay, param, grad);
  if (kMomentum != Momentum::none) {
    if (kMomentum == Momentum::first) {
      buffer = grad;
    } else {
      const V kept = options.momentum * buffer;
      buffer = Math::fma(options.undamped, grad, kept);
    }
    grad = kNesterov ? Math::fma(options.momentum, buffer, grad) : buffer;
  }
  param = Math::fma(options.negative_lr, grad, param);
}

}  // namespace fastopt
