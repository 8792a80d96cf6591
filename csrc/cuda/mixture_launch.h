// Which kernels of mixture_kernels.cuh a call takes, and with what sizes. Context is as in
// triplet_launch.h. Nothing here depends on values, only on sizes: calls can be captured in a CUDA
// graph.
#pragma once

#include "mixture_kernels.cuh"

namespace sketchfast {
namespace mixture {
namespace cuda {

// CTAs of four warps that fill the GPUs this is for.
constexpr int64_t kResidentCtas = 132 * 16;
constexpr int64_t kMostEach = 16;  // positions a warp

template <typename Context>
void launch_forward(Context& context, const ForwardParams& p, int64_t ctas) {
  const size_t shared = 2 * kWarps * sizeof(double);
  const auto launch = [&](auto kernel) { context.launch(kernel, ctas, kWarps * kWarp, shared, p); };
  if (p.components <= kWarp) {
    launch(forward_kernel<1>);
  } else if (p.components <= 2 * kWarp) {
    launch(forward_kernel<2>);
  } else {
    launch(forward_kernel<0>);
  }
}

// rows: null, or where the gradient goes.
template <typename Context>
void forward(Context& context, const Input& output, const float* target, int64_t positions,
             int components, float* pen, float* stroke, float* rows) {
  int64_t ctas = 0;
  double* parts = nullptr;
  if (positions > 0) {
    const int64_t wanted = ceil_div(positions, kResidentCtas * kWarps);
    const int64_t each = wanted < kMostEach ? wanted : kMostEach;
    ctas = ceil_div(positions, each * kWarps);
    parts = static_cast<double*>(context.scratch(static_cast<size_t>(2 * ctas) * sizeof(double)));
    launch_forward(context,
                   {output, target, rows, parts, positions, components, static_cast<int>(each)},
                   ctas);
  }
  context.launch(mean_kernel, 1, kThreads, 2 * (kThreads / kWarp) * sizeof(double),
                 MeanParams{parts, ctas, positions, pen, stroke});
}

template <typename Context>
void backward(Context& context, const BackwardParams& p) {
  const int64_t ctas = ceil_div(p.positions * p.width, kThreads * kElements);
  if (ctas > 0) context.launch(backward_kernel, ctas, kThreads, 0, p);
}

}  // namespace cuda
}  // namespace mixture
}  // namespace sketchfast
