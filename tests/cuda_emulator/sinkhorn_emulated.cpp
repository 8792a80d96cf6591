// The kernels of csrc/cuda/sinkhorn_kernels.cuh and the choices of sinkhorn_launch.h, run by the
// emulator behind a C interface for ctypes. Each function returns null or a message.
#include "cuda/sinkhorn_launch.h"
#include "emulated_context.h"

namespace {

using namespace sketchfast::sinkhorn::cuda;
using emulator::Context;
using emulator::guarded;
using sketchfast::device::Dtype;
using sketchfast::device::Input;
using sketchfast::device::Output;

}  // namespace

extern "C" {

// As the tests fill it in; the order is theirs too.
struct Call {
  const void* cost;
  const double* epsilon;
  const float *a, *b, *init, *x, *y;
  const void* grad_plan;
  const float *grad_f, *grad_g, *grad;
  const double *lam, *mu;
  void* plan;
  float *f, *g, *error, *value;
  int32_t* iterations;
  double *phi, *gamma, *wide_plan, *row_rhs, *column_rhs;
  void* grad_cost;
  float *grad_a, *grad_b, *grad_x, *grad_y;
  int64_t count, rows, columns, max_iter, cost_dtype, plan_dtype, shared_limit, resident,
      most_warps, most_cluster, dimensions;
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
  Input grad_plan_input() const { return {grad_plan, static_cast<Dtype>(plan_dtype)}; }
  Output grad_cost_output() const { return {grad_cost, static_cast<Dtype>(cost_dtype)}; }
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

const char* sinkhorn_adjoint(const Call* c) {
  return guarded(c->shared_limit, [&](Context& context) {
    adjoint(context, c->problem(), c->phi, c->gamma, c->grad_plan_input(), c->grad_f, c->grad_g,
            c->wide_plan, c->row_rhs, c->column_rhs);
  });
}

const char* sinkhorn_cost_gradient(const Call* c) {
  return guarded(c->shared_limit, [&](Context& context) {
    cost_gradient(context, c->problem(), c->grad_plan_input(), c->wide_plan, c->lam, c->mu,
                  c->grad_cost_output());
  });
}

const char* sinkhorn_unrolled(const Call* c) {
  return guarded(c->shared_limit, [&](Context& context) {
    unrolled_backward(context, c->problem(), c->iterations, c->grad_plan_input(), c->grad_f,
                      c->grad_g, c->grad_cost_output(), c->grad_a, c->grad_b);
  });
}

// grad [count] times the plan.
const char* sinkhorn_value_backward(const Call* c) {
  return guarded(c->shared_limit, [&](Context& context) {
    write_plan(context, c->problem(), c->phi, c->gamma, c->grad, c->grad_cost_output());
  });
}

// cost: the scores [rows, columns]; plan: the assignment, of their type.
const char* sinkhorn_swav(const Call* c, double epsilon) {
  return guarded(c->shared_limit, [&](Context& context) {
    const Problem q = c->problem();
    swav_assign(context, q.cost.data, c->rows, c->columns, epsilon, static_cast<int>(c->max_iter),
                {c->plan, static_cast<Dtype>(c->plan_dtype)}, c->choice());
  });
}

const char* sinkhorn_points(const Call* c) {
  return guarded(c->shared_limit, [&](Context& context) {
    solve_points(context, c->problem(), c->x, c->y, static_cast<int>(c->dimensions), c->solution());
  });
}

const char* sinkhorn_points_backward(const Call* c) {
  return guarded(c->shared_limit, [&](Context& context) {
    points_backward(context, c->problem(), c->x, c->y, static_cast<int>(c->dimensions), c->grad,
                    c->phi, c->gamma, c->grad_x, c->grad_y);
  });
}

}  // extern "C"
