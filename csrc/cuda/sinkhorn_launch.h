// Which kernels of sinkhorn_kernels.cuh a call takes, and with what sizes.
//
// Context is where they run: the CUDA device (sinkhorn.cu) or tests/cuda_emulator. It gives
//   size_t shared_limit             bytes of shared memory a CTA may have
//   void* scratch(size_t bytes)     device memory that lives until the call's kernels are done
//   void launch(kernel, int64_t blocks, int threads, size_t shared, const Params&, int cluster = 1)
//   bool runs(kernel, int threads, size_t shared, int cluster)   whether the device can
// Nothing here depends on values, only on sizes: calls can be captured in a CUDA graph.
#pragma once

#include "sinkhorn_kernels.cuh"

namespace sketchfast {
namespace sinkhorn {
namespace cuda {

// What tests force; the defaults are the rule.
struct Choice {
  bool resident = true;  // where it fits
  int most_warps = 16;
  int most_cluster = kMaxCluster;
};

// --- the resident solver

// Solves with tiles of R x C a lane, if the device can hold the problem so.
template <int R, int C, int W, typename Context>
bool solve_resident(Context& context, const Problem& problem, const Solution& solution,
                    const Choice& choice) {
  constexpr int strip = Resident<R, C, W>::kStrip;
  const int most_warps = choice.most_warps < W ? choice.most_warps : W;
  int cluster = 1;
  while (cluster < choice.most_cluster &&
         ceil_div(problem.columns, cluster) > most_warps * strip) {
    cluster *= 2;
  }
  const int64_t warps = ceil_div(ceil_div(problem.columns, cluster), strip);
  if (problem.rows > Resident<R, C, W>::kRows || warps > most_warps) return false;
  const int threads = static_cast<int>(warps) * kWarp;
  const size_t bytes = Resident<R, C, W>::bytes(cluster);
  const auto kernel = resident_kernel<R, C, W>;
  if (!context.runs(kernel, threads, bytes, cluster)) return false;
  const ResidentParams params{problem, solution, cluster, static_cast<int>(warps) * strip};
  context.launch(kernel, problem.count * cluster, threads, bytes, params, cluster);
  return true;
}

// --- the rule
//
// A problem of up to 320 rows whose columns fit a CTA, or a cluster of up to 16 where the device
// has clusters, is solved by the resident kernel: one launch, every problem of the batch by itself.
// Columns a CTA: 256 up to 128 rows, 128 beyond. All else streams the cost: a launch per half-step.
template <typename Context>
void solve(Context& context, const Problem& problem, const Solution& solution,
           const Choice& choice) {
  if (problem.count == 0) return;
  const int64_t rows = problem.rows;
  if (choice.resident) {
    const bool solved = rows <= 16    ? solve_resident<1, 16, 8>(context, problem, solution, choice)
                        : rows <= 32  ? solve_resident<2, 16, 8>(context, problem, solution, choice)
                        : rows <= 64  ? solve_resident<4, 16, 8>(context, problem, solution, choice)
                        : rows <= 128 ? solve_resident<8, 8, 16>(context, problem, solution, choice)
                        : rows <= 256 ? solve_resident<16, 4, 16>(context, problem, solution, choice)
                        : rows <= 320 ? solve_resident<20, 4, 16>(context, problem, solution, choice)
                                      : false;
    if (solved) return;
  }
}

}  // namespace cuda
}  // namespace sinkhorn
}  // namespace sketchfast
