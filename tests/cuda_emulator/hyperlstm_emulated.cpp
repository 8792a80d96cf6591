// The kernels of csrc/cuda/hyperlstm_kernels.cuh and the choices of hyperlstm_launch.h, run by the
// emulator behind a C interface for ctypes. Each function returns null or a message.
#include "cuda/hyperlstm_launch.h"
#include "emulated_context.h"

namespace {

using namespace sketchfast::hyperlstm::cuda;
using emulator::Context;
using emulator::guarded;

void check_fits(bool fits) {
  if (!fits) throw std::runtime_error("a row is more than the shared memory holds");
}

}  // namespace

// Rows of [part, step, row, unit]; no data: not given.
struct Array {
  void* data;
  int64_t dtype, part, step, row;

  operator AnyRows() const { return {data, static_cast<Dtype>(dtype), step, row}; }
  template <typename T>
  operator Rows<T>() const {
    return {static_cast<T*>(data), step, row};
  }
};

// As the tests fill it in; the order is theirs too.
struct Call {
  Array gates, x_part, scales, cell, hidden, shown, cells;          // of forward, and
  Array cell_before, cell_after, grad_out, grad_hidden, grad_cell;  // of backward
  Array grad_gates, grad_x_part, grad_scales;
  const float *bias, *ln_weight, *ln_bias, *ln_c_weight, *ln_c_bias;
  float* partials;
  const int64_t *lengths, *seed;
  int64_t batch, width, steps, first, step_offset, slots, shared_limit;
  double forget_bias, dropout;

  Setting setting() const {
    Setting out{};
    out.batch = static_cast<int>(batch);
    out.width = static_cast<int>(width);
    out.steps = static_cast<int>(steps);
    out.share = 1.0f / static_cast<float>(width);
    out.first = first;
    out.counter = static_cast<uint32_t>(first + step_offset);
    out.lengths = lengths;
    out.norm = {ln_weight, ln_bias, ln_c_weight, ln_c_bias};
    out.dropout = dropout_of(seed, dropout);
    out.forget_bias = static_cast<float>(forget_bias);
    return out;
  }
  template <typename D>
  MainGates<D> main_gates() const {
    return {gates, x_part, scales, scales.part, bias};
  }
  Dtype dtype() const { return static_cast<Dtype>(gates.dtype); }
};

extern "C" {

void set_schedule(int schedule, unsigned seed) {
  emulator::machine.schedule = static_cast<emulator::Schedule>(schedule);
  emulator::machine.seed = seed;
}

int launches() { return Context::launches; }

const char* hyperlstm_hyper_fwd(const Call* c) {
  return guarded(c->shared_limit, [&](Context& context) {
    check_fits(with_dtype(c->dtype(), [&](auto tag) {
      using Gates = HyperGates<decltype(tag)>;
      return forward(context, ForwardParams<Gates>{c->setting(), Gates{c->gates, c->x_part},
                                                   c->cell, c->hidden, c->shown, c->cells});
    }));
  });
}

const char* hyperlstm_main_fwd(const Call* c) {
  return guarded(c->shared_limit, [&](Context& context) {
    check_fits(with_dtype(c->dtype(), [&](auto tag) {
      using D = decltype(tag);
      return forward(context, ForwardParams<MainGates<D>>{c->setting(), c->main_gates<D>(), c->cell,
                                                          c->hidden, c->shown, c->cells});
    }));
  });
}

const char* hyperlstm_main_bwd(const Call* c) {
  return guarded(c->shared_limit, [&](Context& context) {
    check_fits(with_dtype(c->dtype(), [&](auto tag) {
      using D = decltype(tag);
      const MainGradients<D> to{c->main_gates<D>(), c->grad_gates, c->grad_x_part, c->grad_scales,
                                c->grad_scales.part};
      return backward(context,
                      BackwardParams<MainGradients<D>>{c->setting(), to, c->cell_before,
                                                       c->cell_after, c->grad_out, c->grad_hidden,
                                                       c->grad_cell, c->partials, 0},
                      c->slots);
    }));
  });
}

const char* hyperlstm_hyper_bwd(const Call* c) {
  return guarded(c->shared_limit, [&](Context& context) {
    check_fits(with_dtype(c->dtype(), [&](auto tag) {
      using D = decltype(tag);
      const HyperGradients<D> to{{c->gates, c->x_part}, c->grad_gates};
      return backward(context,
                      BackwardParams<HyperGradients<D>>{c->setting(), to, c->cell_before,
                                                        c->cell_after, c->grad_out, c->grad_hidden,
                                                        c->grad_cell, c->partials, 0},
                      c->slots);
    }));
  });
}

}  // extern "C"
