// A saved gradient times its upstream gradient, in place.
#include "cpu/simd.h"
#include "params.h"

namespace fastopt {
namespace FASTOPT_LEVEL {

// Tasks: with one factor, single elements of the dense memory; else the rows where their classes
// lie side by side, and the (batch entry, class) pairs where their positions do.
void cross_entropy_scale(const CrossEntropyScale& p, int64_t begin, int64_t end) {
  with_element(p.type, [&](auto element) {
    using T = typename decltype(element)::type;
    using A = Acc<T>;
    constexpr int kStep = kLanes<A>;
    const auto by_one = [](T* x, int64_t count, A factor) {
      const Vec<A> factors = splat<A>(factor);
      int64_t i = 0;
      for (; i + kStep <= count; i += kStep) store(x + i, load(x + i) * factors);
      const int left = static_cast<int>(count - i);
      if (left > 0) store_tail(x + i, load_tail(x + i, left, A(0)) * factors, left);
    };
    T* const grad = static_cast<T*>(p.grad);
    const A* const factors = static_cast<const A*>(p.factors);
    if (p.one) return by_one(grad + begin, end - begin, *factors);
    if (p.strides.cls == 1) {
      for (int64_t r = begin; r < end; ++r) {
        by_one(grad + row_offset(p.strides, r, p.positions), p.classes, factors[r]);
      }
      return;
    }
    for (int64_t task = begin; task < end; ++task) {
      const A* const own = factors + task / p.classes * p.positions;
      T* const run = grad + task / p.classes * p.strides.batch + task % p.classes * p.strides.cls;
      int64_t i = 0;
      if (p.strides.position == 1) {
        for (; i + kStep <= p.positions; i += kStep) store(run + i, load(run + i) * load(own + i));
      }
      for (; i < p.positions; ++i) {
        T& x = run[i * p.strides.position];
        x = from_acc<T>(to_acc(x) * own[i]);
      }
    }
  });
}

}  // namespace FASTOPT_LEVEL
}  // namespace fastopt
