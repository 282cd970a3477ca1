// The four storage types, each with its accumulation type: plain inline functions for host and
// device.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTOPT_RULE static __host__ __device__ __forceinline__
#else
#define FASTOPT_RULE static inline __attribute__((always_inline))
#endif

namespace fastopt {

// Storage types of half precision: bits only, arithmetic happens in float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The storage types by name, where a plain struct carries one.
enum class Element : int32_t { float32, float64, bfloat16, float16 };

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

template <class T>
struct Type {
  using type = T;
};

// run(Type<T>{}) for the type of that name.
template <class F>
void with_element(Element element, const F& run) {
  switch (element) {
    case Element::float32:
      return run(Type<float>{});
    case Element::float64:
      return run(Type<double>{});
    case Element::bfloat16:
      return run(Type<BFloat16>{});
    case Element::float16:
      return run(Type<Half>{});
  }
}

// Accumulation type of a storage type: float, but double for double.
template <class T>
struct AccumulateTraits {
  using type = float;
};
template <>
struct AccumulateTraits<double> {
  using type = double;
};
template <class T>
using Acc = typename AccumulateTraits<T>::type;

template <class V, class U>
FASTOPT_RULE V bit_cast(U u) {
  static_assert(sizeof(V) == sizeof(U), "bit_cast keeps the size");
  V v;
  memcpy(&v, &u, sizeof(V));
  return v;
}

FASTOPT_RULE float to_acc(float x) { return x; }
FASTOPT_RULE double to_acc(double x) { return x; }
FASTOPT_RULE float to_acc(BFloat16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
FASTOPT_RULE float to_acc(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#elif defined(__ARM_FP16_FORMAT_IEEE)
  __fp16 half;
  memcpy(&half, &x.bits, sizeof(half));
  return half;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Subnormals get a leading 1, which a difference takes away again: no operand of it is subnormal
  // as a float32, which a CPU may have been told to read as 0. Inf and NaN by hand.
  const uint32_t moved = (magnitude << 13) + 0x38000000u;
  const float subnormal = bit_cast<float>(moved + 0x00800000u) - 0x1p-14f;
  const uint32_t bits = magnitude >= 0x7c00u   ? 0x7f800000u | (magnitude << 13)
                        : magnitude >= 0x0400u ? moved
                                               : bit_cast<uint32_t>(subnormal);
  return bit_cast<float>(bits | sign);
#endif
}

FASTOPT_RULE float round_to(float, float x) { return x; }
FASTOPT_RULE double round_to(double, double x) { return x; }
FASTOPT_RULE BFloat16 round_to(BFloat16, float x) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // nearest, ties to even
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
#endif
}
FASTOPT_RULE Half round_to(Half, float x) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(x))};
#elif defined(__ARM_FP16_FORMAT_IEEE)
  const __fp16 half = static_cast<__fp16>(x);
  Half rounded;
  memcpy(&rounded.bits, &half, sizeof(half));
  return rounded;
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal result: let float addition round it
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(half | sign)};
#endif
}

// a * b rounded by itself, never part of a fused multiply-add.
FASTOPT_RULE float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  float result = a * b;
  __asm__("" : "+m"(result));
  return result;
#endif
}
FASTOPT_RULE double product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  double result = a * b;
  __asm__("" : "+m"(result));
  return result;
#endif
}

template <class T>
FASTOPT_RULE T from_acc(Acc<T> x) {
  return round_to(T{}, x);
}

}  // namespace fastopt
