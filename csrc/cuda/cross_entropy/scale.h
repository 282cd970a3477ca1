// A saved gradient times its upstream gradient, in place. A factor of 1 reads nothing but itself.
#pragma once

#include "params.h"
#include "words.h"

namespace fastopt::gpu {

struct ScaleParams {
  CrossEntropyProblem problem;  // its gradient, dense, and its labels, if it has any
  bool smoothed;
  const void* factor;  // 0-dim, factor_type
  Element factor_type;
};

FASTOPT_DEVICE double load_scalar(const void* p, Element type) {
  switch (type) {
    case Element::float32:
      return static_cast<double>(*static_cast<const float*>(p));
    case Element::float64:
      return *static_cast<const double*>(p);
    case Element::bfloat16:
      return static_cast<double>(to_acc(*static_cast<const BFloat16*>(p)));
    default:
      return static_cast<double>(to_acc(*static_cast<const Half*>(p)));
  }
}

template <class T>
FASTOPT_KERNEL void FASTOPT_BOUNDS(kParcelThreads)
    cross_entropy_scale(FASTOPT_PARAMS ScaleParams params) {
  using A = Acc<T>;
  const A factor = static_cast<A>(load_scalar(params.factor, params.factor_type));
  if (factor == A(1)) return;
  const CrossEntropyProblem& p = params.problem;
  T* const grad = static_cast<T*>(p.grad);
  const int64_t count = p.batch * p.positions * p.classes;
  const int64_t threads = grid_size() * block_size();
  const int64_t thread = block_index() * block_size() + thread_index();
  if (factor - factor != A(0)) {  // inf or NaN: so seldom that it may take its time
    for (int64_t i = thread; i < count; i += threads) {
      const int64_t r = i / p.classes, c = i % p.classes;
      T& x = grad[r / p.positions * p.grad_strides.batch +
                  r % p.positions * p.grad_strides.position + c * p.grad_strides.cls];
      const bool labels = p.labels != nullptr;
      const bool ignored = labels && p.labels[r] == p.ignore_index;
      const bool has_mass = !labels || params.smoothed || p.labels[r] == c;
      x = from_acc<T>(times_upstream(to_acc(x), factor, ignored, has_mass));
    }
    return;
  }
  for_my_elements<static_cast<int>(sizeof(Words) / sizeof(T)), 4>(
      count, head_of(grad, count), thread, threads, [&](auto shape, int64_t first, int64_t step) {
        constexpr int n = shape.size;
        A v[shape.count];
        for (int i = 0; i < shape.vectors; ++i)
          load_some<n, Cache::stream>(grad + first + i * step, true, v + i * n);
        for (int i = 0; i < shape.count; ++i) v[i] *= factor;
        for (int i = 0; i < shape.vectors; ++i)
          store_some<n, Cache::stream>(grad + first + i * step, true, v + i * n);
      });
}

}  // namespace fastopt::gpu
