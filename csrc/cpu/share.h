// How torch's threads share a batch of problems.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "team.h"

namespace sketchfast {

// A problem of fewer entries than this is over before a second thread has begun.
constexpr int64_t kSharedEntries = 1 << 15;

// The one rule: problems go a thread each where there are enough of them or each is small; else
// the threads share each problem, one after another. Calls solve(begin, end, team).
template <typename Solve>
void share_problems(int64_t count, int64_t entries, Solve solve) {
  const int64_t threads = torch::stable::get_num_threads();
  if (threads > 1 && count < 2 * threads && entries >= kSharedEntries) {
    const Team team{threads, [](int64_t size, void (*work)(void*, int64_t), void* context) {
                      torch::stable::parallel_for(0, size, 1, [&](int64_t begin, int64_t end) {
                        for (int64_t member = begin; member < end; ++member) work(context, member);
                      });
                    }};
    return solve(0, count, team);
  }
  const int64_t grain = std::max<int64_t>(1, kSharedEntries / std::max<int64_t>(1, entries));
  torch::stable::parallel_for(
      0, count, grain, [&](int64_t begin, int64_t end) { solve(begin, end, Team{1, nullptr}); });
}

}  // namespace sketchfast
