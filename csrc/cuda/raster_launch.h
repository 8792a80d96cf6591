// Which kernels of raster_kernels.cuh a call takes, and with what sizes.
//
// Context is where they run: the CUDA device (raster.cu) or tests/cuda_emulator. It gives
//   size_t shared_limit             bytes of shared memory a CTA may have
//   void* scratch(size_t bytes)     device memory that lives until the call's kernels are done
//   void launch(kernel, int64_t blocks, int threads, size_t shared, const Params&)
// Nothing here depends on values, only on sizes: calls can be captured in a CUDA graph.
#pragma once

#include "raster_kernels.cuh"

namespace sketchfast {
namespace raster {
namespace cuda {

// Images up to this many pixels take one CTA a sketch. Larger ones would too as far as memory goes,
// but tiles fill more of the GPU and skip the empty parts.
constexpr int64_t kWholePixels = 64 * 64;
constexpr int kTile = 32;
// Points a gather CTA owns: with the segment before them, two segments for each of its 8 warps.
constexpr int kRun = 15, kGatherThreads = 256;
constexpr int kMaxRun = 256, kMaxCapacity = 2 * kMaxThreads;
// No stroke farther off than this is drawn, whatever the sharpness: float squares stay finite.
constexpr double kMaxReach = 1e8;

struct Scene {
  Strokes strokes;
  int64_t batch;
  Canvas canvas;
  double sharpness, offset, sigma;
  int64_t taps;

  int64_t area() const { return static_cast<int64_t>(canvas.height) * canvas.width; }
  int64_t pixels() const { return batch * area(); }
  int64_t half() const { return sigma > 0 ? taps / 2 : 0; }
};

inline Ink ink_of(const Scene& s, double cutoff) {
  const double far = reach(s.sharpness, s.offset, cutoff);
  return {static_cast<float>(s.sharpness), static_cast<float>(s.offset),
          static_cast<float>(minimum(far, kMaxReach))};
}

// 1 / (sum of the Gaussian's weights), the centre's being 1.
inline double blur_scale(const Scene& s) {
  double sum = 1;
  for (int64_t k = 1; k <= s.half(); ++k) {
    const double weight = ::exp(-0.5 * (k / s.sigma) * (k / s.sigma));
    if (weight < 1e-20) break;
    sum += 2 * weight;
  }
  return 1 / sum;
}

inline bool is_wide(const Scene& s) { return s.half() > kMaxHalf; }

// No blur where it is wider than a halo: wide_blur follows then.
inline Blur blur_of(const Scene& s) {
  Blur blur{};
  blur.weight[0] = 1;
  if (s.half() == 0 || is_wide(s)) return blur;
  blur.half = static_cast<int>(s.half());
  const double scale = blur_scale(s);
  for (int k = 0; k <= blur.half; ++k) {
    blur.weight[k] = static_cast<float>(scale * ::exp(-0.5 * (k / s.sigma) * (k / s.sigma)));
  }
  return blur;
}

inline Tiling tiling_of(const Canvas& canvas, int width, int height) {
  const int64_t across = ceil_div(canvas.width, width);
  return {width, height, static_cast<int>(across),
          static_cast<int>(across * ceil_div(canvas.height, height))};
}

inline Tiling tiles(const Canvas& canvas) { return tiling_of(canvas, kTile, kTile); }
inline Tiling whole(const Canvas& canvas) { return tiling_of(canvas, canvas.width, canvas.height); }

// Pixels of the largest tile with `halo` around it.
inline int largest_area(const Tiling& tiling, int halo, const Canvas& canvas) {
  return smaller(tiling.width + 2 * halo, canvas.width) *
         smaller(tiling.height + 2 * halo, canvas.height);
}

// About four pixels a thread; 28 x 28 gives 7 warps, four of its 28 patches each.
inline int threads_for(int64_t area) {
  const int64_t threads = ceil_div(ceil_div(area, 4), kWarp) * kWarp;
  return static_cast<int>(threads < 128 ? 128 : threads > kMaxThreads ? kMaxThreads : threads);
}

inline int capacity_for(int64_t steps) {
  const int64_t segments = ceil_div(steps > 1 ? steps - 1 : 1, kWarp) * kWarp;
  return static_cast<int>(segments < kMaxCapacity ? segments : kMaxCapacity);
}

inline int run_for(int64_t steps) { return static_cast<int>(steps < kMaxRun ? steps : kMaxRun); }

// --- wide blur

// Both axes of a blur of any width, `between` holding the first's result.
template <typename Context>
void wide_blur(Context& context, const Scene& s, const Input& in, float* between,
               const Output& out) {
  WideBlurParams p{};
  p.canvas = s.canvas;
  p.pixels = s.pixels();
  p.half = s.half();
  p.decay = static_cast<float>(minimum(0.5 / (s.sigma * s.sigma), 1e30));
  p.scale = static_cast<float>(blur_scale(s));
  p.in = in;
  p.out = {between, Dtype::kFloat32};
  p.rows = true;
  context.launch(wide_blur_kernel, ceil_div(p.pixels, 256), 256, 0, p);
  p.in = {between, Dtype::kFloat32};
  p.out = out;
  p.rows = false;
  context.launch(wide_blur_kernel, ceil_div(p.pixels, 256), 256, 0, p);
}

template <typename T, typename Context>
T* scratch(Context& context, int64_t count) {
  return static_cast<T*>(context.scratch(static_cast<size_t>(count) * sizeof(T)));
}

// --- rasterize

inline size_t forward_bytes(const ForwardParams& p) {
  size_t bytes = 0;
  ForwardMemory(Arena{nullptr, 0}, p, largest_area(p.tiling, p.blur.half, p.canvas), &bytes);
  return bytes;
}

// image [B, H, W]; winner [B, H, W] or null data.
template <typename Context>
void forward(Context& context, const Scene& s, double cutoff, const Output& image,
             const Winner& winner) {
  if (s.pixels() == 0) return;
  ForwardParams p{};
  p.strokes = s.strokes;
  p.canvas = s.canvas;
  p.ink = ink_of(s, cutoff);
  p.blur = blur_of(s);
  p.capacity = capacity_for(s.strokes.steps);
  p.winner = winner;
  p.image = image;
  float* plane = nullptr;
  if (is_wide(s)) {
    plane = scratch<float>(context, s.pixels());
    p.image = {plane, Dtype::kFloat32};
  }
  p.tiling = whole(s.canvas);
  if (s.area() > kWholePixels || forward_bytes(p) > context.shared_limit)
    p.tiling = tiles(s.canvas);
  const int threads =
      smaller(threads_for(largest_area(p.tiling, p.blur.half, p.canvas)), kTileThreads);
  context.launch(forward_kernel, s.batch * p.tiling.per_sketch, threads, forward_bytes(p), p);
  if (plane) {
    float* between = scratch<float>(context, s.pixels());
    wide_blur(context, s, {plane, Dtype::kFloat32}, between, image);
  }
}

inline size_t backward_bytes(const BackwardParams& p) {
  size_t bytes = 0;
  BackwardMemory(Arena{nullptr, 0}, p, largest_area(p.tiling, 0, p.canvas), &bytes);
  return bytes;
}

inline size_t run_bytes(int run) {
  Arena arena{nullptr, 0};
  RunMemory(&arena, run);
  return arena.used;
}

template <typename Context>
void gather(Context& context, const Scene& s, BackwardParams p) {
  p.run = kRun;
  const int64_t blocks = s.batch * ceil_div(s.strokes.steps, kRun);
  context.launch(gather_kernel, blocks, kGatherThreads, run_bytes(kRun), p);
}

// grad [B, H, W] of the image, winner as forward wrote it, grad_points [B, steps, 2].
template <typename Context>
void backward(Context& context, const Scene& s, const Input& grad, const Winner& winner,
              const Output& grad_points) {
  if (s.batch == 0 || s.strokes.steps == 0) return;
  BackwardParams p{};
  p.strokes = s.strokes;
  p.canvas = s.canvas;
  p.ink = ink_of(s, kImageCutoff<float>);
  p.blur = blur_of(s);
  p.grad = grad;
  p.winner = winner;
  p.grad_points = grad_points;
  p.tiling = whole(s.canvas);
  p.run = run_for(s.strokes.steps);
  if (is_wide(s)) {
    p.slope = scratch<float>(context, s.pixels());
    wide_blur(context, s, grad, scratch<float>(context, s.pixels()), {p.slope, Dtype::kFloat32});
    return gather(context, s, p);
  }
  if (s.area() <= kWholePixels && backward_bytes(p) <= context.shared_limit) {
    return context.launch(backward_sketch_kernel, s.batch, threads_for(s.area()), backward_bytes(p),
                          p);
  }
  p.tiling = tiles(s.canvas);
  if (p.blur.half > 0) {
    p.slope = scratch<float>(context, s.pixels());
    const size_t plane = static_cast<size_t>(largest_area(p.tiling, p.blur.half, p.canvas)) * 4;
    context.launch(blur_grad_kernel, s.batch * p.tiling.per_sketch, 256, 2 * (plane + 16), p);
  }
  gather(context, s, p);
}

// --- raster_bce

inline size_t loss_bytes(const LossParams& p) {
  size_t bytes = 0;
  const int halo = p.blur.half * (p.need_grad ? 2 : 1);
  LossMemory(Arena{nullptr, 0}, p, largest_area(p.tiling, halo, p.canvas), &bytes);
  return bytes;
}

// Sums the parts of the loss and, where wanted, gathers the gradients of the points.
template <typename Context>
void finish_loss(Context& context, const Scene& s, bool need_grad, const Ink& ink,
                 const float* slope, const Winner& winner, const float* partial, int parts,
                 float* loss, const Output& grad_points) {
  BackwardParams p{};
  p.strokes = s.strokes;
  p.canvas = s.canvas;
  p.ink = ink;
  p.winner = winner;
  p.slope = const_cast<float*>(slope);
  p.grad_points = grad_points;
  p.partial = partial;
  p.tiling.per_sketch = parts;
  p.loss = loss;
  p.scale = static_cast<float>(1.0 / static_cast<double>(s.area()));
  if (need_grad && s.strokes.steps > 0) return gather(context, s, p);
  context.launch(loss_kernel, s.batch, kWarp, 0, p);
}

// The stages apart, for blurs no tile can hold.
template <typename Context>
void staged_loss(Context& context, const Scene& s, const Strokes& target_strokes,
                 const float* target, bool need_grad, float* loss, const Output& grad_points) {
  const double cutoff = kLossCutoff<float>;
  float* image = scratch<float>(context, s.pixels());
  const bool wide_index = s.strokes.steps > (1 << 15);
  Winner winner{nullptr, wide_index};
  if (need_grad) winner.data = context.scratch(s.pixels() * (wide_index ? 4 : 2));
  forward(context, s, cutoff, {image, Dtype::kFloat32}, winner);
  if (!target) {
    Scene target_scene = s;
    target_scene.strokes = target_strokes;
    float* drawn = scratch<float>(context, s.pixels());
    forward(context, target_scene, cutoff, {drawn, Dtype::kFloat32}, Winner{nullptr, false});
    target = drawn;
  }
  PixelLossParams p{};
  p.image = image;
  p.target = target;
  p.pixels = s.area();
  p.chunk = 4096;
  p.chunks = static_cast<int>(ceil_div(p.pixels, p.chunk));
  p.scale = static_cast<float>(1.0 / static_cast<double>(s.area()));
  p.partial = scratch<float>(context, s.batch * p.chunks);
  p.slope = need_grad ? scratch<float>(context, s.pixels()) : nullptr;
  context.launch(pixel_loss_kernel, s.batch * p.chunks, 256, sizeof(float) * kMaxThreads / kWarp,
                 p);
  if (need_grad && s.half() > 0) {
    // The image is no longer needed: it holds the half-blurred slope.
    wide_blur(context, s, {p.slope, Dtype::kFloat32}, image, {p.slope, Dtype::kFloat32});
  }
  finish_loss(context, s, need_grad, ink_of(s, cutoff), p.slope, winner, p.partial, p.chunks, loss,
              grad_points);
}

// loss [B]; the target as an image [B, H, W] or, where that is null, as strokes; grad_points [B,
// steps, 2] float32 where need_grad.
template <typename Context>
void bce(Context& context, const Scene& s, const Strokes& target_strokes, const float* target,
         bool need_grad, float* loss, float* grad_points) {
  if (s.batch == 0) return;
  const Output grad{grad_points, Dtype::kFloat32};
  LossParams p{};
  p.strokes = s.strokes;
  p.target_strokes = target_strokes;
  p.target = target;
  p.canvas = s.canvas;
  p.ink = ink_of(s, kLossCutoff<float>);
  p.blur = blur_of(s);
  const int64_t longest =
      target || s.strokes.steps > target_strokes.steps ? s.strokes.steps : target_strokes.steps;
  p.capacity = capacity_for(longest);
  p.need_grad = need_grad;
  p.scale = static_cast<float>(1.0 / static_cast<double>(s.area()));
  p.grad_points = grad;
  p.loss = loss;
  p.winner.wide = true;
  p.tiling = whole(s.canvas);
  p.run = need_grad ? run_for(s.strokes.steps) : 0;
  if (!is_wide(s) && s.area() <= kWholePixels && loss_bytes(p) <= context.shared_limit) {
    return context.launch(bce_kernel<true>, s.batch, threads_for(s.area()), loss_bytes(p), p);
  }
  p.tiling = tiles(s.canvas);
  p.run = 0;
  if (is_wide(s) || loss_bytes(p) > context.shared_limit) {
    return staged_loss(context, s, target_strokes, target, need_grad, loss, grad);
  }
  const int64_t blocks = s.batch * p.tiling.per_sketch;
  p.loss = scratch<float>(context, blocks);
  p.winner.wide = s.strokes.steps > (1 << 15);
  if (need_grad) {
    p.winner.data = context.scratch(s.pixels() * (p.winner.wide ? 4 : 2));
    p.slope = scratch<float>(context, s.pixels());
  }
  const int halo = p.blur.half * (need_grad ? 2 : 1);
  const int threads = smaller(threads_for(largest_area(p.tiling, halo, p.canvas)), kTileThreads);
  context.launch(bce_kernel<false>, blocks, threads, loss_bytes(p), p);
  finish_loss(context, s, need_grad, p.ink, p.slope, p.winner, p.loss, p.tiling.per_sketch, loss,
              grad);
}

// --- stroke_distance

// distance2, segment [B, H, W]. Of the scene only strokes, batch and canvas count.
template <typename Context>
void distance_forward(Context& context, const Scene& s, float* distance2, int32_t* segment) {
  if (s.pixels() == 0) return;
  DistanceParams p{};
  p.strokes = s.strokes;
  p.canvas = s.canvas;
  p.distance2 = distance2;
  p.segment = segment;
  p.capacity = capacity_for(s.strokes.steps);
  p.tiling = tiling_of(s.canvas, kDistanceTile, kDistanceTile);
  size_t bytes = 0;
  DistanceMemory(Arena{nullptr, 0}, p, &bytes);
  const int threads = kDistanceTile * kDistanceTile;
  context.launch(distance_kernel, s.batch * p.tiling.per_sketch, threads, bytes, p);
}

// grad, segment [B, H, W]; grad_points [B, steps, 2].
template <typename Context>
void distance_backward(Context& context, const Scene& s, const float* grad, const int32_t* segment,
                       const Output& grad_points) {
  if (s.batch == 0 || s.strokes.steps == 0) return;
  DistanceParams p{};
  p.strokes = s.strokes;
  p.canvas = s.canvas;
  p.grad = grad;
  p.segment = const_cast<int32_t*>(segment);
  p.grad_points = grad_points;
  p.tiling = tiles(s.canvas);
  p.words = static_cast<int>(ceil_div(s.strokes.steps, 32));
  p.run = kRun;
  const int64_t blocks = s.batch * p.tiling.per_sketch;
  p.present = scratch<unsigned>(context, blocks * p.words);
  context.launch(present_kernel, blocks, 256, 0, p);
  const int64_t runs = s.batch * ceil_div(s.strokes.steps, kRun);
  context.launch(distance_gather_kernel, runs, kGatherThreads, run_bytes(kRun), p);
}

}  // namespace cuda
}  // namespace raster
}  // namespace sketchfast
