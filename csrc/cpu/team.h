// Threads that share one problem.
#pragma once

#include <cstdint>

#include "simd.h"

namespace sketchfast {

// One chunk of work a member; `run` is null where the caller works alone.
struct Team {
  int64_t size;
  void (*run)(int64_t size, void (*work)(void*, int64_t), void* context);
};

inline namespace SKETCHFAST_ISA {

// Calls work(0), ..., work(size - 1), a member each, and waits for all.
template <typename Work>
void for_members(const Team& team, int64_t size, Work work) {
  if (size == 1) return work(0);
  team.run(
      size,
      [](void* context, int64_t member) {
        FlushSubnormals flush;
        (*static_cast<Work*>(context))(member);
      },
      &work);
}

}  // namespace SKETCHFAST_ISA
}  // namespace sketchfast
