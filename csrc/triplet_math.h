// What the triplet kernels compute of one triplet, on CPU and GPU alike (DESIGN 4.3).
#pragma once

#include "elementary.h"

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

// The first two words of Philox4x32-10 at counter (first, second, 0, 0): Salmon et al. 2011,
// "Parallel random numbers: as easy as 1, 2, 3".
struct PhiloxWords {
  uint32_t first, second;
};

SKETCHFAST_HD PhiloxWords philox(uint64_t seed, uint32_t first, uint32_t second) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  uint32_t x0 = first, x1 = second, x2 = 0, x3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(x0) * 0xD2511F53u, product1 = uint64_t(x2) * 0xCD9E8D57u;
    x0 = uint32_t(product1 >> 32) ^ x1 ^ key0;
    x1 = uint32_t(product1);
    x2 = uint32_t(product0 >> 32) ^ x3 ^ key1;
    x3 = uint32_t(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {x0, x1};
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
  int64_t j = below(words.first, batch - 1);
  j += j >= anchor;
  const int64_t low = j < anchor ? j : anchor, high = j < anchor ? anchor : j;
  int64_t k = below(words.second, batch - 2);
  k += k >= low;
  k += k >= high;
  return {j, k};
}

#if defined(SKETCHFAST_ISA)
}  // namespace SKETCHFAST_ISA
#endif
}  // namespace sketchfast
