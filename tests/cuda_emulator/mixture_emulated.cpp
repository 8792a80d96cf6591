// The kernels of csrc/cuda/mixture_kernels.cuh and the choices of mixture_launch.h, run by the
// emulator behind a C interface for ctypes. Each function returns null or a message.
#include "cuda/mixture_launch.h"
#include "emulated_context.h"

namespace {

using emulator::Context;
using emulator::guarded;
using sketchfast::device::Dtype;
namespace kernels = sketchfast::mixture::cuda;

}  // namespace

extern "C" {

// As the tests fill it in; the order is theirs too.
struct Call {
  const void* output;
  const float *target, *rows_in, *grad_pen, *grad_stroke;
  float *pen, *stroke, *rows;
  void* grad;
  int64_t positions, components, dtype, shared_limit;
};

void set_schedule(int schedule, unsigned seed) {
  emulator::machine.schedule = static_cast<emulator::Schedule>(schedule);
  emulator::machine.seed = seed;
}

int launches() { return Context::launches; }

const char* mixture_forward(const Call* c) {
  return guarded(c->shared_limit, [&](Context& context) {
    kernels::forward(context, {c->output, static_cast<Dtype>(c->dtype)}, c->target, c->positions,
                     static_cast<int>(c->components), c->pen, c->stroke, c->rows);
  });
}

const char* mixture_backward(const Call* c) {
  return guarded(c->shared_limit, [&](Context& context) {
    kernels::backward(context, {c->rows_in,
                                c->grad_pen,
                                c->grad_stroke,
                                {c->grad, static_cast<Dtype>(c->dtype)},
                                c->positions,
                                3 + 6 * c->components});
  });
}

}  // extern "C"
