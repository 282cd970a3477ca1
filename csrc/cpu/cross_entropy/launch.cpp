// Softmax cross-entropy on CPU, the back end of host/cross_entropy.h: what the kernels are told,
// the plan (which of them, how the work is cut), and the registration of the ops whose schemas
// stand in fastopt/ops.py.
#include <sys/mman.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "host/cross_entropy.h"
#include "params.h"
#include "rules/target.h"

namespace fastopt {
namespace {

// ---- the plan's constants, measured on 2 cores of an EPYC (AVX-512, 1 MB L2) ----

// Up to this many classes, contiguous rows go through tiles: a row is too short to fill vectors.
constexpr int64_t kFewClasses = 64;
// A tile's logits; bounded by L2, and by the promise of no more than 1 MB beyond the gradient.
constexpr int64_t kTileBytes = 192 << 10;
constexpr int64_t kTransposedTileBytes = 16 << 10;
constexpr int64_t kTileRows = 1024;
constexpr int64_t kMinTileRows = 64;
// Rows up to this long keep their exponentials in scratch (256 KB of float32 a thread).
constexpr int64_t kCachedClasses = 1 << 16;
// Logits of one task: enough to bury its start, little enough to balance the cores.
constexpr int64_t kTaskLogits = 1 << 15;
// Below this many logits a second thread costs more than it takes over.
constexpr int64_t kSerialLogits = 1 << 13;
// Rows at least this long are cut into segments where there are too few of them for all threads.
constexpr int64_t kSegmentClasses = 1 << 13;
// Fresh gradients from this size on come straight from mmap (glibc's largest threshold): their
// page faults cost more than the arithmetic unless the kernel may hand out huge pages.
constexpr int64_t kHugePageBytes = 32 << 20;

// ---- tensors ----

int64_t bytes_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return t.numel() * (type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2);
}

void advise_huge_pages(const Tensor& grad) {
  const int64_t bytes = bytes_of(grad);
#ifdef MADV_HUGEPAGE
  if (bytes >= kHugePageBytes) {
    // Only whole huge pages inside the buffer: its neighbours in memory keep their pages.
    constexpr uintptr_t kPage = 2 << 20;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(grad.mutable_data_ptr());
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
    const uintptr_t last = (begin + bytes) / kPage * kPage;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
}

// body(begin, end) over tasks on torch's own threads; in place where one thread does them all.
template <class F>
void parallel(int64_t tasks, int64_t grain, const F& body) {
  if (tasks <= grain) {
    body(0, tasks);
  } else {
    torch::stable::parallel_for(0, tasks, grain, body);
  }
}

double scalar_value(const Tensor& t) {
  const Tensor value = torch::stable::to(t, ScalarType::Double);
  return *static_cast<const double*>(value.const_data_ptr());
}

// ---- an upstream gradient that is no number ----

// Some factor is inf or NaN. One for all rows, or one for each.
template <class T>
void scale_by_no_number(const CrossEntropyProblem& p, const void* factors, bool one,
                        bool smoothed) {
  using A = Acc<T>;
  const int64_t rows = p.batch * p.positions;
  parallel(rows, std::max<int64_t>(1, kTaskLogits / p.classes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T* const row = static_cast<T*>(p.grad) + row_offset(p.grad_strides, r, p.positions);
      const A factor = static_cast<const A*>(factors)[one ? 0 : r];
      const bool ignored = p.labels != nullptr && p.labels[r] == p.ignore_index;
      const bool all = p.labels == nullptr || smoothed;
      for (int64_t c = 0; c < p.classes; ++c) {
        T& grad = row[c * p.grad_strides.cls];
        grad = from_acc<T>(times_upstream(to_acc(grad), factor, ignored, all || p.labels[r] == c));
      }
    }
  });
}

template <class A>
bool all_finite(const Tensor& factors) {
  const A* const values = static_cast<const A*>(factors.const_data_ptr());
  return std::all_of(values, values + factors.numel(), [](A x) { return std::isfinite(x); });
}

// ---- one call ----

struct Call : CrossEntropyCall<CrossEntropyParams> {
  double total_weight = 0;  // the divisor of the mean
  std::optional<Tensor> masses;

  Call(const Tensor& logits_in, const Tensor& target_in, const CrossEntropyOptions& options)
      : CrossEntropyCall(logits_in, target_in, options) {
    if (weight) {
      if (accumulate == ScalarType::Double) {
        set_masses<double>();
      } else {
        set_masses<float>();
      }
    }
    if (p.labels != nullptr) {
      count_labels();
    } else {
      total_weight = static_cast<double>(rows);
    }
  }

  // Own and even masses of every class (rules/target.h), for all rows.
  template <class A>
  void set_masses() {
    const A* const w = static_cast<const A*>(weight->const_data_ptr());
    masses = empty_strided({2, p.classes}, {p.classes, 1}, accumulate, place);
    A* const own = static_cast<A*>(masses->mutable_data_ptr());
    A* const even = own + p.classes;
    // Not 0 * inf; but that is what torch makes of labels' own masses.
    const bool has_own = p.keep != 0 || p.labels != nullptr, has_even = p.uniform > 0;
    // Compensated: added up one by one, a thousand float64 weights would lose three digits.
    double sum = 0, lost = 0;
    for (int64_t c = 0; c < p.classes; ++c) {
      own[c] = has_own ? product(static_cast<A>(p.keep), w[c]) : A(0);
      even[c] = has_even ? product(static_cast<A>(p.uniform), w[c]) : A(0);
      const double mass = static_cast<double>(even[c]), next = sum + mass;
      lost += std::fabs(sum) >= std::fabs(mass) ? (sum - next) + mass : (mass - next) + sum;
      sum = next;
    }
    p.constants.smoothing_mass = std::isfinite(sum) ? sum + lost : sum;
    p.true_masses = own;
    p.smoothing_masses = even;
  }

  void count_labels() {
    if (rows == 0) return;
    constexpr int64_t kLabelsPerTask = 1 << 15;
    const int64_t tasks = (rows + kLabelsPerTask - 1) / kLabelsPerTask;
    std::vector<LabelCount> counts(tasks);
    parallel(tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * kLabelsPerTask;
        counts[task] =
            FASTOPT_DISPATCH(cross_entropy_count_labels, p.labels + first,
                             std::min(kLabelsPerTask, rows - first), p.classes, p.ignore_index);
      }
    });
    int64_t valid = 0, out_of_range = 0;
    for (const LabelCount& count : counts) {
      valid += count.valid;
      out_of_range += count.out_of_range;
    }
    if (out_of_range > 0) refuse_labels();
    total_weight = static_cast<double>(valid);
    if (weight && reduction == kMean) {
      total_weight = p.logits_type == Element::float64 ? weight_of_labels<double>()
                                                       : weight_of_labels<float>();
    }
  }

  [[noreturn]] void refuse_labels() const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t y = p.labels[r];
      if (y != p.ignore_index && !in_range(y, p.classes))
        throw std::out_of_range("Target " + std::to_string(y) + " is out of bounds.");
    }
    throw std::out_of_range("Target is out of bounds.");
  }

  template <class A>
  double weight_of_labels() const {
    const A* const w = static_cast<const A*>(weight->const_data_ptr());
    double sum = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t y = p.labels[r];
      if (counts(y, p.ignore_index, p.classes)) sum += static_cast<double>(w[y]);
    }
    return sum;
  }

  // Which kernel, how cut, and the run. Returns the sum of the row losses.
  double run() {
    if (rows == 0 || p.classes == 0) return 0;
    merge_positions();
    const int64_t threads = torch::stable::get_num_threads();
    if (!contiguous_classes() || p.classes <= kFewClasses) return run_tiles();
    if (rows < 4 * threads && threads > 1 && p.classes >= 2 * kSegmentClasses) {
      return run_segments(threads);
    }
    return run_rows();
  }

  int64_t serial_tasks(int64_t logits_per_task) const {
    return std::max<int64_t>(1, kSerialLogits / std::max<int64_t>(1, logits_per_task));
  }

  // body(begin, end, scratch) over tasks, with scratch_bytes of aligned memory for each thread.
  template <class F>
  static void parallel_with_scratch(int64_t tasks, int64_t grain, int64_t scratch_bytes,
                                    const F& body) {
    parallel(tasks, grain, [&](int64_t begin, int64_t end) {
      constexpr size_t kAlign = 64;
      size_t space = static_cast<size_t>(scratch_bytes) + kAlign;
      const std::unique_ptr<char[]> memory(new char[space]);
      void* scratch = memory.get();
      std::align(kAlign, static_cast<size_t>(scratch_bytes), scratch, space);
      body(begin, end, scratch);
    });
  }

  double run_rows() {
    p.rows_per_task = std::max<int64_t>(1, kTaskLogits / p.classes);
    p.caches_exps = p.classes <= kCachedClasses;
    const int64_t tasks = (rows + p.rows_per_task - 1) / p.rows_per_task;
    std::vector<double> partial(tasks);
    p.partial_loss = partial.data();
    // One base per chunk of at least 1 KB, and the exponentials themselves.
    const int64_t size = p.logits_type == Element::float64 ? 8 : 4;
    const int64_t bases = p.classes / 256 + 1;
    const int64_t scratch_bytes =
        p.grad == nullptr ? 0 : size * (bases + (p.caches_exps ? p.classes : 0));
    parallel_with_scratch(tasks, serial_tasks(p.rows_per_task * p.classes), scratch_bytes,
                          [&](int64_t begin, int64_t end, void* scratch) {
                            FASTOPT_DISPATCH(cross_entropy_rows, p, begin, end, scratch);
                          });
    return sum_of(partial);
  }

  double run_segments(int64_t threads) {
    p.segments = std::min((4 * threads + rows - 1) / rows, p.classes / kSegmentClasses);
    const int64_t tasks = rows * p.segments;
    std::vector<double> partial(rows);
    std::vector<RowStats<double>> stats(tasks);
    std::vector<RowEnd<double>> ends(rows);
    p.partial_loss = partial.data();
    p.segment_stats = stats.data();
    p.row_ends = ends.data();
    parallel(tasks, 1, [&](int64_t begin, int64_t end) {
      FASTOPT_DISPATCH(cross_entropy_segment_stats, p, begin, end);
    });
    FASTOPT_DISPATCH(cross_entropy_merge_segments, p);
    if (p.grad != nullptr) {
      parallel(tasks, 1, [&](int64_t begin, int64_t end) {
        FASTOPT_DISPATCH(cross_entropy_segment_gradients, p, begin, end);
      });
    }
    return sum_of(partial);
  }

  double run_tiles() {
    const int64_t size = p.logits_type == Element::float64 ? 8 : 4;
    // Wide tiles make long runs of memory; many classes narrow them, then cut the classes.
    // Transposed tiles are touched in single elements and have to stay in L1.
    const int64_t bytes = p.logits_strides.cls == 1 ? kTransposedTileBytes : kTileBytes;
    const int64_t wide = bytes / size / p.classes / kMinTileRows * kMinTileRows;
    p.tile_rows = std::min(std::max(wide, kMinTileRows), kTileRows);
    const int64_t used = (std::max(p.positions, rows) + kMinTileRows - 1) / kMinTileRows;
    p.tile_rows = std::min(p.tile_rows, used * kMinTileRows);
    p.tile_classes = std::min(p.classes, kTileBytes / size / p.tile_rows);
    const int64_t tasks = p.positions >= p.tile_rows
                              ? p.batch * ((p.positions + p.tile_rows - 1) / p.tile_rows)
                              : (rows + p.tile_rows - 1) / p.tile_rows;
    const int64_t row_arrays = 10 * size + static_cast<int64_t>(sizeof(int64_t));
    const int64_t blocks = p.probabilities != nullptr ? 2 : 1;
    constexpr int64_t kVectorBytes = 64;  // between the classes of a block
    const int64_t scratch_bytes =
        p.tile_rows * row_arrays + blocks * p.tile_classes * (p.tile_rows * size + kVectorBytes);
    std::vector<double> partial(tasks);
    p.partial_loss = partial.data();
    parallel_with_scratch(tasks, serial_tasks(p.tile_rows * p.classes), scratch_bytes,
                          [&](int64_t begin, int64_t end, void* scratch) {
                            FASTOPT_DISPATCH(cross_entropy_tiles, p, begin, end, scratch);
                          });
    return sum_of(partial);
  }

  // In the order of the tasks, whatever thread ran them: the same bits every time.
  static double sum_of(const std::vector<double>& partial) {
    double sum = 0;
    for (const double part : partial) sum += part;
    return sum;
  }

  Tensor empty_gradient() const {
    const Tensor grad = CrossEntropyCall::empty_gradient();
    advise_huge_pages(grad);
    return grad;
  }

  Tensor unit(const std::optional<Tensor>& largest_mass) {
    // With every row ignored the loss is NaN and the gradient 0, as in torch.
    double unit = reduced(1.0);
    p.constants.upstream = unit;
    if (p.logits_type == Element::float16 && std::isfinite(unit)) {
      const double largest = largest_mass ? scalar_value(*largest_mass) : 1.0;
      p.constants.upstream = half_gradient_scale(static_cast<float>(largest));
      unit /= p.constants.upstream;
    } else {
      unit = 1.0;
    }
    return scalar(unit, ScalarType::Float);
  }

  // Runs; the loss as torch would return it.
  Tensor loss(ScalarType type) {
    element_of(type);
    if (reduction != kNone) return scalar(reduced(run()), type);
    Tensor of_rows = empty_rows();
    p.row_loss = of_rows.mutable_data_ptr();
    run();
    return torch::stable::to(of_rows, type);
  }

  double reduced(double value) const {
    return reduction == kMean ? mean_of(value, total_weight, p.uniform > 0) : value;
  }

  // Written by hand: at a hundred logits a call of aten::to is a tenth of everything.
  static Tensor scalar(double value, ScalarType type) {
    Tensor result = empty_strided({}, {}, type, {aoti_torch_device_type_cpu(), 0});
    void* const at = result.mutable_data_ptr();
    switch (type) {
      case ScalarType::Double:
        *static_cast<double*>(at) = value;
        break;
      case ScalarType::BFloat16:
        *static_cast<c10::BFloat16*>(at) = c10::BFloat16(static_cast<float>(value));
        break;
      case ScalarType::Half:
        *static_cast<c10::Half*>(at) = c10::Half(static_cast<float>(value));
        break;
      default:
        *static_cast<float*>(at) = static_cast<float>(value);
    }
    return result;
  }

  static void scale(const CrossEntropyCall<CrossEntropyProblem>& call, const Tensor& factor,
                    bool smoothed) {
    const CrossEntropyProblem& p = call.p;
    const Tensor factors = as_contiguous(torch::stable::to(factor, call.accumulate));
    const void* const values = factors.const_data_ptr();
    const bool one = factors.numel() == 1;
    const bool finite = call.accumulate == ScalarType::Double ? all_finite<double>(factors)
                                                              : all_finite<float>(factors);
    if (!finite) {
      return with_element(p.logits_type, [&](auto element) {
        scale_by_no_number<typename decltype(element)::type>(p, values, one, smoothed);
      });
    }
    const CrossEntropyScale scale{p.logits_type, p.grad,      p.grad_strides, p.batch,
                                  p.classes,     p.positions, values,         one};
    const bool by_rows = p.grad_strides.cls == 1;
    const int64_t count = call.rows * p.classes;
    const int64_t tasks = one ? count : by_rows ? call.rows : p.batch * p.classes;
    const int64_t each = one ? 1 : by_rows ? p.classes : p.positions;
    parallel(tasks, std::max<int64_t>(1, kTaskLogits / each), [&](int64_t begin, int64_t end) {
      FASTOPT_DISPATCH(cross_entropy_scale, scale, begin, end);
    });
  }
};

STABLE_TORCH_LIBRARY_IMPL(fastopt, CPU, library) { register_cross_entropy<Call>(library); }

}  // namespace
}  // namespace fastopt
