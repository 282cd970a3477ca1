// Classes strided, or few: classes x rows are copied into a small scratch block and the lanes run
// over rows. task = a tile of rows. Memory sees one read and one write per logit here too.
#include "common.h"

namespace fastopt {
namespace FASTOPT_LEVEL {
namespace {

template <class T, class TT, bool kMass, bool kWeight>
struct Tiles : CrossEntropy<T, TT, kMass, kWeight> {
  using Base = CrossEntropy<T, TT, kMass, kWeight>;
  using Base::Base, Base::kL, Base::kLabels, Base::p, Base::logits, Base::probabilities;
  using Base::keep, Base::uniform, Base::true_masses, Base::smoothing_masses, Base::constants;
  using Base::label, Base::loss_by_class, Base::offset, Base::row_loss;
  using Base::true_gradient, Base::true_mass;
  using typename Base::A, typename Base::V;

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
    const Tiles& op;
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
    return probability_mass(load(tile.q + (c - c0) * tile.width + i), own, shared);
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
        // No NaN of an infinite weight's inf * 0; a branch, so that it is a fused multiply-add in
        // every instantiation: true_term is one where the compiler chooses.
        if (d != 0) tile.dot[i] += true_mass(y) * d;
        tile.mass[i] = constants.smoothing_mass + true_mass(y);
      }
    }
    for (int64_t i = 0; i < n; i += kL) {
      // A whole row of -inf has no softmax: NaN, as in torch.
      const V sum =
          load(tile.max + i) == -kInfinity ? V{} + (kInfinity - kInfinity) : load(tile.sum + i);
      const RowStats<V> row{load(tile.max + i), sum, load(tile.dot + i), load(tile.mass + i)};
      const RowEnd<V> end = end_row(row, log_positive(sum), constants);
      store(tile.sum + i, sum);
      store(tile.scratch + i, masked(end.loss, tile, i));
      if (p.grad != nullptr) store(tile.factor + i, end.factor);
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
    const V upstream = splat<A>(constants.upstream);  // a member would be read after every store
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

}  // namespace

void cross_entropy_tiles(const CrossEntropyParams& p, int64_t begin, int64_t end, void* scratch) {
  with_kernel<Tiles>(p, [=](const auto& kernel) { kernel.tiles(begin, end, scratch); });
}

}  // namespace FASTOPT_LEVEL
}  // namespace fastopt
