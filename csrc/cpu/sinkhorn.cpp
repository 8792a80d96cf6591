// Sinkhorn on the CPU: the kernel matrix in tiles of all rows by a few vectors of columns.
//
// One pass over a tile is one iteration's work on it: column sums of u K~ give v, complete because
// the tile has all rows, and the rows of the same tile, now in the nearest cache, give its part of
// K~ v. Parts are added in a fixed order, u follows, and the next pass begins. Many problems go a
// thread each; one large problem is cut into runs of tiles, a run a thread, one parallel region an
// iteration. Squared distances of points are formed tile by tile in every pass and never held.
// What goes out of the scales' bounds is done again in log form from the cost (../sinkhorn_math.h).
#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>

#include "../sinkhorn_math.h"
#include "elements.h"
#include "isa.h"
#include "memory.h"
#include "team.h"

namespace sketchfast {
namespace sinkhorn_cpu {

// A batch of cost matrices: stored elements times `sign`, or squared distances of points.
struct Costs {
  const void* matrix;  // null: squared distances
  Dtype dtype;
  int64_t problem_stride, row_stride, column_stride;  // in elements; one of rows, columns is 1
  double sign;
  const void *x, *y;  // [N, rows, d], [N, columns, d], in the compute type
  int64_t dimensions;
};
struct Batch {
  Costs costs;
  int64_t count, rows, columns;
  bool is_double;         // the compute type is double, else float
  const double* epsilon;  // [N], or null: `single_epsilon`
  double single_epsilon;
  const void *a, *b, *init;  // [N, rows], [N, columns], [N, columns] in the compute type, or null
  int64_t max_iter;
  double tol;  // negative: none
};
// Where results go; null for what is not wanted.
struct Results {
  void* plan;
  Dtype plan_dtype;
  int64_t plan_problem_stride, plan_row_stride, plan_column_stride;
  double plan_scale;
  void *f, *g, *value, *error;  // compute type
  int32_t* iterations;
  double *phi, *gamma;
};
struct UnrolledGrads {
  const void *grad_plan, *grad_f, *grad_g;  // null: none
  Dtype plan_dtype;
  const int32_t* iterations;
  void* grad_cost;  // dtype of the cost
  void *grad_a, *grad_b;
};
// What one instruction set offers.
struct Kernels {
  // Problems begin..end, by a team that shares each problem.
  void (*solve)(const Batch&, const Results&, int64_t begin, int64_t end, Team);
  void (*unrolled_backward)(const Batch&, const UnrolledGrads&, int64_t begin, int64_t end, Team);
  // Columns of blocks begin..end of the plan and right-hand sides (blocks of kAdjointColumns).
  void (*adjoint)(const Batch&, const double* phi, const double* gamma, const void* grad_plan,
                  Dtype grad_dtype, double* plan, double* row_parts, double* column_rhs,
                  int64_t begin, int64_t end);
  void (*cost_gradient)(const double* plan, const void* grad_plan, Dtype grad_dtype,
                        const double* epsilon, const double* lam, const double* mu, int64_t rows,
                        int64_t columns, void* grad_cost, Dtype dtype, int64_t begin, int64_t end);
  void (*value_backward)(const Batch&, const void* grad, const double* phi, const double* gamma,
                         void* grad_cost, int64_t begin, int64_t end);
  // Rows begin..end of all problems of the gradient to the points of one side.
  void (*points_backward)(const Batch&, bool to_y, const void* grad, const double* phi,
                          const double* gamma, void* grad_points, int64_t begin, int64_t end);
};
extern const Kernels baseline_kernels, avx2_kernels, avx512_kernels;

constexpr int64_t kAdjointColumns = 256;

inline namespace SKETCHFAST_ISA {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// A tile this large still lies in the nearest cache beside the row sums.
constexpr int64_t kTileBytes = 40 << 10;

// --- vectors -----------------------------------------------------------------------------------

template <typename real>
using Vec = typename Simd<real>::V;

// Half as many floats as a vector holds, in double (doubles as they are), and back; GCC's own
// conversion takes twice the instructions.
SKETCHFAST_INLINE DoubleV widen(const float* from) {
#if defined(SKETCHFAST_ISA_avx512)
  return (DoubleV)_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(from));
#elif defined(SKETCHFAST_ISA_avx2)
  return (DoubleV)_mm256_cvtps_pd(_mm_loadu_ps(from));
#else
  DoubleV v;
  for (int t = 0; t < kLanes<double>; ++t) v[t] = from[t];
  return v;
#endif
}
SKETCHFAST_INLINE DoubleV widen(const double* from) { return load<DoubleV>(from); }
SKETCHFAST_INLINE FloatV narrow_halves(DoubleV low, DoubleV high) {
#if defined(SKETCHFAST_ISA_avx512)
  const __m256 halves[2] = {_mm512_maskz_cvtpd_ps(0xff, (__m512d)low),
                            _mm512_maskz_cvtpd_ps(0xff, (__m512d)high)};
  return (FloatV)_mm512_insertf32x8(_mm512_castps256_ps512(halves[0]), halves[1], 1);
#elif defined(SKETCHFAST_ISA_avx2)
  return (FloatV)_mm256_set_m128(_mm256_cvtpd_ps((__m256d)high), _mm256_cvtpd_ps((__m256d)low));
#else
  FloatV v;
  for (int t = 0; t < kLanes<double>; ++t) {
    v[t] = float(low[t]);
    v[t + kLanes<double>] = float(high[t]);
  }
  return v;
#endif
}

// base + (lane of added) - c * inverse in double, rounded to the type of c: potentials in float
// would lose what small epsilons ask for.
SKETCHFAST_INLINE FloatV exponent(double base, const double* added, const float* c,
                                  double inverse) {
  constexpr int half = kLanes<double>;
  const DoubleV low = (base + load<DoubleV>(added)) - widen(c) * inverse;
  const DoubleV high = (base + load<DoubleV>(added + half)) - widen(c + half) * inverse;
  return narrow_halves(low, high);
}
SKETCHFAST_INLINE DoubleV exponent(double base, const double* added, const double* c,
                                   double inverse) {
  return (base + load<DoubleV>(added)) - load<DoubleV>(c) * inverse;
}

// e^x, 0 below what the type holds as a normal number; NaN stays.
template <typename real>
SKETCHFAST_INLINE Vec<real> flushed_exponential(Vec<real> x) {
  const Vec<real> least = Vec<real>{} + real(sinkhorn::kLeastExponent<real>);
  const Vec<real> e = select(x < least, Vec<real>{}, exponential(x));
  return select(x != x, x, e);
}

template <typename I>
SKETCHFAST_INLINE bool any_lane(I mask) {
  int64_t words[sizeof(I) / 8], any = 0;
  std::memcpy(words, &mask, sizeof(I));
  for (int64_t word : words) any |= word;
  return any != 0;
}

// Lane r is the sum of the lanes of row r, for as many rows as there are lanes: neighbours are
// added first, a fixed order.
template <typename real>
SKETCHFAST_INLINE Vec<real> sums_of_rows(const real* rows) {
  constexpr int lanes = kLanes<real>;
  Vec<real> r[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) r[i] = load<Vec<real>>(rows + i * lanes);
  return fold_rows<1, lanes>(r);
}

// --- one problem -------------------------------------------------------------------------------

// The sizes that follow from a problem's: `width` columns a tile, `slots` workers.
template <typename real>
struct Layout {
  static constexpr int lanes = kLanes<real>;
  int64_t rows, columns, dimensions;
  int64_t padded_rows, width, tiles, padded_columns, slots;
  bool resident;  // the kernel matrix is held; else a tile of it a slot, formed in every pass

  Layout(const Batch& batch, int64_t members)
      : rows(batch.rows),
        columns(batch.columns),
        dimensions(batch.costs.dimensions),
        resident(batch.costs.matrix != nullptr) {
    padded_rows = (rows + lanes - 1) / lanes * lanes;
    const int64_t row_bytes = kVectorBytes * rows, vectors = (columns + lanes - 1) / lanes;
    // Distances cost more than reading a tile from the second cache, and share loads in width.
    const int64_t room = resident ? kTileBytes : 16 * kTileBytes;
    int64_t wide = 4 * row_bytes <= room ? 4 : 2 * row_bytes <= room ? 2 : 1;
    while (wide > 1 && wide > vectors) wide /= 2;
    width = wide * lanes;
    tiles = (columns + width - 1) / width;
    padded_columns = tiles * width;
    slots = std::min(members, tiles);
  }

  int64_t kernel_size() const { return (resident ? tiles : slots) * rows * width; }
};

template <typename real>
class Solver {
 public:
  using V = Vec<real>;
  static constexpr int lanes = kLanes<real>;

  Solver(const Batch& batch, Team team)
      : batch_(batch),
        team_(team),
        to_(batch, team.size),
        arena_(bytes_needed(to_)),
        kernel_(arena_.take<real>(to_.kernel_size())),
        a_(arena_.take<real>(to_.padded_rows)),
        u_(arena_.take<real>(to_.padded_rows)),
        next_u_(arena_.take<real>(to_.padded_rows)),
        live_a_(arena_.take<real>(to_.padded_rows)),
        b_(arena_.take<real>(to_.padded_columns)),
        live_b_(arena_.take<real>(to_.padded_columns)),
        v_(arena_.take<real>(to_.padded_columns)),
        phi_(arena_.take<double>(to_.padded_rows)),
        row_max_(arena_.take<double>(to_.padded_rows)),
        minus_max_(arena_.take<double>(to_.padded_rows)),
        gamma_(arena_.take<double>(to_.padded_columns)),
        zeros_(arena_.take<double>(to_.width)),
        parts_(arena_.take<real>(to_.slots * to_.padded_rows * lanes)),
        largest_(arena_.take<real>(to_.slots * to_.padded_rows * lanes)),
        flagged_(arena_.take<int64_t>(to_.slots * 8)),
        line_(arena_.take<real>(to_.slots * to_.padded_rows)),
        scratch_(arena_.take<real>(to_.slots * to_.rows * to_.width)),
        y_(arena_.take<real>(to_.slots * to_.dimensions * to_.width)) {
    fill(zeros_, to_.width, 0.0);
    // Rows of padding: their parts stay 0.
    fill(parts_, to_.slots * to_.padded_rows * lanes, real(0));
    fill(largest_, to_.slots * to_.padded_rows * lanes, real(-kInfinity));
  }

  void solve(int64_t problem, const Results& results) {
    start(problem);
    iterate(batch_.max_iter, batch_.tol, [](int64_t) {});
    write(results);
  }

  void unrolled_backward(int64_t problem, const UnrolledGrads& grads);

 private:
  static int64_t bytes_needed(const Layout<real>& to) {
    const auto reals = [](int64_t count) { return Arena::bytes_of<real>(count); };
    const auto doubles = [](int64_t count) { return Arena::bytes_of<double>(count); };
    return reals(to.kernel_size()) + 4 * reals(to.padded_rows) + 3 * reals(to.padded_columns) +
           3 * doubles(to.padded_rows) + doubles(to.padded_columns) + doubles(to.width) +
           2 * reals(to.slots * to.padded_rows * lanes) + doubles(to.slots * 8) +
           reals(to.slots * to.padded_rows) + reals(to.slots * to.rows * to.width) +
           reals(to.slots * to.dimensions * to.width);
  }

  double epsilon() const {
    return batch_.epsilon ? batch_.epsilon[problem_] : batch_.single_epsilon;
  }

  void start(int64_t problem) {
    problem_ = problem;
    inverse_ = 1 / epsilon();
    infeasible_ = false;
    const auto read = [&](const void* from, int64_t count, int64_t padded, real* to) {
      for (int64_t i = 0; i < count; ++i)
        to[i] = from ? static_cast<const real*>(from)[problem * count + i] : real(1) / real(count);
      fill(to + count, padded - count, real(0));
    };
    read(batch_.a, to_.rows, to_.padded_rows, a_);
    read(batch_.b, to_.columns, to_.padded_columns, b_);
    fill(live_a_, to_.padded_rows, real(0));
    fill(u_, to_.padded_rows, real(1));
    fill(v_, to_.padded_columns, real(1));
    const real* init = static_cast<const real*>(batch_.init);
    starts_flat_ = true;
    for (int64_t j = 0; j < to_.padded_columns; ++j) {
      double first = 0;
      if (init && j < to_.columns) first = double(init[problem * to_.columns + j]) * inverse_;
      if (first - first != 0) first = 0;
      gamma_[j] = b_[j] > 0 ? first : -kInfinity;
      if (j < to_.columns && gamma_[j] != 0) starts_flat_ = false;
    }
  }

  // `visit(n)` after iteration n.
  template <typename Visit>
  void iterate(int64_t max_iter, double tol, Visit visit) {
    first_rows();
    for (iterations_ = 0;; ++iterations_) {
      if (iterations_ > 0) visit(iterations_);
      add_parts();
      if (iterations_ > 0 && (tol >= 0 || iterations_ == max_iter)) {
        error_ = row_error();
        if (error_ < tol || iterations_ == max_iter) return;
      }
      if (next_scales()) {
        std::swap(u_, next_u_);
        if (!sweep()) continue;
        absorb_rows();
      } else {
        absorb_columns();
        log_rows();
      }
      log_columns();
    }
  }

  // --- passes ---

  template <typename Work>
  void for_slots(Work work) {
    for_members(team_, to_.slots, work);
  }
  int64_t first_tile(int64_t slot) const { return slot * to_.tiles / to_.slots; }

  template <typename Work>
  void for_tiles(int64_t slot, Work work) {
    for (int64_t tile = first_tile(slot); tile < first_tile(slot + 1); ++tile) work(tile);
  }
  real* kernel_of(int64_t tile, int64_t slot) const {
    return kernel_ + (to_.resident ? tile : slot) * to_.rows * to_.width;
  }
  real* parts_of(int64_t slot) const { return parts_ + slot * to_.padded_rows * lanes; }
  real* largest_of(int64_t slot) const { return largest_ + slot * to_.padded_rows * lanes; }

  // Calls work(vectors a tile row has), that number a constant.
  template <typename Work>
  void with_width(Work work) const {
    switch (to_.width / lanes) {
      case 4:
        return work(std::integral_constant<int, 4>());
      case 2:
        return work(std::integral_constant<int, 2>());
      default:
        return work(std::integral_constant<int, 1>());
    }
  }

  // The costs of a tile as [rows][width], +inf in the padding.
  void load_costs(int64_t tile, int64_t slot, real* to) {
    const Costs& costs = batch_.costs;
    if (!costs.matrix) return load_distances(tile, slot, to);
    const int64_t first = tile * to_.width;
    const int64_t count = std::min(to_.width, to_.columns - first);
    const int64_t origin = problem_ * costs.problem_stride + first * costs.column_stride;
    for (int64_t i = 0; i < to_.rows; ++i) {
      real* row = to + i * to_.width;
      if (costs.column_stride == 1) {
        load_elements(costs.matrix, costs.dtype, origin + i * costs.row_stride, row, count);
        if (costs.sign != 1)
          for (int64_t j = 0; j < count; ++j) row[j] *= real(costs.sign);
      }
      fill(row + count, to_.width - count, real(kInfinity));
    }
    if (costs.column_stride == 1) return;
    // A column lies in one piece (row_stride is 1): whole columns are read, and spread over the
    // rows.
    real* column = line_ + slot * to_.padded_rows;
    for (int64_t j = 0; j < count; ++j) {
      load_elements(costs.matrix, costs.dtype, origin + j * costs.column_stride, column, to_.rows);
      for (int64_t i = 0; i < to_.rows; ++i) to[i * to_.width + j] = real(costs.sign) * column[i];
    }
  }

  void load_distances(int64_t tile, int64_t slot, real* to) {
    const int64_t d = to_.dimensions, width = to_.width, first = tile * width;
    const int64_t count = std::min(width, to_.columns - first);
    const real* x = static_cast<const real*>(batch_.costs.x) + problem_ * to_.rows * d;
    const real* y = static_cast<const real*>(batch_.costs.y) + (problem_ * to_.columns + first) * d;
    real* columns = y_ + slot * d * width;  // [d][width]
    fill(columns, d * width, real(0));
    for (int64_t j = 0; j < count; ++j)
      for (int64_t k = 0; k < d; ++k) columns[k * width + j] = y[j * d + k];
    with_width([&](auto vectors) {
      constexpr int Q = decltype(vectors)::value;
      int64_t i = 0;
      for (; i + 2 <= to_.rows; i += 2) distances<Q, 2>(x + i * d, columns, to + i * width);
      for (; i < to_.rows; ++i) distances<Q, 1>(x + i * d, columns, to + i * width);
    });
    for (int64_t i = 0; count < width && i < to_.rows; ++i)
      fill(to + i * width + count, width - count, real(kInfinity));
  }

  template <int Q, int R>
  void distances(const real* x, const real* columns, real* to) const {
    const int64_t d = to_.dimensions;
    V sum[R][Q] = {};
    for (int64_t k = 0; k < d; ++k)
      for (int q = 0; q < Q; ++q) {
        const V column = load<V>(columns + (k * Q + q) * lanes);
        for (int r = 0; r < R; ++r) {
          const V gap = column - x[r * d + k];
          sum[r][q] += gap * gap;
        }
      }
    for (int r = 0; r < R; ++r)
      for (int q = 0; q < Q; ++q) store(to + (r * Q + q) * lanes, sum[r][q]);
  }

  // The largest gamma_j - C_ij / epsilon of every row, to the type's own precision.
  void row_maxima(bool flat) {
    for_slots([&](int64_t slot) {
      with_width([&](auto vectors) {
        constexpr int Q = decltype(vectors)::value;
        real *largest = largest_of(slot), *costs = scratch_ + slot * to_.rows * to_.width;
        fill(largest, to_.rows * lanes, real(-kInfinity));
        for_tiles(slot, [&](int64_t tile) {
          load_costs(tile, slot, costs);
          for (int64_t i = 0; i < to_.rows; ++i) {
            V top = load<V>(largest + i * lanes);
            for (int q = 0; q < Q; ++q) {
              const real* cost = costs + i * to_.width + q * lanes;
              // From a start at 0 it is the least cost, and needs no arithmetic in double.
              const V z =
                  flat ? -load<V>(cost)
                       : exponent(0.0, gamma_ + tile * to_.width + q * lanes, cost, inverse_);
              top = select(z != z, z, maximum(z, top));
            }
            store(largest + i * lanes, top);
          }
        });
      });
    });
    for (int64_t i = 0; i < to_.rows; ++i) {
      double top = -kInfinity;
      for (int64_t slot = 0; slot < to_.slots; ++slot)
        for (int t = 0; t < lanes; ++t) {
          const double candidate = largest_of(slot)[i * lanes + t];
          if (top == top && !(candidate <= top)) top = candidate;
        }
      row_max_[i] = flat ? top * inverse_ : top;
    }
  }

  // The start: phi such that the largest entry of a row of K~ is its mass, gamma as given; K~, and
  // the parts of K~ v. One exponential an entry, and no sum of it that could overflow.
  void first_rows() {
    row_maxima(starts_flat_);
    for (int64_t i = 0; i < to_.rows; ++i) set_row(i, row_max_[i]);
    for (int64_t j = 0; j < to_.padded_columns; ++j) live_b_[j] = b_[j];
    for_slots([&](int64_t slot) {
      with_width([&](auto vectors) {
        constexpr int Q = decltype(vectors)::value;
        clear_parts(slot);
        for_tiles(slot, [&](int64_t tile) {
          form_kernel<Q>(tile, slot);
          add_row_parts<Q>(tile, slot);
        });
      });
    });
  }

  void set_row(int64_t i, double log_sum) {
    phi_[i] = sinkhorn::log_half_step(a_[i], log_sum);
    infeasible_ = infeasible_ || sinkhorn::is_infeasible(a_[i], phi_[i]);
    live_a_[i] = phi_[i] == -kInfinity ? real(0) : a_[i];
    u_[i] = 1;
  }

  // phi from gamma, in log form: u is 1 afterwards, and K~ out of date.
  void log_rows() {
    row_maxima(false);
    for (int64_t i = 0; i < to_.rows; ++i)
      minus_max_[i] = row_max_[i] == -kInfinity ? 0.0 : -row_max_[i];
    for_slots([&](int64_t slot) {
      with_width([&](auto vectors) {
        constexpr int Q = decltype(vectors)::value;
        real *sums = parts_of(slot), *costs = scratch_ + slot * to_.rows * to_.width;
        fill(sums, to_.rows * lanes, real(0));
        for_tiles(slot, [&](int64_t tile) {
          load_costs(tile, slot, costs);
          for (int64_t i = 0; i < to_.rows; ++i) {
            V sum = {};
            for (int q = 0; q < Q; ++q)
              sum += flushed_exponential<real>(
                  exponent(minus_max_[i], gamma_ + tile * to_.width + q * lanes,
                           costs + i * to_.width + q * lanes, inverse_));
            store(sums + i * lanes, load<V>(sums + i * lanes) + sum);
          }
        });
      });
    });
    for (int64_t i = 0; i < to_.rows; ++i) {
      double sum = 0;
      for (int64_t slot = 0; slot < to_.slots; ++slot)
        sum += sum_of_lanes(load<V>(parts_of(slot) + i * lanes));
      set_row(i, sum == 0 ? -kInfinity : __builtin_log(sum) - minus_max_[i]);
    }
  }

  // gamma from phi, in log form; K~ with both absorbed, v = 1, and the parts of K~ v.
  void log_columns() {
    for_slots([&](int64_t slot) {
      with_width([&](auto vectors) {
        constexpr int Q = decltype(vectors)::value;
        clear_parts(slot);
        int64_t missing = 0;
        for_tiles(slot, [&](int64_t tile) {
          missing |= log_column_tile<Q>(tile, slot, kernel_of(tile, slot));
          add_row_parts<Q>(tile, slot);
        });
        flagged_[slot * 8] = missing;
      });
    });
    for (int64_t slot = 0; slot < to_.slots; ++slot) infeasible_ |= flagged_[slot * 8] != 0;
  }

  // Whether a column has mass but no entry.
  template <int Q>
  bool log_column_tile(int64_t tile, int64_t slot, real* kernel) {
    const int64_t width = to_.width, first = tile * width;
    load_costs(tile, slot, kernel);
    V top[Q], sum[Q] = {};
    for (int q = 0; q < Q; ++q) top[q] = V{} + real(-kInfinity);
    for (int64_t i = 0; i < to_.rows; ++i)
      for (int q = 0; q < Q; ++q) {
        const V z = exponent(phi_[i], zeros_, kernel + i * width + q * lanes, inverse_);
        top[q] = select(z != z, z, maximum(z, top[q]));
      }
    double minus_top[Q * lanes];
    for (int q = 0; q < Q; ++q)
      for (int t = 0; t < lanes; ++t)
        minus_top[q * lanes + t] = top[q][t] == real(-kInfinity) ? 0.0 : -double(top[q][t]);
    for (int64_t begin = 0; begin < to_.rows; begin += kRowBlock) {
      V block[Q] = {};
      for (int64_t i = begin; i < std::min(begin + kRowBlock, to_.rows); ++i)
        for (int q = 0; q < Q; ++q) {
          real* entry = kernel + i * width + q * lanes;
          const V e =
              flushed_exponential<real>(exponent(phi_[i], minus_top + q * lanes, entry, inverse_));
          store(entry, e);
          block[q] += e;
        }
      for (int q = 0; q < Q; ++q) sum[q] += block[q];
    }
    bool missing = false;
    V factor[Q];
    for (int q = 0; q < Q; ++q) {
      const V b = load<V>(b_ + first + q * lanes);
      factor[q] = select(sum[q] == real(0), V{}, b / sum[q]);
      for (int t = 0; t < lanes; ++t) {
        const int64_t j = first + q * lanes + t;
        const double log_sum =
            sum[q][t] == 0 ? -kInfinity : __builtin_log(sum[q][t]) - minus_top[q * lanes + t];
        gamma_[j] = sinkhorn::log_half_step(b_[j], log_sum);
        missing |= sinkhorn::is_infeasible(b_[j], gamma_[j]);
        live_b_[j] = gamma_[j] == -kInfinity ? real(0) : b_[j];
        v_[j] = 1;
      }
    }
    for (int64_t i = 0; i < to_.rows; ++i)
      for (int q = 0; q < Q; ++q) {
        real* entry = kernel + i * width + q * lanes;
        store(entry, load<V>(entry) * factor[q]);
      }
    return missing;
  }

  // The iteration's work on every tile: v from u, then the parts of K~ v. True where a scale left
  // its bounds: then v and the parts are not to be used.
  bool sweep() {
    for_slots([&](int64_t slot) {
      with_width([&](auto vectors) {
        constexpr int Q = decltype(vectors)::value;
        clear_parts(slot);
        bool out = false;
        for_tiles(slot, [&](int64_t tile) {
          if (!to_.resident) form_kernel<Q>(tile, slot);
          out |= column_scales<Q>(kernel_of(tile, slot), tile * to_.width);
          add_row_parts<Q>(tile, slot);
        });
        flagged_[slot * 8] = out;
      });
    });
    bool out = false;
    for (int64_t slot = 0; slot < to_.slots; ++slot) out |= flagged_[slot * 8] != 0;
    return out;
  }

  template <int Q>
  void form_kernel(int64_t tile, int64_t slot) {
    real* kernel = kernel_of(tile, slot);
    load_costs(tile, slot, kernel);
    for (int64_t i = 0; i < to_.rows; ++i)
      for (int q = 0; q < Q; ++q) {
        real* entry = kernel + i * to_.width + q * lanes;
        const double* gamma = gamma_ + tile * to_.width + q * lanes;
        store(entry, flushed_exponential<real>(exponent(phi_[i], gamma, entry, inverse_)));
      }
  }

  static constexpr double kLogScaleLimit = 13.86;  // log(kScaleLimit), 2^20
  static constexpr int64_t kRowBlock = 128;  // sums stay short: float adds its own rounding each

  template <int Q>
  SKETCHFAST_INLINE bool column_scales(const real* kernel, int64_t first) {
    constexpr int R = Q == 4 ? 2 : 4;  // chains of additions enough to hide their latency
    V sum[Q] = {};
    for (int64_t begin = 0; begin < to_.rows; begin += kRowBlock) {
      const int64_t end = std::min(begin + kRowBlock, to_.rows);
      V chain[R][Q] = {};
      int64_t i = begin;
      for (; i + R <= end; i += R)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int q = 0; q < Q; ++q)
            chain[r][q] += load<V>(kernel + ((i + r) * Q + q) * lanes) * u_[i + r];
      for (; i < end; ++i)
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) chain[0][q] += load<V>(kernel + (i * Q + q) * lanes) * u_[i];
      for (int q = 0; q < Q; ++q) {
        for (int r = 1; r < R; ++r) chain[0][q] += chain[r][q];
        sum[q] += chain[0][q];
      }
    }
    typename Simd<real>::I out = {};
    for (int q = 0; q < Q; ++q) {
      const V b = load<V>(live_b_ + first + q * lanes), v = b / sum[q];
      const auto live = b > real(0);
      out |= live & sinkhorn::needs_log_form<real>(v, sum[q]);
      store(v_ + first + q * lanes, select(live, v, V{}));
    }
    return any_lane(out);
  }

  // One tile is the whole of its rows: their sums need no parts.
  bool single_tile() const { return to_.tiles == 1; }

  void clear_parts(int64_t slot) {
    if (!single_tile()) fill(parts_of(slot), to_.rows * lanes, real(0));
  }

  // The tile's share of K~ v: into the slot's parts, or summed at once into next_u_.
  template <int Q>
  SKETCHFAST_INLINE void add_row_parts(int64_t tile, int64_t slot) {
    const real* kernel = kernel_of(tile, slot);
    V scale[Q];
    for (int q = 0; q < Q; ++q) scale[q] = load<V>(v_ + tile * to_.width + q * lanes);
    if (single_tile()) return row_sums<Q>(kernel, scale);
    real* parts = parts_of(slot);
#pragma GCC unroll 2
    for (int64_t i = 0; i < to_.rows; ++i)
      store(parts + i * lanes, load<V>(parts + i * lanes) + scaled_row<Q>(kernel, scale, i));
  }

  template <int Q>
  static SKETCHFAST_INLINE V scaled_row(const real* kernel, const V* scale, int64_t i) {
    V sum = load<V>(kernel + i * Q * lanes) * scale[0];
#pragma GCC unroll 4
    for (int q = 1; q < Q; ++q) sum += load<V>(kernel + (i * Q + q) * lanes) * scale[q];
    return sum;
  }

  template <int Q>
  SKETCHFAST_INLINE void row_sums(const real* kernel, const V* scale) {
    int64_t i = 0;
    for (; i + lanes <= to_.rows; i += lanes) {
      V rows[lanes];
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) rows[r] = scaled_row<Q>(kernel, scale, i + r);
      store(next_u_ + i, fold_rows<1, lanes>(rows));
    }
    if (i == to_.rows) return;
    V rows[lanes] = {};
    for (int r = 0; r < to_.rows - i; ++r) rows[r] = scaled_row<Q>(kernel, scale, i + r);
    store(next_u_ + i, fold_rows<1, lanes>(rows));
  }

  // The row sums K~ v into next_u_.
  void add_parts() {
    if (single_tile()) return;
    for (int64_t slot = 1; slot < to_.slots; ++slot)
      for (int64_t i = 0; i < to_.rows * lanes; i += lanes)
        store(parts_ + i, load<V>(parts_ + i) + load<V>(parts_of(slot) + i));
    for (int64_t i = 0; i < to_.padded_rows; i += lanes)
      store(next_u_ + i, sums_of_rows(parts_ + i * lanes));
  }

  double row_error() const {
    if (infeasible_) return kInfinity;
    double error = 0;
    for (int64_t i = 0; i < to_.rows; ++i)
      error += __builtin_fabs(double(u_[i]) * double(next_u_[i]) - double(a_[i]));
    return error;
  }

  // Row sums in next_u_ become scales; false where one leaves its bounds.
  bool next_scales() {
    typename Simd<real>::I out = {};
    for (int64_t i = 0; i < to_.padded_rows; i += lanes) {
      const V a = load<V>(live_a_ + i), sum = load<V>(next_u_ + i), u = a / sum;
      const auto live = a > real(0);
      out |= live & sinkhorn::needs_log_form<real>(u, sum);
      store(next_u_ + i, select(live, u, V{} + real(1)));
    }
    return !any_lane(out);
  }

  void absorb_rows() { absorb(phi_, u_, to_.rows); }
  void absorb_columns() { absorb(gamma_, v_, to_.columns); }
  static void absorb(double* potential, real* scale, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (potential[i] != -kInfinity && scale[i] != 1)
        potential[i] += __builtin_log(double(scale[i]));
      scale[i] = 1;
    }
  }

  // --- results ---

  void write(const Results& results) {
    if (results.plan) write_plan(results);
    if (results.iterations) results.iterations[problem_] = int32_t(iterations_);
    if (results.error) static_cast<real*>(results.error)[problem_] = real(error_);
    if (!results.phi) return;
    absorb_rows();
    absorb_columns();
    std::memcpy(results.phi + problem_ * to_.rows, phi_, to_.rows * sizeof(double));
    std::memcpy(results.gamma + problem_ * to_.columns, gamma_, to_.columns * sizeof(double));
    const double shift = gauge(gamma_);
    real* f = static_cast<real*>(results.f) + problem_ * to_.rows;
    real* g = static_cast<real*>(results.g) + problem_ * to_.columns;
    double value = 0;
    for (int64_t i = 0; i < to_.rows; ++i) {
      const double shown = sinkhorn::shown_potential(phi_[i], shift, epsilon(), a_[i]);
      f[i] = real(shown);
      if (a_[i] > 0) value += double(a_[i]) * shown;
    }
    for (int64_t j = 0; j < to_.columns; ++j) {
      const double shown = sinkhorn::shown_potential(gamma_[j], -shift, epsilon(), b_[j]);
      g[j] = real(shown);
      if (b_[j] > 0) value += double(b_[j]) * (shown - (shown < kInfinity ? epsilon() : 0));
    }
    if (results.value) static_cast<real*>(results.value)[problem_] = real(value);
  }

  double gauge(const double* gamma) const {
    double weighted = 0, mass = 0;
    for (int64_t j = 0; j < to_.columns; ++j)
      if (gamma[j] != -kInfinity) {
        weighted += double(b_[j]) * gamma[j];
        mass += double(b_[j]);
      }
    return mass > 0 ? weighted / mass : 0;
  }

  void write_plan(const Results& results) {
    const int64_t origin = problem_ * results.plan_problem_stride;
    const real scale = real(results.plan_scale);
    for_slots([&](int64_t slot) {
      real *plan = scratch_ + slot * to_.rows * to_.width, *line = line_ + slot * to_.padded_rows;
      for_tiles(slot, [&](int64_t tile) {
        const int64_t first = tile * to_.width, at = origin + first * results.plan_column_stride;
        const int64_t count = std::min(to_.width, to_.columns - first);
        for (int64_t i = 0; i < to_.rows; ++i) {
          const real* kernel = kernel_of(tile, slot) + i * to_.width;
          real* row = plan + i * to_.width;
          for (int64_t j = 0; j < to_.width; j += lanes)
            store(row + j, load<V>(kernel + j) * (u_[i] * scale) * load<V>(v_ + first + j));
          if (results.plan_column_stride == 1)
            store_elements(results.plan, results.plan_dtype, at + i * results.plan_row_stride, row,
                           count);
        }
        for (int64_t j = 0; results.plan_column_stride != 1 && j < count; ++j) {
          for (int64_t i = 0; i < to_.rows; ++i) line[i] = plan[i * to_.width + j];
          store_elements(results.plan, results.plan_dtype, at + j * results.plan_column_stride,
                         line, to_.rows);
        }
      });
    });
  }

  // Scales u, v such that the plan of the potentials given is u K~ v: from K~ as it is, or, where
  // they would leave their bounds, from K~ formed again with the potentials absorbed.
  void represent(const double* phi, const double* gamma) {
    if (scales_of(phi, phi_, to_.rows, u_) && scales_of(gamma, gamma_, to_.columns, v_)) return;
    std::memcpy(phi_, phi, to_.rows * sizeof(double));
    std::memcpy(gamma_, gamma, to_.columns * sizeof(double));
    fill(u_, to_.rows, real(1));
    fill(v_, to_.columns, real(1));
    for_slots([&](int64_t slot) {
      with_width([&](auto vectors) {
        constexpr int Q = decltype(vectors)::value;
        for_tiles(slot, [&](int64_t tile) { form_kernel<Q>(tile, slot); });
      });
    });
  }

  static bool scales_of(const double* potential, const double* absorbed, int64_t count, real* to) {
    bool within = true;
    for (int64_t i = 0; i < count; ++i) {
      const double gap = absorbed[i] == -kInfinity ? 0.0 : potential[i] - absorbed[i];
      within = within && gap < kLogScaleLimit && gap > -kLogScaleLimit;
      to[i] = real(__builtin_exp(gap));
    }
    return within;
  }

  // Over the entries p of the plan u K~ v: w = weight(p, i, j, slope of the entry), a vector of
  // columns from j on; sign times the sums of w over rows and over columns are added to what is
  // given (null: not wanted).
  template <typename Weight>
  void over_plan(real* slope, double sign, double* row_sums, double* column_sums, Weight weight) {
    for_slots([&](int64_t slot) {
      with_width([&](auto vectors) {
        constexpr int Q = decltype(vectors)::value;
        real* parts = parts_of(slot);
        fill(parts, to_.rows * lanes, real(0));
        for_tiles(slot, [&](int64_t tile) {
          const int64_t first = tile * to_.width;
          const real* kernel = kernel_of(tile, slot);
          V columns[Q] = {};
          for (int64_t i = 0; i < to_.rows; ++i) {
            V row = {};
            for (int q = 0; q < Q; ++q) {
              const int64_t entry = (i * Q + q) * lanes, j = first + q * lanes;
              const V p = load<V>(kernel + entry) * u_[i] * load<V>(v_ + j);
              const V w = weight(p, i, j, slope + tile * to_.rows * to_.width + entry);
              row += w;
              columns[q] += w;
            }
            store(parts + i * lanes, load<V>(parts + i * lanes) + row);
          }
          for (int q = 0; column_sums && q < Q; ++q)
            for (int t = 0; t < lanes; ++t)
              column_sums[first + q * lanes + t] += sign * double(columns[q][t]);
        });
      });
    });
    for (int64_t slot = 0; row_sums && slot < to_.slots; ++slot)
      for (int64_t i = 0; i < to_.rows; ++i)
        row_sums[i] += sign * sum_of_lanes(load<V>(parts_of(slot) + i * lanes));
  }

  const Batch& batch_;
  Team team_;
  Layout<real> to_;
  Arena arena_;
  real* kernel_;                      // [tiles][rows][width], or [slots][rows][width]
  real *a_, *u_, *next_u_, *live_a_;  // live: the mass that finds an entry
  real *b_, *live_b_, *v_;
  double *phi_, *row_max_, *minus_max_, *gamma_, *zeros_;
  real *parts_, *largest_;  // [slots][padded_rows][lanes]
  int64_t* flagged_;        // a cache line each
  real *line_, *scratch_, *y_;
  int64_t problem_ = 0, iterations_ = 0;
  double inverse_ = 0, error_ = 0;
  bool infeasible_ = false, starts_flat_ = false;  // flat: every gamma starts at 0
};

// --- gradients ---------------------------------------------------------------------------------

// Reverses every half-step that was run. With P = exp(phi_i + gamma_j - C_ij / epsilon) of the
// potentials on either side of a half-step, its rows (or columns) sum to the marginal, and
//   d f_i = epsilon d a_i / a_i - sum_j (P_ij / a_i) (d g_j - d C_ij), and g likewise.
template <typename real>
void Solver<real>::unrolled_backward(int64_t problem, const UnrolledGrads& grads) {
  const int64_t rows = to_.rows, columns = to_.columns, width = to_.width;
  const int64_t steps = grads.iterations[problem];
  start(problem);
  Arena history(Arena::bytes_of<double>((steps + 2) * (to_.padded_rows + to_.padded_columns) + 2) +
                Arena::bytes_of<real>(to_.tiles * rows * width) +
                Arena::bytes_of<real>(to_.padded_rows) + Arena::bytes_of<real>(to_.padded_columns) +
                Arena::bytes_of<double>(to_.padded_rows) * 4);
  double* phis = history.take<double>(steps * to_.padded_rows);             // after half-step n + 1
  double* gammas = history.take<double>((steps + 1) * to_.padded_columns);  // before, and after
  double* lam = history.take<double>(to_.padded_rows);
  double* mu = history.take<double>(to_.padded_columns);
  real* weight_a = history.take<real>(to_.padded_rows);
  real* weight_b = history.take<real>(to_.padded_columns);
  real* slope = history.take<real>(to_.tiles * rows * width);
  std::memcpy(gammas, gamma_, to_.padded_columns * sizeof(double));
  iterate(steps, -1.0, [&](int64_t n) {
    double *phi = phis + (n - 1) * to_.padded_rows, *gamma = gammas + n * to_.padded_columns;
    for (int64_t i = 0; i < rows; ++i) phi[i] = phi_[i] + __builtin_log(double(u_[i]));
    for (int64_t j = 0; j < columns; ++j)
      gamma[j] = gamma_[j] == -kInfinity || live_b_[j] == 0
                     ? -kInfinity
                     : gamma_[j] + __builtin_log(double(v_[j]));
  });
  const double* last_phi = phis + (steps - 1) * to_.padded_rows;
  const double* last_gamma = gammas + steps * to_.padded_columns;
  real* grad_a = static_cast<real*>(grads.grad_a) + problem * rows;
  real* grad_b = static_cast<real*>(grads.grad_b) + problem * columns;
  const real* grad_f = static_cast<const real*>(grads.grad_f);
  const real* grad_g = static_cast<const real*>(grads.grad_g);
  fill(lam, to_.padded_rows, 0.0);
  fill(mu, to_.padded_columns, 0.0);
  fill(slope, to_.tiles * rows * width, real(0));
  fill(weight_a, to_.padded_rows, real(0));
  fill(weight_b, to_.padded_columns, real(0));

  // The outputs' own gradients: plan, f, g, and the gauge that shifts f and g.
  double excess = 0, mass = 0;
  for (int64_t i = 0; grad_f && i < rows; ++i)
    if (last_phi[i] != -kInfinity) excess += lam[i] = grad_f[problem * rows + i];
  for (int64_t j = 0; j < columns; ++j) {
    if (last_gamma[j] == -kInfinity) continue;
    mass += double(b_[j]);
    if (grad_g) excess -= mu[j] = grad_g[problem * columns + j];
  }
  const double shift = gauge(last_gamma);
  for (int64_t j = 0; j < columns; ++j) {
    const bool live = last_gamma[j] != -kInfinity && mass > 0;
    grad_b[j] = live ? real(excess / mass * epsilon() * (last_gamma[j] - shift)) : real(0);
    if (live) mu[j] += excess * double(b_[j]) / mass;
  }
  fill(grad_a, rows, real(0));
  if (grads.grad_plan) {
    represent(last_phi, last_gamma);
    over_plan(slope, 1.0, lam, mu, [&](V p, int64_t i, int64_t j, real* to) {
      real upstream[lanes];
      fill(upstream, lanes, real(0));
      if (j < columns)
        load_elements(grads.grad_plan, grads.plan_dtype, (problem * rows + i) * columns + j,
                      upstream, std::min<int64_t>(lanes, columns - j));
      const V w = select(p == real(0), V{}, p * load<V>(upstream) * real(inverse_));
      store(to, -w);
      return w;
    });
  }
  for (int64_t n = steps; n-- > 0;) {
    const double* phi = phis + n * to_.padded_rows;
    const double *before = gammas + n * to_.padded_columns, *after = before + to_.padded_columns;
    for (int64_t j = 0; j < columns; ++j) {
      weight_b[j] = after[j] == -kInfinity ? real(0) : real(mu[j] / double(b_[j]));
      grad_b[j] += real(epsilon()) * weight_b[j];
    }
    represent(phi, after);
    over_plan(slope, -1.0, lam, nullptr, [&](V p, int64_t, int64_t j, real* to) {
      const V w = p * load<V>(weight_b + j);
      store(to, load<V>(to) + w);
      return w;
    });
    for (int64_t i = 0; i < rows; ++i) {
      weight_a[i] = phi[i] == -kInfinity ? real(0) : real(lam[i] / double(a_[i]));
      grad_a[i] += real(epsilon()) * weight_a[i];
    }
    fill(mu, to_.padded_columns, 0.0);
    fill(lam, to_.padded_rows, 0.0);
    represent(phi, before);
    over_plan(slope, -1.0, nullptr, mu, [&](V p, int64_t i, int64_t, real* to) {
      const V w = p * weight_a[i];
      store(to, load<V>(to) + w);
      return w;
    });
  }
  for (int64_t tile = 0; tile < to_.tiles; ++tile)
    for (int64_t i = 0; i < rows; ++i)
      store_elements(grads.grad_cost, batch_.costs.dtype,
                     (problem * rows + i) * columns + tile * width,
                     slope + (tile * rows + i) * width, std::min(width, columns - tile * width));
}

// `count` values of a row as a local buffer, padded to vectors with `rest`.
template <typename real>
SKETCHFAST_INLINE void load_row(const void* data, Dtype dtype, int64_t first, int64_t count,
                                int64_t padded, real rest, real* to) {
  load_elements(data, dtype, first, to, count);
  fill(to + count, padded - count, rest);
}

template <typename real>
void adjoint_block(const Batch& batch, const double* phi, const double* gamma,
                   const void* grad_plan, Dtype grad_dtype, double* plan, double* row_parts,
                   double* column_rhs, int64_t index) {
  constexpr int lanes = kLanes<real>;
  constexpr int64_t most = kAdjointColumns;
  const int64_t rows = batch.rows, columns = batch.columns;
  const int64_t blocks = (columns + most - 1) / most, problem = index / blocks;
  const int64_t first = index % blocks * most, count = std::min(most, columns - first);
  const int64_t padded = (count + lanes - 1) / lanes * lanes;
  const double inverse = 1 / batch.epsilon[problem];
  double potential[most], sums[most];
  real cost[most], upstream[most];
  load_row<double>(gamma, Dtype::float64, problem * columns + first, count, padded, -kInfinity,
                   potential);
  fill(sums, padded, 0.0);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (problem * rows + i) * columns + first;
    load_row<real>(batch.costs.matrix, batch.costs.dtype, at, count, padded, real(kInfinity), cost);
    if (grad_plan) load_row<real>(grad_plan, grad_dtype, at, count, padded, real(0), upstream);
    DoubleV part = {};
    for (int64_t j = 0; j < padded; j += lanes) {
      real p[lanes];
      store(p, flushed_exponential<real>(
                   exponent(phi[problem * rows + i], potential + j, cost + j, inverse)));
      for (int t = 0; t < lanes; t += kLanes<double>) {
        const DoubleV wide = widen(p + t);
        if (j + lanes <= count)
          store(plan + at + j + t, wide);
        else
          for (int64_t k = 0; k < std::min<int64_t>(kLanes<double>, count - j - t); ++k)
            plan[at + j + t + k] = wide[k];
        if (!grad_plan) continue;
        const DoubleV w = select(wide == 0.0, DoubleV{}, wide * widen(upstream + j + t) * inverse);
        store(sums + j + t, load<DoubleV>(sums + j + t) + w);
        part += w;
      }
    }
    row_parts[index * rows + i] = sum_of_lanes(part);
  }
  std::memcpy(column_rhs + problem * columns + first, sums, count * sizeof(double));
}

void adjoint(const Batch& batch, const double* phi, const double* gamma, const void* grad_plan,
             Dtype grad_dtype, double* plan, double* row_parts, double* column_rhs, int64_t begin,
             int64_t end) {
  FlushSubnormals flush;
  for (int64_t index = begin; index < end; ++index)
    batch.is_double ? adjoint_block<double>(batch, phi, gamma, grad_plan, grad_dtype, plan,
                                            row_parts, column_rhs, index)
                    : adjoint_block<float>(batch, phi, gamma, grad_plan, grad_dtype, plan,
                                           row_parts, column_rhs, index);
}

template <typename real>
void cost_gradient_row(const double* plan, const void* grad_plan, Dtype grad_dtype,
                       const double* epsilon, const double* lam, const double* mu, int64_t rows,
                       int64_t columns, void* grad_cost, Dtype dtype, int64_t row) {
  constexpr int64_t most = 512;
  const int64_t problem = row / rows;
  const double inverse = 1 / epsilon[problem], own = lam[row];
  const double* other = mu + problem * columns;
  real buffer[most];
  for (int64_t first = 0; first < columns; first += most) {
    const int64_t count = std::min(most, columns - first), at = row * columns + first;
    fill(buffer, count, real(0));
    if (grad_plan) load_elements(grad_plan, grad_dtype, at, buffer, count);
    for (int64_t j = 0; j < count; ++j) {
      const double slope = own + other[first + j] - double(buffer[j]) * inverse;
      buffer[j] = plan[at + j] == 0 ? real(0) : real(plan[at + j] * slope);
    }
    store_elements(grad_cost, dtype, at, buffer, count);
  }
}

void cost_gradient(const double* plan, const void* grad_plan, Dtype grad_dtype,
                   const double* epsilon, const double* lam, const double* mu, int64_t rows,
                   int64_t columns, void* grad_cost, Dtype dtype, int64_t begin, int64_t end) {
  FlushSubnormals flush;
  for (int64_t row = begin; row < end; ++row)
    dtype == Dtype::float64 ? cost_gradient_row<double>(plan, grad_plan, grad_dtype, epsilon, lam,
                                                        mu, rows, columns, grad_cost, dtype, row)
                            : cost_gradient_row<float>(plan, grad_plan, grad_dtype, epsilon, lam,
                                                       mu, rows, columns, grad_cost, dtype, row);
}

template <typename real>
void value_backward_row(const Batch& batch, const void* grad, const double* phi,
                        const double* gamma, void* grad_cost, int64_t row) {
  constexpr int lanes = kLanes<real>;
  constexpr int64_t most = 512;
  const int64_t columns = batch.columns, problem = row / batch.rows;
  const double inverse = 1 / batch.epsilon[problem];
  const real upstream = static_cast<const real*>(grad)[problem];
  real buffer[most];
  double potential[most];
  for (int64_t first = 0; first < columns; first += most) {
    const int64_t count = std::min(most, columns - first), at = row * columns + first;
    const int64_t padded = (count + lanes - 1) / lanes * lanes;
    load_row<real>(batch.costs.matrix, batch.costs.dtype, at, count, padded, real(kInfinity),
                   buffer);
    load_row<double>(gamma, Dtype::float64, problem * columns + first, count, padded, -kInfinity,
                     potential);
    for (int64_t j = 0; j < padded; j += lanes)
      store(buffer + j, upstream * flushed_exponential<real>(
                                       exponent(phi[row], potential + j, buffer + j, inverse)));
    store_elements(grad_cost, batch.costs.dtype, at, buffer, count);
  }
}

void value_backward(const Batch& batch, const void* grad, const double* phi, const double* gamma,
                    void* grad_cost, int64_t begin, int64_t end) {
  FlushSubnormals flush;
  for (int64_t row = begin; row < end; ++row)
    batch.is_double ? value_backward_row<double>(batch, grad, phi, gamma, grad_cost, row)
                    : value_backward_row<float>(batch, grad, phi, gamma, grad_cost, row);
}

// 2 grad sum_j P_ij (x_i - y_j) for points i of one side: a point's distances to a vector of the
// other side's, which lie as [tile][d][lanes].
template <typename real>
class PointsGradient {
 public:
  PointsGradient(const Batch& batch, bool to_y, const void* grad, const double* phi,
                 const double* gamma, void* grad_points)
      : batch_(batch),
        own_count_(to_y ? batch.columns : batch.rows),
        other_count_(to_y ? batch.rows : batch.columns),
        d_(batch.costs.dimensions),
        tiles_((other_count_ + lanes - 1) / lanes),
        own_(static_cast<const real*>(to_y ? batch.costs.y : batch.costs.x)),
        other_(static_cast<const real*>(to_y ? batch.costs.x : batch.costs.y)),
        own_potential_(to_y ? gamma : phi),
        other_potential_(to_y ? phi : gamma),
        grad_(static_cast<const real*>(grad)),
        to_(static_cast<real*>(grad_points)),
        arena_(Arena::bytes_of<real>(tiles_ * d_ * lanes) +
               Arena::bytes_of<double>(tiles_ * lanes) + Arena::bytes_of<real>(d_ * lanes) +
               Arena::bytes_of<double>(d_)),
        points_(arena_.take<real>(tiles_ * d_ * lanes)),
        potential_(arena_.take<double>(tiles_ * lanes)),
        sums_(arena_.take<real>(d_ * lanes)),
        totals_(arena_.take<double>(d_)) {}

  void rows(int64_t begin, int64_t end) {
    int64_t loaded = -1;
    for (int64_t row = begin; row < end; ++row) {
      if (row / own_count_ != loaded) load_other(loaded = row / own_count_);
      one(row, loaded);
    }
  }

 private:
  using V = Vec<real>;
  static constexpr int lanes = kLanes<real>;
  static constexpr int64_t kTilesASum = 64;

  void load_other(int64_t problem) {
    fill(points_, tiles_ * d_ * lanes, real(0));
    fill(potential_, tiles_ * lanes, -kInfinity);
    for (int64_t j = 0; j < other_count_; ++j) {
      const int64_t at = problem * other_count_ + j;
      potential_[j] = other_potential_[at];
      for (int64_t k = 0; k < d_; ++k)
        points_[(j / lanes * d_ + k) * lanes + j % lanes] = other_[at * d_ + k];
    }
  }

  void one(int64_t row, int64_t problem) {
    const double inverse = 1 / (batch_.epsilon ? batch_.epsilon[problem] : batch_.single_epsilon);
    const real* x = own_ + row * d_;
    fill(totals_, d_, 0.0);
    for (int64_t first = 0; first < tiles_; first += kTilesASum) {
      fill(sums_, d_ * lanes, real(0));
      for (int64_t tile = first; tile < std::min(first + kTilesASum, tiles_); ++tile) {
        const real* points = points_ + tile * d_ * lanes;
        V distance = {};
        for (int64_t k = 0; k < d_; ++k) {
          const V gap = x[k] - load<V>(points + k * lanes);
          distance += gap * gap;
        }
        real cost[lanes];
        store(cost, distance);
        const V p = flushed_exponential<real>(
            exponent(own_potential_[row], potential_ + tile * lanes, cost, inverse));
        for (int64_t k = 0; k < d_; ++k)
          store(sums_ + k * lanes,
                load<V>(sums_ + k * lanes) + p * (x[k] - load<V>(points + k * lanes)));
      }
      for (int64_t k = 0; k < d_; ++k) totals_[k] += sum_of_lanes(load<V>(sums_ + k * lanes));
    }
    for (int64_t k = 0; k < d_; ++k)
      to_[row * d_ + k] = real(2 * double(grad_[problem]) * totals_[k]);
  }

  const Batch& batch_;
  int64_t own_count_, other_count_, d_, tiles_;
  const real *own_, *other_;
  const double *own_potential_, *other_potential_;
  const real* grad_;
  real* to_;
  Arena arena_;
  real* points_;
  double* potential_;
  real* sums_;
  double* totals_;
};

void points_backward(const Batch& batch, bool to_y, const void* grad, const double* phi,
                     const double* gamma, void* grad_points, int64_t begin, int64_t end) {
  FlushSubnormals flush;
  if (batch.is_double)
    PointsGradient<double>(batch, to_y, grad, phi, gamma, grad_points).rows(begin, end);
  else
    PointsGradient<float>(batch, to_y, grad, phi, gamma, grad_points).rows(begin, end);
}

void solve(const Batch& batch, const Results& results, int64_t begin, int64_t end, Team team) {
  FlushSubnormals flush;
  const auto run = [&](auto real) {
    Solver<decltype(real)> solver(batch, team);
    for (int64_t problem = begin; problem < end; ++problem) solver.solve(problem, results);
  };
  batch.is_double ? run(double()) : run(float());
}

void unrolled_backward(const Batch& batch, const UnrolledGrads& grads, int64_t begin, int64_t end,
                       Team team) {
  FlushSubnormals flush;
  const auto run = [&](auto real) {
    Solver<decltype(real)> solver(batch, team);
    for (int64_t problem = begin; problem < end; ++problem)
      solver.unrolled_backward(problem, grads);
  };
  batch.is_double ? run(double()) : run(float());
}

}  // namespace SKETCHFAST_ISA

extern const Kernels SKETCHFAST_KERNELS_OF(SKETCHFAST_ISA) = {
    solve, unrolled_backward, adjoint, cost_gradient, value_backward, points_backward};

}  // namespace sinkhorn_cpu
}  // namespace sketchfast

// --- torch -------------------------------------------------------------------------------------

#if defined(SKETCHFAST_ISA_baseline)

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "../check.h"
#include "dtype_of.h"
#include "share.h"

namespace sketchfast {
namespace sinkhorn_cpu {
namespace {

using OptionalTensor = std::optional<Tensor>;
using torch::stable::new_empty;

const Kernels& kernels(){SKETCHFAST_RETURN_KERNELS_OF_CHOSEN_ISA}

ScalarType compute_type(const Tensor& like) {
  return like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
ScalarType plan_type(const Tensor& cost) {
  return cost.scalar_type() == ScalarType::Half ? ScalarType::Float : cost.scalar_type();
}
const void* data_or_null(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}
const double* doubles(const Tensor& tensor) {
  return static_cast<const double*>(tensor.const_data_ptr());
}
double* mutable_doubles(Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }

void check_optional(const char* name, const OptionalTensor& tensor, ScalarType dtype,
                    std::initializer_list<int64_t> shape) {
  if (tensor) check_tensor(name, *tensor, dtype, shape);
}

// --- how work is shared ---

void solve_batch(const Batch& batch, const Results& results) {
  share_problems(batch.count, batch.rows * batch.columns,
                 [&](int64_t begin, int64_t end, const Team& team) {
                   kernels().solve(batch, results, begin, end, team);
                 });
}

template <typename Work>
void over_rows(int64_t rows, int64_t columns, Work work) {
  const int64_t grain = std::max<int64_t>(1, kSharedEntries / std::max<int64_t>(1, columns));
  torch::stable::parallel_for(0, rows, grain, work);
}

// --- arguments ---

Batch batch_of(const Tensor& cost, const Tensor& epsilon, const OptionalTensor& a,
               const OptionalTensor& b, const OptionalTensor& init, int64_t max_iter, double tol) {
  check(cost.dim() == 3 && cost.size(1) >= 1 && cost.size(2) >= 1,
        "cost must have shape [N, K >= 1, E >= 1], got ", shape_of(cost));
  check(max_iter >= 1, "max_iter must be at least 1, got ", max_iter);
  const int64_t count = cost.size(0), rows = cost.size(1), columns = cost.size(2);
  const ScalarType type = compute_type(cost);
  check_tensor("cost", cost, cost.scalar_type(), {count, rows, columns});
  check_tensor("epsilon", epsilon, ScalarType::Double, {count});
  check_optional("a", a, type, {count, rows});
  check_optional("b", b, type, {count, columns});
  check_optional("init", init, type, {count, columns});
  const Costs costs{cost.const_data_ptr(),
                    dtype_of("cost", cost.scalar_type()),
                    rows * columns,
                    columns,
                    1,
                    1.0,
                    nullptr,
                    nullptr,
                    0};
  return {costs,
          count,
          rows,
          columns,
          type == ScalarType::Double,
          doubles(epsilon),
          0.0,
          data_or_null(a),
          data_or_null(b),
          data_or_null(init),
          max_iter,
          tol};
}

Batch points_of(const Tensor& x, const Tensor& y, const Tensor& epsilon, const OptionalTensor& a,
                const OptionalTensor& b, int64_t max_iter, double tol) {
  check(x.dim() == 3 && x.size(1) >= 1, "x must have shape [N, n >= 1, d], got ", shape_of(x));
  check(y.dim() == 3 && y.size(1) >= 1, "y must have shape [N, m >= 1, d], got ", shape_of(y));
  check(max_iter >= 1, "max_iter must be at least 1, got ", max_iter);
  const int64_t count = x.size(0), rows = x.size(1), columns = y.size(1), dimensions = x.size(2);
  const ScalarType type = compute_type(x);
  check_tensor("x", x, type, {count, rows, dimensions});
  check_tensor("y", y, type, {count, columns, dimensions});
  check_tensor("epsilon", epsilon, ScalarType::Double, {count});
  check_optional("a", a, type, {count, rows});
  check_optional("b", b, type, {count, columns});
  const Costs costs{nullptr,   Dtype::float32, 0, 0, 0, 1.0, x.const_data_ptr(), y.const_data_ptr(),
                    dimensions};
  return {costs,
          count,
          rows,
          columns,
          type == ScalarType::Double,
          doubles(epsilon),
          0.0,
          data_or_null(a),
          data_or_null(b),
          nullptr,
          max_iter,
          tol};
}

// The tensors every solver returns.
struct Potentials {
  Tensor f, g, iterations, error, phi, gamma, value;

  Potentials(const Tensor& like, const Batch& batch)
      : f(new_empty(like, {batch.count, batch.rows}, compute_type(like))),
        g(new_empty(like, {batch.count, batch.columns}, compute_type(like))),
        iterations(new_empty(like, {batch.count}, ScalarType::Int)),
        error(new_empty(like, {batch.count}, compute_type(like))),
        phi(new_empty(like, {batch.count, batch.rows}, ScalarType::Double)),
        gamma(new_empty(like, {batch.count, batch.columns}, ScalarType::Double)),
        value(new_empty(like, {batch.count}, compute_type(like))) {}

  Results results() {
    Results to{};
    to.plan_scale = 1;
    to.f = f.mutable_data_ptr();
    to.g = g.mutable_data_ptr();
    to.value = value.mutable_data_ptr();
    to.error = error.mutable_data_ptr();
    to.iterations = static_cast<int32_t*>(iterations.mutable_data_ptr());
    to.phi = mutable_doubles(phi);
    to.gamma = mutable_doubles(gamma);
    return to;
  }
};

// --- ops ---

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn_fwd(
    Tensor cost, Tensor epsilon, OptionalTensor a, OptionalTensor b, OptionalTensor init,
    int64_t max_iter, double tol, std::string) {
  const Batch batch = batch_of(cost, epsilon, a, b, init, max_iter, tol);
  Potentials found(cost, batch);
  Tensor plan = new_empty(cost, {batch.count, batch.rows, batch.columns}, plan_type(cost));
  Results to = found.results();
  to.plan = plan.mutable_data_ptr();
  to.plan_dtype = dtype_of("plan", plan.scalar_type());
  to.plan_problem_stride = batch.rows * batch.columns;
  to.plan_row_stride = batch.columns;
  to.plan_column_stride = 1;
  solve_batch(batch, to);
  return {plan, found.f, found.g, found.iterations, found.error, found.phi, found.gamma};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn_value_fwd(
    Tensor cost, Tensor epsilon, OptionalTensor a, OptionalTensor b, int64_t max_iter, double tol) {
  const Batch batch = batch_of(cost, epsilon, a, b, std::nullopt, max_iter, tol);
  Potentials found(cost, batch);
  solve_batch(batch, found.results());
  return {found.value, found.f, found.g, found.phi, found.gamma};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn_points_fwd(
    Tensor x, Tensor y, Tensor epsilon, OptionalTensor a, OptionalTensor b, int64_t max_iter,
    double tol) {
  const Batch batch = points_of(x, y, epsilon, a, b, max_iter, tol);
  Potentials found(x, batch);
  solve_batch(batch, found.results());
  return {found.value, found.f, found.g, found.iterations, found.error, found.phi, found.gamma};
}

Tensor swav_assign(Tensor scores, double epsilon, int64_t n_iter) {
  check(scores.dim() == 2 && scores.size(1) >= 1, "scores must have shape [B, K >= 1], got ",
        shape_of(scores));
  check(epsilon > 0, "epsilon must be greater than 0, got ", epsilon);
  check(n_iter >= 1, "n_iter must be at least 1, got ", n_iter);
  const int64_t samples = scores.size(0), prototypes = scores.size(1);
  check_tensor("scores", scores, scores.scalar_type(), {samples, prototypes});
  Tensor assigned = new_empty(scores, {samples, prototypes}, scores.scalar_type());
  if (samples == 0) return assigned;
  // Prototypes are the rows of the problem, samples its columns: prototypes come first.
  const Dtype dtype = dtype_of("scores", scores.scalar_type());
  const Costs costs{scores.const_data_ptr(), dtype, 0, 1, prototypes, -1.0, nullptr, nullptr, 0};
  const Batch batch{costs,   1,       prototypes, samples, dtype == Dtype::float64,
                    nullptr, epsilon, nullptr,    nullptr, nullptr,
                    n_iter,  -1.0};
  Results to{};
  to.plan = assigned.mutable_data_ptr();
  to.plan_dtype = dtype;
  to.plan_row_stride = 1;
  to.plan_column_stride = prototypes;
  to.plan_scale = double(samples);
  solve_batch(batch, to);
  return assigned;
}

std::tuple<Tensor, Tensor, Tensor> sinkhorn_adjoint(OptionalTensor grad_plan, OptionalTensor grad_f,
                                                    OptionalTensor grad_g, Tensor cost,
                                                    Tensor epsilon, Tensor phi, Tensor gamma) {
  const Batch batch = batch_of(cost, epsilon, std::nullopt, std::nullopt, std::nullopt, 1, -1.0);
  const int64_t count = batch.count, rows = batch.rows, columns = batch.columns;
  check_optional("grad_plan", grad_plan, plan_type(cost), {count, rows, columns});
  check_optional("grad_f", grad_f, compute_type(cost), {count, rows});
  check_optional("grad_g", grad_g, compute_type(cost), {count, columns});
  check_tensor("phi", phi, ScalarType::Double, {count, rows});
  check_tensor("gamma", gamma, ScalarType::Double, {count, columns});
  const int64_t blocks = (columns + kAdjointColumns - 1) / kAdjointColumns;
  Tensor plan = new_empty(cost, {count, rows, columns}, ScalarType::Double);
  Tensor row_rhs = new_empty(cost, {count, rows}, ScalarType::Double);
  Tensor column_rhs = new_empty(cost, {count, columns}, ScalarType::Double);
  Tensor parts = new_empty(cost, {count * blocks, rows}, ScalarType::Double);
  double *to_plan = mutable_doubles(plan), *to_parts = mutable_doubles(parts);
  double *to_rows = mutable_doubles(row_rhs), *to_columns = mutable_doubles(column_rhs);
  const Dtype grad_dtype = dtype_of("grad_plan", plan_type(cost));
  const int64_t block_size = rows * std::min(columns, kAdjointColumns);
  torch::stable::parallel_for(0, count * blocks, std::max<int64_t>(1, kSharedEntries / block_size),
                              [&](int64_t begin, int64_t end) {
                                kernels().adjoint(batch, doubles(phi), doubles(gamma),
                                                  data_or_null(grad_plan), grad_dtype, to_plan,
                                                  to_parts, to_columns, begin, end);
                              });
  const auto add = [&](const OptionalTensor& grad, const Tensor& potential, double* to) {
    const double* scaled = doubles(potential);
    const void* upstream = data_or_null(grad);
    const Dtype dtype = dtype_of("grad", compute_type(cost));
    for (int64_t i = 0, size = potential.numel(); i < size; ++i) {
      if (scaled[i] - scaled[i] != 0)
        to[i] = 0;
      else if (upstream)
        to[i] += element(upstream, dtype, i);
    }
  };
  for (int64_t n = 0; n < count; ++n)
    for (int64_t i = 0; i < rows; ++i) {
      double sum = 0;
      for (int64_t block = 0; block < blocks; ++block)
        sum += to_parts[(n * blocks + block) * rows + i];
      to_rows[n * rows + i] = sum;
    }
  add(grad_f, phi, to_rows);
  add(grad_g, gamma, to_columns);
  return {plan, row_rhs, column_rhs};
}

Tensor sinkhorn_cost_gradient(OptionalTensor grad_plan, Tensor plan, Tensor epsilon, Tensor lam,
                              Tensor mu, ScalarType dtype) {
  check(plan.dim() == 3, "plan must have shape [N, K, E], got ", shape_of(plan));
  const int64_t count = plan.size(0), rows = plan.size(1), columns = plan.size(2);
  check_tensor("plan", plan, ScalarType::Double, {count, rows, columns});
  check_tensor("epsilon", epsilon, ScalarType::Double, {count});
  check_tensor("lam", lam, ScalarType::Double, {count, rows});
  check_tensor("mu", mu, ScalarType::Double, {count, columns});
  const ScalarType upstream = dtype == ScalarType::Half ? ScalarType::Float : dtype;
  check_optional("grad_plan", grad_plan, upstream, {count, rows, columns});
  Tensor grad_cost = new_empty(plan, {count, rows, columns}, dtype);
  void* to = grad_cost.mutable_data_ptr();
  const Dtype grad_dtype = dtype_of("grad_plan", upstream), cost_dtype = dtype_of("dtype", dtype);
  over_rows(count * rows, columns, [&](int64_t begin, int64_t end) {
    kernels().cost_gradient(doubles(plan), data_or_null(grad_plan), grad_dtype, doubles(epsilon),
                            doubles(lam), doubles(mu), rows, columns, to, cost_dtype, begin, end);
  });
  return grad_cost;
}

std::tuple<Tensor, Tensor, Tensor> sinkhorn_unrolled_bwd(OptionalTensor grad_plan,
                                                         OptionalTensor grad_f,
                                                         OptionalTensor grad_g, Tensor cost,
                                                         Tensor epsilon, OptionalTensor a,
                                                         OptionalTensor b, OptionalTensor init,
                                                         Tensor iterations, int64_t max_iter) {
  const Batch batch = batch_of(cost, epsilon, a, b, init, max_iter, -1.0);
  const int64_t count = batch.count, rows = batch.rows, columns = batch.columns;
  check_optional("grad_plan", grad_plan, plan_type(cost), {count, rows, columns});
  check_optional("grad_f", grad_f, compute_type(cost), {count, rows});
  check_optional("grad_g", grad_g, compute_type(cost), {count, columns});
  check_tensor("iterations", iterations, ScalarType::Int, {count});
  Tensor grad_cost = new_empty(cost, {count, rows, columns}, cost.scalar_type());
  Tensor grad_a = new_empty(cost, {count, rows}, compute_type(cost));
  Tensor grad_b = new_empty(cost, {count, columns}, compute_type(cost));
  const UnrolledGrads grads{data_or_null(grad_plan),
                            data_or_null(grad_f),
                            data_or_null(grad_g),
                            dtype_of("grad_plan", plan_type(cost)),
                            static_cast<const int32_t*>(iterations.const_data_ptr()),
                            grad_cost.mutable_data_ptr(),
                            grad_a.mutable_data_ptr(),
                            grad_b.mutable_data_ptr()};
  share_problems(count, rows * columns, [&](int64_t begin, int64_t end, const Team& team) {
    kernels().unrolled_backward(batch, grads, begin, end, team);
  });
  return {grad_cost, grad_a, grad_b};
}

Tensor sinkhorn_value_bwd(Tensor grad, Tensor cost, Tensor epsilon, Tensor phi, Tensor gamma) {
  const Batch batch = batch_of(cost, epsilon, std::nullopt, std::nullopt, std::nullopt, 1, -1.0);
  check_tensor("grad", grad, compute_type(cost), {batch.count});
  check_tensor("phi", phi, ScalarType::Double, {batch.count, batch.rows});
  check_tensor("gamma", gamma, ScalarType::Double, {batch.count, batch.columns});
  Tensor grad_cost = new_empty(cost, {batch.count, batch.rows, batch.columns}, cost.scalar_type());
  void* to = grad_cost.mutable_data_ptr();
  over_rows(batch.count * batch.rows, batch.columns, [&](int64_t begin, int64_t end) {
    kernels().value_backward(batch, grad.const_data_ptr(), doubles(phi), doubles(gamma), to, begin,
                             end);
  });
  return grad_cost;
}

std::tuple<Tensor, Tensor> sinkhorn_points_bwd(Tensor grad, Tensor x, Tensor y, Tensor epsilon,
                                               Tensor phi, Tensor gamma) {
  const Batch batch = points_of(x, y, epsilon, std::nullopt, std::nullopt, 1, -1.0);
  check_tensor("grad", grad, compute_type(x), {batch.count});
  check_tensor("phi", phi, ScalarType::Double, {batch.count, batch.rows});
  check_tensor("gamma", gamma, ScalarType::Double, {batch.count, batch.columns});
  const auto side = [&](bool to_y, const Tensor& points) {
    const int64_t own = points.size(1), other = (to_y ? x : y).size(1);
    Tensor grad_points = new_empty(points, {batch.count, own, points.size(2)}, compute_type(x));
    void* to = grad_points.mutable_data_ptr();
    over_rows(batch.count * own, other * (1 + points.size(2)), [&](int64_t begin, int64_t end) {
      kernels().points_backward(batch, to_y, grad.const_data_ptr(), doubles(phi), doubles(gamma),
                                to, begin, end);
    });
    return grad_points;
  };
  return {side(false, x), side(true, y)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sketchfast, CPU, library) {
  library.impl("sinkhorn_fwd_native", TORCH_BOX(&sinkhorn_fwd));
  library.impl("sinkhorn_value_fwd_native", TORCH_BOX(&sinkhorn_value_fwd));
  library.impl("sinkhorn_points_fwd_native", TORCH_BOX(&sinkhorn_points_fwd));
  library.impl("swav_assign_native", TORCH_BOX(&swav_assign));
  library.impl("sinkhorn_adjoint_native", TORCH_BOX(&sinkhorn_adjoint));
  library.impl("sinkhorn_cost_gradient_native", TORCH_BOX(&sinkhorn_cost_gradient));
  library.impl("sinkhorn_unrolled_bwd_native", TORCH_BOX(&sinkhorn_unrolled_bwd));
  library.impl("sinkhorn_value_bwd_native", TORCH_BOX(&sinkhorn_value_bwd));
  library.impl("sinkhorn_points_bwd_native", TORCH_BOX(&sinkhorn_points_bwd));
}

}  // namespace sinkhorn_cpu
}  // namespace sketchfast

#endif  // SKETCHFAST_ISA_baseline
