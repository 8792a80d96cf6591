// The kernels of csrc/cuda/sinkhorn_kernels.cuh and the choices of sinkhorn_launch.h, run by the
// emulator behind a C interface for ctypes. Each function returns null or a message.
#include "cuda/sinkhorn_launch.h"
#include "emulated_context.h"

namespace {

using namespace sketchfast::sinkhorn::cuda;
using emulator::Context;
using emulator::guarded;
using sketchfast::device::Dtype;

}  // namespace

extern "C" {

// As the tests fill it in; the order is theirs too.
struct Call {
  const void* cost;
  const double* epsilon;
  const float *a, *b, *init;
  void* plan;
  float *f, *g, *error, *value;
  int32_t* iterations;
  double *phi, *gamma;
  int64_t count, rows, columns, max_iter, cost_dtype, plan_dtype, shared_limit, resident,
      most_warps, most_cluster;
  double tol;

  Problem problem() const {
    Problem q{};
    q.cost = {{cost, static_cast<Dtype>(cost_dtype)}, rows * columns, columns, 1, false};
    q.epsilon = epsilon;
    q.a = a;
    q.b = b;
    q.init = init;
    q.a_value = 1.0f / rows;
    q.b_value = 1.0f / columns;
    q.count = count;
    q.rows = rows;
    q.columns = columns;
    q.max_iter = static_cast<int>(max_iter);
    q.tol = static_cast<float>(tol);
    return q;
  }
  Solution solution() const {
    return {{plan, static_cast<Dtype>(plan_dtype)}, f, g, iterations, error, value, phi, gamma};
  }
  Choice choice() const {
    return {resident != 0, static_cast<int>(most_warps), static_cast<int>(most_cluster)};
  }
};

void set_schedule(int schedule, unsigned seed) {
  emulator::machine.schedule = static_cast<emulator::Schedule>(schedule);
  emulator::machine.seed = seed;
}

int launches() { return Context::launches; }

const char* sinkhorn_solve(const Call* c) {
  return guarded(c->shared_limit, [&](Context& context) {
    solve(context, c->problem(), c->solution(), c->choice());
  });
}

}  // extern "C"
