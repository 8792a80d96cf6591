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
  // The scaled potential of a column to start from: init where it is finite, else 0.
  __device__ double first_gamma(int64_t problem, int64_t j, double per_epsilon) const {
    const double gamma = init ? init[problem * columns + j] * per_epsilon : 0.0;
    return gamma - gamma == 0 ? gamma : 0.0;
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

// A sum of exponentials, as sum * exp(most). Differences from `most` are formed in float64; a
// float32 exponential of them is enough, since far ones weigh nothing.
template <typename real>
struct LogSum {
  double most = minus_infinity();
  real sum = 0;

  __device__ void add(double other_most, real other_sum = 1) {
    if (other_most == minus_infinity()) return;
    const double gap = other_most - most;
    const real ratio = exponential(static_cast<float>(gap > 0 ? -gap : gap));
    sum = gap > 0 ? sum * ratio + other_sum : sum + other_sum * ratio;
    if (gap > 0) most = other_most;
  }

  __device__ void add(const LogSum& other) { add(other.most, other.sum); }

  // Several at once: one rescaling, and exponentials that do not wait for each other.
  template <int N>
  __device__ void add_all(const double (&x)[N]) {
    double top = most;
#pragma unroll
    for (int k = 0; k < N; ++k) top = x[k] > top ? x[k] : top;
    if (top > most) sum *= exponential(static_cast<float>(most - top));
    most = top;
    if (top == minus_infinity()) return;
#pragma unroll
    for (int k = 0; k < N; ++k) sum += exponential(static_cast<float>(x[k] - top));
  }

  // With the lane whose index differs in the bits of `lanes`; the same bits in both.
  __device__ void add_lane(int lanes) {
    const double other_most = __shfl_xor_sync(kAllLanes, most, lanes);
    const real other_sum = __shfl_xor_sync(kAllLanes, sum, lanes);
    const double top = maximum(most, other_most);
    if (top == minus_infinity()) return;
    sum = sum * exponential(static_cast<float>(most - top)) +
          other_sum * exponential(static_cast<float>(other_most - top));
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
template <int kRows, int kColumns, int kMaxWarps, int kBlock>
struct ResidentMemory {
  double phi[kRows], gamma[kColumns];  // absorbed potentials
  double per_epsilon;                  // these two to save registers
  int64_t offset;                      // of the slab's first entry in the cost
  double of_warp[kMaxWarps], of_cta[2][kMaxCluster];
  float u[2][kRows];  // of the last iteration and of the next, in turn
  float a[kRows], v[kColumns], b[kColumns];
  struct Warp {
    float part_sum[kRows], part_most[kRows];
    float block[kBlock];
  } warp[kMaxWarps];  // last: a CTA asks only for those it has
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

  // An odd stride: lanes on rows beside each other meet different banks.
  static constexpr int kBlockStride = kStrip + 1;
  using Memory = ResidentMemory<kRows, kColumns, W, kRowLanes * kBlockStride>;
  using Exchange = ExchangeMemory<kRows>;

  const ResidentParams& p;
  Memory& memory;
  Exchange* const exchange;  // two of them
  int64_t problem, first_column;
  int rows, columns;                         // columns of the slab that exist
  int rank, row_lane, base;                  // base: this lane's first column in the slab
  int exchanges = 0, sums = 0, current = 0;  // current: which u is the last iteration's
  bool stale = true;                         // the tile is not that of the absorbed potentials
  float tile[R][C];

  static SKETCHFAST_HD size_t own_bytes(int warps) {
    return sizeof(Memory) - (W - warps) * sizeof(typename Memory::Warp);
  }
  static SKETCHFAST_HD size_t bytes(int warps, int cluster) {
    return own_bytes(warps) + (cluster > 1 ? 2 * sizeof(Exchange) : 0);
  }

  __device__ Resident(const ResidentParams& params, unsigned char* shared)
      : p(params),
        memory(*reinterpret_cast<Memory*>(shared)),
        exchange(reinterpret_cast<Exchange*>(shared + own_bytes(warp_count()))) {
    const Problem& q = p.problem;
    rank = p.cluster > 1 ? cluster_rank() : 0;
    problem = blockIdx.x / p.cluster;
    first_column = static_cast<int64_t>(rank) * p.slab;
    rows = static_cast<int>(q.rows);
    const int64_t left = q.columns - first_column;
    columns = static_cast<int>(left < 0 ? 0 : left < p.slab ? left : p.slab);
    row_lane = lane_index() / kColumnLanes;
    base = warp_index() * kStrip + lane_index() % kColumnLanes * C;
  }

  __device__ double cost_at(int i, int j) const {
    const Matrix& cost = p.problem.cost;
    return scaled_cost(cost, memory.offset + i * cost.row_stride + j * cost.column_stride,
                       memory.per_epsilon);
  }

  __device__ void start() {
    const Problem& q = p.problem;
    const double per_epsilon = 1.0 / q.epsilon_of(problem);
    if (threadIdx.x == 0) {
      memory.per_epsilon = per_epsilon;
      memory.offset = problem * q.cost.problem_stride + first_column * q.cost.column_stride;
    }
    for (int i = threadIdx.x; i < kRows; i += blockDim.x) {
      memory.a[i] = i < rows ? q.row_mass(problem, i) : 0.0f;
      memory.phi[i] = minus_infinity();
      memory.u[current][i] = 1.0f;
    }
    for (int j = threadIdx.x; j < warp_count() * kStrip; j += blockDim.x) {
      const float mass = j < columns ? q.column_mass(problem, first_column + j) : 0.0f;
      memory.b[j] = mass;
      memory.gamma[j] =
          mass > 0 ? q.first_gamma(problem, first_column + j, per_epsilon) : minus_infinity();
      memory.v[j] = 1.0f;
    }
    __syncthreads();
    if (p.cluster > 1) cluster_barrier();  // no CTA writes to one that has not started
    log_rows();
  }

  // Between the tile, whose registers need constant indices, and memory stands a block in shared
  // memory, 16 rows of a warp's strip at a time. Runs visit(i, j, its place in the block) for rows
  // first .. first + 15, neighbouring lanes on neighbours in memory.
  template <typename Visit>
  __device__ void for_block(int first, Visit visit) {
    const bool by_rows = p.problem.cost.column_stride == 1;
    float* const block = memory.warp[warp_index()].block;
#pragma unroll 2
    for (int k = lane_index(); k < kRowLanes * kStrip; k += kWarp) {
      const int row = by_rows ? k / kStrip : k % kRowLanes;
      const int column = by_rows ? k % kStrip : k / kRowLanes;
      visit(first + row, warp_index() * kStrip + column, block + row * kBlockStride + column);
    }
  }

  // Row r of the tile (a number that changes) in this lane's part of the block: visit(tile row,
  // part).
  template <typename Visit>
  __device__ void with_row(int r, Visit visit) {
    float* const part = memory.warp[warp_index()].block + row_lane * kBlockStride + base % kStrip;
#pragma unroll
    for (int constant = 0; constant < R; ++constant) {
      if (constant == r) visit(tile[constant], part);
    }
  }

  // K~ from the absorbed potentials.
  __device__ void form() {
#pragma unroll 1
    for (int r = 0; r < R; ++r) {
      __syncwarp();
      for_block(r * kRowLanes, [&](int i, int j, float* entry) {
        const bool inside = i < rows && j < columns;
        *entry = inside ? exp_of(memory.phi[i] + memory.gamma[j] - cost_at(i, j)) : 0.0f;
      });
      __syncwarp();
      with_row(r, [](float (&row)[C], const float* part) {
#pragma unroll
        for (int c = 0; c < C; ++c) row[c] = part[c];
      });
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

  // The half-step of this warp's columns in log form, some at a time; their scales become 1.
  __device__ void log_columns() {
    constexpr int some = C < 8 ? C : 8;
#pragma unroll 1
    for (int first = base; first < base + C; first += some) {
      LogSum<float> total[some];
#pragma unroll 1
      for (int i = row_lane; i < rows; i += kRowLanes) {
        const double phi = memory.phi[i] + ::log(static_cast<double>(memory.u[current][i]));
#pragma unroll
        for (int c = 0; c < some; ++c) {
          if (first + c < columns) total[c].add(phi - cost_at(i, first + c));
        }
      }
      __syncwarp();
#pragma unroll
      for (int c = 0; c < some; ++c) {
        for (int step = kColumnLanes; step < kWarp; step *= 2) total[c].add_lane(step);
        if (row_lane != 0) continue;
        const double gamma = log_half_step(memory.b[first + c], total[c].logarithm_of());
        memory.gamma[first + c] = gamma;
        memory.v[first + c] = gamma == minus_infinity() ? 0.0f : 1.0f;
      }
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
    float* part = memory.warp[warp_index()].part_sum;
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
      for (int w = 0; w < warp_count(); ++w) sum += memory.warp[w].part_sum[i];
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
      LogSum<float> total;
#pragma unroll 1
      for (int j = base; i < rows && j < base + C && j < columns; ++j) {
        total.add(memory.gamma[j] - cost_at(i, j));
      }
      for (int step = 1; step < kColumnLanes; step *= 2) total.add_lane(step);
      if (lane_index() % kColumnLanes != 0) continue;
      // The exponent may be any number near the largest: float32 is enough, and half the traffic.
      const float most = static_cast<float>(total.most);
      const bool some = total.most != minus_infinity();
      memory.warp[warp_index()].part_most[i] = most;
      memory.warp[warp_index()].part_sum[i] = some ? total.sum * exp_of(total.most - most) : 0.0f;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kRows; i += blockDim.x) {
      LogSum<float> total;
      for (int w = 0; w < warp_count(); ++w) {
        total.add(memory.warp[w].part_most[i], memory.warp[w].part_sum[i]);
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
        LogSum<float> total;
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

  __device__ void set_row(int i, const LogSum<float>& total) {
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

  __device__ void write_plan() {
    const Matrix& cost = p.problem.cost;
#pragma unroll 1
    for (int r = 0; r < R; ++r) {
      const float u = memory.u[current][r * kRowLanes + row_lane];
      __syncwarp();
      with_row(r, [&](const float (&row)[C], float* part) {
#pragma unroll
        for (int c = 0; c < C; ++c) part[c] = u * row[c] * memory.v[base + c];
      });
      __syncwarp();
      for_block(r * kRowLanes, [&](int i, int j, const float* entry) {
        if (i >= rows || j >= columns) return;
        store(p.solution.plan, memory.offset + i * cost.row_stride + j * cost.column_stride,
              *entry);
      });
    }
  }
};

template <int R, int C, int W>
__global__ void __launch_bounds__(W* kWarp, 512 / (W * kWarp))
    resident_kernel(const __grid_constant__ ResidentParams p) {
  SKETCHFAST_SHARED_MEMORY(shared);
  Resident<R, C, W> solver(p, shared);
  solver.run();
}

// --- the streamed solver: a launch per half-step, in log form
//
// Lines are the rows or the columns; a line's terms are summed by lanes beside each other where the
// terms lie beside each other in memory (along), and by one lane where the lines do (across). Where
// there are few lines, several CTAs share the terms of one, and combine_kernel adds their parts.

constexpr int kLineThreads = 256, kLineWarps = kLineThreads / kWarp;

struct Lines {
  int64_t count, lines, terms;  // count: problems
  int64_t problem_stride, line_stride, term_stride;
  int splits;           // CTAs a line
  int warps;            // along: warps a line, 1 or all
  const int32_t* runs;  // [count], 0: nothing to do for this problem; or null
  int iteration;        // only where runs[problem] >= this

  __device__ bool wants(int64_t problem) const { return !runs || runs[problem] >= iteration; }
  __device__ int64_t offset(int64_t problem, int64_t line, int64_t term) const {
    return problem * problem_stride + line * line_stride + term * term_stride;
  }
};

// Which lines and terms a CTA has, from its index.
struct Share {
  int64_t problem, first_line, first_term, end_term;
  int split;

  __device__ Share(const Lines& lines, int lines_a_cta) {
    const int64_t blocks = ceil_div(lines.lines, lines_a_cta);
    int64_t index = blockIdx.x;
    split = static_cast<int>(index % lines.splits);
    index /= lines.splits;
    first_line = index % blocks * lines_a_cta;
    problem = index / blocks;
    const int64_t size = ceil_div(lines.terms, lines.splits);
    first_term = split * size;
    end_term = first_term + size < lines.terms ? first_term + size : lines.terms;
  }
};

// Two sums in float64.
struct Sums {
  double first = 0, second = 0;

  __device__ void add(const Sums& other) {
    first += other.first;
    second += other.second;
  }
  __device__ void add_lane(int lanes) {
    first += __shfl_xor_sync(kAllLanes, first, lanes);
    second += __shfl_xor_sync(kAllLanes, second, lanes);
  }
};

// An operation on lines has `lines`, a State (LogSum or Sums), add(problem, line, terms[4], state)
// for terms that may be -1, parts [count, lines, splits] and finish(problem, line, state).

template <typename Op>
__device__ inline void end_line(const Op& op, const Share& share, int64_t line,
                                const typename Op::State& state) {
  if (op.lines.splits == 1) return op.finish(share.problem, line, state);
  op.parts[(share.problem * op.lines.lines + line) * op.lines.splits + share.split] = state;
}

template <typename Op>
__global__ void __launch_bounds__(kLineThreads) along_kernel(const __grid_constant__ Op op) {
  SKETCHFAST_SHARED_MEMORY(shared);
  auto* of_warp = reinterpret_cast<typename Op::State*>(shared);
  const int warps = op.lines.warps;
  const Share share(op.lines, kLineWarps / warps);
  if (!op.lines.wants(share.problem)) return;
  const int64_t line = share.first_line + warp_index() / warps;
  const int stride = warps * kWarp;
  typename Op::State state{};
  if (line < op.lines.lines) {
    const int start = warp_index() % warps * kWarp + lane_index();
#pragma unroll 1
    for (int64_t term = share.first_term + start; term < share.end_term; term += 4 * stride) {
      int64_t terms[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        terms[k] = term + k * stride < share.end_term ? term + k * stride : -1;
      }
      op.add(share.problem, line, terms, &state);
    }
  }
  for (int step = 1; step < kWarp; step *= 2) state.add_lane(step);
  if (warps > 1) {
    if (lane_index() == 0) of_warp[warp_index()] = state;
    __syncthreads();
    if (warp_index() > 0) return;
    for (int w = 1; w < warps; ++w) state.add(of_warp[w]);
  }
  if (lane_index() == 0 && line < op.lines.lines) end_line(op, share, line, state);
}

template <typename Op>
__global__ void __launch_bounds__(kLineThreads) across_kernel(const __grid_constant__ Op op) {
  SKETCHFAST_SHARED_MEMORY(shared);
  auto* of_thread = reinterpret_cast<typename Op::State*>(shared);
  const Share share(op.lines, kWarp);
  if (!op.lines.wants(share.problem)) return;
  const int64_t line = share.first_line + lane_index();
  typename Op::State state{};
#pragma unroll 1
  for (int64_t term = share.first_term + warp_index(); term < share.end_term;
       term += 4 * kLineWarps) {
    int64_t terms[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t next = term + k * kLineWarps;
      terms[k] = line < op.lines.lines && next < share.end_term ? next : -1;
    }
    op.add(share.problem, line, terms, &state);
  }
  of_thread[threadIdx.x] = state;
  __syncthreads();
  if (warp_index() > 0 || line >= op.lines.lines) return;
  for (int w = 1; w < kLineWarps; ++w) state.add(of_thread[w * kWarp + lane_index()]);
  end_line(op, share, line, state);
}

template <typename Op>
__global__ void __launch_bounds__(kLineThreads) combine_kernel(const __grid_constant__ Op op) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kLineThreads + threadIdx.x;
  if (index >= op.lines.count * op.lines.lines) return;
  const int64_t problem = index / op.lines.lines, line = index % op.lines.lines;
  if (!op.lines.wants(problem)) return;
  typename Op::State state = op.parts[index * op.lines.splits];
  for (int s = 1; s < op.lines.splits; ++s) state.add(op.parts[index * op.lines.splits + s]);
  op.finish(problem, line, state);
}

// A half-step in log form: potential = log(mass) - log of the sum of exp(other - C / epsilon).
struct HalfStep {
  using State = LogSum<double>;
  Lines lines;
  State* parts;
  Matrix cost;
  const double* epsilon;
  double epsilon_value;
  const float* mass;  // [count, lines], or null: mass_value
  float mass_value;
  const double* other;  // [count, terms]
  const double*
      old;        // [count, lines]; with it, what mass the plan of `old` and `other` gives lines
  double* error;  // [count, lines], |that - mass|, or null
  double* potential;  // [count, lines], or null

  __device__ void add(int64_t problem, int64_t line, const int64_t (&terms)[4],
                      State* state) const {
    const double per_epsilon = 1.0 / (epsilon ? epsilon[problem] : epsilon_value);
    double x[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      x[k] = terms[k] < 0
                 ? minus_infinity()
                 : other[problem * lines.terms + terms[k]] -
                       scaled_cost(cost, lines.offset(problem, line, terms[k]), per_epsilon);
    }
    state->add_all(x);
  }

  __device__ void finish(int64_t problem, int64_t line, const State& state) const {
    const int64_t at = problem * lines.lines + line;
    const double m = mass ? mass[at] : mass_value, log_sum = state.logarithm_of();
    const double now = log_half_step(m, log_sum);
    if (error) {
      const double gap = old[at] == minus_infinity() ? m : ::exp(old[at] + log_sum) - m;
      error[at] = is_infeasible(m, now) ? std::numeric_limits<double>::infinity() : ::fabs(gap);
    }
    if (potential) potential[at] = now;
  }
};

// The sum over all threads of a CTA of kLineThreads, the same in each.
__device__ inline double sum_of_cta(double value, double* of_warp) {
  value = sum_of_warp(value);
  __syncthreads();
  if (lane_index() == 0) of_warp[warp_index()] = value;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kLineWarps; ++w) sum += of_warp[w];
  return sum;
}

// What a streamed solve keeps in memory.
struct State {
  Problem problem;
  Solution solution;
  double *phi, *gamma, *next_phi;  // [count, rows], [count, columns]; next_phi where there is a tol
  double* error;                   // [count, rows]
  int32_t* runs;                   // [count]: the iteration a problem is at; -1: converged; or null
  int32_t* iterations;             // [count] or null
  int iteration;
};

// Potentials to start from; a CTA per problem.
__global__ void __launch_bounds__(kLineThreads) start_kernel(const __grid_constant__ State s) {
  const Problem& q = s.problem;
  const int64_t problem = blockIdx.x;
  const double per_epsilon = 1.0 / q.epsilon_of(problem);
  for (int64_t j = threadIdx.x; j < q.columns; j += kLineThreads) {
    const bool live = q.column_mass(problem, j) > 0;
    s.gamma[problem * q.columns + j] =
        live ? q.first_gamma(problem, j, per_epsilon) : minus_infinity();
  }
  if (threadIdx.x == 0 && s.runs) s.runs[problem] = 1;
}

// The marginal error of a problem's plan, inf where it is infeasible; the same in every thread.
__device__ inline double plan_error(const State& s, int64_t problem, double* of_warp) {
  const Problem& q = s.problem;
  double error = 0;
  for (int64_t i = threadIdx.x; i < q.rows; i += kLineThreads)
    error += s.error[problem * q.rows + i];
  for (int64_t j = threadIdx.x; j < q.columns; j += kLineThreads) {
    if (is_infeasible(q.column_mass(problem, j), s.gamma[problem * q.columns + j])) {
      error = std::numeric_limits<double>::infinity();
    }
  }
  return sum_of_cta(error, of_warp);
}

// After the row half-step of s.iteration, which told the error of the iteration before: whether the
// problem goes on, and if so with the new phi. A CTA per problem.
__global__ void __launch_bounds__(kLineThreads) decide_kernel(const __grid_constant__ State s) {
  SKETCHFAST_SHARED_MEMORY(shared);
  const Problem& q = s.problem;
  const int64_t problem = blockIdx.x;
  if (s.runs[problem] < 0) return;
  if (s.iteration > 1) {
    const double error = plan_error(s, problem, reinterpret_cast<double*>(shared));
    if (static_cast<float>(error) < q.tol) {
      if (threadIdx.x == 0) s.runs[problem] = -1;
      return;
    }
  }
  for (int64_t i = threadIdx.x; i < q.rows; i += kLineThreads) {
    s.phi[problem * q.rows + i] = s.next_phi[problem * q.rows + i];
  }
  if (threadIdx.x == 0) s.iterations[problem] = s.iteration;
}

// What a caller sees of the potentials; a CTA per problem.
__global__ void __launch_bounds__(kLineThreads) finish_kernel(const __grid_constant__ State s) {
  SKETCHFAST_SHARED_MEMORY(shared);
  double* of_warp = reinterpret_cast<double*>(shared);
  const Problem& q = s.problem;
  const Solution& out = s.solution;
  const int64_t problem = blockIdx.x;
  const double epsilon = q.epsilon_of(problem);
  const double error = plan_error(s, problem, of_warp);
  double weighted = 0, weight = 0, value = 0;
  for (int64_t j = threadIdx.x; j < q.columns; j += kLineThreads) {
    const double gamma = s.gamma[problem * q.columns + j];
    if (gamma == minus_infinity()) continue;
    weighted += q.column_mass(problem, j) * gamma;
    weight += q.column_mass(problem, j);
  }
  weighted = sum_of_cta(weighted, of_warp);
  weight = sum_of_cta(weight, of_warp);
  const double shift = weight > 0 ? weighted / weight : 0.0;
  for (int64_t j = threadIdx.x; j < q.columns; j += kLineThreads) {
    const int64_t at = problem * q.columns + j;
    const float b = q.column_mass(problem, j);
    const double g = shown_potential(s.gamma[at], -shift, epsilon, b);
    if (out.g) out.g[at] = static_cast<float>(g);
    if (b > 0) value += b * g;
  }
  for (int64_t i = threadIdx.x; i < q.rows; i += kLineThreads) {
    const int64_t at = problem * q.rows + i;
    const float a = q.row_mass(problem, i);
    const double f = shown_potential(s.phi[at], shift, epsilon, a);
    if (out.f) out.f[at] = static_cast<float>(f);
    if (a > 0) value += a * f;
  }
  value = sum_of_cta(value, of_warp) - epsilon * weight;
  if (threadIdx.x != 0) return;
  if (out.value) out.value[problem] = static_cast<float>(value);
  if (out.error) out.error[problem] = static_cast<float>(error);
  if (out.iterations) out.iterations[problem] = s.runs ? s.iterations[problem] : q.max_iter;
}

// --- entry by entry, in the order of memory

constexpr int kChunk = 2048;  // entries a CTA

struct EntryParams {
  Matrix cost;
  int64_t count, rows, columns;
  const double* epsilon;
  double epsilon_value;
  const double *phi, *gamma;
  Output out;
  const float* scale;  // [count], a factor of the plan, or null
  const double* plan;  // cost gradient: [count, rows, columns]
  const double *lam, *mu;
  Input grad_plan;  // data null: none
};

// Runs visit(problem, i, j, offset) for the CTA's entries.
template <typename Visit>
__device__ inline void for_entries(const EntryParams& p, Visit visit) {
  const int64_t size = p.rows * p.columns, chunks = ceil_div(size, kChunk);
  const int64_t problem = blockIdx.x / chunks, first = blockIdx.x % chunks * kChunk;
  const bool by_rows = p.cost.column_stride == 1;
  const int64_t inner = by_rows ? p.columns : p.rows;
  const int64_t line = first / inner;
  const uint32_t start = static_cast<uint32_t>(first % inner);
#pragma unroll 1
  for (int k = threadIdx.x; k < kChunk && first + k < size; k += kLineThreads) {
    const uint32_t at = start + k, lines = at / static_cast<uint32_t>(inner);
    const int64_t outer_index = line + lines, inner_index = at - lines * inner;
    visit(problem, by_rows ? outer_index : inner_index, by_rows ? inner_index : outer_index,
          problem * size + first + k);
  }
}

__global__ void __launch_bounds__(kLineThreads) plan_kernel(const __grid_constant__ EntryParams p) {
  for_entries(p, [&](int64_t problem, int64_t i, int64_t j, int64_t offset) {
    const double per_epsilon = 1.0 / (p.epsilon ? p.epsilon[problem] : p.epsilon_value);
    const double potential = p.phi[problem * p.rows + i] + p.gamma[problem * p.columns + j];
    const float scale = p.scale ? p.scale[problem] : 1.0f;
    store(p.out, offset, scale * exp_of(potential - scaled_cost(p.cost, offset, per_epsilon)));
  });
}

__device__ inline void store_double(const Output& out, int64_t i, double value) {
  store(out, i, static_cast<float>(value));
}

__global__ void __launch_bounds__(kLineThreads)
    cost_gradient_kernel(const __grid_constant__ EntryParams p) {
  for_entries(p, [&](int64_t problem, int64_t i, int64_t j, int64_t offset) {
    double slope = p.lam[problem * p.rows + i] + p.mu[problem * p.columns + j];
    if (p.grad_plan.data) slope -= load(p.grad_plan, offset) / p.epsilon[problem];
    const double plan = p.plan[offset];
    store_double(p.out, offset, plan > 0 ? plan * slope : 0.0);
  });
}

// --- sums of the implicit and the unrolled gradient, in float64

// Of lines: the sum of plan, and of plan * grad_plan; the right-hand sides of the adjoint system.
struct Adjoint {
  using State = Sums;
  Lines lines;
  State* parts;
  Matrix cost;
  const double* epsilon;
  const double *line_potential, *term_potential;
  Input grad_plan;    // data null: none
  const float* grad;  // [count, lines], of f or g; or null
  double* plan;       // written where not null
  double* out;        // [count, lines]

  __device__ void add(int64_t problem, int64_t line, const int64_t (&terms)[4],
                      State* state) const {
    const double per_epsilon = 1.0 / epsilon[problem];
    const double potential = line_potential[problem * lines.lines + line];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (terms[k] < 0) continue;
      const int64_t offset = lines.offset(problem, line, terms[k]);
      const double mass = ::exp(potential + term_potential[problem * lines.terms + terms[k]] -
                                scaled_cost(cost, offset, per_epsilon));
      if (plan) plan[offset] = mass;
      state->first += mass;
      if (grad_plan.data && mass > 0) state->second += mass * load(grad_plan, offset);
    }
  }

  __device__ void finish(int64_t problem, int64_t line, const State& state) const {
    const int64_t at = problem * lines.lines + line;
    out[at] = state.second / epsilon[problem] + (grad && state.first > 0 ? grad[at] : 0.0);
  }
};

// One half-step backwards. The slopes of the terms (the gradient to their potential over their
// mass) pass through the plan between: slope_line = (own gradient - sum of plan * slope_term) /
// mass_line.
struct Backstep {
  using State = Sums;
  Lines lines;
  State* parts;
  Matrix cost;
  const double* epsilon;
  const double *line_potential, *term_potential;  // of the plan between
  const double* term_slope;                       // [count, terms]
  const double* own;  // [count, lines], the gradient to the returned potential; or null
  const int32_t* iterations;
  int iteration;       // `own` counts where this is the problem's last
  bool last_has_none;  // and then there are no terms: nothing follows
  const float* mass;   // [count, lines], or null: mass_value
  float mass_value;
  double* slope;  // [count, lines]

  __device__ void add(int64_t problem, int64_t line, const int64_t (&terms)[4],
                      State* state) const {
    if (last_has_none && iterations[problem] == iteration) return;
    const double per_epsilon = 1.0 / epsilon[problem];
    const double potential = line_potential[problem * lines.lines + line];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (terms[k] < 0) continue;
      const int64_t at = problem * lines.terms + terms[k];
      state->first += term_slope[at] *
                      ::exp(potential + term_potential[at] -
                            scaled_cost(cost, lines.offset(problem, line, terms[k]), per_epsilon));
    }
  }

  __device__ void finish(int64_t problem, int64_t line, const State& state) const {
    const int64_t at = problem * lines.lines + line;
    const double m = mass ? mass[at] : mass_value;
    const bool live = line_potential[at] != minus_infinity();
    const double mine = own && iterations[problem] == iteration ? own[at] : 0.0;
    slope[at] = live ? (mine - state.first) / m : 0.0;
  }
};

struct UnrolledParams {
  Problem problem;
  double *last_phi,
      *last_gamma;  // [count, rows], [count, columns]: of each problem's last iteration
  const int32_t* iterations;
  // [max_iter + 1][count, rows or columns]; index 0 is the start
  const double *phi, *gamma;
  double *row_slope, *column_slope;
  double *own_row, *own_column;  // gradients to the last phi and gamma
  const float *grad_f, *grad_g;
  Input grad_plan;
  Output grad_cost;
  float *grad_a, *grad_b;
  double* gauge_b;  // [count, columns]: what the gauge adds to grad_b
};

// The potentials after each problem's last iteration. A CTA per problem.
__global__ void __launch_bounds__(kLineThreads)
    unrolled_last_kernel(const __grid_constant__ UnrolledParams p) {
  const Problem& q = p.problem;
  const int64_t problem = blockIdx.x, from = p.iterations[problem] * q.count + problem;
  for (int64_t i = threadIdx.x; i < q.rows; i += kLineThreads) {
    p.last_phi[problem * q.rows + i] = p.phi[from * q.rows + i];
  }
  for (int64_t j = threadIdx.x; j < q.columns; j += kLineThreads) {
    p.last_gamma[problem * q.columns + j] = p.gamma[from * q.columns + j];
  }
}

// Turns the right-hand sides of Adjoint into gradients to the last phi and gamma, with the gauge's
// part: f = epsilon (phi + s), g = epsilon (gamma - s), s = <b, gamma> / <b, 1>. A CTA per problem.
__global__ void __launch_bounds__(kLineThreads)
    unrolled_start_kernel(const __grid_constant__ UnrolledParams p) {
  SKETCHFAST_SHARED_MEMORY(shared);
  double* of_warp = reinterpret_cast<double*>(shared);
  const Problem& q = p.problem;
  const int64_t problem = blockIdx.x;
  const double epsilon = q.epsilon[problem];
  const double* phi = p.last_phi + problem * q.rows;
  const double* gamma = p.last_gamma + problem * q.columns;
  double to_shift = 0, weighted = 0, weight = 0;
  for (int64_t i = threadIdx.x; i < q.rows; i += kLineThreads) {
    const int64_t at = problem * q.rows + i;
    if (p.grad_f && phi[i] != minus_infinity()) to_shift += p.grad_f[at];
    p.own_row[at] *= epsilon;
  }
  for (int64_t j = threadIdx.x; j < q.columns; j += kLineThreads) {
    if (gamma[j] == minus_infinity()) continue;
    if (p.grad_g) to_shift -= p.grad_g[problem * q.columns + j];
    weighted += q.column_mass(problem, j) * gamma[j];
    weight += q.column_mass(problem, j);
  }
  to_shift = epsilon * sum_of_cta(to_shift, of_warp);
  weighted = sum_of_cta(weighted, of_warp);
  weight = sum_of_cta(weight, of_warp);
  const double per_weight = weight > 0 ? 1 / weight : 0.0;
  for (int64_t j = threadIdx.x; j < q.columns; j += kLineThreads) {
    const int64_t at = problem * q.columns + j;
    const bool live = gamma[j] != minus_infinity();
    const double b = q.column_mass(problem, j);
    p.own_column[at] = live ? epsilon * p.own_column[at] + to_shift * b * per_weight : 0.0;
    p.gauge_b[at] = live ? to_shift * (gamma[j] - weighted * per_weight) * per_weight : 0.0;
  }
}

// grad_a = the sum of slopes over iterations; grad_b likewise with the gauge's part. A CTA per
// problem.
__global__ void __launch_bounds__(kLineThreads)
    unrolled_marginals_kernel(const __grid_constant__ UnrolledParams p) {
  const Problem& q = p.problem;
  const int64_t problem = blockIdx.x, last = p.iterations[problem];
  for (int64_t i = threadIdx.x; i < q.rows; i += kLineThreads) {
    double sum = 0;
    for (int64_t n = last; n >= 1; --n) sum += p.row_slope[(n * q.count + problem) * q.rows + i];
    p.grad_a[problem * q.rows + i] = static_cast<float>(sum);
  }
  for (int64_t j = threadIdx.x; j < q.columns; j += kLineThreads) {
    double sum = p.gauge_b[problem * q.columns + j];
    for (int64_t n = last; n >= 1; --n) {
      sum += p.column_slope[(n * q.count + problem) * q.columns + j];
    }
    p.grad_b[problem * q.columns + j] = static_cast<float>(sum);
  }
}

// (sum over half-steps of plan between * slope - grad_plan * plan) / epsilon.
__global__ void __launch_bounds__(kLineThreads)
    unrolled_cost_kernel(const __grid_constant__ UnrolledParams p) {
  const Problem& q = p.problem;
  EntryParams entries{};
  entries.cost = q.cost;
  entries.rows = q.rows;
  entries.columns = q.columns;
  for_entries(entries, [&](int64_t problem, int64_t i, int64_t j, int64_t offset) {
    const double per_epsilon = 1.0 / q.epsilon[problem];
    const double cost = scaled_cost(q.cost, offset, per_epsilon);
    const int64_t rows = q.count * q.rows, columns = q.count * q.columns;
    const int last = p.iterations[problem];
    // Where iteration n's potentials and slopes are, n counting down.
    int64_t row = last * rows + problem * q.rows + i;
    int64_t column = last * columns + problem * q.columns + j;
    double sum = 0;
    if (p.grad_plan.data) {
      const double plan = exp_of(p.phi[row] + p.gamma[column] - cost);
      if (plan > 0) sum -= plan * load(p.grad_plan, offset);
    }
#pragma unroll 1
    for (int n = last; n >= 1; --n) {
      const double phi = p.phi[row] - cost;
      sum += p.column_slope[column] * double(exp_of(phi + p.gamma[column]));
      column -= columns;
      sum += p.row_slope[row] * double(exp_of(phi + p.gamma[column]));
      row -= rows;
    }
    store_double(p.grad_cost, offset, sum * per_epsilon);
  });
}

// --- point clouds: the cost is formed on the fly, tile by tile
//
// In many dimensions ||x - y||^2 = |x|^2 + |y|^2 - 2 x.y of points about a common centre: the
// product is one multiply-add a dimension, the norms are float64. In few, where points lie close to
// each other for their spread, differences are squared and nothing cancels.

constexpr int kFewDimensions = 8;
constexpr int kDepth = 32;  // dimensions at a time

struct Cloud {
  const float* points;  // [count, size, dimensions]
  const double* norm;   // [count, size], about the centre; not of few dimensions
  int64_t size;
};

struct PointsParams {
  Cloud lines, terms;
  int64_t count;
  int dimensions;
  const float* centre;  // [count, dimensions]
  const double* epsilon;
  const double *line_potential, *term_potential;
  // half-step
  LogSum<double>* parts;  // [count, lines, splits]
  int splits;
  const int32_t* runs;
  // gradient
  const float* grad;  // [count]
  float* out;         // [count, lines, dimensions]

  __device__ bool few() const { return dimensions <= kFewDimensions; }
};

// The mean of up to 1024 of the points of `lines`, which is about their centre. A CTA a problem.
__global__ void __launch_bounds__(kLineThreads)
    centre_kernel(const __grid_constant__ PointsParams p) {
  SKETCHFAST_SHARED_MEMORY(shared);
  double* of_thread = reinterpret_cast<double*>(shared);
  const int64_t problem = blockIdx.x, step = ceil_div(p.lines.size, 1024);
  for (int first = 0; first < p.dimensions; first += kWarp) {
    const int axis = first + lane_index();
    double sum = 0;
    int64_t seen = 0;
    for (int64_t i = 0; i < p.lines.size; i += step, ++seen) {
      if (seen % kLineWarps != warp_index() || axis >= p.dimensions) continue;
      sum += p.lines.points[(problem * p.lines.size + i) * p.dimensions + axis];
    }
    __syncthreads();
    of_thread[threadIdx.x] = sum;
    __syncthreads();
    if (warp_index() > 0 || axis >= p.dimensions) continue;
    for (int w = 1; w < kLineWarps; ++w) sum += of_thread[w * kWarp + lane_index()];
    const_cast<float*>(p.centre)[problem * p.dimensions + axis] =
        static_cast<float>(sum / static_cast<double>(seen));
  }
}

// Squared norms of `lines` about the centre; a warp a point.
__global__ void __launch_bounds__(kLineThreads)
    norm_kernel(const __grid_constant__ PointsParams p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kLineWarps + warp_index();
  if (at >= p.count * p.lines.size) return;
  const float* centre = p.centre + at / p.lines.size * p.dimensions;
  double sum = 0;
  for (int axis = lane_index(); axis < p.dimensions; axis += kWarp) {
    const double x = p.lines.points[at * p.dimensions + axis] - centre[axis];
    sum += x * x;
  }
  sum = sum_of_warp(sum);
  if (lane_index() == 0) const_cast<double*>(p.lines.norm)[at] = sum;
}

// Products (or squared distances) of T x T points in a CTA of 256 threads, M = T / 16 a thread each
// way: threads of a warp hold 2 groups of lines and 16 of terms, a group being M / 4 runs of 4.
template <int T>
struct PointTile {
  static constexpr int M = T / 16;
  float line[kDepth][T + 4], term[kDepth][T + 4];

  // Index in the tile of a thread's k-th line or term: runs of 4, T / (M / 4) apart.
  static __device__ int place(int group, int k) {
    return k / 4 * (T / (M / 4)) + group * 4 + k % 4;
  }

  static __device__ void fill(float (*to)[T + 4], const PointsParams& p, const Cloud& cloud,
                              int64_t problem, int64_t first, int axis) {
    for (int k = threadIdx.x; k < T * kDepth; k += kLineThreads) {
      const int point = k / kDepth, depth = k % kDepth;
      const bool inside = first + point < cloud.size && axis + depth < p.dimensions;
      float x = 0;
      if (inside) {
        x = cloud.points[(problem * cloud.size + first + point) * p.dimensions + axis + depth];
        if (!p.few()) x -= p.centre[problem * p.dimensions + axis + depth];
      }
      to[depth][point] = x;
    }
  }

  // Ends with a barrier after the last read.
  __device__ void multiply(const PointsParams& p, int64_t problem, int64_t first_line,
                           int64_t first_term, float (&sum)[M][M]) {
    const int row = threadIdx.x / 16, column = threadIdx.x % 16;
#pragma unroll
    for (int r = 0; r < M; ++r) {
#pragma unroll
      for (int c = 0; c < M; ++c) sum[r][c] = 0;
    }
#pragma unroll 1
    for (int axis = 0; axis < p.dimensions; axis += kDepth) {
      fill(line, p, p.lines, problem, first_line, axis);
      fill(term, p, p.terms, problem, first_term, axis);
      __syncthreads();
      const int left = p.dimensions - axis, depths = left < kDepth ? left : kDepth;
#pragma unroll 4
      for (int depth = 0; depth < depths; ++depth) {
        float x[M], y[M];
#pragma unroll
        for (int k = 0; k < M; ++k) {
          x[k] = line[depth][place(row, k)];
          y[k] = term[depth][place(column, k)];
        }
        if (p.few()) {
#pragma unroll
          for (int r = 0; r < M; ++r) {
#pragma unroll
            for (int c = 0; c < M; ++c) sum[r][c] += (x[r] - y[c]) * (x[r] - y[c]);
          }
        } else {
#pragma unroll
          for (int r = 0; r < M; ++r) {
#pragma unroll
            for (int c = 0; c < M; ++c) sum[r][c] += x[r] * y[c];
          }
        }
      }
      __syncthreads();
    }
  }

  // potential - C / epsilon is factor * sum + weight of the line + weight of the term.
  static __device__ double factor(const PointsParams& p, double per_epsilon) {
    return p.few() ? -per_epsilon : 2 * per_epsilon;
  }
  static __device__ double weight(const PointsParams& p, const Cloud& cloud,
                                  const double* potential, int64_t problem, int64_t point,
                                  double per_epsilon) {
    if (point >= cloud.size) return minus_infinity();
    const int64_t at = problem * cloud.size + point;
    const double norm = p.few() ? 0.0 : cloud.norm[at] * per_epsilon;
    return (potential ? potential[at] : 0.0) - norm;
  }
};

constexpr int kPointTile = 128, kGradTile = 64;

// The sums of a half-step over clouds; combine_kernel<HalfStep> finishes it.
__global__ void __launch_bounds__(kLineThreads)
    points_kernel(const __grid_constant__ PointsParams p) {
  using Tile = PointTile<kPointTile>;
  constexpr int M = Tile::M;
  SKETCHFAST_SHARED_MEMORY(shared);
  Tile& tile = *reinterpret_cast<Tile*>(shared);
  double* term_weight = reinterpret_cast<double*>(shared + sizeof(Tile));
  const int64_t blocks = ceil_div(p.lines.size, kPointTile);
  const int split = static_cast<int>(blockIdx.x % p.splits);
  const int64_t block = blockIdx.x / p.splits, problem = block / blocks;
  if (p.runs && p.runs[problem] < 0) return;
  const int64_t first_line = block % blocks * kPointTile;
  const int64_t tiles = ceil_div(p.terms.size, kPointTile), a_split = ceil_div(tiles, p.splits);
  const int64_t first = split * a_split, end = first + a_split < tiles ? first + a_split : tiles;
  const double per_epsilon = 1.0 / p.epsilon[problem], factor = Tile::factor(p, per_epsilon);
  const int row = threadIdx.x / 16, column = threadIdx.x % 16;
  // Sums of exponentials as in LogSum, but about a float32: any number near the largest will do.
  float most[M], sums[M];
#pragma unroll
  for (int r = 0; r < M; ++r) {
    most[r] = -std::numeric_limits<float>::infinity();
    sums[r] = 0;
  }
#pragma unroll 1
  for (int64_t t = first; t < end; ++t) {
    for (int k = threadIdx.x; k < kPointTile; k += kLineThreads) {
      term_weight[k] =
          Tile::weight(p, p.terms, p.term_potential, problem, t * kPointTile + k, per_epsilon);
    }
    float sum[M][M];
    tile.multiply(p, problem, first_line, t * kPointTile, sum);
#pragma unroll
    for (int r = 0; r < M; ++r) {
      double x[M];
      float top = most[r];
#pragma unroll
      for (int c = 0; c < M; ++c) {
        x[c] = factor * sum[r][c] + term_weight[Tile::place(column, c)];
        top = maximum(top, static_cast<float>(x[c]));
      }
      if (top == -std::numeric_limits<float>::infinity()) continue;
      sums[r] *= exponential(most[r] - top);
      most[r] = top;
#pragma unroll
      for (int c = 0; c < M; ++c) sums[r] += exponential(static_cast<float>(x[c] - top));
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < M; ++r) {
    LogSum<double> part;
    part.most = most[r];
    part.sum = sums[r];
    for (int step = 1; step < 16; step *= 2) part.add_lane(step);
    const int64_t line = first_line + Tile::place(row, r);
    if (column != 0 || line >= p.lines.size) continue;
    part.most += Tile::weight(p, p.lines, nullptr, problem, line, per_epsilon);
    p.parts[(problem * p.lines.size + line) * p.splits + split] = part;
  }
}

// 2 grad * sum of P (line - term) for up to kGradTile dimensions of kGradTile lines.
__global__ void __launch_bounds__(kLineThreads)
    points_grad_kernel(const __grid_constant__ PointsParams p) {
  using Tile = PointTile<kGradTile>;
  constexpr int M = Tile::M, T = kGradTile;
  SKETCHFAST_SHARED_MEMORY(shared);
  Tile& tile = *reinterpret_cast<Tile*>(shared);
  float (*plan)[T + 4] = reinterpret_cast<float (*)[T + 4]>(shared + sizeof(Tile));  // [term][line]
  float (*other)[T + 4] = plan + T;                                                  // [term][axis]
  const int64_t chunks = ceil_div(p.dimensions, T), blocks = ceil_div(p.lines.size, T);
  const int first_axis = static_cast<int>(blockIdx.x % chunks) * T;
  const int64_t block = blockIdx.x / chunks, problem = block / blocks;
  const int64_t first_line = block % blocks * T;
  const double per_epsilon = 1.0 / p.epsilon[problem], factor = Tile::factor(p, per_epsilon);
  const int row = threadIdx.x / 16, column = threadIdx.x % 16;
  double total[M][M] = {};
  float x[M][M];
#pragma unroll
  for (int r = 0; r < M; ++r) {
#pragma unroll
    for (int c = 0; c < M; ++c) {
      const int64_t line = first_line + Tile::place(row, r);
      const int axis = first_axis + Tile::place(column, c);
      const bool inside = line < p.lines.size && axis < p.dimensions;
      x[r][c] =
          inside ? p.lines.points[(problem * p.lines.size + line) * p.dimensions + axis] : 0.0f;
    }
  }
#pragma unroll 1
  for (int64_t first_term = 0; first_term < p.terms.size; first_term += T) {
    float sum[M][M];
    tile.multiply(p, problem, first_line, first_term, sum);
#pragma unroll
    for (int r = 0; r < M; ++r) {
      const int line = Tile::place(row, r);
      const double of_line =
          Tile::weight(p, p.lines, p.line_potential, problem, first_line + line, per_epsilon);
#pragma unroll
      for (int c = 0; c < M; ++c) {
        const int term = Tile::place(column, c);
        const double of_term =
            Tile::weight(p, p.terms, p.term_potential, problem, first_term + term, per_epsilon);
        plan[term][line] = exp_of(factor * sum[r][c] + of_term + of_line);
      }
    }
    for (int k = threadIdx.x; k < T * T; k += kLineThreads) {
      const int term = k / T, axis = first_axis + k % T;
      const bool inside = first_term + term < p.terms.size && axis < p.dimensions;
      other[term][k % T] =
          inside
              ? p.terms.points[(problem * p.terms.size + first_term + term) * p.dimensions + axis]
              : 0.0f;
    }
    __syncthreads();
    float part[M][M] = {};
#pragma unroll 4
    for (int term = 0; term < T; ++term) {
#pragma unroll
      for (int r = 0; r < M; ++r) {
        const float mass = plan[term][Tile::place(row, r)];
#pragma unroll
        for (int c = 0; c < M; ++c) {
          part[r][c] += mass * (x[r][c] - other[term][Tile::place(column, c)]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < M; ++r) {
#pragma unroll
      for (int c = 0; c < M; ++c) total[r][c] += part[r][c];
    }
    __syncthreads();
  }
  const double scale = 2.0 * p.grad[problem];
#pragma unroll
  for (int r = 0; r < M; ++r) {
#pragma unroll
    for (int c = 0; c < M; ++c) {
      const int64_t line = first_line + Tile::place(row, r);
      const int axis = first_axis + Tile::place(column, c);
      if (line >= p.lines.size || axis >= p.dimensions) continue;
      p.out[(problem * p.lines.size + line) * p.dimensions + axis] =
          static_cast<float>(scale * total[r][c]);
    }
  }
}

}  // namespace cuda
}  // namespace sinkhorn
}  // namespace sketchfast
