// The seam between torch and the CPU kernels of cross-entropy: plain structs, no torch type. Three
// ways through the same formula (csrc/rules/softmax.h), chosen by launch.cpp from the layout:
//
//   rows      classes contiguous; row.h has the sums and the gradient of a row
//   segments  the same for a few very long rows, which all cores share
//   tiles     classes strided, or few
#pragma once

#include "cpu/levels.h"
#include "rules/cross_entropy.h"

namespace fastopt {

struct CrossEntropyParams : CrossEntropyProblem {
  const void* true_masses;       // (classes), (1 - e) w_c in the accumulation type; null: no weight
  const void* smoothing_masses;  // (classes), (e / C) w_c
  double* partial_loss;          // one per task: the sum of its rows' losses, in float64

  // How rows are cut into tasks (launch.cpp).
  int64_t rows_per_task;            // rows
  bool caches_exps;                 // rows: the scratch has room for a row's exponentials
  int64_t segments;                 // segments: every row is cut into this many parts
  RowStats<double>* segment_stats;  // segments: one per task
  RowEnd<double>* row_ends;         // segments: one per row
  int64_t tile_classes, tile_rows;  // tiles: classes and rows of a block
};

// A saved gradient times its upstream gradient, in place.
struct CrossEntropyScale {
  Element type;
  void* grad;
  Strides strides;
  int64_t batch, classes, positions;
  const void* factors;  // accumulation type: one, or one per row
  bool one;
};

struct LabelCount {
  int64_t valid;         // labels that are not ignored
  int64_t out_of_range;  // of these, the ones outside [0, classes)
};

// The kernels of one SIMD level. [begin, end) are tasks; scratch is private to the caller.
#define FASTOPT_DECLARE_CROSS_ENTROPY(level)                                                      \
  namespace level {                                                                               \
  LabelCount cross_entropy_count_labels(const int64_t* labels, int64_t count, int64_t classes,    \
                                        int64_t ignore_index);                                    \
  void cross_entropy_rows(const CrossEntropyParams&, int64_t begin, int64_t end, void* scratch);  \
  void cross_entropy_tiles(const CrossEntropyParams&, int64_t begin, int64_t end, void* scratch); \
  void cross_entropy_segment_stats(const CrossEntropyParams&, int64_t begin, int64_t end);        \
  void cross_entropy_merge_segments(const CrossEntropyParams&);                                   \
  void cross_entropy_segment_gradients(const CrossEntropyParams&, int64_t begin, int64_t end);    \
  void cross_entropy_scale(const CrossEntropyScale&, int64_t begin, int64_t end);                 \
  }
FASTOPT_FOR_EACH_LEVEL(FASTOPT_DECLARE_CROSS_ENTROPY)
#undef FASTOPT_DECLARE_CROSS_ENTROPY

}  // namespace fastopt
