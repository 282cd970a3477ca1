// Which SIMD level runs. Every unit that names FASTOPT_LEVEL is compiled once per level, in the
// namespace of that name; FASTOPT_DISPATCH picks the one of this machine.
#pragma once

// Built for a single level: other machines' only one, or the one that sanitizers will look at.
#if !defined(__x86_64__)
#define FASTOPT_ONE_LEVEL baseline
#endif

#if defined(FASTOPT_ONE_LEVEL)
#define FASTOPT_FOR_EACH_LEVEL(DO) DO(FASTOPT_ONE_LEVEL)
#else
#define FASTOPT_FOR_EACH_LEVEL(DO) DO(baseline) DO(avx2) DO(avx512)
#endif

namespace fastopt {

enum class Level { baseline, avx2, avx512 };

// The best level of this CPU, capped by FASTOPT_SIMD=avx512|avx2|baseline. Read once.
Level active_level();

// FASTOPT_DISPATCH(run, params): fastopt::<level>::run(params) for the active level.
#if defined(FASTOPT_ONE_LEVEL)
#define FASTOPT_DISPATCH(function, ...) ::fastopt::FASTOPT_ONE_LEVEL::function(__VA_ARGS__)
#else
#define FASTOPT_DISPATCH(function, ...)                  \
  (::fastopt::active_level() == ::fastopt::Level::avx512 \
       ? ::fastopt::avx512::function(__VA_ARGS__)        \
   : ::fastopt::active_level() == ::fastopt::Level::avx2 \
       ? ::fastopt::avx2::function(__VA_ARGS__)          \
       : ::fastopt::baseline::function(__VA_ARGS__))
#endif

}  // namespace fastopt
