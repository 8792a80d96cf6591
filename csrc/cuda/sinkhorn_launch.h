// Which kernels of sinkhorn_kernels.cuh a call takes, and with what sizes.
//
// Context is where they run: the CUDA device (sinkhorn.cu) or tests/cuda_emulator. It gives
//   size_t shared_limit             bytes of shared memory a CTA may have
//   void* scratch(size_t bytes)     device memory that lives until the call's kernels are done
//   void launch(kernel, int64_t blocks, int threads, size_t shared, const Params&, int cluster = 1)
//   bool runs(kernel, int threads, size_t shared, int cluster)   whether the device can
// Nothing here depends on values, only on sizes: calls can be captured in a CUDA graph.
#pragma once

#include <utility>

#include "sinkhorn_kernels.cuh"

namespace sketchfast {
namespace sinkhorn {
namespace cuda {

// What tests force; the defaults are the rule.
struct Choice {
  bool resident = true;  // where it fits
  int most_warps = 16;
  int most_cluster = kMaxCluster;
};

// --- the resident solver

// Solves with tiles of R x C a lane, if the device can hold the problem so.
template <int R, int C, int W, typename Context>
bool solve_resident(Context& context, const Problem& problem, const Solution& solution,
                    const Choice& choice) {
  constexpr int strip = Resident<R, C, W>::kStrip;
  const int most_warps = choice.most_warps < W ? choice.most_warps : W;
  int cluster = 1;
  while (cluster < choice.most_cluster && ceil_div(problem.columns, cluster) > most_warps * strip) {
    cluster *= 2;
  }
  const int64_t warps = ceil_div(ceil_div(problem.columns, cluster), strip);
  if (problem.rows > Resident<R, C, W>::kRows || warps > most_warps) return false;
  const int threads = static_cast<int>(warps) * kWarp;
  const size_t bytes = Resident<R, C, W>::bytes(static_cast<int>(warps), cluster);
  const auto kernel = resident_kernel<R, C, W>;
  if (!context.runs(kernel, threads, bytes, cluster)) return false;
  const ResidentParams params{problem, solution, cluster, static_cast<int>(warps) * strip};
  context.launch(kernel, problem.count * cluster, threads, bytes, params, cluster);
  return true;
}

// --- the streamed solver

constexpr int64_t kWantedCtas = 264;  // two for each multiprocessor of the GPUs this is for
constexpr int kMaxSplits = 64;

template <typename T, typename Context>
T* scratch(Context& context, int64_t count) {
  return static_cast<T*>(context.scratch(static_cast<size_t>(count) * sizeof(T)));
}

inline size_t line_sums_bytes() { return sizeof(double) * kLineWarps; }

// How many CTAs share a line, so that there are enough CTAs and each has enough terms.
inline int splits_for(int64_t ctas, int64_t terms, int64_t least_terms) {
  int64_t splits = ceil_div(kWantedCtas, ctas < 1 ? 1 : ctas);
  const int64_t most = ceil_div(terms, least_terms);
  splits = splits < most ? splits : most;
  return static_cast<int>(splits < kMaxSplits ? splits : kMaxSplits);
}

// The rows of a cost as lines, or its columns; `along` says whether terms lie beside each other.
inline Lines lines_of(const Matrix& cost, int64_t count, int64_t rows, int64_t columns,
                      bool by_rows) {
  Lines lines{};
  lines.count = count;
  lines.lines = by_rows ? rows : columns;
  lines.terms = by_rows ? columns : rows;
  lines.problem_stride = cost.problem_stride;
  lines.line_stride = by_rows ? cost.row_stride : cost.column_stride;
  lines.term_stride = by_rows ? cost.column_stride : cost.row_stride;
  const bool along = lines.term_stride == 1;
  lines.warps = lines.terms >= 1024 ? kLineWarps : 1;
  const int64_t lines_a_cta = along ? kLineWarps / lines.warps : kWarp;
  const int64_t ctas = count * ceil_div(lines.lines, lines_a_cta);
  const int64_t least = along ? 4 * kWarp * lines.warps : 4 * kLineWarps;
  lines.splits = along && lines.warps == 1 ? 1 : splits_for(ctas, lines.terms, 4 * least);
  return lines;
}

template <typename Op, typename Context>
typename Op::State* parts_for(Context& context, const Lines& lines) {
  if (lines.splits == 1) return nullptr;
  return scratch<typename Op::State>(context, lines.count * lines.lines * lines.splits);
}

template <typename Op, typename Context>
void combine(Context& context, const Op& op) {
  const int64_t blocks = ceil_div(op.lines.count * op.lines.lines, kLineThreads);
  context.launch(combine_kernel<Op>, blocks, kLineThreads, 0, op);
}

template <typename Op, typename Context>
void launch_lines(Context& context, const Op& op) {
  const Lines& l = op.lines;
  using State = typename Op::State;
  if (l.term_stride == 1) {
    const int64_t blocks = l.count * ceil_div(l.lines, kLineWarps / l.warps) * l.splits;
    context.launch(along_kernel<Op>, blocks, kLineThreads, sizeof(State) * kLineWarps, op);
  } else {
    const int64_t blocks = l.count * ceil_div(l.lines, kWarp) * l.splits;
    context.launch(across_kernel<Op>, blocks, kLineThreads, sizeof(State) * kLineThreads, op);
  }
  if (l.splits > 1) combine(context, op);
}

// Half-steps of a cost in memory, for stream_solve.
template <typename Context>
class CostSteps {
 public:
  CostSteps(Context& context, const Problem& problem)
      : context_(context), rows_(step_of(problem, true)), columns_(step_of(problem, false)) {}

  // Runs the row (or column) half-step with what `set` puts into it.
  template <typename Set>
  void run(bool by_rows, Set set) {
    HalfStep op = by_rows ? rows_ : columns_;
    set(&op);
    launch_lines(context_, op);
  }

 private:
  HalfStep step_of(const Problem& q, bool by_rows) {
    HalfStep op{};
    op.lines = lines_of(q.cost, q.count, q.rows, q.columns, by_rows);
    op.parts = parts_for<HalfStep>(context_, op.lines);
    op.cost = q.cost;
    op.epsilon = q.epsilon;
    op.epsilon_value = q.epsilon_value;
    op.mass = by_rows ? q.a : q.b;
    op.mass_value = by_rows ? q.a_value : q.b_value;
    return op;
  }

  Context& context_;
  HalfStep rows_, columns_;
};

// All iterations, a launch or two a half-step. With a tolerance a third kernel an iteration decides
// which problems go on; for the others the launches are empty.
template <typename Context, typename Steps>
State stream_solve(Context& context, const Problem& q, const Solution& solution, Steps& steps) {
  const bool decides = q.tol >= 0;
  State s{};
  s.problem = q;
  s.solution = solution;
  s.phi = solution.phi ? solution.phi : scratch<double>(context, q.count * q.rows);
  s.gamma = solution.gamma ? solution.gamma : scratch<double>(context, q.count * q.columns);
  s.next_phi = decides ? scratch<double>(context, q.count * q.rows) : s.phi;
  s.error = scratch<double>(context, q.count * q.rows);
  s.runs = decides ? scratch<int32_t>(context, q.count) : nullptr;
  s.iterations = decides ? scratch<int32_t>(context, q.count) : nullptr;
  context.launch(start_kernel, q.count, kLineThreads, 0, s);
  for (int n = 1; n <= q.max_iter; ++n) {
    steps.run(true, [&](HalfStep* op) {
      op->lines.runs = s.runs;
      op->other = s.gamma;
      op->potential = s.next_phi;
      op->old = s.phi;
      op->error = decides && n > 1 ? s.error : nullptr;
    });
    s.iteration = n;
    if (decides) context.launch(decide_kernel, q.count, kLineThreads, line_sums_bytes(), s);
    steps.run(false, [&](HalfStep* op) {
      op->lines.runs = s.runs;
      op->other = s.phi;
      op->potential = s.gamma;
    });
  }
  steps.run(true, [&](HalfStep* op) {
    op->other = s.gamma;
    op->old = s.phi;
    op->error = s.error;
  });
  context.launch(finish_kernel, q.count, kLineThreads, line_sums_bytes(), s);
  return s;
}

// --- entry by entry

inline EntryParams entries_of(const Matrix& cost, int64_t count, int64_t rows, int64_t columns) {
  EntryParams p{};
  p.cost = cost;
  p.count = count;
  p.rows = rows;
  p.columns = columns;
  return p;
}

template <typename Context, typename Params>
void launch_entries(Context& context, void (*kernel)(Params), const Problem& q, const Params& p) {
  const int64_t blocks = q.count * ceil_div(q.rows * q.columns, kChunk);
  context.launch(kernel, blocks, kLineThreads, 0, p);
}

// `scale` [count] times the plan of the potentials, into `out`.
template <typename Context>
void write_plan(Context& context, const Problem& q, const double* phi, const double* gamma,
                const float* scale, const Output& out) {
  if (q.count == 0) return;
  EntryParams p = entries_of(q.cost, q.count, q.rows, q.columns);
  p.epsilon = q.epsilon;
  p.epsilon_value = q.epsilon_value;
  p.phi = phi;
  p.gamma = gamma;
  p.scale = scale;
  p.out = out;
  launch_entries(context, plan_kernel, q, p);
}

// --- the rule
//
// A problem of up to 320 rows whose columns fit a CTA, or a cluster of up to 16 where the device
// has clusters, is solved by the resident kernel: one launch, every problem of the batch by itself.
// Columns a CTA: 256 up to 128 rows, 128 up to 256, 96 beyond. All else streams the cost: a launch
// per half-step.
template <typename Context>
void solve(Context& context, const Problem& problem, const Solution& solution,
           const Choice& choice) {
  if (problem.count == 0) return;
  const int64_t rows = problem.rows;
  if (choice.resident) {
    const bool solved =
        rows <= 16    ? solve_resident<1, 16, 8>(context, problem, solution, choice)
        : rows <= 32  ? solve_resident<2, 16, 8>(context, problem, solution, choice)
        : rows <= 64  ? solve_resident<4, 16, 8>(context, problem, solution, choice)
        : rows <= 128 ? solve_resident<8, 8, 16>(context, problem, solution, choice)
        : rows <= 256 ? solve_resident<16, 4, 16>(context, problem, solution, choice)
        : rows <= 320 ? solve_resident<20, 4, 12>(context, problem, solution, choice)
                      : false;
    if (solved) return;
  }
  CostSteps<Context> steps(context, problem);
  const State state = stream_solve(context, problem, solution, steps);
  if (solution.plan.data) {
    write_plan(context, problem, state.phi, state.gamma, nullptr, solution.plan);
  }
}

// --- gradients

// Of float64 plans: the plan and the right-hand sides of the adjoint system.
template <typename Context>
void adjoint(Context& context, const Problem& q, const double* phi, const double* gamma,
             const Input& grad_plan, const float* grad_f, const float* grad_g, double* plan,
             double* row_rhs, double* column_rhs) {
  if (q.count == 0) return;
  for (const bool by_rows : {true, false}) {
    Adjoint op{};
    op.lines = lines_of(q.cost, q.count, q.rows, q.columns, by_rows);
    op.parts = parts_for<Adjoint>(context, op.lines);
    op.cost = q.cost;
    op.epsilon = q.epsilon;
    op.line_potential = by_rows ? phi : gamma;
    op.term_potential = by_rows ? gamma : phi;
    op.grad_plan = grad_plan;
    op.grad = by_rows ? grad_f : grad_g;
    op.plan = by_rows ? plan : nullptr;
    op.out = by_rows ? row_rhs : column_rhs;
    launch_lines(context, op);
  }
}

template <typename Context>
void cost_gradient(Context& context, const Problem& q, const Input& grad_plan, const double* plan,
                   const double* lam, const double* mu, const Output& out) {
  if (q.count == 0) return;
  EntryParams p = entries_of(q.cost, q.count, q.rows, q.columns);
  p.epsilon = q.epsilon;
  p.grad_plan = grad_plan;
  p.plan = plan;
  p.lam = lam;
  p.mu = mu;
  p.out = out;
  launch_entries(context, cost_gradient_kernel, q, p);
}

// One half-step backwards: the slopes of iteration n's rows, or of its columns.
template <typename Context>
void backstep(Context& context, const UnrolledParams& p, bool by_rows, int n, Sums* parts) {
  const Problem& q = p.problem;
  const int64_t rows = q.count * q.rows, columns = q.count * q.columns;
  Backstep op{};
  op.lines = lines_of(q.cost, q.count, q.rows, q.columns, by_rows);
  op.lines.runs = p.iterations;
  op.lines.iteration = n;
  op.parts = parts;
  op.cost = q.cost;
  op.epsilon = q.epsilon;
  op.iterations = p.iterations;
  op.iteration = n;
  if (by_rows) {
    op.line_potential = p.phi + n * rows;
    op.term_potential = p.gamma + n * columns;
    op.term_slope = p.column_slope + n * columns;
    op.own = p.own_row;
    op.slope = p.row_slope + n * rows;
  } else {  // what follows iteration n's columns are the rows of the next
    op.last_has_none = true;
    op.line_potential = p.gamma + n * columns;
    op.term_potential = n < q.max_iter ? p.phi + (n + 1) * rows : nullptr;
    op.term_slope = n < q.max_iter ? p.row_slope + (n + 1) * rows : nullptr;
    op.own = p.own_column;
    op.slope = p.column_slope + n * columns;
  }
  op.mass = by_rows ? q.a : q.b;
  op.mass_value = by_rows ? q.a_value : q.b_value;
  launch_lines(context, op);
}

// The gradients through the half-steps that were run, which are run again and their potentials
// kept. grad_a [count, rows], grad_b [count, columns]; grad_cost in the type of the cost.
template <typename Context>
void unrolled_backward(Context& context, const Problem& q, const int32_t* iterations,
                       const Input& grad_plan, const float* grad_f, const float* grad_g,
                       const Output& grad_cost, float* grad_a, float* grad_b) {
  if (q.count == 0) return;
  const int64_t rows = q.count * q.rows, columns = q.count * q.columns, steps = q.max_iter + 1;
  UnrolledParams p{};
  p.problem = q;
  p.iterations = iterations;
  double* phi = scratch<double>(context, steps * rows);
  double* gamma = scratch<double>(context, steps * columns);
  p.phi = phi;
  p.gamma = gamma;
  p.row_slope = scratch<double>(context, steps * rows);
  p.column_slope = scratch<double>(context, steps * columns);
  p.last_phi = scratch<double>(context, rows);
  p.last_gamma = scratch<double>(context, columns);
  p.own_row = scratch<double>(context, rows);
  p.own_column = scratch<double>(context, columns);
  p.gauge_b = scratch<double>(context, columns);
  p.grad_f = grad_f;
  p.grad_g = grad_g;
  p.grad_plan = grad_plan;
  p.grad_cost = grad_cost;
  p.grad_a = grad_a;
  p.grad_b = grad_b;

  State start{};
  start.problem = q;
  start.gamma = gamma;
  context.launch(start_kernel, q.count, kLineThreads, 0, start);
  CostSteps<Context> forward(context, q);
  for (int n = 1; n <= q.max_iter; ++n) {
    for (const bool by_rows : {true, false}) {
      forward.run(by_rows, [&](HalfStep* op) {
        op->lines.runs = iterations;
        op->lines.iteration = n;
        op->other = by_rows ? gamma + (n - 1) * columns : phi + n * rows;
        op->potential = by_rows ? phi + n * rows : gamma + n * columns;
      });
    }
  }
  context.launch(unrolled_last_kernel, q.count, kLineThreads, 0, p);
  double* plan = nullptr;
  adjoint(context, q, p.last_phi, p.last_gamma, grad_plan, grad_f, grad_g, plan, p.own_row,
          p.own_column);
  context.launch(unrolled_start_kernel, q.count, kLineThreads, line_sums_bytes(), p);
  Sums* row_parts =
      parts_for<Backstep>(context, lines_of(q.cost, q.count, q.rows, q.columns, true));
  Sums* column_parts =
      parts_for<Backstep>(context, lines_of(q.cost, q.count, q.rows, q.columns, false));
  for (int n = q.max_iter; n >= 1; --n) {
    backstep(context, p, false, n, column_parts);
    backstep(context, p, true, n, row_parts);
  }
  context.launch(unrolled_marginals_kernel, q.count, kLineThreads, 0, p);
  launch_entries(context, unrolled_cost_kernel, q, p);
}

// --- SwAV: samples are columns of the transport problem, prototypes its rows
//
// The row half-step gives each prototype the same mass, the column half-step each sample the
// mass 1.
template <typename Context>
void swav_assign(Context& context, const Input& scores, int64_t samples, int64_t prototypes,
                 double epsilon, int iterations, const Output& out, const Choice& choice) {
  if (samples == 0) return;
  Problem q{};
  q.cost = {scores, 0, 1, prototypes, true};
  q.epsilon_value = epsilon;
  q.a_value = q.b_value = 1;
  q.count = 1;
  q.rows = prototypes;
  q.columns = samples;
  q.max_iter = iterations;
  q.tol = -1;
  Solution solution{};
  solution.plan = out;
  solve(context, q, solution, choice);
}

// --- point clouds

template <typename Context>
class PointSteps {
 public:
  PointSteps(Context& context, const Problem& q, const float* x, const float* y, int dimensions)
      : context_(context), problem_(q) {
    rows_ = params_of(x, y, q.rows, q.columns, dimensions);
    if (dimensions > kFewDimensions) prepare();
    columns_ = rows_;
    std::swap(columns_.lines, columns_.terms);
    for (PointsParams* p : {&rows_, &columns_}) {
      const int64_t ctas = q.count * ceil_div(p->lines.size, kPointTile);
      p->splits = splits_for(ctas, p->terms.size, 4 * kPointTile);
      p->parts = scratch<LogSum<double>>(context_, q.count * p->lines.size * p->splits);
    }
  }

  const PointsParams& params(bool by_rows) const { return by_rows ? rows_ : columns_; }

  template <typename Set>
  void run(bool by_rows, Set set) {
    const Problem& q = problem_;
    PointsParams p = params(by_rows);
    HalfStep op{};
    op.lines.count = q.count;
    op.lines.lines = p.lines.size;
    op.lines.terms = p.terms.size;
    op.lines.splits = p.splits;
    op.parts = p.parts;
    op.mass = by_rows ? q.a : q.b;
    op.mass_value = by_rows ? q.a_value : q.b_value;
    set(&op);
    p.term_potential = op.other;
    p.runs = op.lines.runs;
    const int64_t blocks = q.count * ceil_div(p.lines.size, kPointTile) * p.splits;
    const size_t bytes = sizeof(PointTile<kPointTile>) + kPointTile * sizeof(double);
    context_.launch(points_kernel, blocks, kLineThreads, bytes, p);
    combine(context_, op);
  }

 private:
  PointsParams params_of(const float* x, const float* y, int64_t n, int64_t m, int dimensions) {
    PointsParams p{};
    p.lines = {x, nullptr, n};
    p.terms = {y, nullptr, m};
    p.count = problem_.count;
    p.dimensions = dimensions;
    p.epsilon = problem_.epsilon;
    return p;
  }

  // A common centre, and the norms about it.
  void prepare() {
    rows_.centre = scratch<float>(context_, rows_.count * rows_.dimensions);
    context_.launch(centre_kernel, rows_.count, kLineThreads, sizeof(double) * kLineThreads, rows_);
    for (Cloud* cloud : {&rows_.lines, &rows_.terms}) {
      double* norm = scratch<double>(context_, rows_.count * cloud->size);
      cloud->norm = norm;
      PointsParams p = rows_;
      p.lines = *cloud;
      const int64_t blocks = ceil_div(rows_.count * cloud->size, kLineWarps);
      context_.launch(norm_kernel, blocks, kLineThreads, 0, p);
    }
  }

  Context& context_;
  Problem problem_;
  PointsParams rows_{}, columns_{};
};

// x [count, rows, dimensions], y [count, columns, dimensions]; of the problem the cost is not read.
template <typename Context>
void solve_points(Context& context, const Problem& q, const float* x, const float* y,
                  int dimensions, const Solution& solution) {
  if (q.count == 0) return;
  PointSteps<Context> steps(context, q, x, y, dimensions);
  stream_solve(context, q, solution, steps);
}

// The gradients of grad [count] * value to the points.
template <typename Context>
void points_backward(Context& context, const Problem& q, const float* x, const float* y,
                     int dimensions, const float* grad, const double* phi, const double* gamma,
                     float* grad_x, float* grad_y) {
  if (q.count == 0 || dimensions == 0) return;
  PointSteps<Context> steps(context, q, x, y, dimensions);
  for (const bool by_rows : {true, false}) {
    PointsParams p = steps.params(by_rows);
    p.line_potential = by_rows ? phi : gamma;
    p.term_potential = by_rows ? gamma : phi;
    p.grad = grad;
    p.out = by_rows ? grad_x : grad_y;
    const int64_t blocks =
        q.count * ceil_div(p.lines.size, kGradTile) * ceil_div(dimensions, kGradTile);
    const size_t bytes =
        sizeof(PointTile<kGradTile>) + 2 * kGradTile * (kGradTile + 4) * sizeof(float);
    context.launch(points_grad_kernel, blocks, kLineThreads, bytes, p);
  }
}

}  // namespace cuda
}  // namespace sinkhorn
}  // namespace sketchfast
