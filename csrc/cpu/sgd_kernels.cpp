// SGD on CPU: one pass over parameter, gradient and momentum buffer. Moves 20 bytes per float32
// parameter with momentum (reads three, writes two), 12 without: nothing is stored in between.
// Half precision is loaded to float32 and rounded once per stored value.
#include "rules/sgd.h"
#include "sgd.h"
#include "simd.h"

namespace fastopt {
namespace FASTOPT_LEVEL {
namespace {

// float32 and float64 go through memory in vectors of at most 32 bytes: with 64 a large step takes
// 5 to 10 % longer (25M parameters, EPYC with AVX-512, one thread). Half precision, which has to be
// converted, takes 25 % less with 64.
constexpr int kStreamBytes = kVectorBytes < 32 ? kVectorBytes : 32;
typedef float Floats __attribute__((vector_size(kStreamBytes)));
typedef double Doubles __attribute__((vector_size(kStreamBytes)));

template <class V, class T>
FASTOPT_INLINE V read_plain(const T* from) {
  V v;
  memcpy(&v, from, sizeof(V));
  return v;
}
FASTOPT_INLINE Floats read(const float* from) { return read_plain<Floats>(from); }
FASTOPT_INLINE Doubles read(const double* from) { return read_plain<Doubles>(from); }
FASTOPT_INLINE Vec<float> read(const BFloat16* from) { return load(from); }
FASTOPT_INLINE Vec<float> read(const Half* from) { return load(from); }

FASTOPT_INLINE void write(float* to, Floats v) { memcpy(to, &v, sizeof(v)); }
FASTOPT_INLINE void write(double* to, Doubles v) { memcpy(to, &v, sizeof(v)); }
FASTOPT_INLINE void write(BFloat16* to, Vec<float> v) { store(to, v); }
FASTOPT_INLINE void write(Half* to, Vec<float> v) { store(to, v); }

// What a vector of T is computed in.
template <class T>
using Lanes = decltype(read(static_cast<const T*>(nullptr)));
template <class T>
constexpr int kCount = sizeof(Lanes<T>) / sizeof(Acc<T>);

// Multiply-adds by name instead of by contraction, which would be free to fuse the product that
// the rule wants rounded. Where the machine has none, torch's kernels round twice as well.
struct Math {
#if defined(__FMA__)
  static inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static inline Doubles fma(Doubles a, Doubles b, Doubles c) { return _mm256_fmadd_pd(a, b, c); }
#if defined(__AVX512F__)
  static inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
    return _mm512_fmadd_ps(a, b, c);
  }
#endif
#elif defined(__ARM_FEATURE_FMA)
  static inline Floats fma(Floats a, Floats b, Floats c) {
    return bit_cast<Floats>(
        vfmaq_f32(bit_cast<float32x4_t>(c), bit_cast<float32x4_t>(a), bit_cast<float32x4_t>(b)));
  }
  static inline Doubles fma(Doubles a, Doubles b, Doubles c) {
    return bit_cast<Doubles>(
        vfmaq_f64(bit_cast<float64x2_t>(c), bit_cast<float64x2_t>(a), bit_cast<float64x2_t>(b)));
  }
#elif defined(__FP_FAST_FMA)
  template <class V>
  static inline V fma(V a, V b, V c) {
    for (unsigned i = 0; i < sizeof(V) / sizeof(a[0]); ++i) c[i] = lane(a[i], b[i], c[i]);
    return c;
  }
  static inline float lane(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static inline double lane(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
  template <class V>
  static inline V fma(V a, V b, V c) {
    return a * b + c;
  }
#endif
};

// What all elements of a parameter have in common.
template <class T>
struct Update {
  SgdOptions<Lanes<T>> options;
  Lanes<T> inv_scale;
  bool nesterov, decay, maximize, unscale;
};

// One vector. Loads come before stores: a gradient may be its own parameter.
template <Momentum kMomentum, bool kNesterov, bool kWeightDecay, class T>
FASTOPT_INLINE void update_vector(T* param, T* grad, T* buffer, const Update<T>& update) {
  Lanes<T> p = read(param);
  Lanes<T> g = read(grad);
  Lanes<T> b{};
  if constexpr (kMomentum == Momentum::running) b = read(buffer);
  if (update.unscale) {
    g *= update.inv_scale;
    write(grad, g);
  }
  if (update.maximize) g = -g;
  sgd_element<kMomentum, kNesterov, kWeightDecay, Math>(p, g, b, update.options);
  if constexpr (kMomentum != Momentum::none) write(buffer, b);
  write(param, p);
}

// By value: what lies in a register cannot be changed by a store.
template <Momentum kMomentum, bool kNesterov, bool kWeightDecay, class T>
void update_all(T* param, T* grad, T* buffer, int64_t numel, const Update<T> update) {
  int64_t i = 0;
  for (; i + kCount<T> <= numel; i += kCount<T>) {
    update_vector<kMomentum, kNesterov, kWeightDecay>(param + i, grad + i, buffer + i, update);
  }
  if (i == numel) return;
  T p[kCount<T>] = {};
  T g[kCount<T>] = {};
  T b[kCount<T>] = {};
  const size_t bytes = static_cast<size_t>(numel - i) * sizeof(T);
  memcpy(p, param + i, bytes);
  memcpy(g, grad + i, bytes);
  if constexpr (kMomentum == Momentum::running) memcpy(b, buffer + i, bytes);
  update_vector<kMomentum, kNesterov, kWeightDecay>(p, g, b, update);
  if (update.unscale) memcpy(grad + i, g, bytes);
  if constexpr (kMomentum != Momentum::none) memcpy(buffer + i, b, bytes);
  memcpy(param + i, p, bytes);
}

template <Momentum kMomentum, class T>
void choose_terms(T* param, T* grad, T* buffer, int64_t numel, const Update<T>& update) {
  constexpr bool kHasBuffer = kMomentum != Momentum::none;
  if (kHasBuffer && update.nesterov) {
    (update.decay
         ? update_all<kMomentum, kHasBuffer, true, T>
         : update_all<kMomentum, kHasBuffer, false, T>)(param, grad, buffer, numel, update);
  } else {
    (update.decay ? update_all<kMomentum, false, true, T>
                  : update_all<kMomentum, false, false, T>)(param, grad, buffer, numel, update);
  }
}

// Elements [begin, end) of one parameter.
template <class T>
void update_row(const SgdStep& step, const SgdRow& row, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const SgdGroup& group = step.groups[row.group];
  const auto vector = [](double number) { return static_cast<A>(number) - Lanes<T>{}; };
  const auto option = [&group](SgdOption which) { return group.options[which].value; };
  const Update<T> update = {{vector(-option(kLr)), vector(option(kMomentum)),
                             vector(1 - option(kDampening)), vector(option(kWeightDecay))},
                            vector(step.inv_scale),
                            group.nesterov,
                            option(kWeightDecay) != 0,  // before rounding, as torch decides it
                            group.maximize,
                            step.unscale};
  T* param = static_cast<T*>(row.param) + begin;
  T* grad = static_cast<T*>(row.grad) + begin;
  if (row.momentum_buffer == nullptr) {
    choose_terms<Momentum::none>(param, grad, grad, end - begin, update);
    return;
  }
  T* buffer = static_cast<T*>(row.momentum_buffer) + begin;
  if (row.first_step) {
    choose_terms<Momentum::first>(param, grad, buffer, end - begin, update);
  } else {
    choose_terms<Momentum::running>(param, grad, buffer, end - begin, update);
  }
}

}  // namespace

void sgd_blocks(const SgdStep& step, int64_t row, int64_t begin, int64_t end) noexcept {
  for (; row < step.count && step.rows[row].first_block < end; ++row) {
    const SgdRow& r = step.rows[row];
    const int64_t first = begin > r.first_block ? (begin - r.first_block) * kSgdBlock : 0;
    const int64_t whole = (end - r.first_block) * kSgdBlock;
    const int64_t last = whole < r.numel ? whole : r.numel;
    switch (r.element) {
      case SgdElement::float32:
        update_row<float>(step, r, first, last);
        break;
      case SgdElement::float64:
        update_row<double>(step, r, first, last);
        break;
      case SgdElement::bfloat16:
        update_row<BFloat16>(step, r, first, last);
        break;
      case SgdElement::float16:
        update_row<Half>(step, r, first, last);
        break;
    }
  }
}

}  // namespace FASTOPT_LEVEL
}  // namespace fastopt
