// The CUDA kernels of rasterization as torch ops: checks, memory and the stream. Schemas are those
// of sketchfast/ops/raster.py; what runs is chosen in raster_launch.h.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "context.h"
#include "raster_launch.h"

namespace sketchfast {
namespace {

namespace kernels = raster::cuda;
using device::check_device;
using device::Context;
using device::input_of;
using device::output_of;

// --- arguments

kernels::Strokes strokes_of(const Tensor& points, const Tensor* pen_down,
                            const std::optional<Tensor>& lengths, const Tensor& like) {
  check(points.dim() == 3 && points.size(2) == 2, "points must have shape [B, T, 2], got ",
        shape_of(points));
  check(points.size(1) <= 0x7fffffff, "points must have at most 2^31 - 1 steps, got ",
        points.size(1));
  check(points.is_contiguous(), "points must be contiguous");
  check_device("points", points, like);
  kernels::Strokes strokes{input_of("points", points), nullptr, nullptr, points.size(1)};
  if (pen_down) {
    check_tensor("pen_down", *pen_down, ScalarType::Bool, {points.size(0), points.size(1)});
    check_device("pen_down", *pen_down, like);
    strokes.pen_down = static_cast<const bool*>(pen_down->const_data_ptr());
  }
  if (lengths.has_value()) {
    check_tensor("lengths", *lengths, ScalarType::Long, {points.size(0)});
    check_device("lengths", *lengths, like);
    strokes.lengths = static_cast<const int64_t*>(lengths->const_data_ptr());
  }
  return strokes;
}

kernels::Canvas canvas_of(int64_t height, int64_t width) {
  // Float32 coordinates are exact up to 2^24.
  constexpr int64_t most = 1 << 24;
  check(height >= 1 && width >= 1 && height <= most && width <= most,
        "size must lie in [1, 2^24], got ", height, " x ", width);
  return {static_cast<int>(height), static_cast<int>(width)};
}

ScalarType segment_type(const Tensor& points) {
  return points.size(1) <= (1 << 15) ? ScalarType::Short : ScalarType::Int;
}

kernels::Winner winner_of(const Tensor& segment) {
  return {segment.mutable_data_ptr(), segment.scalar_type() == ScalarType::Int};
}

// --- ops

std::tuple<Tensor, Tensor> raster_fwd(const Tensor& points, const Tensor& pen_down,
                                      const std::optional<Tensor>& lengths, int64_t height,
                                      int64_t width, double sharpness, double offset,
                                      double blur_sigma, int64_t blur_taps, ScalarType dtype,
                                      bool save) {
  const kernels::Scene scene{strokes_of(points, &pen_down, lengths, points),
                             points.size(0),
                             canvas_of(height, width),
                             sharpness,
                             offset,
                             blur_sigma,
                             blur_taps};
  Context context(points);
  Tensor image = torch::stable::new_empty(points, {scene.batch, height, width}, dtype);
  Tensor segment = torch::stable::new_empty(points, {save ? scene.batch : 0, height, width},
                                            segment_type(points));
  kernels::Winner winner = winner_of(segment);
  if (!save) winner.data = nullptr;
  kernels::forward(context, scene, raster::kImageCutoff<float>, output_of("dtype", image), winner);
  return {image, segment};
}

Tensor raster_bwd(const Tensor& grad, const Tensor& points, const Tensor& pen_down,
                  const std::optional<Tensor>& lengths, const Tensor& segment, double sharpness,
                  double offset, double blur_sigma, int64_t blur_taps) {
  check(grad.dim() == 3, "grad must have shape [B, H, W], got ", shape_of(grad));
  const int64_t height = grad.size(1), width = grad.size(2);
  check_tensor("grad", grad, grad.scalar_type(), {points.size(0), height, width});
  check_device("grad", grad, points);
  check_tensor("segment", segment, segment_type(points), {points.size(0), height, width});
  check_device("segment", segment, points);
  const kernels::Scene scene{strokes_of(points, &pen_down, lengths, points),
                             points.size(0),
                             canvas_of(height, width),
                             sharpness,
                             offset,
                             blur_sigma,
                             blur_taps};
  Context context(points);
  Tensor grad_points = torch::stable::empty_like(points);
  kernels::backward(context, scene, input_of("grad", grad), winner_of(segment),
                    output_of("points", grad_points));
  return grad_points;
}

std::tuple<Tensor, Tensor> raster_bce(const Tensor& points, const Tensor& pen_down,
                                      const std::optional<Tensor>& lengths,
                                      const std::optional<Tensor>& target,
                                      const std::optional<Tensor>& target_points,
                                      const std::optional<Tensor>& target_pen_down,
                                      const std::optional<Tensor>& target_lengths, int64_t height,
                                      int64_t width, double sharpness, double offset,
                                      double blur_sigma, int64_t blur_taps, bool need_grad) {
  const kernels::Scene scene{strokes_of(points, &pen_down, lengths, points),
                             points.size(0),
                             canvas_of(height, width),
                             sharpness,
                             offset,
                             blur_sigma,
                             blur_taps};
  kernels::Strokes target_strokes{};
  const float* target_image = nullptr;
  if (target.has_value()) {
    check_tensor("target", *target, ScalarType::Float, {scene.batch, height, width});
    check_device("target", *target, points);
    target_image = static_cast<const float*>(target->const_data_ptr());
  } else {
    check(target_points.has_value() && target_pen_down.has_value(),
          "target must be an image or points with pen_down");
    check(target_points->size(0) == scene.batch, "target_points must have shape [", scene.batch,
          ", T', 2], got ", shape_of(*target_points));
    target_strokes = strokes_of(*target_points, &*target_pen_down, target_lengths, points);
  }
  Context context(points);
  Tensor loss = torch::stable::new_empty(points, {scene.batch}, ScalarType::Float);
  Tensor grad_points = torch::stable::new_empty(
      points, {need_grad ? scene.batch : 0, points.size(1), 2}, ScalarType::Float);
  kernels::bce(context, scene, target_strokes, target_image, need_grad,
               static_cast<float*>(loss.mutable_data_ptr()),
               static_cast<float*>(grad_points.mutable_data_ptr()));
  return {loss, grad_points};
}

// A scene of which only strokes, batch and canvas count.
kernels::Scene distance_scene(const kernels::Strokes& strokes, int64_t batch, int64_t height,
                              int64_t width) {
  return {strokes, batch, canvas_of(height, width), 1, 0, 0, 1};
}

std::tuple<Tensor, Tensor> stroke_distance_fwd(const Tensor& points, const Tensor& pen_down,
                                               const std::optional<Tensor>& lengths, int64_t height,
                                               int64_t width) {
  const kernels::Scene scene =
      distance_scene(strokes_of(points, &pen_down, lengths, points), points.size(0), height, width);
  Context context(points);
  Tensor distance2 =
      torch::stable::new_empty(points, {scene.batch, height, width}, ScalarType::Float);
  Tensor segment = torch::stable::new_empty(points, {scene.batch, height, width}, ScalarType::Int);
  kernels::distance_forward(context, scene, static_cast<float*>(distance2.mutable_data_ptr()),
                            static_cast<int32_t*>(segment.mutable_data_ptr()));
  return {distance2, segment};
}

Tensor stroke_distance_bwd(const Tensor& grad, const Tensor& points, const Tensor& segment) {
  check(grad.dim() == 3, "grad must have shape [B, H, W], got ", shape_of(grad));
  const int64_t height = grad.size(1), width = grad.size(2);
  check_tensor("grad", grad, ScalarType::Float, {points.size(0), height, width});
  check_device("grad", grad, points);
  check_tensor("segment", segment, ScalarType::Int, {points.size(0), height, width});
  check_device("segment", segment, points);
  const kernels::Scene scene = distance_scene(strokes_of(points, nullptr, std::nullopt, points),
                                              points.size(0), height, width);
  Context context(points);
  Tensor grad_points = torch::stable::empty_like(points);
  kernels::distance_backward(context, scene, static_cast<const float*>(grad.const_data_ptr()),
                             static_cast<const int32_t*>(segment.const_data_ptr()),
                             output_of("points", grad_points));
  return grad_points;
}

}  // namespace
}  // namespace sketchfast

STABLE_TORCH_LIBRARY_IMPL(sketchfast, CUDA, m) {
  m.impl("raster_fwd_native", TORCH_BOX(&sketchfast::raster_fwd));
  m.impl("raster_bwd_native", TORCH_BOX(&sketchfast::raster_bwd));
  m.impl("raster_bce_native", TORCH_BOX(&sketchfast::raster_bce));
  m.impl("stroke_distance_fwd_native", TORCH_BOX(&sketchfast::stroke_distance_fwd));
  m.impl("stroke_distance_bwd_native", TORCH_BOX(&sketchfast::stroke_distance_bwd));
}
