// The small SIMD vocabulary of the CPU kernels: one vector width per SIMD level, the four storage
// types, exp and log. Everything is in namespace fastopt::FASTOPT_LEVEL: this header is compiled
// once per level (see setup.py) and no function of one level may be linked into another.
//
// Vectors are GCC/Clang vector extensions: + - * / < and ?: work lane by lane. Products followed
// by sums are contracted to fused multiply-adds by -ffp-contract=fast where the level has them.
#pragma once

#include <cstdint>
#include <cstring>

#include "rules/types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FASTOPT_INLINE static inline __attribute__((always_inline))

namespace fastopt {
namespace FASTOPT_LEVEL {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Vec<A>: a vector of the accumulation type A (float or double); IntVec<A>: integers as wide.
template <class A>
struct VecTraits;
template <>
struct VecTraits<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t IntVec __attribute__((vector_size(kVectorBytes)));
  using Int = int32_t;
};
template <>
struct VecTraits<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t IntVec __attribute__((vector_size(kVectorBytes)));
  using Int = int64_t;
};
template <class A>
using Vec = typename VecTraits<A>::Vec;
template <class A>
using IntVec = typename VecTraits<A>::IntVec;
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

constexpr int kHalfLanes = kLanes<float>;
typedef uint16_t HalfVec __attribute__((vector_size(kHalfLanes * 2)));
typedef uint32_t WordVec __attribute__((vector_size(kVectorBytes)));

template <class A>
FASTOPT_INLINE Vec<A> splat(A a) {
  return a - Vec<A>{};  // a - 0 keeps the sign of zero, which a + 0 would not
}

// ---- kLanes elements ----

FASTOPT_INLINE Vec<float> load(const float* p) {
  Vec<float> v;
  memcpy(&v, p, sizeof(v));
  return v;
}
FASTOPT_INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  memcpy(&v, p, sizeof(v));
  return v;
}
FASTOPT_INLINE Vec<float> load(const BFloat16* p) {
  HalfVec h;
  memcpy(&h, p, sizeof(h));
#if defined(__AVX512F__)  // g++ 12 widens by two halves where one instruction will do
  return bit_cast<Vec<float>>(
      bit_cast<WordVec>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(h))) << 16);
#elif defined(__AVX2__)
  return bit_cast<Vec<float>>(bit_cast<WordVec>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(h))) << 16);
#else
  return bit_cast<Vec<float>>(__builtin_convertvector(h, WordVec) << 16);
#endif
}
FASTOPT_INLINE Vec<float> load(const Half* p) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return bit_cast<Vec<float>>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__aarch64__)
  float16x4_t h;
  memcpy(&h, p, sizeof(h));
  return bit_cast<Vec<float>>(vcvt_f32_f16(h));
#else
  static_assert(kHalfLanes == 4);
  return Vec<float>{to_acc(p[0]), to_acc(p[1]), to_acc(p[2]), to_acc(p[3])};
#endif
}

FASTOPT_INLINE void store(float* p, Vec<float> v) { memcpy(p, &v, sizeof(v)); }
FASTOPT_INLINE void store(double* p, Vec<double> v) { memcpy(p, &v, sizeof(v)); }
FASTOPT_INLINE void store(BFloat16* p, Vec<float> v) {
  const WordVec bits = bit_cast<WordVec>(v);
  WordVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // nearest, ties to even
  rounded = v != v ? WordVec{} + 0x7fc0u : rounded;
#if defined(__AVX512F__)
  const HalfVec h =
      bit_cast<HalfVec>(_mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(rounded)));
#else
  const HalfVec h = __builtin_convertvector(rounded, HalfVec);
#endif
  memcpy(p, &h, sizeof(h));
}
FASTOPT_INLINE void store(Half* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(p),
      _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  const float16x4_t h = vcvt_f16_f32(bit_cast<float32x4_t>(v));
  memcpy(p, &h, sizeof(h));
#else
  for (int i = 0; i < kHalfLanes; ++i) p[i] = from_acc<Half>(v[i]);
#endif
}

// Tails: only the first n < kLanes elements are touched in memory; other lanes read as `fill`.
// AVX-512 masks them, the other levels go through a copy.
#if defined(__AVX512F__)
FASTOPT_INLINE Vec<float> load_tail(const float* p, int n, float fill) {
  return bit_cast<Vec<float>>(
      _mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>((1u << n) - 1), p));
}
FASTOPT_INLINE Vec<double> load_tail(const double* p, int n, double fill) {
  return bit_cast<Vec<double>>(
      _mm512_mask_loadu_pd(_mm512_set1_pd(fill), static_cast<__mmask8>((1u << n) - 1), p));
}
FASTOPT_INLINE void store_tail(float* p, Vec<float> v, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), bit_cast<__m512>(v));
}
FASTOPT_INLINE void store_tail(double* p, Vec<double> v, int n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), bit_cast<__m512d>(v));
}
#endif
template <class T>
FASTOPT_INLINE Vec<Acc<T>> load_tail(const T* p, int n, Acc<T> fill) {
  T buffer[kLanes<Acc<T>>];
  const T filler = from_acc<T>(fill);
  for (int i = 0; i < kLanes<Acc<T>>; ++i) buffer[i] = filler;
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T>
FASTOPT_INLINE void store_tail(T* p, Vec<Acc<T>> v, int n) {
  T buffer[kLanes<Acc<T>>];
  store(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}

template <class V>
FASTOPT_INLINE V max(V a, V b) {
  return b > a ? b : a;  // a NaN in b is dropped: the kernels meet it again in exp(x - max)
}

// Reductions over the lanes, by halving: same order, hence same bits, every time.
template <class A, int kCount>
struct Lanes {
  typedef A Type __attribute__((vector_size(kCount * sizeof(A))));
};
template <class A, int kCount, class F>
FASTOPT_INLINE A fold_lanes(typename Lanes<A, kCount>::Type v, const F& combine) {
  if constexpr (kCount == 2) {
    return combine(v[0], v[1]);
  } else {
    typename Lanes<A, kCount / 2>::Type half[2];
    memcpy(half, &v, sizeof(v));
    return fold_lanes<A, kCount / 2>(combine(half[0], half[1]), combine);
  }
}
template <class A>
FASTOPT_INLINE A horizontal_sum(Vec<A> v) {
  return fold_lanes<A, kLanes<A>>(v, [](auto a, auto b) { return a + b; });
}
template <class A>
FASTOPT_INLINE A horizontal_max(Vec<A> v) {
  return fold_lanes<A, kLanes<A>>(v, [](auto a, auto b) { return b > a ? b : a; });
}

typedef float Quad __attribute__((vector_size(16)));

// The lanes kFrom of a and b together. g++ 11 knows one spelling, clang only the other.
template <int... kFrom>
FASTOPT_INLINE Quad pick(Quad a, Quad b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kFrom...);
#else
  typedef int32_t Pick __attribute__((vector_size(16)));
  return __builtin_shuffle(a, b, Pick{kFrom...});
#endif
}

// A 4 x 4 block, rows to columns: one instruction an element, where moving them singly takes
// three and misses the write combining of the stores.
FASTOPT_INLINE void transpose4(const float* from, int64_t from_stride, float* to,
                               int64_t to_stride) {
  Quad r[4];
  for (int i = 0; i < 4; ++i) memcpy(&r[i], from + i * from_stride, sizeof(Quad));
  const Quad low01 = pick<0, 4, 1, 5>(r[0], r[1]);
  const Quad high01 = pick<2, 6, 3, 7>(r[0], r[1]);
  const Quad low23 = pick<0, 4, 1, 5>(r[2], r[3]);
  const Quad high23 = pick<2, 6, 3, 7>(r[2], r[3]);
  const Quad c[4] = {pick<0, 1, 4, 5>(low01, low23), pick<2, 3, 6, 7>(low01, low23),
                     pick<0, 1, 4, 5>(high01, high23), pick<2, 3, 6, 7>(high01, high23)};
  for (int i = 0; i < 4; ++i) memcpy(to + i * to_stride, &c[i], sizeof(Quad));
}

// ---- exp and log ----
// exp(x) = 2^n p(r) with n = round(x / ln 2), r = x - n ln 2 and p a minimax polynomial (fitted by
// Remez; p(0) = 1). Only for x <= 0, as in a softmax. Below the smallest normal number the result
// is exactly 0, so exp(-inf) = 0; NaN stays NaN.
//
// double: ln 2 in two parts, so that n * high is exact; relative error 3.1e-18 before rounding.
// float: 1.1e-7, of both signs, and 2.7e-9 |x| from ln 2 in one part, where rounding
// x - log(sum) costs torch's softmax up to 6e-8 |x - log(sum)|.

// 1 + r + r^2 p. Horner rounds less with fused multiply-adds, small parts first without.
template <class A>
FASTOPT_INLINE Vec<A> last_steps(Vec<A> p, Vec<A> r) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return (p * r + A(1)) * r + A(1);
#else
  return A(1) + (r * r * p + r);
#endif
}

FASTOPT_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  constexpr float kShift = 0x1.8p23f + 127;  // adding it leaves n + 127 in the low mantissa bits
  const Vec<float> shifted = x * 1.44269504f + kShift;
  const Vec<float> n = shifted - kShift;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  const Vec<float> r = x - n * 0x1.62e43p-1f;
#else  // the product would be rounded
  const Vec<float> r = (x - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f;
#endif
  Vec<float> p = r * 8.31250134e-3f + 4.18903315e-2f;
  p = p * r + 1.66671154e-1f;
  p = p * r + 4.99992303e-1f;
  p = last_steps<float>(p, r);
  const Vec<float> result = p * bit_cast<Vec<float>>(bit_cast<IntVec<float>>(shifted) << 23);
  return x < -87.33f ? Vec<float>{} : result;
}

FASTOPT_INLINE Vec<double> exp_nonpositive(Vec<double> x) {
  constexpr double kShift = 0x1.8p52 + 1023;
  const Vec<double> shifted = x * 0x1.71547652b82fep0 + kShift;
  const Vec<double> n = shifted - kShift;
  const Vec<double> r = (x - n * 0x1.62e42fefa2p-1) - n * 0x1.9ef35793c7673p-41;
  Vec<double> p = r * 2.4994247177932405e-8 + 2.7632368019197578e-7;
  p = p * r + 2.7557623136996031e-6;
  p = p * r + 2.4801486320588121e-5;
  p = p * r + 1.9841269431454022e-4;
  p = p * r + 1.3888888951410253e-3;
  p = p * r + 8.3333333335601749e-3;
  p = p * r + 4.1666666666492075e-2;
  p = p * r + 1.6666666666666166e-1;
  p = p * r + 0.50000000000000178;
  p = last_steps<double>(p, r);
  const Vec<double> result = p * bit_cast<Vec<double>>(bit_cast<IntVec<double>>(shifted) << 52);
  return x < -708.3 ? Vec<double>{} : result;
}

// log(x) = e ln 2 + 2 atanh(s), s = (m - 1) / (m + 1), with x = m 2^e and m in [sqrt(1/2),
// sqrt(2)). Only for normal x > 0, as the sum of a softmax; infinity and NaN come back as they are.

FASTOPT_INLINE Vec<float> log_positive(Vec<float> x) {
  const IntVec<float> bits = bit_cast<IntVec<float>>(x);
  const IntVec<float> e = (bits - 0x3f3504f3) >> 23;
  const Vec<float> m = bit_cast<Vec<float>>(bits - (e << 23));
  const Vec<float> s = (m - 1.0f) / (m + 1.0f);
  const Vec<float> z = s * s;
  Vec<float> p = z * (2.0f / 9) + 2.0f / 7;
  p = p * z + 2.0f / 5;
  p = p * z + 2.0f / 3;
  const Vec<float> k = __builtin_convertvector(e, Vec<float>);
  const Vec<float> result = k * 0x1.62ep-1f + ((s + s) + (s * z * p + k * 0x1.0bfbe8p-15f));
  return x - x == 0.0f ? result : x;
}

FASTOPT_INLINE Vec<double> log_positive(Vec<double> x) {
  const IntVec<double> bits = bit_cast<IntVec<double>>(x);
  const IntVec<double> e = (bits - 0x3fe6a09e667f3bcd) >> 52;
  const Vec<double> m = bit_cast<Vec<double>>(bits - (e << 52));
  const Vec<double> s = (m - 1.0) / (m + 1.0);
  const Vec<double> z = s * s;
  Vec<double> p = z * (2.0 / 23) + 2.0 / 21;
  p = p * z + 2.0 / 19;
  p = p * z + 2.0 / 17;
  p = p * z + 2.0 / 15;
  p = p * z + 2.0 / 13;
  p = p * z + 2.0 / 11;
  p = p * z + 2.0 / 9;
  p = p * z + 2.0 / 7;
  p = p * z + 2.0 / 5;
  p = p * z + 2.0 / 3;
  const Vec<double> k = __builtin_convertvector(e, Vec<double>);
  const Vec<double> result =
      k * 0x1.62e42fefa2p-1 + ((s + s) + (s * z * p + k * 0x1.9ef35793c7673p-41));
  return x - x == 0.0 ? result : x;
}

}  // namespace FASTOPT_LEVEL
}  // namespace fastopt
