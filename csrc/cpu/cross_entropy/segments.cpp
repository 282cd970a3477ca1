// Classes contiguous, and a few very long rows: every row is cut into parts for all the cores.
// task = (row, part of its classes).
#include "row.h"

namespace fastopt {
namespace FASTOPT_LEVEL {
namespace {

template <class T, class TT, bool kMass, bool kWeight>
struct Segments : ContiguousRow<T, TT, kMass, kWeight> {
  using Base = ContiguousRow<T, TT, kMass, kWeight>;
  using Base::Base, Base::kLabels, Base::p;
  using Base::close_row, Base::row_at, Base::row_gradient, Base::sweep;
  using typename Base::Row, typename Base::Stats;

  int64_t segment_begin(int64_t segment) const { return p.classes * segment / p.segments; }

  void segment_stats(int64_t begin, int64_t end) const {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t segment = task % p.segments;
      const Row row = row_at(task / p.segments);
      if (kLabels && row.y < 0) continue;
      p.segment_stats[task] = sweep(row.x, row.t, segment_begin(segment),
                                    segment_begin(segment + 1), {nullptr, nullptr});
    }
  }

  void merge_segments() const {
    for (int64_t r = 0; r < p.batch * p.positions; ++r) {
      const Row row = row_at(r);
      const Stats* const parts = p.segment_stats + r * p.segments;
      Stats stats = parts[0];
      if (!kLabels || row.y >= 0) {
        for (int64_t i = 1; i < p.segments; ++i) stats = merge(stats, parts[i]);
      }
      double loss_sum = 0;
      p.row_ends[r] = close_row(row, r, stats, &loss_sum);
      p.partial_loss[r] = loss_sum;
    }
  }

  void segment_gradients(int64_t begin, int64_t end) const {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t r = task / p.segments, segment = task % p.segments;
      row_gradient(row_at(r), r, p.row_ends[r], segment_begin(segment), segment_begin(segment + 1),
                   {nullptr, nullptr});
    }
  }
};

}  // namespace

void cross_entropy_segment_stats(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  with_kernel<Segments>(p, [=](const auto& kernel) { kernel.segment_stats(begin, end); });
}
void cross_entropy_merge_segments(const CrossEntropyParams& p) {
  with_kernel<Segments>(p, [](const auto& kernel) { kernel.merge_segments(); });
}
void cross_entropy_segment_gradients(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  with_kernel<Segments>(p, [=](const auto& kernel) { kernel.segment_gradients(begin, end); });
}

}  // namespace FASTOPT_LEVEL
}  // namespace fastopt
