// CUDA kernels of the mixture density loss: no torch types, so that tests/cuda_emulator compiles
// this very source with a host compiler. mixture_launch.h chooses kernels and sizes, mixture.cu is
// the door to torch.
//
// A warp a position, a lane a component or several: a position's numbers are read once, and its
// gradient row written. Sums are in a fixed order; results repeat bit for bit.
#pragma once

#include "../mixture_math.h"
#include "device.cuh"

namespace sketchfast {
namespace mixture {
namespace cuda {

using namespace device;

constexpr int kWarps = 4;  // of a CTA of the forward kernel
constexpr int kThreads = 256;
constexpr int kElements = 4;  // a thread of the backward kernel

struct ForwardParams {
  Input output;         // [positions, 3 + 6 components]
  const float* target;  // [positions, 5]
  float* rows;          // as output, or null
  double* parts;        // [CTAs, 2]: sums of pen and stroke losses
  int64_t positions;
  int components;
  int each;  // positions a warp
};

__device__ inline float greatest_of_warp(float value) { return -least_of_warp(-value); }

// --- pen states: every lane does the same, the first three write

__device__ inline float pen_loss(const ForwardParams& p, int64_t position, int64_t width) {
  const float* target = p.target + position * 5;
  const int state = pen_state(target[2], target[3], target[4]);
  float x[3], share_of[3];
#pragma unroll
  for (int s = 0; s < 3; ++s) x[s] = load(p.output, position * width + s);
  const float most = maximum(maximum(x[0], x[1]), x[2]);
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    x[s] -= most;
    share_of[s] = share(x[s]);
  }
  const float sum = share_of[0] + share_of[1] + share_of[2];
  const int lane = lane_index();
  if (p.rows && lane < 3) {
    const float mine = lane == 0 ? share_of[0] : lane == 1 ? share_of[1] : share_of[2];
    p.rows[position * width + lane] = mine / sum - (lane == state ? 1.0f : 0.0f);
  }
  return logarithm(sum) - (state == 0 ? x[0] : state == 1 ? x[1] : x[2]);
}

// --- strokes

// The components of a lane: kEach of them in registers, or, with kEach 0, any number, formed again
// at every look.
template <int kEach>
struct Components {
  const ForwardParams& p;
  int64_t first;  // of the position's mixture in output and rows
  float x, y;
  float weight[kEach ? kEach : 1];
  Density<float> kept[kEach ? kEach : 1];

  __device__ int steps() const { return kEach ? kEach : (p.components + kWarp - 1) / kWarp; }
  __device__ static int component(int step) { return step * kWarp + lane_index(); }
  __device__ bool exists(int step) const { return component(step) < p.components; }

  __device__ float number(int which, int step) const {
    return load(p.output, first + int64_t(which) * p.components + component(step));
  }
  __device__ float weight_at(int step) const {
    if constexpr (kEach > 0) return weight[step];
    return number(0, step);
  }
  __device__ Density<float> formed(int step) const {
    return density(x, y, number(1, step), number(2, step), number(3, step), number(4, step),
                   number(5, step));
  }
  __device__ Density<float> at(int step) const {
    if constexpr (kEach > 0) return kept[step];
    return formed(step);
  }
  __device__ void read() {
    if constexpr (kEach > 0) {
#pragma unroll
      for (int step = 0; step < kEach; ++step) {
        if (!exists(step)) continue;
        weight[step] = number(0, step);
        kept[step] = formed(step);
      }
    }
  }
  __device__ void write(int which, int step, float value) const {
    p.rows[first + int64_t(which) * p.components + component(step)] = value;
  }
};

// -live * log p(x, y); writes its gradient.
template <int kEach>
__device__ inline float stroke_loss(const ForwardParams& p, int64_t position, int64_t width) {
  const float* target = p.target + position * 5;
  Components<kEach> components{p, position * width + 3, target[0], target[1], {}, {}};
  components.read();
  constexpr int kUnrolled = kEach ? kEach : 1;
  const float live = 1 - target[4];
  const int steps = components.steps();

  float top = -INFINITY;
#pragma unroll kUnrolled
  for (int step = 0; step < steps; ++step) {
    if (components.exists(step)) top = maximum(top, components.weight_at(step));
  }
  top = greatest_of_warp(top);
  float best = -INFINITY, prior_sum = 0;
  bool is_broken = false;
#pragma unroll kUnrolled
  for (int step = 0; step < steps; ++step) {
    if (!components.exists(step)) continue;
    const float weight = components.weight_at(step) - top;
    const float log = weight + components.at(step).log_density;
    is_broken |= log != log;
    best = maximum(best, log);
    prior_sum += share(weight);
  }
  best = greatest_of_warp(best);
  prior_sum = sum_of_warp(prior_sum);
  is_broken = __ballot_sync(kAllLanes, is_broken) != 0;
  const bool is_far = best == -INFINITY;  // from every component
  const float base = is_far ? 0.0f : best;
  float sum = 0;
#pragma unroll kUnrolled
  for (int step = 0; step < steps; ++step) {
    if (!components.exists(step)) continue;
    sum += share(components.weight_at(step) - top + components.at(step).log_density - base);
  }
  sum = sum_of_warp(sum);

  if (p.rows) {
    const bool nothing = is_broken || is_far;
#pragma unroll kUnrolled
    for (int step = 0; step < steps; ++step) {
      if (!components.exists(step)) continue;
      const Density<float> d = components.at(step);
      const float weight = components.weight_at(step) - top;
      const float factor = nothing ? NAN : share(weight + d.log_density - base) * (-live / sum);
      components.write(0, step, factor + share(weight) * (live / prior_sum));
      components.write(1, step, weighted(factor, d.mean_x));
      components.write(2, step, weighted(factor, d.mean_y));
      components.write(3, step, weighted(factor, d.log_sigma_x));
      components.write(4, step, weighted(factor, d.log_sigma_y));
      components.write(5, step, weighted(factor, d.correlation));
    }
  }
  if (is_broken) return NAN;
  if (is_far) return live * INFINITY;
  return -live * (best + logarithm(sum / prior_sum) - static_cast<float>(kLogFourPi));
}

template <int kEach>
__global__ void __launch_bounds__(kWarps* kWarp)
    forward_kernel(const __grid_constant__ ForwardParams p) {
  SKETCHFAST_SHARED_MEMORY(shared);
  double* sums = reinterpret_cast<double*>(shared);  // [kWarps, 2]
  const int64_t width = 3 + 6 * int64_t(p.components);
  const int64_t first = (int64_t(blockIdx.x) * kWarps + warp_index()) * p.each;
  double pen = 0, stroke = 0;
  for (int64_t position = first; position < first + p.each && position < p.positions; ++position) {
    pen += pen_loss(p, position, width);
    stroke += stroke_loss<kEach>(p, position, width);
  }
  if (lane_index() == 0) {
    sums[2 * warp_index()] = pen;
    sums[2 * warp_index() + 1] = stroke;
  }
  __syncthreads();
  if (threadIdx.x >= 2) return;
  double sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += sums[2 * warp + threadIdx.x];
  p.parts[2 * int64_t(blockIdx.x) + threadIdx.x] = sum;
}

// --- means

struct MeanParams {
  const double* parts;  // [count, 2]
  int64_t count, positions;
  float *pen, *stroke;
};

__global__ void __launch_bounds__(kThreads) mean_kernel(const __grid_constant__ MeanParams p) {
  SKETCHFAST_SHARED_MEMORY(shared);
  double* sums = reinterpret_cast<double*>(shared);  // [warps, 2]
  double pen = 0, stroke = 0;
  for (int64_t i = threadIdx.x; i < p.count; i += kThreads) {
    pen += p.parts[2 * i];
    stroke += p.parts[2 * i + 1];
  }
  pen = sum_of_warp(pen);
  stroke = sum_of_warp(stroke);
  if (lane_index() == 0) {
    sums[2 * warp_index()] = pen;
    sums[2 * warp_index() + 1] = stroke;
  }
  __syncthreads();
  if (threadIdx.x >= 2) return;
  double sum = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += sums[2 * warp + threadIdx.x];
  float* out = threadIdx.x == 0 ? p.pen : p.stroke;
  *out = static_cast<float>(sum / static_cast<double>(p.positions < 1 ? 1 : p.positions));
}

// --- backward

struct BackwardParams {
  const float *rows, *grad_pen, *grad_stroke;
  Output out;
  int64_t positions, width;
};

__global__ void __launch_bounds__(kThreads)
    backward_kernel(const __grid_constant__ BackwardParams p) {
  const int64_t size = p.positions * p.width, first = int64_t(blockIdx.x) * kThreads * kElements;
  const unsigned width = static_cast<unsigned>(p.width);
  const unsigned column = static_cast<unsigned>(first % p.width);  // the long division once a CTA
  const float pen = *p.grad_pen / static_cast<float>(p.positions);
  const float stroke = *p.grad_stroke / static_cast<float>(p.positions);
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const unsigned offset = i * kThreads + threadIdx.x;
    if (first + offset >= size) return;
    const float scale = (column + offset) % width < 3 ? pen : stroke;
    store(p.out, first + offset, p.rows[first + offset] * scale);
  }
}

}  // namespace cuda
}  // namespace mixture
}  // namespace sketchfast
