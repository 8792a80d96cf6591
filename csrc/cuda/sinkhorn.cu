// The CUDA kernels of entropic optimal transport as torch ops: checks, memory and the stream.
// Schemas are those of sketchfast/ops/sinkhorn.py; what runs is chosen in sinkhorn_launch.h.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "context.h"
#include "sinkhorn_launch.h"

namespace sketchfast {
namespace {

namespace kernels = sinkhorn::cuda;
using device::check_device;
using device::Context;
using device::input_of;
using device::output_of;
using OptionalTensor = std::optional<Tensor>;

// --- arguments

// `tensor` of this type and shape, contiguous and on the device of `like`: its elements.
template <typename T>
const T* elements(const char* name, const Tensor& tensor, ScalarType dtype,
                  std::initializer_list<int64_t> shape, const Tensor& like) {
  check_tensor(name, tensor, dtype, shape);
  check_device(name, tensor, like);
  return static_cast<const T*>(tensor.const_data_ptr());
}

const float* floats(const char* name, const OptionalTensor& tensor,
                    std::initializer_list<int64_t> shape, const Tensor& like) {
  if (!tensor.has_value()) return nullptr;
  return elements<float>(name, *tensor, ScalarType::Float, shape, like);
}

const double* doubles(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape,
                      const Tensor& like) {
  return elements<double>(name, tensor, ScalarType::Double, shape, like);
}

template <typename T>
T* new_elements(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

kernels::Problem sized_problem(const Tensor& like, int64_t count, int64_t rows, int64_t columns,
                               const Tensor& epsilon, const OptionalTensor& a,
                               const OptionalTensor& b) {
  check(rows >= 1 && columns >= 1 && rows <= 0x7fffffff && columns <= 0x7fffffff,
        "a problem must have 1 to 2^31 - 1 rows and columns, got ", rows, " x ", columns);
  kernels::Problem problem{};
  problem.epsilon = doubles("epsilon", epsilon, {count}, like);
  problem.a = floats("a", a, {count, rows}, like);
  problem.b = floats("b", b, {count, columns}, like);
  problem.a_value = static_cast<float>(1.0 / static_cast<double>(rows));
  problem.b_value = static_cast<float>(1.0 / static_cast<double>(columns));
  problem.count = count;
  problem.rows = rows;
  problem.columns = columns;
  problem.tol = -1;
  return problem;
}

kernels::Problem problem_of(const Tensor& cost, const Tensor& epsilon, const OptionalTensor& a,
                            const OptionalTensor& b) {
  check(cost.dim() == 3, "cost must have shape [N, K, E], got ", shape_of(cost));
  check(cost.is_cuda() && cost.is_contiguous(), "cost must be a contiguous CUDA tensor");
  kernels::Problem problem =
      sized_problem(cost, cost.size(0), cost.size(1), cost.size(2), epsilon, a, b);
  problem.cost = {input_of("cost", cost), problem.rows * problem.columns, problem.columns, 1,
                  false};
  return problem;
}

void set_iterations(kernels::Problem* problem, int64_t max_iter, double tol) {
  check(max_iter >= 1 && max_iter <= 0x7fffffff, "max_iter must lie in [1, 2^31 - 1], got ",
        max_iter);
  problem->max_iter = static_cast<int>(max_iter);
  problem->tol = static_cast<float>(tol);
}

// f, g, iterations, error, phi, gamma.
using Potentials = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Potentials new_potentials(const Tensor& like, const kernels::Problem& p, kernels::Solution* out) {
  Tensor f = new_tensor(like, {p.count, p.rows}, ScalarType::Float);
  Tensor g = new_tensor(like, {p.count, p.columns}, ScalarType::Float);
  Tensor iterations = new_tensor(like, {p.count}, ScalarType::Int);
  Tensor error = new_tensor(like, {p.count}, ScalarType::Float);
  Tensor phi = new_tensor(like, {p.count, p.rows}, ScalarType::Double);
  Tensor gamma = new_tensor(like, {p.count, p.columns}, ScalarType::Double);
  out->f = new_elements<float>(f);
  out->g = new_elements<float>(g);
  out->iterations = new_elements<int32_t>(iterations);
  out->error = new_elements<float>(error);
  out->phi = new_elements<double>(phi);
  out->gamma = new_elements<double>(gamma);
  return {f, g, iterations, error, phi, gamma};
}

ScalarType plan_type(const Tensor& cost) {
  return cost.scalar_type() == ScalarType::Half ? ScalarType::Float : cost.scalar_type();
}

// The gradient to the plan, of the plan's shape.
kernels::Input grad_of_plan(const OptionalTensor& grad, const kernels::Problem& p,
                            const Tensor& like) {
  if (!grad.has_value()) return {nullptr, device::Dtype::kFloat32};
  check_tensor("grad_plan", *grad, grad->scalar_type(), {p.count, p.rows, p.columns});
  check_device("grad_plan", *grad, like);
  return input_of("grad_plan", *grad);
}

// --- ops

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn_fwd(
    const Tensor& cost, const Tensor& epsilon, const OptionalTensor& a, const OptionalTensor& b,
    const OptionalTensor& init, int64_t max_iter, double tol, std::string) {
  kernels::Problem p = problem_of(cost, epsilon, a, b);
  set_iterations(&p, max_iter, tol);
  p.init = floats("init", init, {p.count, p.columns}, cost);
  Context context(cost);
  kernels::Solution solution{};
  Tensor plan = new_tensor(cost, {p.count, p.rows, p.columns}, plan_type(cost));
  solution.plan = output_of("plan", plan);
  auto [f, g, iterations, error, phi, gamma] = new_potentials(cost, p, &solution);
  kernels::solve(context, p, solution, kernels::Choice{});
  return {plan, f, g, iterations, error, phi, gamma};
}

std::tuple<Tensor, Tensor, Tensor> sinkhorn_adjoint(const OptionalTensor& grad_plan,
                                                    const OptionalTensor& grad_f,
                                                    const OptionalTensor& grad_g,
                                                    const Tensor& cost, const Tensor& epsilon,
                                                    const Tensor& phi, const Tensor& gamma) {
  const kernels::Problem p = problem_of(cost, epsilon, std::nullopt, std::nullopt);
  Context context(cost);
  Tensor plan = new_tensor(cost, {p.count, p.rows, p.columns}, ScalarType::Double);
  Tensor row_rhs = new_tensor(cost, {p.count, p.rows}, ScalarType::Double);
  Tensor column_rhs = new_tensor(cost, {p.count, p.columns}, ScalarType::Double);
  kernels::adjoint(context, p, doubles("phi", phi, {p.count, p.rows}, cost),
                   doubles("gamma", gamma, {p.count, p.columns}, cost),
                   grad_of_plan(grad_plan, p, cost),
                   floats("grad_f", grad_f, {p.count, p.rows}, cost),
                   floats("grad_g", grad_g, {p.count, p.columns}, cost), new_elements<double>(plan),
                   new_elements<double>(row_rhs), new_elements<double>(column_rhs));
  return {plan, row_rhs, column_rhs};
}

Tensor sinkhorn_cost_gradient(const OptionalTensor& grad_plan, const Tensor& plan,
                              const Tensor& epsilon, const Tensor& lam, const Tensor& mu,
                              ScalarType dtype) {
  check(plan.dim() == 3, "plan must have shape [N, K, E], got ", shape_of(plan));
  check(plan.is_cuda(), "plan must be a CUDA tensor");
  kernels::Problem p = sized_problem(plan, plan.size(0), plan.size(1), plan.size(2), epsilon,
                                     std::nullopt, std::nullopt);
  p.cost = {{nullptr, device::Dtype::kFloat32}, p.rows * p.columns, p.columns, 1, false};
  Context context(plan);
  Tensor grad_cost = new_tensor(plan, {p.count, p.rows, p.columns}, dtype);
  kernels::cost_gradient(context, p, grad_of_plan(grad_plan, p, plan),
                         doubles("plan", plan, {p.count, p.rows, p.columns}, plan),
                         doubles("lam", lam, {p.count, p.rows}, plan),
                         doubles("mu", mu, {p.count, p.columns}, plan),
                         output_of("dtype", grad_cost));
  return grad_cost;
}

std::tuple<Tensor, Tensor, Tensor> sinkhorn_unrolled_bwd(
    const OptionalTensor& grad_plan, const OptionalTensor& grad_f, const OptionalTensor& grad_g,
    const Tensor& cost, const Tensor& epsilon, const OptionalTensor& a, const OptionalTensor& b,
    const OptionalTensor& init, const Tensor& iterations, int64_t max_iter) {
  kernels::Problem p = problem_of(cost, epsilon, a, b);
  set_iterations(&p, max_iter, -1);
  p.init = floats("init", init, {p.count, p.columns}, cost);
  Context context(cost);
  Tensor grad_cost = new_tensor(cost, {p.count, p.rows, p.columns}, cost.scalar_type());
  Tensor grad_a = new_tensor(cost, {p.count, p.rows}, ScalarType::Float);
  Tensor grad_b = new_tensor(cost, {p.count, p.columns}, ScalarType::Float);
  kernels::unrolled_backward(
      context, p, elements<int32_t>("iterations", iterations, ScalarType::Int, {p.count}, cost),
      grad_of_plan(grad_plan, p, cost), floats("grad_f", grad_f, {p.count, p.rows}, cost),
      floats("grad_g", grad_g, {p.count, p.columns}, cost), output_of("cost", grad_cost),
      new_elements<float>(grad_a), new_elements<float>(grad_b));
  return {grad_cost, grad_a, grad_b};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn_value_fwd(
    const Tensor& cost, const Tensor& epsilon, const OptionalTensor& a, const OptionalTensor& b,
    int64_t max_iter, double tol) {
  kernels::Problem p = problem_of(cost, epsilon, a, b);
  set_iterations(&p, max_iter, tol);
  Context context(cost);
  kernels::Solution solution{};
  auto [f, g, iterations, error, phi, gamma] = new_potentials(cost, p, &solution);
  Tensor value = new_tensor(cost, {p.count}, ScalarType::Float);
  solution.value = new_elements<float>(value);
  kernels::solve(context, p, solution, kernels::Choice{});
  return {value, f, g, phi, gamma};
}

Tensor sinkhorn_value_bwd(const Tensor& grad, const Tensor& cost, const Tensor& epsilon,
                          const Tensor& phi, const Tensor& gamma) {
  const kernels::Problem p = problem_of(cost, epsilon, std::nullopt, std::nullopt);
  Context context(cost);
  Tensor grad_cost = new_tensor(cost, {p.count, p.rows, p.columns}, cost.scalar_type());
  kernels::write_plan(context, p, doubles("phi", phi, {p.count, p.rows}, cost),
                      doubles("gamma", gamma, {p.count, p.columns}, cost),
                      elements<float>("grad", grad, ScalarType::Float, {p.count}, cost),
                      output_of("cost", grad_cost));
  return grad_cost;
}

Tensor swav_assign(const Tensor& scores, double epsilon, int64_t iterations) {
  check(scores.dim() == 2, "scores must have shape [B, K], got ", shape_of(scores));
  check(scores.is_cuda() && scores.is_contiguous(), "scores must be a contiguous CUDA tensor");
  check(scores.size(1) >= 1 && scores.size(0) <= 0x7fffffff && scores.size(1) <= 0x7fffffff,
        "scores must have at most 2^31 - 1 rows and 1 to 2^31 - 1 columns, got ", shape_of(scores));
  check(iterations >= 1 && iterations <= 0x7fffffff, "n_iter must lie in [1, 2^31 - 1], got ",
        iterations);
  Context context(scores);
  Tensor assignment = new_tensor(scores, {scores.size(0), scores.size(1)}, scores.scalar_type());
  kernels::swav_assign(context, input_of("scores", scores), scores.size(0), scores.size(1), epsilon,
                       static_cast<int>(iterations), output_of("scores", assignment),
                       kernels::Choice{});
  return assignment;
}

// The checked elements of clouds x [N, n, d] and y [N, m, d], float32.
struct Clouds {
  const float *x, *y;
  int64_t count, n, m;
  int dimensions;

  Clouds(const Tensor& x_points, const Tensor& y_points) {
    check(x_points.dim() == 3, "x must have shape [N, n, d], got ", shape_of(x_points));
    check(y_points.dim() == 3, "y must have shape [N, m, d], got ", shape_of(y_points));
    check(x_points.is_cuda(), "x must be a CUDA tensor");
    check(x_points.size(2) <= 0x7fffff, "x must have at most 2^23 - 1 dimensions, got ",
          x_points.size(2));
    count = x_points.size(0);
    n = x_points.size(1);
    m = y_points.size(1);
    dimensions = static_cast<int>(x_points.size(2));
    x = elements<float>("x", x_points, ScalarType::Float, {count, n, x_points.size(2)}, x_points);
    y = elements<float>("y", y_points, ScalarType::Float, {count, m, x_points.size(2)}, x_points);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn_points_fwd(
    const Tensor& x, const Tensor& y, const Tensor& epsilon, const OptionalTensor& a,
    const OptionalTensor& b, int64_t max_iter, double tol) {
  const Clouds clouds(x, y);
  kernels::Problem p = sized_problem(x, clouds.count, clouds.n, clouds.m, epsilon, a, b);
  set_iterations(&p, max_iter, tol);
  Context context(x);
  kernels::Solution solution{};
  auto [f, g, iterations, error, phi, gamma] = new_potentials(x, p, &solution);
  Tensor value = new_tensor(x, {p.count}, ScalarType::Float);
  solution.value = new_elements<float>(value);
  kernels::solve_points(context, p, clouds.x, clouds.y, clouds.dimensions, solution);
  return {value, f, g, iterations, error, phi, gamma};
}

std::tuple<Tensor, Tensor> sinkhorn_points_bwd(const Tensor& grad, const Tensor& x, const Tensor& y,
                                               const Tensor& epsilon, const Tensor& phi,
                                               const Tensor& gamma) {
  const Clouds clouds(x, y);
  const kernels::Problem p =
      sized_problem(x, clouds.count, clouds.n, clouds.m, epsilon, std::nullopt, std::nullopt);
  Context context(x);
  Tensor grad_x = torch::stable::empty_like(x), grad_y = torch::stable::empty_like(y);
  kernels::points_backward(context, p, clouds.x, clouds.y, clouds.dimensions,
                           elements<float>("grad", grad, ScalarType::Float, {p.count}, x),
                           doubles("phi", phi, {p.count, p.rows}, x),
                           doubles("gamma", gamma, {p.count, p.columns}, x),
                           new_elements<float>(grad_x), new_elements<float>(grad_y));
  return {grad_x, grad_y};
}

}  // namespace
}  // namespace sketchfast

STABLE_TORCH_LIBRARY_IMPL(sketchfast, CUDA, m) {
  m.impl("sinkhorn_fwd_native", TORCH_BOX(&sketchfast::sinkhorn_fwd));
  m.impl("sinkhorn_adjoint_native", TORCH_BOX(&sketchfast::sinkhorn_adjoint));
  m.impl("sinkhorn_cost_gradient_native", TORCH_BOX(&sketchfast::sinkhorn_cost_gradient));
  m.impl("sinkhorn_unrolled_bwd_native", TORCH_BOX(&sketchfast::sinkhorn_unrolled_bwd));
  m.impl("sinkhorn_value_fwd_native", TORCH_BOX(&sketchfast::sinkhorn_value_fwd));
  m.impl("sinkhorn_value_bwd_native", TORCH_BOX(&sketchfast::sinkhorn_value_bwd));
  m.impl("swav_assign_native", TORCH_BOX(&sketchfast::swav_assign));
  m.impl("sinkhorn_points_fwd_native", TORCH_BOX(&sketchfast::sinkhorn_points_fwd));
  m.impl("sinkhorn_points_bwd_native", TORCH_BOX(&sketchfast::sinkhorn_points_bwd));
}
