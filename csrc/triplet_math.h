// What the triplet kernels compute of one triplet, on CPU and GPU alike (DESIGN 4.3).
#pragma once

#include "elementary.h"
#include "philox.h"

namespace sketchfast {
#if defined(SKETCHFAST_ISA)
inline namespace SKETCHFAST_ISA {
#endif

// The term of a triplet that draws `drawn` near and pushes `pushed` off is margin + drawn - pushed
// where that is positive. Decided by one rounded sum, as every impl does it; 0 at the kink.
template <typename real>
SKETCHFAST_HD bool is_active(real drawn, real pushed, real margin) {
  return drawn + margin > pushed;
}

// A word as a number below `count`.
SKETCHFAST_HD int64_t below(uint32_t word, int64_t count) {
  return int64_t((uint64_t(word) * uint64_t(count)) >> 32);
}

// j and k of a sampled triplet: all of i, j, k differ.
struct Pair {
  int64_t j, k;
};

SKETCHFAST_HD Pair sampled_pair(uint64_t seed, int64_t anchor, int64_t sample, int64_t batch) {
  const PhiloxWords words = philox(seed, uint32_t(anchor), uint32_t(sample));
  int64_t j = below(words.word[0], batch - 1);
  j += j >= anchor;
  const int64_t low = j < anchor ? j : anchor, high = j < anchor ? anchor : j;
  int64_t k = below(words.word[1], batch - 2);
  k += k >= low;
  k += k >= high;
  return {j, k};
}

#if defined(SKETCHFAST_ISA)
}  // namespace SKETCHFAST_ISA
#endif
}  // namespace sketchfast
