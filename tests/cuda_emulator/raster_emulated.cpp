// The kernels of csrc/cuda/raster_kernels.cuh and the choices of raster_launch.h, run by the
// emulator behind a C interface for ctypes. Each function returns null or a message.
#include "cuda/raster_launch.h"
#include "emulated_context.h"

namespace {

using namespace sketchfast::raster;
using namespace sketchfast::raster::cuda;
using emulator::Context;
using emulator::guarded;

}  // namespace

extern "C" {

// As the tests fill it in; the order is theirs too.
struct Call {
  const void* points;
  const bool* pen_down;
  const int64_t* lengths;
  const void* target_points;
  const bool* target_pen_down;
  const int64_t* target_lengths;
  int64_t batch, steps, target_steps, height, width, taps, points_dtype, image_dtype, wide_winner,
      shared_limit;
  double sharpness, offset, sigma;

  Strokes strokes() const {
    return {{points, static_cast<Dtype>(points_dtype)}, pen_down, lengths, steps};
  }
  Strokes target_strokes() const {
    return {{target_points, Dtype::kFloat32}, target_pen_down, target_lengths, target_steps};
  }
  Scene scene() const {
    const Canvas canvas{static_cast<int>(height), static_cast<int>(width)};
    return {strokes(), batch, canvas, sharpness, offset, sigma, taps};
  }
  Dtype image_type() const { return static_cast<Dtype>(image_dtype); }
};

void set_schedule(int schedule, unsigned seed) {
  emulator::machine.schedule = static_cast<emulator::Schedule>(schedule);
  emulator::machine.seed = seed;
}

int launches() { return Context::launches; }

const char* raster_forward(const Call* c, void* image, void* winner) {
  return guarded(c->shared_limit, [&](Context& context) {
    forward(context, c->scene(), kImageCutoff<float>, {image, c->image_type()},
            {winner, c->wide_winner != 0});
  });
}

const char* raster_backward(const Call* c, const void* grad, void* winner, void* grad_points) {
  return guarded(c->shared_limit, [&](Context& context) {
    backward(context, c->scene(), {grad, c->image_type()}, {winner, c->wide_winner != 0},
             {grad_points, static_cast<Dtype>(c->points_dtype)});
  });
}

const char* raster_bce(const Call* c, const float* target, float* loss, float* grad_points) {
  return guarded(c->shared_limit, [&](Context& context) {
    bce(context, c->scene(), c->target_strokes(), target, grad_points != nullptr, loss,
        grad_points);
  });
}

const char* distance_forward(const Call* c, float* distance2, int32_t* segment) {
  return guarded(c->shared_limit, [&](Context& context) {
    sketchfast::raster::cuda::distance_forward(context, c->scene(), distance2, segment);
  });
}

const char* distance_backward(const Call* c, const float* grad, const int32_t* segment,
                              void* grad_points) {
  return guarded(c->shared_limit, [&](Context& context) {
    sketchfast::raster::cuda::distance_backward(context, c->scene(), grad, segment,
                                                {grad_points, static_cast<Dtype>(c->points_dtype)});
  });
}

}  // extern "C"
