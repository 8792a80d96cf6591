// The random numbers of the kernels: counted, so that forward and backward, and every impl, draw
// the same ones.
#pragma once

#include "elementary.h"

namespace sketchfast {
#if defined(SKETCHFAST_ISA)
inline namespace SKETCHFAST_ISA {
#endif

struct PhiloxWords {
  uint32_t word[4];
};

// Philox4x32-10 at counter (first, second, third, 0) under key `seed`: Salmon et al. 2011,
// "Parallel random numbers: as easy as 1, 2, 3".
SKETCHFAST_HD PhiloxWords philox(uint64_t seed, uint32_t first, uint32_t second,
                                 uint32_t third = 0) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  uint32_t x0 = first, x1 = second, x2 = third, x3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(x0) * 0xD2511F53u, product1 = uint64_t(x2) * 0xCD9E8D57u;
    x0 = uint32_t(product1 >> 32) ^ x1 ^ key0;
    x1 = uint32_t(product1);
    x2 = uint32_t(product0 >> 32) ^ x3 ^ key1;
    x3 = uint32_t(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{x0, x1, x2, x3}};
}

#if defined(SKETCHFAST_ISA)
}  // namespace SKETCHFAST_ISA
#endif
}  // namespace sketchfast
