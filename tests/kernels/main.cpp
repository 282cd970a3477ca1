// The CPU kernels alone, without torch or Python: every entry point of
// csrc/cpu/cross_entropy/params.h and csrc/cpu/sgd.h at the SIMD level of this machine
// (FASTOPT_SIMD caps it), so that they can be tested where torch is not, as under an emulator of
// another machine. Values are compared with the formula in long double; an error is allowed as many
// roundings as the kernel's chain of operations has. Prints what failed and how many comparisons
// were made; exits with 1 if any failed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/cross_entropy/params.h"
#include "cpu/sgd.h"

extern "C" const char* fastopt_simd_level();

namespace {

using namespace fastopt;
using Exact = long double;

int64_t checks = 0, failures = 0;

// `what` is called to tell what is wrong.
template <class F>
void check(bool right, const F& what) {
  ++checks;
  if (right || ++failures > 20) return;
  std::printf("wrong: %s\n", std::string(what()).c_str());
}

// ---- storage types, by arithmetic of our own ----

template <class T>
struct Format;  // digits of the significand, the smallest normal exponent
template <>
struct Format<float> {
  static constexpr int digits = 24, least = -126;
};
template <>
struct Format<double> {
  static constexpr int digits = 53, least = -1022;
};
template <>
struct Format<BFloat16> {
  static constexpr int digits = 8, least = -126;
};
template <>
struct Format<Half> {
  static constexpr int digits = 11, least = -14;
};

Exact value_of(float x) { return x; }
Exact value_of(double x) { return x; }
template <class T>
Exact value_of(T x) {
  constexpr int fraction = Format<T>::digits - 1, special = (1 << (15 - fraction)) - 1;
  const int exponent = (x.bits & 0x7fff) >> fraction, bits = x.bits & ((1 << fraction) - 1);
  Exact magnitude;
  if (exponent == special) {
    magnitude = bits == 0 ? std::numeric_limits<Exact>::infinity()
                          : std::numeric_limits<Exact>::quiet_NaN();
  } else {
    const int whole = exponent == 0 ? bits : bits | (1 << fraction);
    magnitude = std::ldexp(Exact(whole), std::max(exponent, 1) - 1 + Format<T>::least - fraction);
  }
  return (x.bits & 0x8000) != 0 ? -magnitude : magnitude;
}

// The distance from |x| to the next number of T.
template <class T>
Exact spacing(Exact x) {
  int exponent = Format<T>::least + 1;
  if (x != 0) std::frexp(x, &exponent);
  return std::ldexp(Exact(1), std::max(exponent - 1, Format<T>::least) - Format<T>::digits + 1);
}

// The nearest number of T, ties to even, as a number.
template <class T>
Exact rounded(Exact x) {
  if (!std::isfinite(x) || x == 0) return x;
  const Exact step = spacing<T>(x);
  const Exact result = std::nearbyint(x / step) * step;
  const Exact largest = std::ldexp(Exact(2), Format<T>::least == -14 ? 15 : 1 - Format<T>::least);
  return std::fabs(result) >= largest ? std::copysign(HUGE_VALL, x) : result;
}

template <class T>
T stored(Exact x) {
  return static_cast<T>(x);
}
template <class T>
T stored_bits(Exact x) {
  constexpr int fraction = Format<T>::digits - 1;
  const Exact magnitude = std::fabs(rounded<T>(x));
  uint16_t bits = std::signbit(x) ? 0x8000 : 0;
  if (std::isinf(magnitude)) {
    bits |= ((1 << (15 - fraction)) - 1) << fraction;
  } else if (magnitude != 0) {
    const Exact step = spacing<T>(magnitude);
    int exponent;
    std::frexp(step, &exponent);
    const int above = exponent - 1 + Format<T>::digits - 1 - Format<T>::least;  // 0: least normal
    // A whole number of steps; a normal number's leading bit adds 1 to the exponent field.
    bits |= static_cast<uint16_t>((above << fraction) + static_cast<int>(magnitude / step));
  }
  return {bits};
}
template <>
BFloat16 stored(Exact x) {
  return stored_bits<BFloat16>(x);
}
template <>
Half stored(Exact x) {
  return stored_bits<Half>(x);
}

template <class T>
constexpr Element kElement = Element::float32;
template <>
constexpr Element kElement<double> = Element::float64;
template <>
constexpr Element kElement<BFloat16> = Element::bfloat16;
template <>
constexpr Element kElement<Half> = Element::float16;

std::mt19937_64 generator(1);

// Whole-number arithmetic, so that every machine draws the same.
double uniform(double from, double to) {
  return from + (to - from) * static_cast<double>(generator() >> 11) * 0x1p-53;
}

// ---- cross-entropy ----

enum class Way { rows, uncached_rows, segments, tiles };

struct Case {
  Way way;
  int64_t batch, classes, positions;
  bool strided;  // classes outermost, as in (N, C, d)
  bool probabilities, weighted;
  double smoothing;
  double spread;  // logits in [-spread, spread]
  std::string name;
};

template <class T, class TT>
class CrossEntropyCase {
  using A = Acc<T>;
  const Case& c;
  const int64_t rows = c.batch * c.positions;
  Strides strides;
  std::vector<T> logits;
  std::vector<TT> probabilities;
  std::vector<int64_t> labels;
  std::vector<A> own, shared;  // weighted masses
  std::vector<A> row_loss;
  CrossEntropyParams p{};
  // Of the formula.
  struct Row {
    Exact max, sum, dot, mass;
    Exact argument;  // sum of exp(d) |d| / sum: by so many roundings the sum is off
    Exact size;      // sum of q |d|
  };
  std::vector<Row> exact;
  std::vector<Exact> exps;  // exp(logit - max)
  std::string what;

 public:
  explicit CrossEntropyCase(const Case& of, const std::string& types) : c(of) {
    what = c.name + " " + types;
    strides = c.strided ? Strides{c.classes * c.positions, c.positions, 1}
                        : Strides{c.classes * c.positions, 1, c.classes};
    const int64_t count = rows * c.classes;
    for (int64_t i = 0; i < count; ++i) logits.push_back(stored<T>(uniform(-c.spread, c.spread)));
    p.batch = c.batch;
    p.classes = c.classes;
    p.positions = c.positions;
    p.logits_type = kElement<T>;
    p.target_type = kElement<TT>;
    p.logits = logits.data();
    p.logits_strides = p.target_strides = p.grad_strides = strides;
    p.ignore_index = -100;
    p.keep = 1 - c.smoothing;
    p.uniform = c.smoothing / static_cast<double>(c.classes);
    p.constants = {0.75, c.smoothing, 0.0};
    if (c.weighted) {
      p.constants.smoothing_mass = 0;
      for (int64_t k = 0; k < c.classes; ++k) {
        const A w = static_cast<A>(uniform(0, 2));
        own.push_back(static_cast<A>(p.keep) * w);
        shared.push_back(static_cast<A>(p.uniform) * w);
        p.constants.smoothing_mass += static_cast<double>(shared.back());
      }
      p.true_masses = own.data();
      p.smoothing_masses = shared.data();
    }
    if (c.probabilities) {
      for (int64_t i = 0; i < count; ++i)
        probabilities.push_back(stored<TT>(uniform(0, 2.0 / static_cast<double>(c.classes))));
      p.probabilities = probabilities.data();
    } else {
      for (int64_t r = 0; r < rows; ++r)
        labels.push_back(r % 3 == 1 ? -100 : static_cast<int64_t>(generator() % c.classes));
      p.labels = labels.data();
    }
    row_loss.resize(rows);
    exps.resize(count);
    for (int64_t r = 0; r < rows; ++r) exact.push_back(exact_row(r));
  }

  void run() {
    compute(/*with_gradient=*/false);
    compute(/*with_gradient=*/true);
  }

 private:
  int64_t offset(int64_t row, int64_t k) const {
    return row / c.positions * strides.batch + row % c.positions * strides.position +
           k * strides.cls;
  }
  bool ignored(int64_t row) const { return !c.probabilities && labels[row] == -100; }

  // q of the formula, from the numbers that the kernel is given.
  Exact mass(int64_t row, int64_t k) const {
    const Exact keep = c.weighted ? Exact(own[k]) : Exact(static_cast<A>(p.keep));
    const Exact even = c.weighted ? Exact(shared[k]) : Exact(static_cast<A>(p.uniform));
    const Exact share = c.smoothing > 0 ? even : Exact(0);
    if (c.probabilities) return keep * value_of(probabilities[offset(row, k)]) + share;
    return (labels[row] == k ? keep : Exact(0)) + share;
  }

  Exact logit(int64_t row, int64_t k) const { return value_of(logits[offset(row, k)]); }

  Row exact_row(int64_t r) {
    Row row{-HUGE_VALL, 0, 0, 0, 0, 0};
    for (int64_t k = 0; k < c.classes; ++k) row.max = std::max(row.max, logit(r, k));
    for (int64_t k = 0; k < c.classes; ++k) {
      const Exact d = logit(r, k) - row.max, e = std::exp(d), q = mass(r, k);
      exps[offset(r, k)] = e;
      row.sum += e;
      row.dot += q * d;
      row.mass += q;
      row.argument -= e * d;
      row.size -= q * d;
    }
    row.argument /= row.sum;
    return row;
  }

  void compute(bool with_gradient) {
    std::vector<T> grad(with_gradient ? logits.size() : 0, stored<T>(7));
    p.grad = with_gradient ? grad.data() : nullptr;
    p.row_loss = row_loss.data();
    const double total = launch();
    compare(grad, total);
  }

  double launch() {
    std::vector<double> partial;
    const auto with_scratch = [&](int64_t elements, const auto& body) {
      std::vector<A> memory(elements + 64);
      const auto at = reinterpret_cast<uintptr_t>(memory.data());
      body(reinterpret_cast<void*>((at + 63) / 64 * 64));
    };
    if (c.way == Way::tiles) {
      p.tile_rows = 64;
      p.tile_classes = std::min<int64_t>(c.classes, 40);
      const int64_t tasks =
          p.positions >= p.tile_rows ? p.batch * ((p.positions + 63) / 64) : (rows + 63) / 64;
      partial.resize(tasks);
      p.partial_loss = partial.data();
      const int64_t row_arrays = 10 + 8 / static_cast<int64_t>(sizeof(A));
      with_scratch(64 * row_arrays + 2 * p.tile_classes * (64 + 64), [&](void* scratch) {
        FASTOPT_DISPATCH(cross_entropy_tiles, p, 0, tasks, scratch);
      });
    } else if (c.way == Way::segments) {
      p.segments = 3;
      std::vector<RowStats<double>> stats(rows * p.segments);
      std::vector<RowEnd<double>> ends(rows);
      partial.resize(rows);
      p.partial_loss = partial.data();
      p.segment_stats = stats.data();
      p.row_ends = ends.data();
      FASTOPT_DISPATCH(cross_entropy_segment_stats, p, 0, rows * p.segments);
      FASTOPT_DISPATCH(cross_entropy_merge_segments, p);
      if (p.grad != nullptr)
        FASTOPT_DISPATCH(cross_entropy_segment_gradients, p, 0, rows * p.segments);
    } else {
      p.rows_per_task = 3;
      p.caches_exps = c.way == Way::rows;
      const int64_t tasks = (rows + 2) / 3;
      partial.resize(tasks);
      p.partial_loss = partial.data();
      with_scratch(2 * c.classes + 64, [&](void* scratch) {
        FASTOPT_DISPATCH(cross_entropy_rows, p, 0, tasks, scratch);
      });
    }
    double total = 0;
    for (const double part : partial) total += part;
    return total;
  }

  // Relative errors in units of one rounding, 2^-digits.
  static constexpr int kExp =
      4;  // of exp itself: polynomial, last steps, and its argument's product
  static constexpr int kTerm =
      4;  // of q (x - max): q's product and sum, the difference, the product
  static constexpr int kStore = 4;  // after the sum: a / sum, the products with up and exp, - q
  // Additions on the way of one term into its sum: a chunk's at most 1024 / 64 vectors and the
  // lanes (rows), groups of 16 (tiles), a few more for the pairs, parts and tails.
  int64_t additions() const { return 30 + (c.way == Way::tiles ? c.classes / 16 : 0); }

  // grad: empty where it was not asked for.
  void compare(const std::vector<T>& grad, double total) const {
    const Exact u = std::ldexp(Exact(1), -Format<A>::digits);
    Exact exact_total = 0, total_budget = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const auto named = [&](const char* part) {
        return [this, r, part] { return what + ", row " + std::to_string(r) + ": " + part; };
      };
      if (ignored(r)) {
        check(row_loss[r] == 0, named("the loss of an ignored row"));
        for (int64_t k = 0; k < c.classes && !grad.empty(); ++k)
          check(value_of(grad[offset(r, k)]) == 0, named("the gradient of an ignored row"));
        continue;
      }
      const Row& row = exact[r];
      const Exact log_sum = std::log(row.sum);
      const Exact sum_error = (kExp + additions() + row.argument) * u;
      const Exact loss = row.mass * log_sum - row.dot;
      const Exact budget = row.mass * (sum_error + 4 * u * (1 + log_sum)) +
                           (kTerm + additions()) * u * (row.size + row.mass * log_sum);
      near<A>(row_loss[r], loss, budget, named("loss"));
      exact_total += loss;
      total_budget += budget + u * std::fabs(loss);
      if (grad.empty()) continue;
      for (int64_t k = 0; k < c.classes; ++k) {
        const int64_t at = offset(r, k);
        const Exact distance = row.max - logit(r, k), up = p.constants.upstream;
        const Exact softmax = row.mass * exps[at] / row.sum, q = mass(r, k);
        const Exact relative = sum_error + (kExp + kStore + additions() + distance) * u;
        near<T>(grad[at], up * (softmax - q),
                std::fabs(up) * (softmax * relative + (kTerm + kStore) * u * q),
                named("gradient of a logit"));
      }
    }
    check(std::fabs(total - exact_total) <= total_budget, [this] { return what + ": all losses"; });
  }

  // |ours - exact| within the budget and one rounding to S. Below its smallest normal number exp
  // is 0.
  template <class S, class F>
  static void near(S ours, Exact exact, Exact budget, const F& named) {
    const Exact slack =
        budget + spacing<S>(std::fabs(exact) + budget) / 2 + std::ldexp(Exact(4), Format<A>::least);
    const Exact got = value_of(ours);
    check(std::fabs(got - exact) <= slack, [&] {
      char numbers[200];
      std::snprintf(numbers, sizeof(numbers), ": %.17Lg, exactly %.17Lg, %.3Lg times the budget",
                    got, exact, std::fabs(got - exact) / slack);
      return named() + numbers;
    });
  }
};

template <class T>
void cross_entropy_of(const std::string& type) {
  const Case layouts[] = {
      {Way::rows, 7, 65, 1, false, false, false, 0, 4, "rows 7 x 65"},
      {Way::rows, 3, 1000, 1, false, false, false, 0, 4, "rows 3 x 1000"},
      {Way::rows, 2, 1500, 1, false, false, false, 0, 30, "rows 2 x 1500, wide"},
      {Way::uncached_rows, 1, 1100, 2, false, false, false, 0, 4, "uncached rows 2 x 1100"},
      {Way::segments, 2, 3331, 1, false, false, false, 0, 4, "segments 2 x 3331"},
      {Way::tiles, 70, 1, 1, false, false, false, 0, 4, "tiles 70 x 1"},
      {Way::tiles, 131, 10, 1, false, false, false, 0, 4, "tiles 131 x 10"},
      {Way::tiles, 2, 21, 77, true, false, false, 0, 4, "tiles 2 x 21 x 77"},
      {Way::tiles, 7, 50, 10, true, false, false, 0, 4, "tiles 7 x 50 x 10, across entries"},
      {Way::tiles, 1, 90, 64, true, false, false, 0, 40, "tiles 1 x 90 x 64, wide"},
  };
  for (Case layout : layouts) {
    for (const bool weighted : {false, true}) {
      for (const double smoothing : {0.0, 0.1}) {
        layout.weighted = weighted;
        layout.smoothing = smoothing;
        const std::string options =
            type + (weighted ? " weighted" : "") + (smoothing > 0 ? " smoothed" : "");
        layout.probabilities = false;
        CrossEntropyCase<T, T>(layout, options + " labels").run();
        layout.probabilities = true;
        CrossEntropyCase<T, T>(layout, options + " probabilities").run();
        if (!std::is_same<T, Acc<T>>::value)
          CrossEntropyCase<T, Acc<T>>(layout, options + " float32 probabilities").run();
      }
    }
  }
}

void label_counts() {
  std::vector<int64_t> labels;
  for (int64_t i = 0; i < 1003; ++i) labels.push_back(i % 7 == 0 ? -100 : i % 11 - 1);
  LabelCount expected{0, 0};
  for (const int64_t y : labels) {
    expected.valid += y != -100;
    expected.out_of_range += y != -100 && (y < 0 || y >= 9);
  }
  const LabelCount count =
      FASTOPT_DISPATCH(cross_entropy_count_labels, labels.data(), 1003, 9, -100);
  check(count.valid == expected.valid, [] { return "valid labels"; });
  check(count.out_of_range == expected.out_of_range, [] { return "labels out of range"; });
}

// ---- SGD ----

// The machines whose kernels have no fused multiply-add round its product too, as torch does there.
bool fuses() {
#if defined(__x86_64__)
  return std::strcmp(fastopt_simd_level(), "baseline") != 0;
#else
  return true;
#endif
}

template <class A>
A multiply_add(A a, A b, A c) {
  if (fuses()) return std::fma(a, b, c);
  const A product = a * b;  // this file is compiled without contraction
  return product + c;
}

template <class T>
void sgd_of(const std::string& type) {
  using A = Acc<T>;
  struct Options {
    double momentum, dampening, weight_decay;
    bool nesterov, maximize, first, unscale;
  };
  const Options all_options[] = {
      {0, 0, 0, false, false, false, false},       {0, 0, 0.01, false, true, false, true},
      {0.9, 0, 0, false, false, true, false},      {0.9, 0, 0, false, false, false, false},
      {0.9, 0.3, 0.01, false, false, false, true}, {0.9, 0, 0.01, true, true, false, false},
      {0.9, 0, 0.01, true, false, true, true},
  };
  for (const Options& o : all_options) {
    for (const int64_t numel : {1, 3, 64, 127, 1000}) {
      std::vector<T> param, grad, buffer;
      for (int64_t i = 0; i < numel; ++i) {
        // Small ones too, for the subnormal numbers of half precision.
        const double size = i % 3 == 0 ? 1e-6 : 1;
        param.push_back(stored<T>(uniform(-size, size)));
        grad.push_back(stored<T>(uniform(-size, size)));
        buffer.push_back(stored<T>(uniform(-size, size)));
      }
      std::vector<T> p = param, g = grad, b = buffer;
      const SgdGroup group = {{{0.1}, {o.momentum}, {o.dampening}, {o.weight_decay}},
                              {},
                              o.nesterov,
                              o.maximize,
                              o.momentum != 0,
                              SgdServed::all};
      SgdRow row{};
      row.param = p.data();
      row.grad = g.data();
      row.momentum_buffer = o.momentum != 0 ? b.data() : nullptr;
      row.numel = numel;
      row.element = static_cast<SgdElement>(kElement<T>);
      row.first_step = o.first;
      const SgdStep step = {&row, 1, &group, o.unscale, 1.0 / 3};
      FASTOPT_DISPATCH(sgd_blocks, step, 0, 0, (numel + kSgdBlock - 1) / kSgdBlock);
      for (int64_t i = 0; i < numel; ++i) {
        A x = static_cast<A>(value_of(param[i])), d = static_cast<A>(value_of(grad[i]));
        A v = static_cast<A>(value_of(buffer[i]));
        if (o.unscale) d *= static_cast<A>(1.0 / 3);
        const T unscaled = stored<T>(d);
        if (o.maximize) d = -d;
        if (o.weight_decay != 0) d = multiply_add(static_cast<A>(o.weight_decay), x, d);
        if (o.momentum != 0) {
          const A kept = static_cast<A>(o.momentum) * v;
          v = o.first ? d : multiply_add(static_cast<A>(1 - o.dampening), d, kept);
          d = o.nesterov ? multiply_add(static_cast<A>(o.momentum), v, d) : v;
        }
        x = multiply_add(static_cast<A>(-0.1), d, x);
        const auto named = [&](const char* part) {
          return [&, part] {
            return "SGD " + type + ", element " + std::to_string(i) + " of " +
                   std::to_string(numel) + ", options " + std::to_string(&o - all_options) + ": " +
                   part;
          };
        };
        const auto same = [](T one, T other) { return std::memcmp(&one, &other, sizeof(T)) == 0; };
        check(same(p[i], stored<T>(x)), named("parameter"));
        check(same(g[i], unscaled), named("gradient"));
        check(same(b[i], o.momentum != 0 ? stored<T>(v) : buffer[i]), named("buffer"));
      }
    }
  }
}

// Every number of a half precision type through a step that changes nothing, and through one that
// lands half way between two numbers, above and below.
template <class T>
void conversions_of(const std::string& type) {
  std::vector<T> all;
  for (uint32_t bits = 0; bits < 0x10000; ++bits)
    if (!std::isnan(value_of(T{static_cast<uint16_t>(bits)})))
      all.push_back(T{static_cast<uint16_t>(bits)});
  const int64_t numel = static_cast<int64_t>(all.size());
  for (const double part : {0.0, 0.25, 0.5, 0.75}) {
    std::vector<T> p = all, g;
    for (const T x : all) {
      const Exact size = std::fabs(value_of(x));
      const bool moves = std::isfinite(size) && size >= std::ldexp(Exact(1), Format<T>::least + 10);
      g.push_back(stored<T>(moves ? -spacing<T>(size) : Exact(0)));
    }
    const SgdGroup group = {{{part}}, {}, false, false, false, SgdServed::all};
    SgdRow row{};
    row.param = p.data();
    row.grad = g.data();
    row.numel = numel;
    row.element = static_cast<SgdElement>(kElement<T>);
    const SgdStep step = {&row, 1, &group, false, 1};
    FASTOPT_DISPATCH(sgd_blocks, step, 0, 0, (numel + kSgdBlock - 1) / kSgdBlock);
    for (int64_t i = 0; i < numel; ++i) {
      const float moved = static_cast<float>(value_of(all[i]) - Exact(part) * value_of(g[i]));
      const T expected = moved == 0 ? all[i] : stored<T>(moved);
      check(p[i].bits == expected.bits,
            [&] { return type + " of bits " + std::to_string(all[i].bits); });
    }
  }
}

}  // namespace

int main() {
  cross_entropy_of<float>("float32");
  cross_entropy_of<double>("float64");
  cross_entropy_of<BFloat16>("bfloat16");
  cross_entropy_of<Half>("float16");
  label_counts();
  sgd_of<float>("float32");
  sgd_of<double>("float64");
  sgd_of<BFloat16>("bfloat16");
  sgd_of<Half>("float16");
  conversions_of<BFloat16>("bfloat16");
  conversions_of<Half>("float16");
  std::printf("%s: %lld of %lld checks passed\n", fastopt_simd_level(),
              static_cast<long long>(checks - failures), static_cast<long long>(checks));
  return failures == 0 ? 0 : 1;
}
