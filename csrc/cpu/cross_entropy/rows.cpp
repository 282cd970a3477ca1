// Classes contiguous: task = some rows. A row is still in L1 or L2 when its gradient follows its
// sums, so memory sees one read and one write per logit.
#include "row.h"

namespace fastopt {
namespace FASTOPT_LEVEL {
namespace {

template <class T, class TT, bool kMass, bool kWeight>
struct Rows : ContiguousRow<T, TT, kMass, kWeight> {
  using Base = ContiguousRow<T, TT, kMass, kWeight>;
  using Base::Base, Base::kLabels, Base::p, Base::offset;
  using Base::close_row, Base::row_at, Base::row_gradient, Base::sweep;
  using typename Base::A, typename Base::Cache, typename Base::End, typename Base::Row;
  using typename Base::Stats;

  // The cache for one row: `memory` where it has room, else, in full precision, the row's own
  // gradient. Half precision rows that long compute their exponentials twice, and so do those whose
  // gradient takes their logits' memory, which is read until the row has ended.
  Cache cache_at(void* memory, int64_t r) const {
    if (p.grad == nullptr) return {nullptr, nullptr};
    A* const bases = static_cast<A*>(memory);
    if (p.caches_exps) return {bases + (p.classes + kChunk - 1) / kChunk, bases};
    if constexpr (sizeof(T) == sizeof(A)) {
      if (p.grad != p.logits) return {static_cast<A*>(p.grad) + offset(p.grad_strides, r), bases};
    }
    return {nullptr, nullptr};
  }

  void rows(int64_t begin, int64_t end, void* memory) const {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * p.rows_per_task;
      const int64_t last = first + p.rows_per_task < p.batch * p.positions ? first + p.rows_per_task
                                                                           : p.batch * p.positions;
      double loss_sum = 0;
      for (int64_t r = first; r < last; ++r) {
        const Row row = row_at(r);
        const Cache cache = cache_at(memory, r);
        const bool ignored = kLabels && row.y < 0;
        const Stats stats =
            ignored ? empty_stats<double>() : sweep(row.x, row.t, 0, p.classes, cache);
        const End end = close_row(row, r, stats, &loss_sum);
        if (p.grad != nullptr) row_gradient(row, r, end, 0, p.classes, cache);
      }
      p.partial_loss[task] = loss_sum;
    }
  }
};

}  // namespace

void cross_entropy_rows(const CrossEntropyParams& p, int64_t begin, int64_t end, void* scratch) {
  with_kernel<Rows>(p, [=](const auto& kernel) { kernel.rows(begin, end, scratch); });
}

}  // namespace FASTOPT_LEVEL
}  // namespace fastopt
