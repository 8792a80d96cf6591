// CUDA kernels of entropic optimal transport: no torch types, so that tests/cuda_emulator compiles
// this very source with a host compiler. sinkhorn_launch.h chooses kernels and sizes, sinkhorn.cu
// is the door to torch.
//
// Potentials are scaled (phi = f / epsilon, gamma = g / epsilon) and float64, -inf where a row or
// column holds no mass: an argument of exp is formed in float64 and its result is exact to float32.
// Every reduction has a fixed order, there are no atomics: results repeat bit for bit.
#pragma once

#include "../sinkhorn_math.h"
#include "device.cuh"

namespace sketchfast {
namespace sinkhorn {
namespace cuda {

using namespace device;

constexpr int kMaxCluster = 16;

// --- arguments

// cost[problem, i, j], any strides; scores are costs of the other sign.
struct Matrix {
  Input data;
  int64_t problem_stride, row_stride, column_stride;
  bool negated;
};

struct Problem {
  Matrix cost;
  const double* epsilon;  // [count], or null: all epsilon_value
  const float *a, *b;     // [count, rows], [count, columns], or null: all the same value
  const float* init;      // [count, columns], an earlier g, or null
  double epsilon_value;
  float a_value, b_value;
  int64_t count, rows, columns;
  int max_iter;
  float tol;  // negative: none

  __device__ double epsilon_of(int64_t problem) const {
    return epsilon ? epsilon[problem] : epsilon_value;
  }
  __device__ float row_mass(int64_t problem, int64_t i) const {
    return a ? a[problem * rows + i] : a_value;
  }
  __device__ float column_mass(int64_t problem, int64_t j) const {
    return b ? b[problem * columns + j] : b_value;
  }
};

// Each may be null. The plan has the strides of the cost.
struct Solution {
  Output plan;
  float *f, *g;
  int32_t* iterations;
  float *error, *value;
  double *phi, *gamma;
};

// --- numbers

SKETCHFAST_HD double minus_infinity() { return -std::numeric_limits<double>::infinity(); }

// 2^n of a double that holds n + 1.5 * 2^52, for -126 <= n <= 127.
__device__ inline float power_of_two(double shifted) {
#if defined(__CUDA_ARCH__)
  return __int_as_float((__double2loint(shifted) + 127) << 23);
#else
  int64_t bits;
  std::memcpy(&bits, &shifted, 8);
  const uint32_t exponent = (static_cast<uint32_t>(bits) + 127u) << 23;
  float out;
  std::memcpy(&out, &exponent, 4);
  return out;
#endif
}

// exp(x) rounded to float32, to about 2 units in the last place for every x: a float32 argument
// would cost |x| / 2 of them. 0 where it would not be a normal number.
__device__ inline float exp_of(double x) {
  if (x <= kLeastExponent<float>) return 0.0f;
  if (!(x < 88.0)) return exponential(static_cast<float>(x));
  constexpr double shift = 6755399441055744.0;  // 1.5 * 2^52: its sum with t is t rounded
  const double t = x * 1.4426950408889634;
  const double shifted = t + shift;
  return exp2f(static_cast<float>(t - (shifted - shift))) * power_of_two(shifted);
}

// The sum of exponentials as sum * exp(most).
struct LogSum {
  double most = minus_infinity();
  float sum = 0;

  __device__ void add(double x) {
    if (x == minus_infinity()) return;
    const double gap = x - most;
    const float ratio = exp_of(gap > 0 ? -gap : gap);
    sum = gap > 0 ? sum * ratio + 1.0f : sum + ratio;
    if (gap > 0) most = x;
  }

  __device__ void add(double other_most, float other_sum) {
    if (other_most == minus_infinity()) return;
    const double gap = other_most - most;
    const float ratio = exp_of(gap > 0 ? -gap : gap);
    sum = gap > 0 ? sum * ratio + other_sum : sum + other_sum * ratio;
    if (gap > 0) most = other_most;
  }

  // With the lane whose index differs in the bits of `lanes`; the same bits in both.
  __device__ void add_lane(int lanes) {
    const double other_most = __shfl_xor_sync(kAllLanes, most, lanes);
    const float other_sum = __shfl_xor_sync(kAllLanes, sum, lanes);
    if (other_most == minus_infinity()) return;
    const double top = maximum(most, other_most);
    const float mine = most == minus_infinity() ? 0.0f : sum * exp_of(most - top);
    sum = mine + other_sum * exp_of(other_most - top);
    most = top;
  }

  __device__ double logarithm_of() const {
    return most == minus_infinity() ? most : most + ::log(static_cast<double>(sum));
  }
};

// C_ij / epsilon.
__device__ inline double scaled_cost(const Matrix& cost, int64_t offset, double per_epsilon) {
  const float c = load(cost.data, offset);
  return (cost.negated ? -c : c) * per_epsilon;
}

// --- the resident solver: a problem per CTA or cluster of CTAs, its matrix in registers
//
// A CTA holds all rows of a slab of columns, a warp all rows of a strip of it: K~ = exp(phi_i +
// gamma_j - C_ij / epsilon), 16 x 2 lanes with R rows and C columns each. One pass over the
// registers is an iteration: the column sums are a warp's own, so v is known in the warp, and the
// partial row sums follow from the same registers; they alone go through shared memory, and from
// CTA to CTA of a cluster. What a row sum says of the last plan is its marginal error.
//
// A half-step that cannot be trusted (sinkhorn_math.h) is taken in log form from the cost, and the
// strip (after columns) or all of K~ (after rows) formed anew.

constexpr int kRowLanes = 16, kColumnLanes = 2;

struct ResidentParams {
  Problem problem;
  Solution solution;
  int cluster;
  int slab;  // columns a CTA
};

// Sizes are the largest of the tile, so that every address is a constant.
template <int kRows, int kColumns, int kMaxWarps>
struct ResidentMemory {
  double phi[kRows], gamma[kColumns];  // absorbed potentials
  double of_warp[kMaxWarps], of_cta[2][kMaxCluster];
  float u[2][kRows];  // of the last iteration and of the next, in turn
  float a[kRows], v[kColumns], b[kColumns];
  float part_sum[kMaxWarps][kRows], part_most[kMaxWarps][kRows];
};

// Written by the other CTAs of a cluster, in turn; follows ResidentMemory where there is one.
template <int kRows>
struct ExchangeMemory {
  float sum[kMaxCluster][kRows], most[kMaxCluster][kRows];
};

// Sums N values over the lanes that differ in the bits kStep, kStep / 2, ..., kLast, each lane
// ending with some of the sums: x[0..] from the index that is returned.
template <int N, int kStep, int kLast>
__device__ inline int scatter_sums(float* x) {
  if constexpr (kStep < kLast) {
    return 0;
  } else if constexpr (N % 2 == 0) {
    const bool upper = lane_index() & kStep;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float given = upper ? x[i] : x[i + N / 2];
      const float kept = upper ? x[i + N / 2] : x[i];
      x[i] = kept + __shfl_xor_sync(kAllLanes, given, kStep);
    }
    return (upper ? N / 2 : 0) + scatter_sums<N / 2, kStep / 2, kLast>(x);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] += __shfl_xor_sync(kAllLanes, x[i], kStep);
    return scatter_sums<N, kStep / 2, kLast>(x);
  }
}

template <int R, int C, int W>
struct Resident {
  static constexpr int kRows = kRowLanes * R, kStrip = kColumnLanes * C;
  static constexpr int kColumns = W * kStrip;
  // Of the lanes that hold one column sum, the one without these bits writes it.
  static constexpr int kCopies = (32 / C - 1) & ~1;

  using Memory = ResidentMemory<kRows, kColumns, W>;
  using Exchange = ExchangeMemory<kRows>;

  const ResidentParams& p;
  Memory& memory;
  Exchange* const exchange;  // two of them
  int64_t problem, first_column, offset;  // offset: of the slab's first entry in the cost
  int rows, columns;                      // columns of the slab that exist
  int rank, row_lane, base;               // base: this lane's first column in the slab
  int exchanges = 0, sums = 0, current = 0;  // current: which u is the last iteration's
  double per_epsilon;
  bool stale = true;  // the tile is not that of the absorbed potentials
  float tile[R][C];

  static SKETCHFAST_HD size_t bytes(int cluster) {
    return sizeof(Memory) + (cluster > 1 ? 2 * sizeof(Exchange) : 0);
  }

  __device__ Resident(const ResidentParams& params, unsigned char* shared)
      : p(params),
        memory(*reinterpret_cast<Memory*>(shared)),
        exchange(reinterpret_cast<Exchange*>(shared + sizeof(Memory))) {
    const Problem& q = p.problem;
    rank = p.cluster > 1 ? cluster_rank() : 0;
    problem = blockIdx.x / p.cluster;
    first_column = static_cast<int64_t>(rank) * p.slab;
    offset = problem * q.cost.problem_stride + first_column * q.cost.column_stride;
    rows = static_cast<int>(q.rows);
    const int64_t left = q.columns - first_column;
    columns = static_cast<int>(left < 0 ? 0 : left < p.slab ? left : p.slab);
    row_lane = lane_index() / kColumnLanes;
    base = warp_index() * kStrip + lane_index() % kColumnLanes * C;
    per_epsilon = 1.0 / q.epsilon_of(problem);
  }

  __device__ double cost_at(int i, int j) const {
    const Matrix& cost = p.problem.cost;
    return scaled_cost(cost, offset + i * cost.row_stride + j * cost.column_stride, per_epsilon);
  }

  __device__ void start() {
    const Problem& q = p.problem;
    for (int i = threadIdx.x; i < kRows; i += blockDim.x) {
      memory.a[i] = i < rows ? q.row_mass(problem, i) : 0.0f;
      memory.phi[i] = minus_infinity();
      memory.u[current][i] = 1.0f;
    }
    for (int j = threadIdx.x; j < warp_count() * kStrip; j += blockDim.x) {
      const float mass = j < columns ? q.column_mass(problem, first_column + j) : 0.0f;
      double gamma = 0;
      if (q.init && j < columns) {
        gamma = q.init[problem * q.columns + first_column + j] * per_epsilon;
        if (gamma - gamma != 0) gamma = 0;  // not finite
      }
      memory.b[j] = mass;
      memory.gamma[j] = mass > 0 ? gamma : minus_infinity();
      memory.v[j] = 1.0f;
    }
    __syncthreads();
    if (p.cluster > 1) cluster_barrier();  // no CTA writes to one that has not started
    log_rows();
  }

  // K~ from the absorbed potentials.
  __device__ void form() {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int i = r * kRowLanes + row_lane;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int j = base + c;
        tile[r][c] = i < rows && j < columns
                         ? exp_of(memory.phi[i] + memory.gamma[j] - cost_at(i, j))
                         : 0.0f;
      }
      __syncwarp();  // keeps loads of one row's registers from piling up with the next's
    }
  }

  // The tile is to be formed anew. Zeroes tell the compiler that it need not keep the old one.
  __device__ void forget() {
    stale = true;
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int c = 0; c < C; ++c) tile[r][c] = 0;
    }
  }

  // v from complete column sums. Columns that hold no mass get 0.
  __device__ void columns_step() {
#pragma unroll 1
    for (bool first = true;; first = false) {
      if (stale) form();  // the one copy of its code
      stale = false;
      if (!first) break;
      float sum[C];
#pragma unroll
      for (int c = 0; c < C; ++c) sum[c] = 0;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float u = memory.u[current][r * kRowLanes + row_lane];
#pragma unroll
        for (int c = 0; c < C; ++c) sum[c] += tile[r][c] * u;
      }
      const int j = base + scatter_sums<C, 16, 2>(sum);
      const bool live = memory.gamma[j] != minus_infinity();
      const float scale = live ? memory.b[j] / sum[0] : 0.0f;
      const bool redo = live && needs_log_form<float>(scale, sum[0]);
      if ((lane_index() & kCopies) == 0) memory.v[j] = scale;
      if (__ballot_sync(kAllLanes, redo) == 0) break;
      log_columns();
      forget();
    }
    __syncwarp();
  }

  // The half-step of this warp's columns in log form; its scales become 1.
  __device__ void log_columns() {
    LogSum total[C];
#pragma unroll 1
    for (int i = row_lane; i < rows; i += kRowLanes) {
      const double phi = memory.phi[i] + ::log(static_cast<double>(memory.u[current][i]));
#pragma unroll
      for (int c = 0; c < C; ++c) {
        if (base + c < columns) total[c].add(phi - cost_at(i, base + c));
      }
    }
    __syncwarp();
#pragma unroll
    for (int c = 0; c < C; ++c) {
      for (int step = kColumnLanes; step < kWarp; step *= 2) total[c].add_lane(step);
      if (row_lane != 0) continue;
      const int j = base + c;
      memory.gamma[j] = log_half_step(memory.b[j], total[c].logarithm_of());
      memory.v[j] = memory.gamma[j] == minus_infinity() ? 0.0f : 1.0f;
    }
    __syncwarp();
  }

  // This CTA's partial row sums, a warp's in memory.part_sum.
  __device__ void sum_rows() {
    float sum[R], v[C];
#pragma unroll
    for (int c = 0; c < C; ++c) v[c] = memory.v[base + c];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      sum[r] = 0;
#pragma unroll
      for (int c = 0; c < C; ++c) sum[r] += tile[r][c] * v[c];
    }
    const int first = scatter_sums<R, 1, 1>(sum);
    float* part = memory.part_sum[warp_index()];
    constexpr int kept = R % 2 == 0 ? R / 2 : R;
    if (R % 2 == 0 || lane_index() % kColumnLanes == 0) {
#pragma unroll
      for (int k = 0; k < kept; ++k) part[(first + k) * kRowLanes + row_lane] = sum[k];
    }
    __syncthreads();
  }

  // Complete row sums, given(i, sum) in the one thread that owns the row, from the warps' parts in
  // order and the CTAs' in order. Alternating buffers make one barrier enough: whoever writes a
  // buffer anew has passed the barrier between, which needs all that read the old one.
  template <typename Given>
  __device__ void complete_rows(Given given) {
    for (int i = threadIdx.x; i < kRows; i += blockDim.x) {
      float sum = 0;
      for (int w = 0; w < warp_count(); ++w) sum += memory.part_sum[w][i];
      if (p.cluster == 1) given(i, sum);
      if (p.cluster == 1) continue;
      float* mine = &exchange[exchanges & 1].sum[rank][i];
      for (int to = 0; to < p.cluster; ++to) *in_shared_memory_of(mine, to) = sum;
    }
    if (p.cluster == 1) return;
    cluster_barrier();
    for (int i = threadIdx.x; i < kRows; i += blockDim.x) {
      float sum = 0;
      for (int from = 0; from < p.cluster; ++from) sum += exchange[exchanges & 1].sum[from][i];
      given(i, sum);
    }
    ++exchanges;
  }

  // phi from its half-step in log form; all scales become 1.
  __device__ void log_rows() {
    for (int j = warp_index() * kStrip + lane_index(); j < (warp_index() + 1) * kStrip;
         j += kWarp) {
      if (memory.gamma[j] == minus_infinity()) continue;
      memory.gamma[j] += ::log(static_cast<double>(memory.v[j]));
      memory.v[j] = 1.0f;
    }
    __syncwarp();
#pragma unroll 1
    for (int r = 0; r < R; ++r) {
      const int i = r * kRowLanes + row_lane;
      LogSum total;
#pragma unroll 1
      for (int j = base; i < rows && j < base + C && j < columns; ++j) {
        total.add(memory.gamma[j] - cost_at(i, j));
      }
      for (int step = 1; step < kColumnLanes; step *= 2) total.add_lane(step);
      if (lane_index() % kColumnLanes != 0) continue;
      // The exponent may be any number near the largest: float32 is enough, and half the traffic.
      const float most = static_cast<float>(total.most);
      const bool some = total.most != minus_infinity();
      memory.part_most[warp_index()][i] = most;
      memory.part_sum[warp_index()][i] =
          some ? total.sum * exp_of(total.most - most) : 0.0f;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kRows; i += blockDim.x) {
      LogSum total;
      for (int w = 0; w < warp_count(); ++w) {
        total.add(memory.part_most[w][i], memory.part_sum[w][i]);
      }
      if (p.cluster == 1) set_row(i, total);
      if (p.cluster == 1) continue;
      Exchange& now = exchange[exchanges & 1];
      for (int to = 0; to < p.cluster; ++to) {  // `most` came from float32
        *in_shared_memory_of(&now.most[rank][i], to) = static_cast<float>(total.most);
        *in_shared_memory_of(&now.sum[rank][i], to) = total.sum;
      }
    }
    if (p.cluster > 1) {
      cluster_barrier();
      for (int i = threadIdx.x; i < kRows; i += blockDim.x) {
        LogSum total;
        for (int from = 0; from < p.cluster; ++from) {
          const Exchange& now = exchange[exchanges & 1];
          total.add(now.most[from][i], now.sum[from][i]);
        }
        set_row(i, total);
      }
      ++exchanges;
    }
    __syncthreads();
  }

  __device__ void set_row(int i, const LogSum& total) {
    memory.phi[i] = log_half_step(memory.a[i], total.logarithm_of());
    memory.u[current][i] = 1.0f;
  }

  // The sum over all threads of the CTA, the same in each.
  __device__ double cta_sum(double value) {
    value = sum_of_warp(value);
    __syncthreads();
    if (lane_index() == 0) memory.of_warp[warp_index()] = value;
    __syncthreads();
    double sum = 0;
    for (int w = 0; w < warp_count(); ++w) sum += memory.of_warp[w];
    return sum;
  }

  // The sum over all threads of the cluster, the same in each.
  __device__ double team_sum(double value) {
    value = cta_sum(value);
    if (p.cluster == 1) return value;
    double* mine = memory.of_cta[sums & 1];
    if (static_cast<int>(threadIdx.x) < p.cluster)
      in_shared_memory_of(mine, threadIdx.x)[rank] = value;
    cluster_barrier();
    double sum = 0;
    for (int from = 0; from < p.cluster; ++from) sum += mine[from];
    ++sums;
    return sum;
  }

  __device__ bool find_infeasible() {
    bool found = false;
    for (int i = threadIdx.x; i < rows; i += blockDim.x) {
      found = found || is_infeasible(memory.a[i], memory.phi[i]);
    }
    for (int j = threadIdx.x; j < columns; j += blockDim.x) {
      found = found || is_infeasible(memory.b[j], memory.gamma[j]);
    }
    return team_sum(found ? 1.0 : 0.0) > 0;
  }

  __device__ void run() {
    const Problem& q = p.problem;
    start();
    bool infeasible = false;
    int n = 1;
    double error = 0;
#pragma unroll 1
    for (;; ++n) {
      columns_step();
      if (n == 1) {
        __syncthreads();
        infeasible = find_infeasible();
      }
      sum_rows();
      bool redo = false;
      double gap = 0;
      complete_rows([&](int i, float sum) {
        const bool live = memory.phi[i] != minus_infinity();
        const float scale = live ? memory.a[i] / sum : 1.0f;
        redo = redo || (live && needs_log_form<float>(scale, sum));
        gap += ::fabs(static_cast<double>(memory.u[current][i]) * sum - memory.a[i]);
        memory.u[1 - current][i] = scale;
      });
      const bool last = n == q.max_iter;
      if (last || q.tol >= 0) {
        error = cta_sum(gap);  // of all rows: the same in every CTA
        if (last || (!infeasible && static_cast<float>(error) < q.tol)) break;
      }
      if (__syncthreads_or(redo)) {
        log_rows();
        forget();
        continue;
      }
      current = 1 - current;
    }
    finish(n, infeasible ? std::numeric_limits<double>::infinity() : error);
  }

  __device__ void finish(int iterations, double error) {
    const Problem& q = p.problem;
    const Solution& out = p.solution;
    const double epsilon = q.epsilon_of(problem);
    double weighted = 0, weight = 0;
    for (int j = threadIdx.x; j < columns; j += blockDim.x) {
      if (memory.gamma[j] == minus_infinity()) continue;
      const double gamma = memory.gamma[j] + ::log(static_cast<double>(memory.v[j]));
      weighted += memory.b[j] * gamma;
      weight += memory.b[j];
    }
    weighted = team_sum(weighted);
    weight = team_sum(weight);
    const double shift = weight > 0 ? weighted / weight : 0.0;
    double value = 0;
    for (int j = threadIdx.x; j < columns; j += blockDim.x) {
      double gamma = memory.gamma[j];
      if (gamma != minus_infinity()) gamma += ::log(static_cast<double>(memory.v[j]));
      const double g = shown_potential(gamma, -shift, epsilon, memory.b[j]);
      const int64_t at = problem * q.columns + first_column + j;
      if (out.gamma) out.gamma[at] = gamma;
      if (out.g) out.g[at] = static_cast<float>(g);
      if (memory.b[j] > 0) value += memory.b[j] * g;
    }
    for (int i = threadIdx.x; rank == 0 && i < rows; i += blockDim.x) {
      double phi = memory.phi[i];
      if (phi != minus_infinity()) phi += ::log(static_cast<double>(memory.u[current][i]));
      const double f = shown_potential(phi, shift, epsilon, memory.a[i]);
      const int64_t at = problem * q.rows + i;
      if (out.phi) out.phi[at] = phi;
      if (out.f) out.f[at] = static_cast<float>(f);
      if (memory.a[i] > 0) value += memory.a[i] * f;
    }
    if (out.value) value = team_sum(value) - epsilon * weight;
    if (threadIdx.x == 0 && rank == 0) {
      if (out.value) out.value[problem] = static_cast<float>(value);
      if (out.iterations) out.iterations[problem] = iterations;
      if (out.error) out.error[problem] = static_cast<float>(error);
    }
    if (out.plan.data) write_plan();
  }

  __device__ void write_plan() const {
    const Matrix& cost = p.problem.cost;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int i = r * kRowLanes + row_lane;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int j = base + c;
        if (i < rows && j < columns) {
          store(p.solution.plan, offset + i * cost.row_stride + j * cost.column_stride,
                memory.u[current][i] * tile[r][c] * memory.v[j]);
        }
      }
    }
  }
};

template <int R, int C, int W>
__global__ void __launch_bounds__(W * kWarp, 512 / (W * kWarp))
    resident_kernel(const __grid_constant__ ResidentParams p) {
  SKETCHFAST_SHARED_MEMORY(shared);
  Resident<R, C, W> solver(p, shared);
  solver.run();
}

}  // namespace cuda
}  // namespace sinkhorn
}  // namespace sketchfast
