// Softmax cross-entropy on GPU: loss and gradient. The formula is in csrc/rules/softmax.h. Three
// ways through it, chosen by cross_entropy_plan.h:
//
//   packed   few classes: a thread a row. A tile of rows passes through shared memory, there and
//            back, so that memory is touched in whole words where rows lie side by side.
//   rows     classes contiguous: lanes of a warp, a block or a cluster of them per row. Where the
//            gradient follows the loss, the row waits for it in shared memory: one read and one
//            write per logit. A row too long for that is read a second time.
//   strided  classes apart in memory: lanes run over rows and loop over classes, twice where the
//            gradient follows; few rows are side by side, so the second read comes from cache.
//
// Before them `sums` adds up what the mean divides by, after them `finish` the losses: partial sums
// in float64, each in an order that depends on nothing but shapes and device. Accumulation in
// float32 (float64 for float64), one rounding at the store. Ignored rows count for nothing,
// whatever they hold, and get gradient 0. A label out of range touches no memory: its loss and
// gradient are NaN.
#pragma once

#include <type_traits>

#include "cross_entropy_plan.h"
#include "primitives.h"
#include "rules/cross_entropy.h"
#include "rules/softmax.h"

namespace fastopt::gpu {

struct CrossEntropyParams : CrossEntropyProblem {
  const void* weight;  // (classes), accumulation type, or null

  // The mean divides by the sum of weight_parts; where targets are probabilities, by the rows.
  bool mean;
  double* weight_parts;  // (weight_part_count) of labels that count, or null
  int weight_part_count;
  // sum_c (e / C) w_c: the sum of smoothing_parts, or known to the host.
  double* smoothing_parts;  // (smoothing_part_count) or null
  double known_smoothing;   // e
  int smoothing_part_count;

  // The gradient in multiples of a unit that is written to `unit` (half_gradient_scale).
  bool in_units;
  const float* largest_mass;  // 0-dim, or null: 1
  float* unit;                // 0-dim, or null

  double* loss_parts;  // (blocks) the sum of a block's row losses, or null
  int64_t loss_part_count;
  void* loss;  // 0-dim, loss_type, or null
  Element loss_type;

  // From the plan.
  int lanes, cluster;
  int64_t slice;
};

// ---- small pieces ----

FASTOPT_DEVICE float larger(float a, float b) {  // b where a is NaN: a maximum never becomes NaN
#if defined(__CUDA_ARCH__)
  return ::fmaxf(a, b);
#else
  return a > b ? a : b;
#endif
}
FASTOPT_DEVICE double larger(double a, double b) {
#if defined(__CUDA_ARCH__)
  return ::fmax(a, b);
#else
  return a > b ? a : b;
#endif
}

// exp(d) for d <= 0, as exact as results of type T can show.
template <class T>
FASTOPT_DEVICE Acc<T> exp_for(Acc<T> d) {
  if constexpr (sizeof(T) == 2) {
    return exp_approximate(d);
  } else {
    return scalar_exp(d);
  }
}

template <class A>
FASTOPT_DEVICE A not_a_number() {
  return static_cast<A>(__builtin_nanf(""));
}

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
FASTOPT_DEVICE void store_scalar(void* p, Element type, double value) {
  switch (type) {
    case Element::float32:
      *static_cast<float*>(p) = static_cast<float>(value);
      return;
    case Element::float64:
      *static_cast<double*>(p) = value;
      return;
    case Element::bfloat16:
      *static_cast<BFloat16*>(p) = from_acc<BFloat16>(static_cast<float>(value));
      return;
    case Element::float16:
      *static_cast<Half*>(p) = from_acc<Half>(static_cast<float>(value));
  }
}

// Sums and maxima over `lanes` that lie side by side in a warp (a power of two; all of it where
// more share a row): the same in each of them. Every lane of the warp takes part.
template <class V>
FASTOPT_DEVICE V sum_of_lanes(V value, int lanes = kWarpSize) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2)
    if (mask < lanes) value += shuffle_xor(value, mask);
  return value;
}
template <class A>
FASTOPT_DEVICE A max_of_lanes(A value, int lanes = kWarpSize) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2)
    if (mask < lanes) value = larger(shuffle_xor(value, mask), value);
  return value;
}
template <bool kMass, class A>
FASTOPT_DEVICE RowStats<A> merge_lanes(RowStats<A> stats, int lanes = kWarpSize) {
  stats = rebase(stats, max_of_lanes(stats.max, lanes));
  stats.sum = sum_of_lanes(stats.sum, lanes);
  if constexpr (kMass) {
    stats.dot = sum_of_lanes(stats.dot, lanes);
    stats.mass = sum_of_lanes(stats.mass, lanes);
  }
  return stats;
}

// The sum over a block of at most 32 warps, for its first thread. `scratch`: one per warp.
FASTOPT_DEVICE double sum_of_block(double value, double* scratch) {
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  value = sum_of_lanes(value);
  if (lane == 0) scratch[warp] = value;
  sync_block();
  if (thread_index() == 0)
    for (int i = 1; i < block_size() / kWarpSize; ++i) value += scratch[i];
  return value;
}

// By all lanes of a warp: partial sums of an earlier kernel, in the same order everywhere.
FASTOPT_DEVICE double sum_of_parts(const double* parts, int64_t count) {
  double sum = 0;
  for (int64_t i = thread_index() % kWarpSize; i < count; i += kWarpSize) sum += parts[i];
  return sum_of_lanes(sum);
}

// The elements of a word.
template <class U>
FASTOPT_DEVICE void unpack(const Words& words, Acc<U>* out) {
  constexpr int kPer = sizeof(Words) / sizeof(U);
  if constexpr (std::is_same_v<U, BFloat16>) {  // one instruction each
    for (int k = 0; k < kPer; ++k) {
      const uint32_t pair = words.word[k / 2];
      out[k] = bit_cast<float>(k % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
    }
  } else {
    U some[kPer];
    memcpy(some, &words, sizeof(words));
    for (int k = 0; k < kPer; ++k) out[k] = to_acc(some[k]);
  }
}

// n elements from p: whole 16-byte words where p is `aligned` to them.
enum class Cache { keep, stream };  // whether they will be read again soon
template <int n, Cache kCache, class U>
FASTOPT_DEVICE void load_some(const U* p, bool aligned, Acc<U>* out) {
  if constexpr (n * sizeof(U) % sizeof(Words) == 0) {
    if (aligned) {
      constexpr int kPer = sizeof(Words) / sizeof(U);
      for (int i = 0; i < n; i += kPer)
        unpack<U>(kCache == Cache::keep ? load_words(p + i) : load_words_streaming(p + i), out + i);
      return;
    }
  }
  for (int i = 0; i < n; ++i) out[i] = to_acc(p[i]);
}
template <class U>
FASTOPT_DEVICE Words pack(const Acc<U>* values) {
  constexpr int kPer = sizeof(Words) / sizeof(U);
  U some[kPer];
  for (int k = 0; k < kPer; ++k) some[k] = from_acc<U>(values[k]);
  Words words;
  memcpy(&words, some, sizeof(words));
  return words;
}
template <int n, Cache kCache, class U>
FASTOPT_DEVICE void store_some(U* p, bool aligned, const Acc<U>* values) {
  if constexpr (n * sizeof(U) % sizeof(Words) == 0) {
    if (aligned) {
      constexpr int kPer = sizeof(Words) / sizeof(U);
      for (int i = 0; i < n; i += kPer) {
        const Words words = pack<U>(values + i);
        kCache == Cache::keep ? store_words(p + i, words) : store_words_streaming(p + i, words);
      }
      return;
    }
  }
  for (int i = 0; i < n; ++i) p[i] = from_acc<U>(values[i]);
}

FASTOPT_DEVICE bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Words) == 0;
}
// Elements between the last whole word's end and p.
template <class U>
FASTOPT_DEVICE int lead_of(const U* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % sizeof(Words) / sizeof(U));
}
// Elements before the first whole word.
template <class U, class I>
FASTOPT_DEVICE I head_of(const U* p, I count) {
  const int bytes = static_cast<int>(-reinterpret_cast<intptr_t>(p) & (sizeof(Words) - 1));
  const I head = bytes / static_cast<int>(sizeof(U));
  return head < count ? head : count;
}

template <int kVectors, int kSize>
struct Shape {  // kVectors vectors of kSize elements each
  static constexpr int vectors = kVectors, size = kSize, count = kVectors * kSize;
};

// visit(Shape, first, step) for all of [0, count): this lane's share of vectors of kSize elements
// that start behind `head`, up to kVectors of them at a time and `step` apart, then single elements
// at both ends: whoever waits for those has all vectors under way.
template <int kSize, int kVectors, class I, class F>
FASTOPT_DEVICE void for_my_elements(I count, I head, I lane, I lanes, const F& visit) {
  const I step = lanes * kSize;
  const I end = head + (count - head) / kSize * kSize;
  I c = head + lane * kSize;
  if constexpr (kVectors > 1) {
    for (; c + (kVectors - 1) * step < end; c += kVectors * step)
      visit(Shape<kVectors, kSize>{}, c, step);
  }
  for (; c < end; c += step) visit(Shape<1, kSize>{}, c, step);
  if (lane < head) visit(Shape<1, 1>{}, lane, I{0});
  if (kSize > 1 && end + lane < count) visit(Shape<1, 1>{}, end + lane, I{0});
}

// At the start of a block's shared memory.
template <class A>
struct BlockShared {
  RowStats<A> of_warp[2][kMaxWarps];  // two rows' worth: one barrier a row is enough
  double losses[kMaxWarps];
  A upstream;
  A smoothing_mass;
};

struct ClassIndex {};  // stands for the storage type of the target where it holds labels
template <class TT>
constexpr bool kIsClassIndex = false;
template <>
constexpr bool kIsClassIndex<ClassIndex> = true;

// ---- one combination of logits type T, target type TT and options ----
// kMass: every class carries target mass q_c (probabilities, or label smoothing).
template <class T, class TT, bool kMass>
struct CrossEntropy {
  using A = Acc<T>;
  using Stats = RowStats<A>;
  static constexpr bool kLabels = kIsClassIndex<TT>;
  static constexpr int kSize = static_cast<int>(sizeof(Words) / sizeof(T));
  // Vectors of a lane that become accumulators together: 16 registers, half of that where each has
  // its mass beside it. More would not fit in the 64 registers that let 1024 threads share an SM.
  static constexpr int kTogether = (kMass ? 32 : 64) / static_cast<int>(kSize * sizeof(A));
  // Vectors of a lane under way at once, as they lie in memory: with four, 64 KB of an SM's
  // threads, where bandwidth times latency is some 40 KB on an H200. (With masses even two would
  // spill.)
  static constexpr int kVectors = kMass ? kTogether : 4;

  const CrossEntropyParams& p;
  const A* const weight = static_cast<const A*>(p.weight);
  BlockShared<A>& shared = *reinterpret_cast<BlockShared<A>*>(shared_memory());
  double loss_sum = 0;  // of the rows whose loss this thread wrote
  int turn = 0;         // which half of shared.of_warp comes next

  static_assert(sizeof(BlockShared<A>) <= block_shared_bytes(sizeof(A)), "the plan reserves it");

  FASTOPT_MEMBER explicit CrossEntropy(const CrossEntropyParams& params) : p(params) {}

  FASTOPT_MEMBER int64_t rows() const { return p.batch * p.positions; }

  FASTOPT_MEMBER int64_t offset(const Strides& strides, int64_t row) const {
    if (p.positions == 1) return row * strides.batch;
    return row / p.positions * strides.batch + row % p.positions * strides.position;
  }

  // What all rows share: the reduction's factor, and the mass that label smoothing gives a row. One
  // warp adds up the partial sums for the block.
  FASTOPT_MEMBER void begin_block() {
    if (thread_index() < kWarpSize) {
      double smoothing = p.known_smoothing;
      if (p.smoothing_parts != nullptr)
        smoothing = sum_of_parts(p.smoothing_parts, p.smoothing_part_count);
      double upstream = 1.0;
      if (p.mean && p.grad != nullptr) upstream = mean_of(p, upstream, total_weight(p));
      if (waits(p, upstream)) upstream = static_cast<double>(scale_of(p));
      if (thread_index() == 0) {
        shared.upstream = static_cast<A>(upstream);
        shared.smoothing_mass = static_cast<A>(smoothing);
      }
    }
    sync_block();
  }

  // Whether the gradient is held in units; not where the mean's divisor already makes it inf or
  // NaN.
  FASTOPT_MEMBER static bool waits(const CrossEntropyParams& p, double upstream) {
    return p.in_units && upstream - upstream == 0;
  }
  FASTOPT_MEMBER static float scale_of(const CrossEntropyParams& p) {
    return half_gradient_scale(p.largest_mass != nullptr ? *p.largest_mass : 1.0f);
  }

  FASTOPT_MEMBER static double total_weight(const CrossEntropyParams& p) {
    if (p.weight_parts != nullptr) return sum_of_parts(p.weight_parts, p.weight_part_count);
    return static_cast<double>(p.batch * p.positions);
  }

  // Weights that add up to 0 divide by 0 as in torch, part by part: next to label smoothing's part
  // the true classes' 0 / 0 makes everything NaN.
  FASTOPT_MEMBER static double mean_of(const CrossEntropyParams& p, double value, double total) {
    return total == 0 && p.uniform > 0 ? not_a_number<double>() : value / total;
  }

  FASTOPT_MEMBER void end_block() {
    const double sum = sum_of_block(loss_sum, shared.losses);
    if (p.loss_parts != nullptr && thread_index() == 0) p.loss_parts[block_index()] = sum;
  }

  struct Row {
    int y = -1;            // the label, where it counts and is in range
    T true_logit{};        // x_y, converted by whoever needs it: nobody waits for it before
    bool ignored = false;  // counts for nothing
    bool invalid = false;  // becomes NaN: its label is out of range
  };
  FASTOPT_MEMBER int64_t label_at(int64_t r) const {
    if constexpr (kLabels) return r < rows() ? p.labels[r] : 0;
    return 0;
  }
  FASTOPT_MEMBER Row row_of(int64_t label) const {
    Row row;
    if constexpr (kLabels) {
      row.ignored = label == p.ignore_index;
      const bool inside = 0 <= label && label < p.classes;
      row.invalid = !row.ignored && !inside;
      if (!row.ignored && inside) row.y = static_cast<int>(label);
    }
    return row;
  }
  FASTOPT_MEMBER void load_true_logit(Row& row, const T* logits) const {
    if (row.y >= 0) row.true_logit = logits[row.y * p.logits_strides.cls];
  }

  // The true class's own mass (1 - e) w_y, and its q_y, which adds its share of the smoothing.
  FASTOPT_MEMBER A true_mass(int y) const {
    const A keep = static_cast<A>(p.keep);
    return weight != nullptr && y >= 0 ? product(keep, weight[y]) : keep;
  }
  FASTOPT_MEMBER A total_mass(int y) const {
    if constexpr (!kMass) return true_mass(y);
    const A uniform = static_cast<A>(p.uniform);
    return true_mass(y) + (weight != nullptr ? product(uniform, weight[y]) : uniform);
  }

  // q of n classes, from t[t_at] (probabilities) and w[w_at] (class weights, or null) on. Products
  // are rounded: q_c is the same number wherever it is met, and with one class a p - q is 0.
  template <int n, Cache kCache>
  FASTOPT_MEMBER void masses(const TT* t, int64_t t_at, bool t_aligned, const A* w, int64_t w_at,
                             bool w_aligned, A* q) const {
    const A keep = static_cast<A>(p.keep), uniform = static_cast<A>(p.uniform);
    if constexpr (kLabels) {
      for (int i = 0; i < n; ++i) q[i] = uniform;
    } else {
      load_some<n, kCache>(t + t_at, t_aligned, q);
      for (int i = 0; i < n; ++i) q[i] = keep * q[i] + uniform;
    }
    if (w != nullptr) {
      A factor[n];
      load_some<n, Cache::keep>(w + w_at, w_aligned, factor);
      for (int i = 0; i < n; ++i) q[i] = product(q[i], factor[i]);
    }
  }

  // The same for class c alone; t: its probability, if it has one.
  FASTOPT_MEMBER A mass_of_class(A t, int c) const {
    const A keep = static_cast<A>(p.keep), uniform = static_cast<A>(p.uniform);
    const A q = kLabels ? uniform : keep * t + uniform;
    return weight != nullptr ? product(q, weight[c]) : q;
  }

  // Takes n more logits (overwritten) and their masses into account.
  template <int n>
  FASTOPT_MEMBER static void add(Stats& stats, A* x, const A* q) {
    A max = stats.max;
    for (int i = 0; i < n; ++i) max = larger(x[i], max);
    stats = rebase(stats, max);
    add_below_max<n>(stats, x, q);
  }
  // The same where stats.max is at least as large as any of them.
  template <int n>
  FASTOPT_MEMBER static void add_below_max(Stats& stats, A* x, const A* q) {
    const A base = stats_base(stats.max);
    A dot = 0, mass = 0;
    for (int i = 0; i < n; ++i) {
      const A d = x[i] - base;
      x[i] = exp_for<T>(d);
      if constexpr (kMass) {
        dot += d == A(0) ? A(0) : q[i] * d;  // not inf * 0
        mass += q[i];
      }
    }
    // Small terms meet one another before they meet a sum that has outgrown their last digits.
    for (int width = n / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) x[i] += x[i + width];
    stats.sum += x[0];
    stats.dot += dot;
    stats.mass += mass;
  }

  // From a row's merged statistics to those that its loss and gradient follow from.
  FASTOPT_MEMBER Stats complete(Stats stats, const Row& row) const {
    if (row.ignored) return {0, 1, 0, 0};
    stats = fastopt::finish(stats);
    if constexpr (kLabels) {
      stats.mass = shared.smoothing_mass;  // the sweep's own sum has rounding errors
      stats = add_true_class(stats, to_acc(row.true_logit), true_mass(row.y));
    }
    if (row.invalid) stats.sum = not_a_number<A>();
    return stats;
  }

  // By one thread of those that share the row.
  FASTOPT_MEMBER void write_results(int64_t r, const Row& row, const Stats& stats) {
    const A loss = row.ignored ? A(0) : fastopt::row_loss(stats);
    if (p.row_loss != nullptr) static_cast<A*>(p.row_loss)[r] = loss;
    loss_sum += static_cast<double>(loss);
  }

  // Everything that a row's gradient needs. The difference a p - q is taken before the products
  // with `up` and before rounding: softmax rounded to half precision first would leave nothing of
  // p_y - 1 on a confident row.
  struct Gradient {
    A up, max;
    A factor;   // a / sum
    A of_true;  // the true class's
  };
  FASTOPT_MEMBER Gradient gradient_of(const Row& row, const Stats& stats) const {
    Gradient g{row.ignored ? A(0) : shared.upstream, stats.max, softmax_factor(stats), 0};
    if (kLabels && row.y >= 0) {
      // up (a p_y - q_y); NaN for an infinite up, where torch has inf - inf.
      const A softmax_mass = g.factor * exp_for<T>(to_acc(row.true_logit) - g.max);
      g.of_true = g.up * (softmax_mass - total_mass(row.y)) + (g.up - g.up);
    }
    return g;
  }
  // up (a p_c - q_c) for a class that is not the true one; q: its mass, where kMass.
  FASTOPT_MEMBER static A logit_gradient(const Gradient& g, A x, A q) {
    if constexpr (kMass) return g.up * (g.factor * exp_for<T>(x - g.max) - q);
    return g.up * g.factor * exp_for<T>(x - g.max);
  }
  FASTOPT_MEMBER static A any_gradient(const Gradient& g, const Row& row, A x, A q, int c) {
    const A other = logit_gradient(g, x, q);  // by a select: threads that branch take turns
    return kLabels && c == row.y ? g.of_true : other;
  }

  // ---- packed: a thread a row, p.slice rows a tile ----

  // A tile's rows of one tensor in shared memory, `pitch` elements apart: so far that the threads'
  // words lie in different banks where rows are whole words, else as in memory.
  template <class U>
  struct Tile {
    U* rows;
    int pitch;
    bool words;  // rows are whole words, and begin with one
  };
  template <class U>
  FASTOPT_MEMBER Tile<U> tile_of(char* memory, const U* first_row) const {
    constexpr int kPer = static_cast<int>(sizeof(Words) / sizeof(U));
    const int classes = static_cast<int>(p.classes);
    const bool words = classes % kPer == 0;
    return {reinterpret_cast<U*>(memory) + (words ? 0 : lead_of(first_row)),
            words ? packed_pitch(classes, kPer) : classes, words};
  }

  // visit(row of the tile, class) for this thread's share of its rows, n classes at a time.
  template <int n, class F>
  FASTOPT_MEMBER void for_my_pieces(int rows, const F& visit) const {
    const int pieces = static_cast<int>(p.classes) / n;
    if (pieces == 0) return;  // no classes
    const int row_step = block_size() / pieces, piece_step = block_size() % pieces;
    int row = thread_index() / pieces, piece = thread_index() % pieces;
    while (row < rows) {
      visit(row, piece * n);
      row += row_step;
      piece += piece_step;
      if (piece >= pieces) {
        piece -= pieces;
        ++row;
      }
    }
  }

  // Moves a tile: copy(n, in the tile, in memory) for n elements at a time, whole words where both
  // sides have them.
  template <class U, class F>
  FASTOPT_MEMBER void for_tile(const Tile<U>& tile, U* memory, const Strides& strides,
                               int64_t first, int rows, const F& copy) const {
    constexpr int kPer = static_cast<int>(sizeof(Words) / sizeof(U));
    U* const start = memory + offset(strides, first);
    const int64_t step = p.positions == 1 ? strides.batch : 0;  // from row to row, where it is one
    const bool aligned = is_aligned(start) && step * static_cast<int64_t>(sizeof(U)) % 16 == 0;
    if (tile.words && step != 0 && aligned) {
      for_my_pieces<kPer>(rows, [&](int row, int c) {
        copy(Shape<1, kPer>{}, tile.rows + row * tile.pitch + c, start + row * step + c);
      });
    } else if (!tile.words && step == p.classes && lead_of(start) == lead_of(tile.rows)) {
      const int count = rows * static_cast<int>(p.classes);
      for_my_elements<kPer, 1>(
          count, head_of(start, count), thread_index(), block_size(),
          [&](auto shape, int c, int) { copy(shape, tile.rows + c, start + c); });
    } else {
      for_my_pieces<1>(rows, [&](int row, int c) {
        copy(Shape<1, 1>{}, tile.rows + row * tile.pitch + c,
             memory + offset(strides, first + row) + c);
      });
    }
  }

  FASTOPT_MEMBER void packed() {
    begin_block();
    const int tile_rows = static_cast<int>(p.slice);
    char* const x_memory = shared_memory() + block_shared_bytes(sizeof(A));
    char* const t_memory = x_memory + packed_bytes(p.slice, p.classes, sizeof(T));
    T* const logits = static_cast<T*>(const_cast<void*>(p.logits));
    TT* const target = static_cast<TT*>(const_cast<void*>(p.probabilities));
    const auto copy_in = [](auto shape, auto* to, const auto* from) {
      copy_some<shape.count>(to, from, true);
    };
    const auto copy_out = [](auto shape, const auto* from, auto* to) {
      if constexpr (shape.count > 1) {
        store_words_streaming(to, load_words(from));
      } else {
        *to = *from;
      }
    };
    for (int64_t first = block_index() * tile_rows; first < rows();
         first += grid_size() * tile_rows) {
      const int64_t left = rows() - first;
      const int rows = static_cast<int>(left < tile_rows ? left : tile_rows);
      const Tile<T> x = tile_of(x_memory, logits + offset(p.logits_strides, first));
      for_tile(x, logits, p.logits_strides, first, rows, copy_in);
      Tile<TT> t{};
      if constexpr (!kLabels) {
        t = tile_of(t_memory, target + offset(p.target_strides, first));
        for_tile(t, target, p.target_strides, first, rows, copy_in);
      }
      wait_for_copies();
      sync_block();
      for (int i = thread_index(); i < rows; i += block_size())
        packed_row(first + i, x.rows + i * x.pitch, x.words, t.rows + i * t.pitch, t.words);
      sync_block();
      if (p.grad != nullptr) {
        for_tile(x, static_cast<T*>(p.grad), p.grad_strides, first, rows, copy_out);
        sync_block();  // before the next tile comes in its place
      }
    }
    end_block();
  }

  // A row in shared memory: its gradient takes its place.
  FASTOPT_MEMBER void packed_row(int64_t r, T* x, bool x_words, TT* t, bool t_words) {
    const int64_t label = label_at(r);
    const int classes = static_cast<int>(p.classes);
    // visit(Shape, c): the vectors of the row, then what is left.
    const auto for_classes = [&](const auto& visit) {
      int c = 0;
      for (; c + kSize <= classes; c += kSize) visit(Shape<1, kSize>{}, c);
      for (; c < classes; ++c) visit(Shape<1, 1>{}, c);
    };
    const auto load = [&](auto shape, int c, A* values) {
      load_some<shape.count, Cache::keep>(x + c, x_words, values);
    };
    const auto load_masses = [&](auto shape, int c, A* q) {
      if constexpr (kMass)
        masses<shape.count, Cache::keep>(t, c, t_words, weight, c, is_aligned(weight), q);
    };
    Stats stats = empty_stats<A>();
    for_classes([&](auto shape, int c) {
      A values[shape.count];
      load(shape, c, values);
      for (int k = 0; k < shape.count; ++k) stats.max = larger(values[k], stats.max);
    });
    for_classes([&](auto shape, int c) {
      A values[shape.count], q[shape.count] = {};
      load(shape, c, values);
      load_masses(shape, c, q);
      add_below_max<shape.count>(stats, values, q);
    });
    Row row = row_of(label);  // not before: the label has had time to arrive
    load_true_logit(row, x);
    stats = complete(stats, row);
    write_results(r, row, stats);
    if (p.grad == nullptr) return;
    const Gradient g = gradient_of(row, stats);
    for_classes([&](auto shape, int c) {
      A values[shape.count], q[shape.count] = {};
      load(shape, c, values);
      load_masses(shape, c, q);
      for (int k = 0; k < shape.count; ++k)
        values[k] = row.ignored ? A(0) : logit_gradient(g, values[k], q[k]);
      store_some<shape.count, Cache::keep>(x + c, x_words, values);
    });
    if (row.y >= 0) x[row.y] = from_acc<T>(g.of_true);
  }

  // ---- rows: some lanes of a warp, a warp, a block or a cluster of blocks per row ----

  // This block's classes of a row, in memory and, where held, in shared memory.
  struct Slice {
    int begin, count;
    const T* x;
    const TT* t;
    bool t_aligned, w_aligned;  // wherever x is
    const A* w;                 // weights from `begin` on, or null
    int head;                   // classes before x is aligned
  };

  FASTOPT_MEMBER bool shares_block() const { return p.lanes > kWarpSize; }

  FASTOPT_MEMBER void sync_row() const {
    if (shares_block()) {
      sync_block();
    } else {
      sync_warp();
    }
  }

  template <bool kHeld>
  FASTOPT_MEMBER void rows_kernel() {
    begin_block();
    const int lane = thread_index() % p.lanes, group = thread_index() / p.lanes;
    const int64_t groups = block_size() / p.lanes;
    const int rank = p.cluster > 1 ? cluster_rank() : 0;
    // Where this group holds its slice.
    const int64_t x_bytes = held_bytes(p.slice, sizeof(T));
    const int64_t t_bytes = kLabels ? 0 : held_bytes(p.slice, sizeof(TT));
    char* const held =
        shared_memory() + block_shared_bytes(sizeof(A)) + group * (x_bytes + t_bytes);

    const int64_t step = grid_size() / p.cluster * groups;
    int64_t first = block_index() / p.cluster * groups;  // the same in every lane of a warp
    int64_t label = label_at(first + group);
    for (; first < rows(); first += step) {
      const auto live = [&] { return first + group < rows(); };
      const int64_t r = live() ? first + group : rows() - 1;
      Row row = row_of(label);
      label = label_at(first + group + step);  // the next row's, a row's time ahead
      const Slice read = slice_at(r, rank);
      const Slice slice = kHeld ? held_slice(read, held, held + x_bytes) : read;
      Stats stats{};
      if (!row.ignored) {
        if constexpr (kHeld) hold(read, slice, lane);
        load_true_logit(row, row_start(r));
        if constexpr (kHeld) wait_for_copies();
        stats = sweep(slice, lane);
      }
      // Rows that share a warp are merged together, one ignored or not.
      if (!row.ignored || p.lanes < kWarpSize) stats = merge(stats);
      stats = complete(stats, row);
      if (live() && lane == 0 && rank == 0) write_results(r, row, stats);
      if (kHeld && !shares_block()) sync_warp();  // the lanes' copies; else merge() was the barrier
      if (p.grad != nullptr && live()) {
        T* const grad = static_cast<T*>(p.grad) + offset(p.grad_strides, r) + slice.begin;
        write_gradient<kHeld>(grad, gradient_of(row, stats), row, slice, lane);
      }
      if (kHeld && p.grad != nullptr) sync_row();  // before the next row comes in its place
    }
    if (p.cluster > 1) sync_cluster();  // others may still read this block's of_warp
    end_block();
  }

  FASTOPT_MEMBER const T* row_start(int64_t r) const {
    return static_cast<const T*>(p.logits) + offset(p.logits_strides, r);
  }

  FASTOPT_MEMBER Slice slice_at(int64_t r, int rank) const {
    Slice s{};
    const int classes = static_cast<int>(p.classes), slice = static_cast<int>(p.slice);
    s.begin = rank * slice < classes ? rank * slice : classes;
    s.count = classes - s.begin < slice ? classes - s.begin : slice;
    s.x = row_start(r) + s.begin;
    s.head = head_of(s.x, s.count);
    if constexpr (!kLabels) {
      s.t = static_cast<const TT*>(p.probabilities) + offset(p.target_strides, r) + s.begin;
      s.t_aligned = is_aligned(s.t + s.head);
    }
    if (weight != nullptr) {
      s.w = weight + s.begin;
      s.w_aligned = is_aligned(s.w + s.head);
    }
    return s;
  }

  // The slice in shared memory, aligned there as its logits are in global memory.
  FASTOPT_MEMBER Slice held_slice(Slice s, char* x_memory, char* t_memory) const {
    constexpr int kTargetSize = static_cast<int>(sizeof(Words) / sizeof(TT));
    s.x = reinterpret_cast<T*>(x_memory) + (kSize - s.head % kSize) % kSize;
    if constexpr (!kLabels) {
      s.t = reinterpret_cast<TT*>(t_memory) + (kTargetSize - s.head % kTargetSize) % kTargetSize;
      s.t_aligned = true;
    }
    return s;
  }

  // Every lane copies what it will be the first to read, and goes on before that has arrived.
  FASTOPT_MEMBER void hold(const Slice& from, const Slice& held, int lane) const {
    T* const x = const_cast<T*>(held.x);
    TT* const t = const_cast<TT*>(held.t);
    for_my_elements<kSize, 1>(from.count, from.head, lane, p.lanes, [&](auto shape, int c, int) {
      copy_some<shape.count>(x + c, from.x + c, true);
      if constexpr (!kLabels) copy_some<shape.count>(t + c, from.t + c, from.t_aligned);
    });
  }
  template <int n, class U>
  FASTOPT_MEMBER static void copy_some(U* to, const U* from, bool aligned) {
    if constexpr (n * sizeof(U) % sizeof(Words) == 0) {
      if (aligned) {
        constexpr int kPer = sizeof(Words) / sizeof(U);
        for (int i = 0; i < n; i += kPer) copy_words_async(to + i, from + i);
        return;
      }
    }
    for (int i = 0; i < n; ++i) to[i] = from[i];
  }

  // This lane's statistics of a slice.
  FASTOPT_MEMBER Stats sweep(const Slice& s, int lane) const {
    Stats stats = empty_stats<A>();
    for_my_elements<kSize, kVectors>(
        s.count, s.head, lane, p.lanes, [&](auto shape, int first, int step) {
          if constexpr (shape.size == 1) {
            A x = to_acc(s.x[first]), q = 0;
            if constexpr (kMass) masses<1, Cache::keep>(s.t, first, false, s.w, first, false, &q);
            add<1>(stats, &x, &q);
          } else {
            constexpr int n = shape.size;
            constexpr int kNow = shape.vectors < kTogether ? shape.vectors : kTogether;
            Words words[shape.vectors];
            for (int i = 0; i < shape.vectors; ++i) words[i] = load_words(s.x + first + i * step);
            for (int i = 0; i < shape.vectors; i += kNow) {
              A x[kNow * n], q[kNow * n] = {};
              for (int k = 0; k < kNow; ++k) {
                unpack<T>(words[i + k], x + k * n);
                if constexpr (kMass) {
                  const int c = first + (i + k) * step;
                  masses<n, Cache::keep>(s.t, c, s.t_aligned, s.w, c, s.w_aligned, q + k * n);
                }
              }
              add<kNow * n>(stats, x, q);
            }
          }
        });
    return stats;
  }

  // The whole row's statistics, the same bits in every thread. Each warp leaves its own in shared
  // memory; after one barrier every warp reads them all, its cluster's too.
  FASTOPT_MEMBER Stats merge(Stats stats) {
    stats = merge_lanes<kMass>(stats, p.lanes);
    if (!shares_block()) return stats;
    const int warps = block_size() / kWarpSize, lane = thread_index() % kWarpSize;
    RowStats<A>* const mine = shared.of_warp[turn];
    turn = 1 - turn;
    if (lane == 0) mine[thread_index() / kWarpSize] = stats;
    if (p.cluster > 1) {
      sync_cluster();
    } else {
      sync_block();
    }
    stats = lane < warps ? mine[lane] : empty_stats<A>();
    if (p.cluster > 1) {
      stats = empty_stats<A>();
      for (int rank = 0; rank < p.cluster; ++rank)  // the same order in every block
        if (lane < warps) stats = fastopt::merge(stats, shared_of(mine, rank)[lane]);
    }
    return merge_lanes<kMass>(stats);
  }

  // The stores are the aligned ones: a gradient that lies otherwise than its logits (they are a
  // view of a larger buffer, say) reads those one by one, from shared memory or a cache.
  template <bool kHeld>
  FASTOPT_MEMBER void write_gradient(T* grad, const Gradient& g, const Row& row, const Slice& s,
                                     int lane) const {
    const int head = head_of(grad, s.count);
    if (row.ignored) {
      const A zeros[kSize] = {};
      return for_my_elements<kSize, 1>(s.count, head, lane, p.lanes, [&](auto shape, int c, int) {
        store_some<shape.count, Cache::stream>(grad + c, true, zeros);
      });
    }
    // Asked once a row, not once a vector; beside masses two loops would need more registers.
    const bool x_aligned = is_aligned(s.x + head);
    if constexpr (kMass) {
      write_elements<kHeld>(grad, g, row, s, head, lane, x_aligned);
    } else if (x_aligned) {
      write_elements<kHeld>(grad, g, row, s, head, lane, true);
    } else {
      write_elements<kHeld>(grad, g, row, s, head, lane, false);
    }
  }
  template <bool kHeld>
  FASTOPT_MEMBER void write_elements(T* grad, const Gradient& g, const Row& row, const Slice& s,
                                     int head, int lane, bool x_aligned) const {
    constexpr Cache kCache = kHeld ? Cache::keep : Cache::stream;
    const bool w_aligned = s.w != nullptr && is_aligned(s.w + head);
    bool t_aligned = false;
    if constexpr (!kLabels) t_aligned = is_aligned(s.t + head);
    for_my_elements<kSize, kMass ? 1 : 2>(
        s.count, head, lane, p.lanes, [&](auto shape, int first, int step) {
          constexpr int n = shape.size;
          A x[shape.count], q[shape.count] = {};
          for (int i = 0; i < shape.vectors; ++i) {
            const int c = first + i * step;
            load_some<n, kCache>(s.x + c, x_aligned, x + i * n);
            if constexpr (kMass) masses<n, kCache>(s.t, c, t_aligned, s.w, c, w_aligned, q + i * n);
          }
          for (int i = 0; i < shape.vectors; ++i) {
            const int c = first + i * step;
            A values[n];
            for (int k = 0; k < n; ++k) values[k] = logit_gradient(g, x[i * n + k], q[i * n + k]);
            if constexpr (kLabels) {
              const int at = row.y - s.begin - c;
              if (0 <= at && at < n) {
                for (int k = 0; k < n; ++k) values[k] = k == at ? g.of_true : values[k];
              }
            }
            store_some<n, Cache::stream>(grad + c, true, values);
          }
        });
  }

  // ---- strided: p.lanes threads side by side, the block's others divide the classes ----
  //
  // A thread takes kAdjacent rows whose elements lie side by side in memory: one access for all of
  // them, and one reckoning of addresses.

  // Of a thread, under way at once. (With 8 float64 of two rows, sm_100 spills.)
  static constexpr int kStridedClasses = kMass || sizeof(A) == 8 ? 4 : 8;

  template <int kAdjacent>
  FASTOPT_MEMBER void strided() {
    begin_block();
    const int lane = thread_index() % p.lanes;
    const Parts parts{thread_index() / p.lanes, block_size() / p.lanes};
    const int64_t tile = static_cast<int64_t>(p.lanes) * kAdjacent;
    for (int64_t first = block_index() * tile; first < rows(); first += grid_size() * tile) {
      const int64_t r = first + lane * kAdjacent;
      strided_rows<kAdjacent>(r < rows() ? r : rows() - kAdjacent, r < rows(), parts);
    }
    end_block();
  }

  struct Parts {  // the threads that share a row's classes
    int mine, count;
  };

  // visit(Shape, c) over this thread's classes, up to kStridedClasses in a row.
  template <class F>
  FASTOPT_MEMBER void for_my_classes(const Parts& parts, const F& visit) const {
    const int classes = static_cast<int>(p.classes);
    int c = parts.mine * kStridedClasses;
    for (; c + kStridedClasses <= classes; c += parts.count * kStridedClasses)
      visit(Shape<1, kStridedClasses>{}, c);
    const int left = classes - c;  // what is left of the row, for one of the threads
    if (left <= 0) return;
    if constexpr (kStridedClasses > 4) {
      if (left & 4) visit(Shape<1, 4>{}, c);
    }
    if (left & 2) visit(Shape<1, 2>{}, c + (left & 4));
    if (left & 1) visit(Shape<1, 1>{}, c + (left & 6));
  }

  // Elements of adjacent rows: one access.
  template <class U, int kAdjacent>
  struct alignas(kAdjacent * sizeof(U)) Adjacent {
    U of_row[kAdjacent];
  };
  template <int kAdjacent, class U, class S>
  FASTOPT_MEMBER static void load_adjacent(S shape, const U* from, int64_t step,
                                           Acc<U> (*out)[S::count]) {
    Adjacent<U, kAdjacent> found[shape.count];
    for (int k = 0; k < shape.count; ++k, from += step)
      found[k] = *reinterpret_cast<const Adjacent<U, kAdjacent>*>(from);
    for (int k = 0; k < shape.count; ++k)
      for (int v = 0; v < kAdjacent; ++v) out[v][k] = to_acc(found[k].of_row[v]);
  }

  template <int kAdjacent>
  FASTOPT_MEMBER void strided_rows(int64_t r, bool live, const Parts& parts) {
    int64_t label[kAdjacent];
    for (int v = 0; v < kAdjacent; ++v) label[v] = label_at(r + v);
    const int64_t batch = p.positions == 1 ? r : r / p.positions;
    const int64_t position = p.positions == 1 ? 0 : r % p.positions;
    const auto start = [&](const Strides& strides) {
      return batch * strides.batch + position * strides.position;
    };
    const T* const logits = static_cast<const T*>(p.logits) + start(p.logits_strides);
    const TT* target = nullptr;
    if constexpr (!kLabels)
      target = static_cast<const TT*>(p.probabilities) + start(p.target_strides);

    const auto load = [&](auto shape, int c, auto* x, auto* q) {
      const int64_t step = p.logits_strides.cls;
      load_adjacent<kAdjacent>(shape, logits + c * step, step, x);
      if constexpr (!kLabels) {
        const int64_t t_step = p.target_strides.cls;
        load_adjacent<kAdjacent>(shape, target + c * t_step, t_step, q);
      }
      if constexpr (kMass) {
        for (int v = 0; v < kAdjacent; ++v)
          for (int k = 0; k < shape.count; ++k) q[v][k] = mass_of_class(q[v][k], c + k);
      }
    };
    Stats stats[kAdjacent];
    Row row[kAdjacent];
    const auto for_rows = [&](const auto& visit) {
      for (int v = 0; v < kAdjacent; ++v) visit(v);
    };
    for_rows([&](int v) { stats[v] = empty_stats<A>(); });
    if (live) {
      for_my_classes(parts, [&](auto shape, int c) {
        A x[kAdjacent][shape.count], q[kAdjacent][shape.count] = {};
        load(shape, c, x, q);
        for_rows([&](int v) { add<shape.count>(stats[v], x[v], q[v]); });
      });
    }
    for_rows([&](int v) {  // not before: the logits do not wait for the label
      row[v] = row_of(label[v]);
      load_true_logit(row[v], logits + v);
    });
    for_rows([&](int v) {
      stats[v] = complete(merge_parts(stats[v], parts), row[v]);
      if (live && parts.mine == 0) write_results(r + v, row[v], stats[v]);
    });
    if (!live || p.grad == nullptr) return;
    Gradient g[kAdjacent];
    bool ignored = true;  // all of them: then nobody asks what they hold
    for_rows([&](int v) {
      g[v] = gradient_of(row[v], stats[v]);
      ignored &= row[v].ignored;
    });
    const int64_t at = start(p.grad_strides), step = p.grad_strides.cls;
    for_my_classes(parts, [&](auto shape, int c) {
      A x[kAdjacent][shape.count] = {}, q[kAdjacent][shape.count] = {};
      if (!ignored) load(shape, c, x, q);
      for (int k = 0; k < shape.count; ++k) {
        Adjacent<A, kAdjacent> values;
        for_rows([&](int v) {
          const A value = any_gradient(g[v], row[v], x[v][k], q[v][k], c + k);
          values.of_row[v] = row[v].ignored ? A(0) : value;
        });
        write_adjacent(at + (c + k) * step, values);
      }
    });
  }

  template <int kAdjacent>
  FASTOPT_MEMBER void write_adjacent(int64_t at, const Adjacent<A, kAdjacent>& values) const {
    Adjacent<T, kAdjacent> rounded;
    for (int v = 0; v < kAdjacent; ++v) rounded.of_row[v] = from_acc<T>(values.of_row[v]);
    *reinterpret_cast<Adjacent<T, kAdjacent>*>(static_cast<T*>(p.grad) + at) = rounded;
  }

  // A row's statistics from all threads that share it, in one order.
  FASTOPT_MEMBER Stats merge_parts(const Stats& stats, const Parts& parts) {
    if (parts.count == 1) return stats;
    Stats* const all = reinterpret_cast<Stats*>(shared_memory() + block_shared_bytes(sizeof(A)));
    sync_block();  // the row before is through with them
    all[thread_index()] = stats;
    sync_block();
    Stats merged = empty_stats<A>();
    for (int part = 0; part < parts.count; ++part)
      merged = fastopt::merge(merged, all[part * p.lanes + thread_index() % p.lanes]);
    return merged;
  }
};

// ---- the kernels ----

// Threads that the registers must leave room for.
template <class T>
constexpr int kThreadsPerSm = threads_per_sm(sizeof(T));

template <class T, class TT, bool kMass>
FASTOPT_KERNEL void FASTOPT_BOUNDS(kParcelThreads, kThreadsPerSm<T> / kParcelThreads)
    cross_entropy_packed(FASTOPT_PARAMS CrossEntropyParams p) {
  CrossEntropy<T, TT, kMass>(p).packed();
}

template <class T, class TT, bool kMass, bool kHeld>
FASTOPT_KERNEL void FASTOPT_BOUNDS(kMaxThreads, kThreadsPerSm<T> / kMaxThreads)
    cross_entropy_rows(FASTOPT_PARAMS CrossEntropyParams p) {
  CrossEntropy<T, TT, kMass>(p).template rows_kernel<kHeld>();
}

template <class T, class TT, bool kMass, int kAdjacent>
FASTOPT_KERNEL void FASTOPT_BOUNDS(kStridedThreads, kThreadsPerSm<T> / kStridedThreads)
    cross_entropy_strided(FASTOPT_PARAMS CrossEntropyParams p) {
  CrossEntropy<T, TT, kMass>(p).template strided<kAdjacent>();
}

// Partial sums over the labels that count (of their weights), and over the smoothing's masses.
// Blocks beyond the number of one kind's parts have nothing to do for it.
template <class A>
FASTOPT_KERNEL void FASTOPT_BOUNDS(kSumThreads)
    cross_entropy_sums(FASTOPT_PARAMS CrossEntropyParams p) {
  double* const scratch = reinterpret_cast<double*>(shared_memory());
  const A* const weight = static_cast<const A*>(p.weight);
  const int64_t block = block_index();
  if (p.weight_parts != nullptr && block < p.weight_part_count) {
    const int64_t rows = p.batch * p.positions, apart = block_size();
    const int64_t step = p.weight_part_count * apart * kSumItems;
    double sum = 0;
    int count = 0;  // where every label weighs 1
    for (int64_t r = block * apart * kSumItems + thread_index(); r < rows; r += step) {
      int64_t y[kSumItems];  // all under way before the first is looked at
      for (int k = 0; k < kSumItems; ++k)
        y[k] = r + k * apart < rows ? p.labels[r + k * apart] : p.ignore_index;
      for (int k = 0; k < kSumItems; ++k) {
        const bool counts = y[k] != p.ignore_index && y[k] >= 0 && y[k] < p.classes;
        if (weight != nullptr && counts) {
          sum += static_cast<double>(weight[y[k]]);
        } else {
          count += counts;
        }
      }
    }
    sum = sum_of_block(sum + count, scratch);
    if (thread_index() == 0) p.weight_parts[block] = sum;
  }
  sync_block();
  if (p.smoothing_parts != nullptr && block < p.smoothing_part_count) {
    double sum = 0;
    for (int64_t c = block * block_size() + thread_index(); c < p.classes;
         c += static_cast<int64_t>(p.smoothing_part_count) * block_size())
      sum += static_cast<double>(static_cast<A>(p.uniform) * weight[c]);
    sum = sum_of_block(sum, scratch);
    if (thread_index() == 0) p.smoothing_parts[block] = sum;
  }
}

// One block: the loss from the blocks' sums, and the gradient's unit.
template <class A>
FASTOPT_KERNEL void FASTOPT_BOUNDS(kMaxThreads)
    cross_entropy_finish(FASTOPT_PARAMS CrossEntropyParams p) {
  using AnyKernel = CrossEntropy<A, ClassIndex, false>;
  double* const scratch = reinterpret_cast<double*>(shared_memory());
  double loss = 0;
  for (int64_t i = thread_index(); i < p.loss_part_count; i += block_size())
    loss += p.loss_parts[i];
  loss = sum_of_block(loss, scratch);
  if (thread_index() >= kWarpSize) return;
  const double total = AnyKernel::total_weight(p);
  if (thread_index() > 0) return;
  if (p.mean) loss = AnyKernel::mean_of(p, loss, total);
  if (p.unit != nullptr) {
    const double upstream = p.mean ? AnyKernel::mean_of(p, 1.0, total) : 1.0;
    const bool waits = AnyKernel::waits(p, upstream);
    *p.unit =
        waits ? static_cast<float>(upstream / static_cast<double>(AnyKernel::scale_of(p))) : 1.0f;
  }
  if (p.loss != nullptr) store_scalar(p.loss, p.loss_type, loss);
}

struct ScaleParams {
  CrossEntropyProblem problem;  // its gradient, dense, and its labels, if it has any
  bool smoothed;
  const void* factor;  // 0-dim, factor_type
  Element factor_type;
};

// grad *= factor. A factor of 1 reads nothing but itself.
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

// ---- which instantiation: for the launcher and the emulation alike ----

inline int64_t bytes_of(Element element) {
  switch (element) {
    case Element::float32:
      return 4;
    case Element::float64:
      return 8;
    default:
      return 2;
  }
}

// Whether positions 2i and 2i + 1 of every class are one aligned access.
inline bool pairs_up(const void* data, int64_t element_bytes, const Strides& strides) {
  return strides.position == 1 && strides.cls % 2 == 0 && strides.batch % 2 == 0 &&
         reinterpret_cast<uintptr_t>(data) % (2 * element_bytes) == 0;
}

// What the plan asks about a call.
inline CrossEntropyShape shape_of(const CrossEntropyParams& p) {
  const bool labels = p.probabilities == nullptr;
  CrossEntropyShape shape{};
  shape.rows = p.batch * p.positions;
  shape.classes = p.classes;
  shape.logit_bytes = bytes_of(p.logits_type);
  shape.target_bytes = labels ? 0 : bytes_of(p.target_type);
  shape.contiguous_classes = p.logits_strides.cls == 1 && (labels || p.target_strides.cls == 1) &&
                             (p.grad == nullptr || p.grad_strides.cls == 1);
  shape.reads_twice = p.grad != nullptr;
  shape.pairs = p.positions % 2 == 0 &&
                pairs_up(p.logits, bytes_of(p.logits_type), p.logits_strides) &&
                (labels || pairs_up(p.probabilities, bytes_of(p.target_type), p.target_strides)) &&
                (p.grad == nullptr || pairs_up(p.grad, bytes_of(p.logits_type), p.grad_strides));
  return shape;
}

// launch(kernel, blocks, threads, shared_bytes, cluster, params) in the order of the stream: the
// whole call. `workspace`: workspace_doubles() of device memory.
inline int64_t workspace_doubles(const CrossEntropyPlan& plan) {
  return 2 * kMaxParts + plan.blocks;
}

template <class T, class TT, bool kMass, class Launch>
void launch_plan(const CrossEntropyParams& p, const CrossEntropyPlan& plan, const Launch& launch) {
  const auto run = [&](auto kernel) {
    launch(kernel, plan.blocks, plan.threads, plan.shared_bytes, plan.cluster, p);
  };
  switch (plan.kernel) {
    case CrossEntropyKernel::packed:
      return run(&cross_entropy_packed<T, TT, kMass>);
    case CrossEntropyKernel::rows:
      return plan.held ? run(&cross_entropy_rows<T, TT, kMass, true>)
                       : run(&cross_entropy_rows<T, TT, kMass, false>);
    case CrossEntropyKernel::strided:
      return plan.adjacent == 2 ? run(&cross_entropy_strided<T, TT, kMass, 2>)
                                : run(&cross_entropy_strided<T, TT, kMass, 1>);
  }
}

template <class Launch>
void launch_cross_entropy(CrossEntropyParams p, const CrossEntropyPlan& plan, double* workspace,
                          const Launch& launch) {
  const int64_t rows = p.batch * p.positions;
  const bool is_double = p.logits_type == Element::float64;
  p.lanes = plan.lanes;
  p.cluster = plan.cluster;
  p.slice = plan.slice;

  if (p.labels != nullptr && p.mean) {
    p.weight_parts = workspace;
    p.weight_part_count = sum_blocks(rows);
  }
  if (p.labels != nullptr && p.weight != nullptr && p.uniform > 0) {
    p.smoothing_parts = workspace + kMaxParts;
    p.smoothing_part_count = sum_blocks(p.classes);
  }
  const int parts = std::max(p.weight_part_count, p.smoothing_part_count);
  if (parts > 0) {
    const auto kernel = is_double ? &cross_entropy_sums<double> : &cross_entropy_sums<float>;
    launch(kernel, parts, kSumThreads, kMaxWarps * 8, 1, p);
  }

  if (p.loss != nullptr) {
    p.loss_parts = workspace + 2 * kMaxParts;
    p.loss_part_count = plan.blocks;
  }
  if (plan.blocks > 0) {
    with_element(p.logits_type, [&](auto logits) {
      using T = typename decltype(logits)::type;
      if (p.labels != nullptr) {
        if (p.uniform > 0) {
          launch_plan<T, ClassIndex, true>(p, plan, launch);
        } else {
          launch_plan<T, ClassIndex, false>(p, plan, launch);
        }
      } else if (p.target_type == p.logits_type) {
        launch_plan<T, T, true>(p, plan, launch);
      } else {  // the checks let float32 probabilities through with half precision logits
        launch_plan<T, Acc<T>, true>(p, plan, launch);
      }
    });
  }
  if (p.loss != nullptr || p.unit != nullptr || plan.blocks == 0) {
    const auto kernel = is_double ? &cross_entropy_finish<double> : &cross_entropy_finish<float>;
    launch(kernel, int64_t{1}, kMaxThreads, kMaxWarps * 8, 1, p);
  }
}

}  // namespace fastopt::gpu
