// Softmax cross-entropy on CPU: loss and gradient. Compiled once per SIMD level. Three ways through
// the same formula (csrc/rules/softmax.h), chosen by cross_entropy.cpp from the layout:
//
//   rows      classes contiguous. One sweep for (max, sum, dot), one for the gradient; the row is
//             still in L1 or L2 for the second, so memory sees one read and one write per logit.
//   segments  the same for a few very long rows: every row is cut into parts for all the cores.
//   tiles     classes strided, or few: classes x rows are copied into a small scratch block and
//             the lanes run over rows. Memory sees one read and one write per logit here too.
//
// Accumulation in float32 (float64 for float64), one rounding at the store. Row losses are added
// up in float64. Ignored rows are never read and get gradient 0.
#include "cross_entropy.h"
#include "rules/softmax.h"
#include "simd.h"

namespace fastopt {
namespace FASTOPT_LEVEL {
namespace {

// Elements of one step of the online max and sum: read twice, so they have to stay in L1.
constexpr int64_t kChunk = 1024;

struct ClassIndex {};  // stands for the storage type of the target where it holds labels

template <class A>
FASTOPT_INLINE IntVec<A> lane_index() {
  IntVec<A> lane;
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = i;
  return lane;
}

template <class T>
FASTOPT_INLINE Vec<Acc<T>> load_some(const T* p, int n) {
  return n == kLanes<Acc<T>> ? load(p) : load_tail(p, n, Acc<T>(0));
}
template <class T>
FASTOPT_INLINE void store_some(T* p, Vec<Acc<T>> v, int n) {
  if (n == kLanes<Acc<T>>) {
    store(p, v);
  } else {
    store_tail(p, v, n);
  }
}

template <class T>
constexpr bool kIsClassIndex = false;
template <>
constexpr bool kIsClassIndex<ClassIndex> = true;

// One combination of logits type T, target type TT and options. kMass: every class carries target
// mass q_c (probabilities, or label smoothing); kWeight: that mass is weighted.
template <class T, class TT, bool kMass, bool kWeight>
struct CrossEntropy {
  using A = Acc<T>;
  using V = Vec<A>;
  using Stats = RowStats<double>;  // a few numbers a row: float64 keeps a - q_c right
  static constexpr int kL = kLanes<A>;
  static constexpr bool kLabels = kIsClassIndex<TT>;

  const CrossEntropyParams& p;
  const T* const logits = static_cast<const T*>(p.logits);
  const TT* const probabilities = static_cast<const TT*>(p.probabilities);
  const A* const true_masses = static_cast<const A*>(p.true_masses);
  const A* const smoothing_masses = static_cast<const A*>(p.smoothing_masses);
  A* const row_loss = static_cast<A*>(p.row_loss);
  const A keep = static_cast<A>(p.keep);
  const A uniform = static_cast<A>(p.uniform);
  const A smoothing_mass = static_cast<A>(p.smoothing_mass);
  const A up = static_cast<A>(p.upstream);

  explicit CrossEntropy(const CrossEntropyParams& params) : p(params) {}

  int64_t offset(const Strides& strides, int64_t row) const {
    return row / p.positions * strides.batch + row % p.positions * strides.position;
  }

  // The label of a row, or -1 where it is ignored. The launcher has refused labels out of range;
  // testing again here keeps reads in bounds whatever another thread writes meanwhile.
  int64_t label(int64_t row) const {
    const int64_t y = p.labels[row];
    return y == p.ignore_index || y < 0 || y >= p.classes ? -1 : y;
  }

  // The true class's own mass (1 - e) w_y, and its q_y, which adds its share of the smoothing.
  A true_mass(int64_t y) const { return true_masses != nullptr ? true_masses[y] : keep; }
  A total_mass(int64_t y) const {
    if constexpr (kMass) return true_mass(y) + (kWeight ? smoothing_masses[y] : uniform);
    return true_mass(y);
  }

  // up (a p_y - q_y); NaN for an infinite up, where torch has inf - inf.
  A true_gradient(A softmax_mass, int64_t y) const {
    return up * (softmax_mass - total_mass(y)) + (up - up);
  }

  // q of the classes c, c + 1, ...; `n` of them (all lanes, but in a tail).
  V mass_at(const TT* t, int64_t c, int n) const {
    V own = splat<A>(keep), shared = splat<A>(uniform);
    if constexpr (kWeight) shared = load_some(smoothing_masses + c, n);
    if constexpr (kLabels) {
      return shared;
    } else {
      if constexpr (kWeight) own = load_some(true_masses + c, n);
      return own * load_some(t + c, n) + shared;
    }
  }

  // ---- classes contiguous: one row, its classes [begin, end) ----

  struct Row {
    const T* x;
    const TT* t;
    int64_t y;  // -1: ignored
  };

  // Where the sweep leaves its exponentials, so that the gradient need not compute them again:
  // exp(x_c - bases[c / kChunk]).
  struct Cache {
    A* exps;
    A* bases;
  };

  // Chunk by chunk: its maximum, then its sums relative to the largest maximum so far.
  Stats sweep(const T* x, const TT* t, int64_t begin, int64_t end, const Cache& cache) const {
    Stats row = empty_stats<double>();
    for (int64_t c0 = begin; c0 < end; c0 += kChunk) {
      const int64_t c1 = c0 + kChunk < end ? c0 + kChunk : end;
      const double chunk_max = static_cast<double>(max_of(x, c0, c1));
      row = rebase(row, chunk_max > row.max ? chunk_max : row.max);
      const A base = static_cast<A>(stats_base(row.max));
      if (cache.exps == nullptr) {
        add_chunk<false>(&row, x, t, c0, c1, base, nullptr);
      } else {
        cache.bases[(c0 - begin) / kChunk] = base;
        add_chunk<true>(&row, x, t, c0, c1, base, cache.exps);
      }
    }
    return row;
  }

  static A max_of(const T* x, int64_t begin, int64_t end) {
    const A minus_infinity = -static_cast<A>(__builtin_inff());
    V largest[2] = {splat<A>(minus_infinity), splat<A>(minus_infinity)};
    int64_t c = begin;
    for (; c + 2 * kL <= end; c += 2 * kL) {
      largest[0] = max(largest[0], load(x + c));
      largest[1] = max(largest[1], load(x + c + kL));
    }
    for_each_vector(c, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      largest[0] = max(largest[0], n == kL ? load(x + i) : load_tail(x + i, n, minus_infinity));
    });
    return horizontal_max<A>(max(largest[0], largest[1]));
  }

  struct Part {
    V sum, dot, mass;
    Part operator+(const Part& other) const {
      return {sum + other.sum, dot + other.dot, mass + other.mass};
    }
  };

  // term(c, n) over the classes of a chunk, n at a time. Pairs of pairs of vectors: small terms
  // meet one another before they meet a sum that has grown past their last digits. As many
  // elements at every SIMD level: fewer lanes must not mean longer sums.
  template <class F>
  static __attribute__((always_inline)) Part sum_of(int64_t begin, int64_t end, const F& term) {
    constexpr int kCount = 256 / kVectorBytes;
    Part total{};
    int64_t c = begin;
    for (; c + kCount * kL <= end; c += kCount * kL) total = total + sum_of_pairs<kCount>(c, term);
    for_each_vector(c, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      total = total + term(i, n);
    });
    return total;
  }
  template <int kCount, class F>
  static __attribute__((always_inline)) Part sum_of_pairs(int64_t c, const F& term) {
    if constexpr (kCount == 1) {
      return term(c, kL);
    } else {
      const Part low = sum_of_pairs<kCount / 2>(c, term);
      return low + sum_of_pairs<kCount / 2>(c + kCount / 2 * kL, term);
    }
  }

  // Sums over one chunk.
  template <bool kKeep>
  void add_chunk(Stats* row, const T* x, const TT* t, int64_t begin, int64_t end, A base,
                 A* exps) const {
    const auto part_at = [&](int64_t c, int n) __attribute__((always_inline)) {
      // exp(-inf) = 0 in the lanes past the end.
      const V xv = n == kL ? load(x + c) : load_tail(x + c, n, -static_cast<A>(__builtin_inff()));
      const V d = xv - base;
      Part part{exp_nonpositive(d), V{}, V{}};
      if constexpr (kKeep) store_some(exps + c, part.sum, n);
      if constexpr (kMass) {
        const V q = mass_at(t, c, n);
        const IntVec<A> inside = lane_index<A>() < n;
        part.dot = inside ? q * d : V{};
        part.mass = inside ? q : V{};
      }
      return part;
    };
    const Part total = sum_of(begin, end, part_at);
    row->sum += static_cast<double>(horizontal_sum<A>(total.sum));
    if constexpr (kMass) {
      row->dot += static_cast<double>(horizontal_sum<A>(total.dot));
      row->mass += static_cast<double>(horizontal_sum<A>(total.mass));
    }
  }

  // step(c, n): n classes from c on, kL at a time, then the tail.
  template <class F>
  static void for_each_vector(int64_t begin, int64_t end, const F& step) {
    int64_t c = begin;
    for (; c + kL <= end; c += kL) step(c, kL);
    if (c < end) step(c, static_cast<int>(end - c));
  }

  // grad_c = up (factor exp(x_c - max) - q_c), factor = a / sum. The difference is taken before
  // the products with up and before rounding: softmax rounded to half precision first would leave
  // nothing of p_y - 1 on a confident row.
  void gradient(T* grad, const Row& row, const Stats& stats, int64_t begin, int64_t end,
                const Cache& cache) const {
    const A row_maximum = static_cast<A>(stats.max);
    const A factor = static_cast<A>(softmax_factor(stats));
    if (cache.exps == nullptr) {
      write_gradient<false>(grad, row, row_maximum, factor, begin, end, nullptr);
    } else {
      for (int64_t c0 = begin; c0 < end; c0 += kChunk) {
        const int64_t c1 = c0 + kChunk < end ? c0 + kChunk : end;
        const A base = cache.bases[(c0 - begin) / kChunk];
        const A scaled = base == row_maximum ? factor : factor * scalar_exp(base - row_maximum);
        write_gradient<true>(grad, row, row_maximum, scaled, c0, c1, cache.exps);
      }
    }
    if (kLabels && begin <= row.y && row.y < end) {
      const A e = scalar_exp(to_acc(row.x[row.y]) - row_maximum);
      grad[row.y] = from_acc<T>(true_gradient(factor * e, row.y));
    }
  }

  template <bool kCached>
  void write_gradient(T* grad, const Row& row, A row_maximum, A factor, int64_t begin, int64_t end,
                      const A* exps) const {
    const A upstream = up, scaled = up * factor;  // a member would be read again after every store
    for_each_vector(begin, end, [&](int64_t c, int n) __attribute__((always_inline)) {
      V e;
      if constexpr (kCached) {
        e = load_some(exps + c, n);
      } else {
        e = exp_nonpositive(load_some(row.x + c, n) - row_maximum);
      }
      V g;
      if constexpr (kMass) {
        g = upstream * (factor * e - mass_at(row.t, c, n));
      } else {
        g = scaled * e;
      }
      store_some(grad + c, g, n);
    });
  }

  Row row_at(int64_t r) const {
    Row row{logits + offset(p.logits_strides, r), nullptr, 0};
    if constexpr (kLabels) {
      row.y = label(r);
    } else {
      row.t = probabilities + offset(p.target_strides, r);
    }
    return row;
  }

  // sum_c q_c (log(sum) - (x_c - max)), a term for each class that has mass, as torch adds them up.
  // y: its label, as the sweep has read it.
  double loss_by_class(int64_t r, int64_t y, double max, double sum) const {
    const T* const x = logits + offset(p.logits_strides, r);
    const auto term = [&](int64_t c, A q) {
      const double d = static_cast<double>(to_acc(x[c * p.logits_strides.cls])) - max;
      return static_cast<double>(q) * (scalar_log(sum) - d);
    };
    double loss = 0;
    if constexpr (kLabels) loss = term(y, true_mass(y));
    for (int64_t c = 0; kMass && c < p.classes; ++c) {
      A q = kWeight ? smoothing_masses[c] : uniform;
      if constexpr (!kLabels) {
        const TT* const t = probabilities + offset(p.target_strides, r);
        q += (kWeight ? true_masses[c] : keep) * to_acc(t[c * p.target_strides.cls]);
      }
      loss += term(c, q);
    }
    return loss;
  }

  // From the sweep's result to the row's loss.
  Stats close_row(const Row& row, int64_t r, Stats stats, double* loss_sum) const {
    stats = finish(stats);
    if constexpr (kLabels) {
      stats.mass = p.smoothing_mass;  // the sweep's own sum has rounding errors
      stats = row.y < 0 ? Stats{0, 1, 0, 0}
                        : add_true_class<double>(stats, to_acc(row.x[row.y]), true_mass(row.y));
    }
    double loss = kLabels && row.y < 0 ? 0.0 : fastopt::row_loss(stats);
    if (is_doubtful(loss, stats.sum)) loss = loss_by_class(r, row.y, stats.max, stats.sum);
    if (row_loss != nullptr) row_loss[r] = static_cast<A>(loss);
    *loss_sum += loss;
    return stats;
  }

  void row_gradient(const Row& row, int64_t r, const Stats& stats, int64_t begin, int64_t end,
                    const Cache& cache) const {
    T* const grad = static_cast<T*>(p.grad) + offset(p.grad_strides, r);
    if (kLabels && row.y < 0) {
      memset(grad + begin, 0, sizeof(T) * (end - begin));
    } else {
      gradient(grad, row, stats, begin, end, cache);
    }
  }

  // The cache for one row: `memory` where it has room, else, in full precision, the row's own
  // gradient; half precision rows that long compute their exponentials twice.
  Cache cache_at(void* memory, int64_t r) const {
    if (p.grad == nullptr) return {nullptr, nullptr};
    A* const bases = static_cast<A*>(memory);
    if (p.caches_exps) return {bases + (p.classes + kChunk - 1) / kChunk, bases};
    if constexpr (sizeof(T) == sizeof(A)) {
      return {static_cast<A*>(p.grad) + offset(p.grad_strides, r), bases};
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
        Stats stats = ignored ? empty_stats<double>() : sweep(row.x, row.t, 0, p.classes, cache);
        stats = close_row(row, r, stats, &loss_sum);
        if (p.grad != nullptr) row_gradient(row, r, stats, 0, p.classes, cache);
      }
      p.partial_loss[task] = loss_sum;
    }
  }

  // ---- segments: task = (row, part of its classes) ----

  int64_t segment_begin(int64_t segment) const { return p.classes * segment / p.segments; }

  void segment_stats(int64_t begin, int64_t end) const {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t segment = task % p.segments;
      const Row row = row_at(task / p.segments);
      if (kLabels && row.y < 0) continue;
      static_cast<Stats*>(p.segment_stats)[task] = sweep(
          row.x, row.t, segment_begin(segment), segment_begin(segment + 1), {nullptr, nullptr});
    }
  }

  // Leaves the whole row's statistics at its first segment.
  void merge_segments() const {
    Stats* const parts = static_cast<Stats*>(p.segment_stats);
    for (int64_t r = 0; r < p.batch * p.positions; ++r) {
      const Row row = row_at(r);
      Stats stats = parts[r * p.segments];
      if (!kLabels || row.y >= 0) {
        for (int64_t i = 1; i < p.segments; ++i) stats = merge(stats, parts[r * p.segments + i]);
      }
      double loss_sum = 0;
      parts[r * p.segments] = close_row(row, r, stats, &loss_sum);
      p.partial_loss[r] = loss_sum;
    }
  }

  void segment_gradients(int64_t begin, int64_t end) const {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t r = task / p.segments, segment = task % p.segments;
      row_gradient(row_at(r), r, static_cast<Stats*>(p.segment_stats)[r * p.segments],
                   segment_begin(segment), segment_begin(segment + 1), {nullptr, nullptr});
    }
  }

  // ---- tiles: lanes run over rows ----

  // A block of classes of up to tile_rows rows, [class][row], and what is known of each row.
  struct Tile {
    int64_t first;  // row
    int64_t rows;   // valid ones
    int64_t width;  // from class to class: tile_rows and one vector, as a power of two would let
                    // the classes of a row evict one another from L1
    A *x, *q;       // (classes, width); lanes past `rows` hold harmless zeros
    // (tile_rows); *_lost: what rounding took from a sum
    A *max, *sum, *dot, *mass, *sum_lost, *dot_lost, *mass_lost, *factor, *scratch;
    typename VecTraits<A>::Int* live;  // (tile_rows) all ones; zero: ignored
    int64_t* y;                        // (tile_rows) -1: ignored
  };

  Tile tile_at(int64_t task, void* memory) const {
    Tile tile{};
    const int64_t w = p.tile_rows;
    if (p.positions >= w) {  // tiles do not cross batch entries: positions are one run of memory
      const int64_t per_batch = (p.positions + w - 1) / w;
      const int64_t position = task % per_batch * w;
      tile.first = task / per_batch * p.positions + position;
      tile.rows = p.positions - position < w ? p.positions - position : w;
    } else {
      tile.first = task * w;
      const int64_t left = p.batch * p.positions - tile.first;
      tile.rows = left < w ? left : w;
    }
    tile.width = w + kL;
    A* at = static_cast<A*>(memory);
    A** const row_arrays[] = {&tile.max,       &tile.sum,      &tile.dot,
                              &tile.mass,      &tile.sum_lost, &tile.dot_lost,
                              &tile.mass_lost, &tile.factor,   &tile.scratch};
    for (A** array : row_arrays) {
      *array = at;
      at += w;
    }
    tile.live = reinterpret_cast<typename VecTraits<A>::Int*>(at);
    at += w;
    tile.y = reinterpret_cast<int64_t*>(at);
    at += w * static_cast<int64_t>(sizeof(int64_t) / sizeof(A));
    tile.x = at;
    tile.q = at + p.tile_classes * tile.width;
    return tile;
  }

  // Where the rows of a tile lie in memory: evenly spaced, but where the tile crosses batch
  // entries of several positions.
  struct RowOffsets {
    const CrossEntropy& op;
    const Strides& strides;
    int64_t first_row, first, step;
    bool even;

    int64_t operator()(int64_t i) const {
      return even ? first + i * step : op.offset(strides, first_row + i);
    }
    bool is_run() const { return even && step == 1; }
  };

  RowOffsets offsets_of(const Tile& tile, const Strides& strides) const {
    const bool one_entry = tile.first / p.positions == (tile.first + tile.rows - 1) / p.positions;
    return {*this,
            strides,
            tile.first,
            offset(strides, tile.first),
            p.positions == 1 ? strides.batch : strides.position,
            one_entry || p.positions == 1};
  }

  template <class U>
  void pack(A* block, const Tile& tile, const U* data, const Strides& strides, int64_t c0,
            int64_t c1) const {
    const int64_t w = tile.width;
    const RowOffsets rows = offsets_of(tile, strides);
    if (rows.is_run()) {
      const U* const start = data + rows.first;
      const int64_t full = tile.rows / kL * kL;
      const int tail = static_cast<int>(tile.rows - full);
      for (int64_t c = c0; c < c1; ++c) {
        const U* const from = start + c * strides.cls;
        // The next classes lie pages away, where the hardware does not look ahead.
        const U* const ahead = from + (c + 2 < c1 ? 2 * strides.cls : 0);
        A* const to = block + (c - c0) * w;
        for (int64_t i = 0; i < full; i += kL) {
          __builtin_prefetch(ahead + i);
          store(to + i, load(from + i));
        }
        if (tail > 0) store(to + full, load_tail(from + full, tail, A(0)));
      }
    } else {
      int64_t i = 0;
      if constexpr (sizeof(U) == sizeof(float) && sizeof(A) == sizeof(float)) {
        if (rows.even && strides.cls == 1) {
          for (; i + 4 <= tile.rows; i += 4) {
            const U* const from = data + rows(i);
            int64_t c = c0;
            for (; c + 4 <= c1; c += 4)
              transpose4(from + c, rows.step, block + (c - c0) * w + i, w);
            for (; c < c1; ++c)
              for (int64_t k = 0; k < 4; ++k) block[(c - c0) * w + i + k] = from[k * rows.step + c];
          }
        }
      }
      for (; i < tile.rows; ++i) {
        const U* const from = data + rows(i);
        for (int64_t c = c0; c < c1; ++c) block[(c - c0) * w + i] = to_acc(from[c * strides.cls]);
      }
      for (int64_t c = 0; c < c1 - c0; ++c)
        for (int64_t i = tile.rows; i < padded(tile); ++i) block[c * w + i] = A(0);
    }
  }

  template <class U>
  void unpack(const A* block, const Tile& tile, U* data, const Strides& strides, int64_t c0,
              int64_t c1) const {
    const int64_t w = tile.width;
    const RowOffsets rows = offsets_of(tile, strides);
    if (rows.is_run()) {
      U* const start = data + rows.first;
      const int64_t full = tile.rows / kL * kL;
      const int tail = static_cast<int>(tile.rows - full);
      for (int64_t c = c0; c < c1; ++c) {
        U* const to = start + c * strides.cls;
        const A* const from = block + (c - c0) * w;
        for (int64_t i = 0; i < full; i += kL) store(to + i, load(from + i));
        if (tail > 0) store_tail(to + full, load(from + full), tail);
      }
    } else {
      int64_t i = 0;
      if constexpr (sizeof(U) == sizeof(float) && sizeof(A) == sizeof(float)) {
        if (rows.even && strides.cls == 1) {
          for (; i + 4 <= tile.rows; i += 4) {
            U* const to = data + rows(i);
            int64_t c = c0;
            for (; c + 4 <= c1; c += 4) transpose4(block + (c - c0) * w + i, w, to + c, rows.step);
            for (; c < c1; ++c)
              for (int64_t k = 0; k < 4; ++k) to[k * rows.step + c] = block[(c - c0) * w + i + k];
          }
        }
      }
      for (; i < tile.rows; ++i) {
        U* const to = data + rows(i);
        for (int64_t c = c0; c < c1; ++c)
          to[c * strides.cls] = from_acc<U>(block[(c - c0) * w + i]);
      }
    }
  }

  static int64_t padded(const Tile& tile) { return (tile.rows + kL - 1) / kL * kL; }

  void load_block(const Tile& tile, int64_t c0, int64_t c1) const {
    pack(tile.x, tile, logits, p.logits_strides, c0, c1);
    if constexpr (!kLabels) {
      pack(tile.q, tile, probabilities, p.target_strides, c0, c1);
    }
  }

  // q of class c for the rows i, i + 1, ... of the tile; c0 is the block's first class.
  V tile_mass(const Tile& tile, int64_t c, int64_t c0, int64_t i) const {
    V own = splat<A>(keep), shared = splat<A>(uniform);
    if constexpr (kWeight) shared = splat<A>(smoothing_masses[c]);
    if constexpr (kLabels) return shared;  // tile.q holds nothing
    if constexpr (kWeight) own = splat<A>(true_masses[c]);
    return own * load(tile.q + (c - c0) * tile.width + i) + shared;
  }

  // Online (max, sum, dot, mass) over one block of classes, per lane as in rules' merge; x becomes
  // exp(x - max), which the gradient uses again when the block holds all classes.
  void tile_sweep(const Tile& tile, int64_t c0, int64_t c1) const {
    const A kInfinity = static_cast<A>(__builtin_inff());
    const int64_t w = tile.width, n = padded(tile);
    A* const old_max = tile.scratch;
    for (int64_t i = 0; i < n; i += kL) store(old_max + i, load(tile.max + i));
    for_groups(c0, c1, [&](int64_t g0, int64_t g1) {
      for (int64_t i = 0; i < n; i += kL) {
        V largest = load(tile.max + i);
        for (int64_t c = g0; c < g1; ++c) largest = max(largest, load(tile.x + (c - c0) * w + i));
        store(tile.max + i, largest);
      }
    });
    if (c0 > 0) {
      for (int64_t i = 0; i < n; i += kL) {
        const V before = load(old_max + i), now = load(tile.max + i);
        const V old_base = before == -kInfinity ? V{} : before;
        const V base = now == -kInfinity ? V{} : now;
        const V scale = before == now ? V{} + 1 : exp_nonpositive(before - base);
        store(tile.sum + i, load(tile.sum + i) * scale);
        if (keeps_lost()) store(tile.sum_lost + i, load(tile.sum_lost + i) * scale);
        if constexpr (kMass) {
          const V mass = load(tile.mass + i);
          add(tile.dot + i, tile.dot_lost + i, mass == 0 ? V{} : mass * (old_base - base));
        }
      }
    }
    for_groups(c0, c1, [&](int64_t g0, int64_t g1) {
      for (int64_t i = 0; i < n; i += kL) {
        const V now = load(tile.max + i);
        const V base = now == -kInfinity ? V{} : now;
        V sum{}, dot{}, mass{};
        for (int64_t c = g0; c < g1; ++c) {
          A* const x = tile.x + (c - c0) * w + i;
          const V d = load(x) - base;
          const V e = exp_nonpositive(d);
          store(x, e);
          sum += e;
          if constexpr (kMass) {
            const V q = tile_mass(tile, c, c0, i);
            dot += q * d;
            mass += q;
          }
        }
        if (g0 == 0) {  // dot and mass: 0 without kMass
          store(tile.sum + i, sum);
          store(tile.dot + i, dot);
          store(tile.mass + i, mass);
        } else {
          add(tile.sum + i, tile.sum_lost + i, sum);
          if constexpr (kMass) {
            add(tile.dot + i, tile.dot_lost + i, dot);
            add(tile.mass + i, tile.mass_lost + i, mass);
          }
        }
      }
    });
  }

  // Whether what rounding takes from a group's sum is kept: of thousands of groups it would be five
  // digits of float32, of a few it is none that the groups themselves have not lost.
  bool keeps_lost() const { return p.classes > 16 * kGroup; }

  // *total += v
  void add(A* total, A* lost, V v) const {
    if (!keeps_lost()) return store(total, load(total) + v);
    const V before = load(total), more = v - load(lost);
    const V after = before + more;
    store(lost, (after - before) - more);
    store(total, after);
  }

  // Classes in groups whose sums stay in registers.
  static constexpr int64_t kGroup = 16;
  template <class F>
  static void for_groups(int64_t c0, int64_t c1, const F& group) {
    for (int64_t g0 = c0; g0 < c1; g0 += kGroup) group(g0, g0 + kGroup < c1 ? g0 + kGroup : c1);
  }

  void tile_forward(const Tile& tile, double* loss_sum) const {
    const A kInfinity = static_cast<A>(__builtin_inff());
    const int64_t n = padded(tile);
    for (int64_t i = 0; i < n; i += kL) store(tile.max + i, splat<A>(-kInfinity));
    for (int64_t i = 0; i < n && keeps_lost(); i += kL) {  // else they do not crowd L1
      store(tile.sum_lost + i, V{});
      if constexpr (kMass) {
        store(tile.dot_lost + i, V{});
        store(tile.mass_lost + i, V{});
      }
    }
    for (int64_t c0 = 0; c0 < p.classes; c0 += p.tile_classes) {
      const int64_t c1 = c0 + p.tile_classes < p.classes ? c0 + p.tile_classes : p.classes;
      load_block(tile, c0, c1);
      tile_sweep(tile, c0, c1);
    }
    if constexpr (kLabels) {
      const RowOffsets rows = offsets_of(tile, p.logits_strides);
      for (int64_t i = 0; i < tile.rows; ++i) {
        const int64_t y = tile.y[i];
        if (y < 0) continue;
        const A true_logit = to_acc(logits[rows(i) + y * p.logits_strides.cls]);
        const A d = true_logit - tile.max[i];
        const A term = true_mass(y) * d;
        tile.dot[i] += d == 0 ? A(0) : term;  // an infinite weight's inf * 0 is no NaN
        tile.mass[i] = smoothing_mass + true_mass(y);
      }
    }
    for (int64_t i = 0; i < n; i += kL) {
      // A whole row of -inf has no softmax: NaN, as in torch.
      const V sum =
          load(tile.max + i) == -kInfinity ? V{} + (kInfinity - kInfinity) : load(tile.sum + i);
      const V loss = load(tile.mass + i) * log_positive(sum) - load(tile.dot + i);
      store(tile.sum + i, sum);
      store(tile.scratch + i, masked(loss, tile, i));
    }
    *loss_sum = sum_of_rows(tile.scratch, tile.rows);
    if (is_doubtful(*loss_sum, 0.0)) {
      for (int64_t i = 0; i < tile.rows; ++i) {
        if (!is_doubtful(tile.scratch[i], tile.sum[i])) continue;
        tile.scratch[i] =
            static_cast<A>(loss_by_class(tile.first + i, tile.y[i], tile.max[i], tile.sum[i]));
      }
      *loss_sum = sum_of_rows(tile.scratch, tile.rows);
    }
    const size_t bytes = sizeof(A) * tile.rows;
    if (row_loss != nullptr) memcpy(row_loss + tile.first, tile.scratch, bytes);
  }

  static double sum_of_rows(const A* losses, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(losses[i]);
    return sum;
  }

  // Ignored rows become exactly 0, also where their logits are NaN.
  static V masked(V v, const Tile& tile, int64_t i) {
    if constexpr (!kLabels) return v;
    IntVec<A> live;
    memcpy(&live, tile.live + i, sizeof(live));
    return bit_cast<V>(bit_cast<IntVec<A>>(v) & live);
  }

  void tile_gradient(const Tile& tile) const {
    const int64_t w = tile.width, n = padded(tile);
    const bool exp_is_there = p.tile_classes >= p.classes;
    A* const true_exp = tile.scratch;
    const V upstream = splat<A>(up);  // a member would be read again after every store
    for (int64_t i = 0; i < n; i += kL)
      store(tile.factor + i, load(tile.mass + i) / load(tile.sum + i));
    for (int64_t c0 = 0; c0 < p.classes; c0 += p.tile_classes) {
      const int64_t c1 = c0 + p.tile_classes < p.classes ? c0 + p.tile_classes : p.classes;
      if (!exp_is_there) {
        load_block(tile, c0, c1);
        for (int64_t c = 0; c < c1 - c0; ++c)
          for (int64_t i = 0; i < n; i += kL)
            store(tile.x + c * w + i,
                  exp_nonpositive(load(tile.x + c * w + i) - load(tile.max + i)));
      }
      if constexpr (kLabels) {
        for (int64_t i = 0; i < tile.rows; ++i)
          if (c0 <= tile.y[i] && tile.y[i] < c1) true_exp[i] = tile.x[(tile.y[i] - c0) * w + i];
      }
      for (int64_t c = c0; c < c1; ++c) {
        A* const x = tile.x + (c - c0) * w;
        for (int64_t i = 0; i < n; i += kL) {
          V g = load(tile.factor + i) * load(x + i);
          if constexpr (kMass) g -= tile_mass(tile, c, c0, i);
          store(x + i, masked(upstream * g, tile, i));
        }
      }
      if constexpr (kLabels) {
        for (int64_t i = 0; i < tile.rows; ++i) {
          const int64_t y = tile.y[i];
          if (c0 <= y && y < c1)
            tile.x[(y - c0) * w + i] = true_gradient(tile.factor[i] * true_exp[i], y);
        }
      }
      unpack(tile.x, tile, static_cast<T*>(p.grad), p.grad_strides, c0, c1);
    }
  }

  void tiles(int64_t begin, int64_t end, void* memory) const {
    for (int64_t task = begin; task < end; ++task) {
      const Tile tile = tile_at(task, memory);
      for (int64_t i = 0; i < padded(tile); ++i) {
        tile.y[i] = kLabels && i < tile.rows ? label(tile.first + i) : -1;
        tile.live[i] = tile.y[i] < 0 ? 0 : -1;
      }
      double loss_sum = 0;
      tile_forward(tile, &loss_sum);
      p.partial_loss[task] = loss_sum;
      if (p.grad != nullptr) tile_gradient(tile);
    }
  }
};

// Calls run(CrossEntropy<...>) with the combination that the params ask for.
template <class T, class TT, class F>
void with_options(const CrossEntropyParams& p, const F& run) {
  const bool mass = !kIsClassIndex<TT> || p.uniform > 0;
  if (mass && p.true_masses != nullptr) {
    run(CrossEntropy<T, TT, true, true>(p));
  } else if (mass) {
    run(CrossEntropy<T, TT, true, false>(p));
  } else if constexpr (kIsClassIndex<TT>) {
    run(CrossEntropy<T, TT, false, false>(p));
  }
}

template <class T, class F>
void with_target(const CrossEntropyParams& p, const F& run) {
  if (p.labels != nullptr) {
    with_options<T, ClassIndex>(p, run);
  } else if (p.target_type == p.logits_type) {
    with_options<T, T>(p, run);
  } else {  // the launcher lets float32 probabilities through with half precision logits
    with_options<T, Acc<T>>(p, run);
  }
}

template <class F>
void dispatch(const CrossEntropyParams& p, const F& run) {
  with_element(p.logits_type,
               [&](auto element) { with_target<typename decltype(element)::type>(p, run); });
}

}  // namespace

void cross_entropy_rows(const CrossEntropyParams& p, int64_t begin, int64_t end, void* scratch) {
  dispatch(p, [=](const auto& op) { op.rows(begin, end, scratch); });
}
void cross_entropy_tiles(const CrossEntropyParams& p, int64_t begin, int64_t end, void* scratch) {
  dispatch(p, [=](const auto& op) { op.tiles(begin, end, scratch); });
}
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
        T* const row =
            grad + r / p.positions * p.strides.batch + r % p.positions * p.strides.position;
        by_one(row, p.classes, factors[r]);
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

LabelCount cross_entropy_count_labels(const int64_t* labels, int64_t count, int64_t classes,
                                      int64_t ignore_index) {
  int64_t valid = 0, out_of_range = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t used = labels[i] != ignore_index;
    const int64_t wrong = static_cast<uint64_t>(labels[i]) >= static_cast<uint64_t>(classes);
    valid += used;
    out_of_range += used & wrong;
  }
  return {valid, out_of_range};
}
void cross_entropy_segment_stats(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  dispatch(p, [=](const auto& op) { op.segment_stats(begin, end); });
}
void cross_entropy_merge_segments(const CrossEntropyParams& p) {
  dispatch(p, [](const auto& op) { op.merge_segments(); });
}
void cross_entropy_segment_gradients(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  dispatch(p, [=](const auto& op) { op.segment_gradients(begin, end); });
}

}  // namespace FASTOPT_LEVEL
}  // namespace fastopt
