// Elements in memory: loads and stores in words of 16 bytes, and which lane takes which.
#pragma once

#include <type_traits>

#include "cuda/primitives.h"
#include "rules/types.h"

namespace fastopt::gpu {

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

template <int n, class U>
FASTOPT_DEVICE void copy_some(U* to, const U* from, bool aligned) {
  if constexpr (n * sizeof(U) % sizeof(Words) == 0) {
    if (aligned) {
      constexpr int kPer = sizeof(Words) / sizeof(U);
      for (int i = 0; i < n; i += kPer) copy_words_async(to + i, from + i);
      return;
    }
  }
  for (int i = 0; i < n; ++i) to[i] = from[i];
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

}  // namespace fastopt::gpu
