// The adjoint system of Sinkhorn's implicit gradient on the CPU, in double:
//   [[diag(P1), P], [P', diag(P'1)]] [lam; mu] = [row_rhs; column_rhs]
// reduced to the smaller side by a Schur complement, scaled to a unit diagonal, and factorised by
// Cholesky; the definition is implicit_solve of the reference. "Small" and "large" are the sides of
// the plan by length, rows and columns where they are equal.
//
// The plan is read twice: in chunks of the large side for the product that makes the complement and
// all sums, then for the solution on the large side. Matrices lie in panels of a few columns, all
// rows of a panel one after another; one routine, a block of rows by a panel, serves both the
// product and the factorisation. Many problems go a thread each; threads that share one problem
// take runs of chunks, their sums are added in a fixed order, and the factorisation is one
// thread's.
#include <algorithm>

#include "isa.h"
#include "memory.h"
#include "simd.h"
#include "team.h"

namespace sketchfast {
namespace sinkhorn_schur_cpu {

// A batch of systems and where their solutions go; plans are [rows, columns].
struct Systems {
  int64_t count, rows, columns;
  const double *plan, *row_rhs, *column_rhs, *gamma, *epsilon;
  double *lam, *mu, *grad_a, *grad_b;
};

// What one instruction set offers.
struct Kernels {
  // Systems begin..end, by a team that shares each.
  void (*solve)(const Systems&, int64_t begin, int64_t end, Team);
};
extern const Kernels baseline_kernels, avx2_kernels, avx512_kernels;

inline namespace SKETCHFAST_ISA {

constexpr double kRidge = 1e-12;  // RIDGE of the reference
constexpr int kDoubles = kLanes<double>;
constexpr int kVectors = 2;                  // a row of a panel
constexpr int kPanel = kVectors * kDoubles;  // columns of a panel
// Rows of a block: its sums by a panel lie in registers.
constexpr int kBlock = kVectorBytes == 64 ? 8 : 4;
constexpr int64_t kChunk = 128;  // two panels of so many rows lie in the nearest cache

using V = DoubleV;

SKETCHFAST_INLINE double reciprocal_or_zero(double x) { return x > 0 ? 1 / x : 0; }
SKETCHFAST_INLINE double finite_or_zero(double x) { return x - x == 0 ? x : 0; }

// A matrix of `rows` rows in panels.
SKETCHFAST_INLINE int64_t in_panels(int64_t row, int64_t column, int64_t rows) {
  return (column / kPanel * rows + row) * kPanel + column % kPanel;
}

// to += or -= left' right: left's first kBlock columns, right a panel, both `depth` rows.
template <bool subtract>
SKETCHFAST_INLINE void add_product(const double* left, const double* right, int64_t depth,
                                   double* to) {
  V sum[kBlock][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kBlock; ++i)
#pragma GCC unroll 2
    for (int q = 0; q < kVectors; ++q) sum[i][q] = load<V>(to + i * kPanel + q * kDoubles);
  for (int64_t k = 0; k < depth; ++k) {
    V row[kVectors];
#pragma GCC unroll 2
    for (int q = 0; q < kVectors; ++q) row[q] = load<V>(right + k * kPanel + q * kDoubles);
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; ++i) {
      const double factor = left[k * kPanel + i];
#pragma GCC unroll 2
      for (int q = 0; q < kVectors; ++q)
        sum[i][q] = subtract ? sum[i][q] - factor * row[q] : sum[i][q] + factor * row[q];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kBlock; ++i)
#pragma GCC unroll 2
    for (int q = 0; q < kVectors; ++q) store(to + i * kPanel + q * kDoubles, sum[i][q]);
}

// A symmetric matrix in panels, upper part and diagonal panels valid, that becomes its factor U,
// matrix = U' U.
class Cholesky {
 public:
  Cholesky(double* matrix, double* per_diagonal, int64_t size)
      : matrix_(matrix), per_diagonal_(per_diagonal), size_(size), panels_(size / kPanel) {}

  void factorise() {
    for (int64_t first = 0; first < size_; first += kBlock) {
      for (int64_t p = first / kPanel; p < panels_; ++p)
        add_product<true>(at(0, first), panel(p), first, panel(p) + first * kPanel);
      double factor[kBlock][kBlock];
      factorise_block(first, factor);
      for (int64_t p = first / kPanel; p < panels_; ++p)
        eliminate(factor, per_diagonal_ + first, panel(p) + first * kPanel);
      for (int i = 0; i < kBlock; ++i)
        fill(panel(first / kPanel) + (first + i) * kPanel, first % kPanel + i, 0.0);
    }
  }

  // x from right-hand sides b, which are overwritten.
  void solve(double* b, double* x) const {
    for (int64_t first = 0; first < size_; first += kBlock) solve_down(first, b);
    fill(x, size_, 0.0);
    for (int64_t first = size_ - kBlock; first >= 0; first -= kBlock) solve_up(first, b, x);
  }

 private:
  double* panel(int64_t p) const { return matrix_ + p * size_ * kPanel; }
  double* at(int64_t row, int64_t column) const { return matrix_ + in_panels(row, column, size_); }

  // The factor of a block on the diagonal.
  void factorise_block(int64_t first, double (*u)[kBlock]) {
    for (int i = 0; i < kBlock; ++i) std::memcpy(u[i], at(first + i, first), sizeof(u[i]));
#pragma GCC unroll 8
    for (int m = 0; m < kBlock; ++m) {
      const double per_root = 1 / __builtin_sqrt(u[m][m]);
      per_diagonal_[first + m] = per_root;
#pragma GCC unroll 8
      for (int j = m; j < kBlock; ++j) u[m][j] *= per_root;
#pragma GCC unroll 8
      for (int i = m + 1; i < kBlock; ++i)
#pragma GCC unroll 8
        for (int j = i; j < kBlock; ++j) u[i][j] -= u[m][i] * u[m][j];
    }
  }

  // Rows of one panel become those of the factor.
  static SKETCHFAST_INLINE void eliminate(const double (*u)[kBlock], const double* per_diagonal,
                                          double* rows) {
    V x[kBlock][kVectors];
#pragma GCC unroll 8
    for (int m = 0; m < kBlock; ++m)
#pragma GCC unroll 2
      for (int q = 0; q < kVectors; ++q) x[m][q] = load<V>(rows + m * kPanel + q * kDoubles);
#pragma GCC unroll 8
    for (int m = 0; m < kBlock; ++m)
#pragma GCC unroll 2
      for (int q = 0; q < kVectors; ++q) {
        x[m][q] *= per_diagonal[m];
#pragma GCC unroll 8
        for (int i = m + 1; i < kBlock; ++i) x[i][q] -= u[m][i] * x[m][q];
        store(rows + m * kPanel + q * kDoubles, x[m][q]);
      }
  }

  // U' y = b from the top: a block of y in place of b, and what it takes from the rest of b.
  void solve_down(int64_t first, double* b) const {
    double y[kBlock];
    std::memcpy(y, b + first, sizeof(y));
    for (int m = 0; m < kBlock; ++m) {
      y[m] *= per_diagonal_[first + m];
      for (int i = m + 1; i < kBlock; ++i) y[i] -= at(first + m, first)[i] * y[m];
    }
    for (int64_t p = first / kPanel; p < panels_; ++p)
      for (int q = 0; q < kVectors; ++q) {
        const double* rows = panel(p) + first * kPanel + q * kDoubles;
        V rest = load<V>(b + p * kPanel + q * kDoubles);
#pragma GCC unroll 8
        for (int m = 0; m < kBlock; ++m) rest -= load<V>(rows + m * kPanel) * y[m];
        store(b + p * kPanel + q * kDoubles, rest);
      }
    std::memcpy(b + first, y, sizeof(y));
  }

  // U x = y from the bottom; x is 0 where it is not yet known.
  void solve_up(int64_t first, const double* y, double* x) const {
    V sums[kBlock] = {};
    for (int64_t p = first / kPanel; p < panels_; ++p)
      for (int q = 0; q < kVectors; ++q) {
        const double* rows = panel(p) + first * kPanel + q * kDoubles;
        const V known = load<V>(x + p * kPanel + q * kDoubles);
#pragma GCC unroll 8
        for (int m = 0; m < kBlock; ++m) sums[m] += load<V>(rows + m * kPanel) * known;
      }
    double rest[kBlock];
#pragma GCC unroll 8
    for (int m = 0; m < kBlock; m += kDoubles)
      store(rest + m, load<V>(y + first + m) - fold_rows<1, kDoubles>(sums + m));
    for (int m = kBlock - 1; m >= 0; --m) {
      for (int i = m + 1; i < kBlock; ++i) rest[m] -= at(first + m, first)[i] * x[first + i];
      x[first + m] = rest[m] * per_diagonal_[first + m];
    }
  }

  double *matrix_, *per_diagonal_;
  int64_t size_, panels_;
};

// The sizes that follow from a system's.
struct Layout {
  bool wide;  // rows are the small side
  int64_t small, large, panels, padded, chunks, slots;

  Layout(const Systems& systems, int64_t members)
      : wide(systems.rows <= systems.columns),
        small(wide ? systems.rows : systems.columns),
        large(wide ? systems.columns : systems.rows),
        panels((small + kPanel - 1) / kPanel),
        padded(panels * kPanel),
        chunks((large + kChunk - 1) / kChunk),
        slots(std::min(members, chunks)) {}
};

// What a connected component of the plan shares.
struct Component {
  double mass = 0, excess = 0, mean_lam = 0, mean_gamma = 0;  // excess: of rows over columns
};

class Solver {
 public:
  Solver(const Systems& systems, const Team& team)
      : systems_(systems),
        team_(team),
        to_(systems, team.size),
        arena_(bytes_needed(to_)),
        chunk_(arena_.take<double>(to_.slots * kChunk * to_.padded)),
        per_root_large_(arena_.take<double>(to_.slots * kChunk)),
        weight_(arena_.take<double>(to_.slots * kChunk)),
        product_(arena_.take<double>(to_.slots * to_.padded * to_.padded)),
        small_(arena_.take<double>(to_.slots * to_.padded)),
        of_rhs_(arena_.take<double>(to_.slots * to_.padded)),
        positive_(arena_.take<int64_t>(to_.slots * to_.padded)),
        large_(arena_.take<double>(to_.chunks * kChunk)),
        root_(arena_.take<double>(to_.padded)),
        per_root_(arena_.take<double>(to_.padded)),
        rhs_(arena_.take<double>(to_.padded)),
        x_(arena_.take<double>(to_.padded)),
        per_diagonal_(arena_.take<double>(to_.padded)),
        of_small_(arena_.take<int64_t>(to_.padded)),
        of_large_(arena_.take<int64_t>(to_.large)),
        parent_(arena_.take<int64_t>(to_.small)),
        number_(arena_.take<int64_t>(to_.small)),
        component_(arena_.take<Component>(to_.small + 1)) {}

  void solve(int64_t problem) {
    plan_ = systems_.plan + problem * to_.small * to_.large;
    problem_ = problem;
    for_members(team_, to_.slots, [&](int64_t slot) { multiply(slot); });
    add_slots();
    find_components();
    form_complement();
    Cholesky cholesky(product_, per_diagonal_, to_.padded);
    cholesky.factorise();
    cholesky.solve(rhs_, x_);
    for (int64_t i = 0; i < to_.padded; ++i) x_[i] *= per_root_[i];
    find_means();
    for_members(team_, to_.slots, [&](int64_t slot) { write_large(slot); });
    write_small();
  }

 private:
  static int64_t bytes_needed(const Layout& to) {
    const auto words = [](int64_t count) { return Arena::bytes_of<double>(count); };
    return words(to.slots * kChunk * to.padded) + 2 * words(to.slots * kChunk) +
           words(to.slots * to.padded * to.padded) + 3 * words(to.slots * to.padded) +
           words(to.chunks * kChunk) + 6 * words(to.padded) + words(to.large) +
           2 * words(to.small) + Arena::bytes_of<Component>(to.small + 1);
  }

  const double* small_rhs() const {
    return to_.wide ? systems_.row_rhs + problem_ * to_.small
                    : systems_.column_rhs + problem_ * to_.small;
  }
  const double* large_rhs() const {
    return to_.wide ? systems_.column_rhs + problem_ * to_.large
                    : systems_.row_rhs + problem_ * to_.large;
  }
  const double* gamma() const { return systems_.gamma + problem_ * systems_.columns; }

  // Calls work(first of the large side, count) on the chunks of a slot.
  template <typename Work>
  void for_chunks(int64_t slot, Work work) const {
    for (int64_t chunk = slot * to_.chunks / to_.slots; chunk < (slot + 1) * to_.chunks / to_.slots;
         ++chunk)
      work(chunk * kChunk, std::min(kChunk, to_.large - chunk * kChunk));
  }

  // --- the product, and all sums ---

  // A slot's part of (plan scaled by 1 / large)(plan)', of the sums of the small side, and of what
  // the large side's right-hand sides are to it.
  void multiply(int64_t slot) {
    const int64_t panel_size = kChunk * kPanel;
    double *chunk = chunk_ + slot * kChunk * to_.padded, *weight = weight_ + slot * kChunk;
    double* per_root = per_root_large_ + slot * kChunk;
    double* product = product_ + slot * to_.padded * to_.padded;
    fill(product, to_.padded * to_.padded, 0.0);
    fill(small_ + slot * to_.padded, to_.padded, 0.0);
    fill(of_rhs_ + slot * to_.padded, to_.padded, 0.0);
    fill(positive_ + slot * to_.padded, to_.padded, int64_t(0));
    for_chunks(slot, [&](int64_t first, int64_t count) {
      to_.wide ? load_wide(first, count, chunk) : load_tall(first, count, chunk);
      const double *large = large_ + first, *rhs = large_rhs() + first;
      for (int64_t k = 0; k < count; ++k)
        per_root[k] = large[k] > 0 ? 1 / __builtin_sqrt(large[k]) : 0.0;
      for (int64_t k = 0; k < count; ++k) weight[k] = per_root[k] * rhs[k];
      for (int64_t p = 0; p < to_.panels; ++p) {
        double* panel = chunk + p * panel_size;
        sum_and_scale(panel, count, per_root, weight, slot * to_.padded + p * kPanel);
        for (int64_t i = 0; i < std::min((p + 1) * kPanel, to_.small); i += kBlock)
          add_product<false>(chunk + in_panels(0, i, kChunk), panel, count,
                             product + (p * to_.padded + i) * kPanel);
      }
    });
  }

  // Rows of a panel to be multiplied by per_root; `to`, an offset into the sums.
  SKETCHFAST_INLINE void sum_and_scale(double* panel, int64_t count, const double* per_root,
                                       const double* weight, int64_t to) {
    V sum[kVectors] = {}, of_rhs[kVectors] = {};
    Int64V positive[kVectors] = {};
    for (int64_t k = 0; k < count; ++k)
#pragma GCC unroll 2
      for (int q = 0; q < kVectors; ++q) {
        double* entry = panel + k * kPanel + q * kDoubles;
        const V p = load<V>(entry), scaled = p * per_root[k];
        sum[q] += p;
        positive[q] -= p > 0.0;
        of_rhs[q] += scaled * weight[k];
        store(entry, scaled);
      }
    for (int q = 0; q < kVectors; ++q, to += kDoubles) {
      store(small_ + to, load<V>(small_ + to) + sum[q]);
      store(of_rhs_ + to, load<V>(of_rhs_ + to) + of_rhs[q]);
      store(positive_ + to, load<Int64V>(positive_ + to) + positive[q]);
    }
  }

  // A chunk as panels of [large][small], and the sums of the large side.
  void load_wide(int64_t first, int64_t count, double* chunk) {
    double* large = large_ + first;
    fill(large, count, 0.0);
    fill(large + count, kChunk - count, 0.0);
    for (int64_t i = 0; i < to_.padded; i += kDoubles) {
      const double* from = plan_ + i * to_.large + first;
      for (int64_t k = 0; k < count; k += kDoubles) {
        V rows[kDoubles];
        if (i + kDoubles <= to_.small && k + kDoubles <= count) {
#pragma GCC unroll 8
          for (int r = 0; r < kDoubles; ++r) rows[r] = load<V>(from + r * to_.large + k);
        } else {
          const int64_t filled = std::min<int64_t>(kDoubles, count - k);
          for (int r = 0; r < kDoubles; ++r)
            rows[r] = i + r < to_.small ? load_first(from + r * to_.large + k, filled) : V{};
        }
        V sum = rows[0];
#pragma GCC unroll 8
        for (int r = 1; r < kDoubles; ++r) sum += rows[r];
        store(large + k, load<V>(large + k) + sum);
        transpose(rows);
        double* to = chunk + in_panels(k, i, kChunk);
#pragma GCC unroll 8
        for (int r = 0; r < kDoubles; ++r) store(to + r * kPanel, rows[r]);
      }
    }
  }
  void load_tall(int64_t first, int64_t count, double* chunk) {
    for (int64_t k = 0; k < kChunk; k += kDoubles) {
      V sums[kDoubles] = {};
      for (int r = 0; r < kDoubles && k + r < count; ++r) {
        const double* from = plan_ + (first + k + r) * to_.small;
        for (int64_t i = 0; i < to_.padded; i += kDoubles) {
          const int64_t left = std::max<int64_t>(0, to_.small - i);
          const V p = left >= kDoubles ? load<V>(from + i) : load_first(from + i, left);
          sums[r] += p;
          store(chunk + in_panels(k + r, i, kChunk), p);
        }
      }
      store(large_ + first + k, fold_rows<1, kDoubles>(sums));
    }
  }

  void add_slots() {
    const auto add = [&](auto* parts, int64_t count) {
      for (int64_t slot = 1; slot < to_.slots; ++slot)
        for (int64_t i = 0; i < count; ++i) parts[i] += parts[slot * count + i];
    };
    add(product_, to_.padded * to_.padded);
    add(small_, to_.padded);
    add(of_rhs_, to_.padded);
    add(positive_, to_.padded);
    for (int64_t i = 0; i < to_.padded; ++i) {
      root_[i] = small_[i] > 0 ? __builtin_sqrt(small_[i]) : 0.0;
      per_root_[i] = small_[i] > 0 ? 1 / root_[i] : 0.0;
    }
  }

  // --- components ---

  // The number of each line's component; components_, one past the last, for a line without mass.
  void find_components() {
    int64_t live = 0, most = 0;
    for (int64_t j = 0; j < to_.large; ++j) live += large_[j] > 0;
    for (int64_t i = 0; i < to_.small; ++i) most = std::max(most, positive_[i]);
    // A line that meets every line of the other side that holds mass joins all.
    if (most >= live || join_through_entries()) {
      components_ = 1;
      for (int64_t i = 0; i < to_.padded; ++i) of_small_[i] = small_[i] > 0 ? 0 : 1;
      for (int64_t j = 0; j < to_.large; ++j) of_large_[j] = large_[j] > 0 ? 0 : 1;
      return;
    }
    components_ = 0;
    for (int64_t i = 0; i < to_.small; ++i)
      if (parent_[i] == i) number_[i] = components_++;
    for (int64_t i = 0; i < to_.padded; ++i)
      of_small_[i] = small_[i] > 0 ? number_[root_of(i)] : components_;
    for (int64_t j = 0; j < to_.large; ++j)
      of_large_[j] = large_[j] > 0 ? number_[root_of(of_large_[j])] : components_;
  }

  int64_t root_of(int64_t i) {
    while (parent_[i] != i) i = parent_[i] = parent_[parent_[i]];
    return i;
  }

  // Union-find over entries > 0: true as soon as all that is live is joined. Else of_large_ holds
  // a line of the small side that each line meets.
  bool join_through_entries() {
    constexpr int64_t stripe = 64;
    const int64_t small_stride = to_.wide ? to_.large : 1, large_stride = to_.wide ? 1 : to_.small;
    int64_t apart = 0;
    for (int64_t i = 0; i < to_.small; ++i) {
      parent_[i] = i;
      apart += small_[i] > 0;
    }
    fill(of_large_, to_.large, int64_t(-1));
    for (int64_t first = 0; first < to_.large && apart > 1; first += stripe)
      for (int64_t i = 0; i < to_.small; ++i)
        for (int64_t j = first; j < std::min(first + stripe, to_.large); ++j) {
          if (!(plan_[i * small_stride + j * large_stride] > 0)) continue;
          if (of_large_[j] < 0) {
            of_large_[j] = i;
            continue;
          }
          const int64_t mine = root_of(i), other = root_of(of_large_[j]);
          apart -= mine != other;
          parent_[std::max(mine, other)] = std::min(mine, other);
        }
    return apart <= 1;
  }

  // --- the system on the small side ---

  // The scaled complement in place of the product, the null space filled in, and its right-hand
  // side without what lies in the null space.
  void form_complement() {
    fill(component_, components_ + 1, Component());
    for (int64_t i = 0; i < to_.small; ++i) {
      Component& own = component_[of_small_[i]];
      own.mass += small_[i];
      own.excess += small_rhs()[i] - of_rhs_[i];
    }
    component_[components_] = Component();
    for (int64_t c = 0; c < components_; ++c)
      component_[c].excess *= reciprocal_or_zero(component_[c].mass);
    for (int64_t i = 0; i < to_.small; ++i)
      rhs_[i] =
          per_root_[i] * (small_rhs()[i] - of_rhs_[i]) - root_[i] * component_[of_small_[i]].excess;
    fill(rhs_ + to_.small, to_.padded - to_.small, 0.0);
    for (int64_t i = 0; i < to_.padded; ++i) {
      const double shared = root_[i] * reciprocal_or_zero(component_[of_small_[i]].mass);
      const double minus_scale = -per_root_[i];
      const Int64V number = Int64V{} + of_small_[i];
      for (int64_t j = i / kPanel * kPanel; j < to_.padded; j += kDoubles) {
        double* entry = product_ + in_panels(i, j, to_.padded);
        const V same = select(load<Int64V>(of_small_ + j) == number, load<V>(root_ + j), V{});
        store(entry, shared * same + (minus_scale * load<V>(per_root_ + j)) * load<V>(entry));
      }
      product_[in_panels(i, i, to_.padded)] += 1 + kRidge;
    }
    if (!to_.wide)
      for (int64_t c = 0; c < components_; ++c) component_[c].excess *= -1;
  }

  void find_means() {
    const double* gamma = this->gamma();
    for (int64_t i = 0; i < to_.small; ++i) {
      Component& own = component_[of_small_[i]];
      const double share = small_[i] * x_[i];
      own.mean_lam += to_.wide ? share : of_rhs_[i] - share;
      if (!to_.wide) own.mean_gamma += small_[i] * finite_or_zero(gamma[i]);
    }
    for (int64_t j = 0; to_.wide && j < to_.large; ++j)
      component_[of_large_[j]].mean_gamma += large_[j] * finite_or_zero(gamma[j]);
    component_[components_] = Component();
    double mass = 0, weighted = 0;
    whole_excess_ = 0;
    for (int64_t c = 0; c < components_; ++c) {
      Component& own = component_[c];
      weighted += own.mean_gamma;
      mass += own.mass;
      whole_excess_ += own.mass * own.excess;
      own.mean_lam *= reciprocal_or_zero(own.mass);
      own.mean_gamma *= reciprocal_or_zero(own.mass);
    }
    shift_ = weighted * reciprocal_or_zero(mass);
    whole_excess_ *= reciprocal_or_zero(mass);
  }

  // --- results ---

  double to_a(double lam, const Component& own) const {
    return systems_.epsilon[problem_] * (lam - own.mean_lam);
  }
  // With what the gauge <b, g> = 0 adds: through the mean of each component, and of the whole.
  double to_b(double mu, double gamma, const Component& own) const {
    return systems_.epsilon[problem_] *
           (mu + own.mean_lam + own.excess * (finite_or_zero(gamma) - own.mean_gamma) +
            whole_excess_ * (own.mean_gamma - shift_));
  }

  void write_row(int64_t i, double lam, double sum, const Component& own) const {
    const int64_t at = problem_ * systems_.rows + i;
    systems_.lam[at] = lam;
    systems_.grad_a[at] = sum > 0 ? to_a(lam, own) : 0.0;
  }
  void write_column(int64_t j, double mu, double sum, const Component& own) const {
    const int64_t at = problem_ * systems_.columns + j;
    systems_.mu[at] = mu;
    systems_.grad_b[at] = sum > 0 ? to_b(mu, gamma()[j], own) : 0.0;
  }

  void write_small() const {
    for (int64_t i = 0; i < to_.small; ++i) {
      const Component& own = component_[of_small_[i]];
      to_.wide ? write_row(i, x_[i], small_[i], own) : write_column(i, x_[i], small_[i], own);
    }
  }

  void write_large(int64_t slot) {
    double* seen = weight_ + slot * kChunk;
    for_chunks(slot, [&](int64_t first, int64_t count) {
      to_.wide ? apply_wide(first, count, seen) : apply_tall(first, count, seen);
      for (int64_t k = 0; k < count; ++k) {
        const int64_t j = first + k;
        const double sum = large_[j], own = reciprocal_or_zero(sum) * (large_rhs()[j] - seen[k]);
        const Component& shared = component_[of_large_[j]];
        to_.wide ? write_column(j, own + shared.excess, sum, shared)
                 : write_row(j, own, sum, shared);
      }
    });
  }

  // What lines of the large side see of x_.
  void apply_wide(int64_t first, int64_t count, double* __restrict seen) const {
    fill(seen, kChunk, 0.0);
    int64_t i = 0;
    for (; i + 4 <= to_.small; i += 4) {
      const double *row = plan_ + i * to_.large + first, *x = x_ + i;
      const double x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3];
      for (int64_t k = 0; k < count; ++k)
        seen[k] += (x0 * row[k] + x1 * row[to_.large + k]) +
                   (x2 * row[2 * to_.large + k] + x3 * row[3 * to_.large + k]);
    }
    for (; i < to_.small; ++i)
      for (int64_t k = 0; k < count; ++k) seen[k] += x_[i] * plan_[i * to_.large + first + k];
  }
  void apply_tall(int64_t first, int64_t count, double* seen) const {
    for (int64_t k = 0; k < count; k += kDoubles) {
      V sums[kDoubles] = {};
      for (int r = 0; r < kDoubles && k + r < count; ++r) {
        const double* row = plan_ + (first + k + r) * to_.small;
        for (int64_t i = 0; i < to_.small; i += kDoubles) {
          const int64_t left = to_.small - i;
          const V p = left >= kDoubles ? load<V>(row + i) : load_first(row + i, left);
          sums[r] += p * load<V>(x_ + i);
        }
      }
      store(seen + k, fold_rows<1, kDoubles>(sums));
    }
  }

  const Systems& systems_;
  Team team_;
  Layout to_;
  Arena arena_;
  double *chunk_, *per_root_large_, *weight_;  // [slots] of panels of [kChunk][small], [kChunk]
  double* product_;                            // [slots] of panels; the first becomes the factor
  double *small_, *of_rhs_;                    // [slots][padded]; the first become the whole
  int64_t* positive_;                          // entries > 0, as small_
  double* large_;
  double *root_, *per_root_, *rhs_, *x_, *per_diagonal_;  // [padded]
  int64_t *of_small_, *of_large_, *parent_, *number_;
  Component* component_;
  const double* plan_ = nullptr;
  int64_t problem_ = 0, components_ = 0;
  double shift_ = 0, whole_excess_ = 0;
};

void solve(const Systems& systems, int64_t begin, int64_t end, Team team) {
  FlushSubnormals flush;
  Solver solver(systems, team);
  for (int64_t problem = begin; problem < end; ++problem) solver.solve(problem);
}

}  // namespace SKETCHFAST_ISA

extern const Kernels SKETCHFAST_KERNELS_OF(SKETCHFAST_ISA) = {solve};

}  // namespace sinkhorn_schur_cpu
}  // namespace sketchfast

// --- torch -------------------------------------------------------------------------------------

#if defined(SKETCHFAST_ISA_baseline)

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../check.h"
#include "share.h"

namespace sketchfast {
namespace sinkhorn_schur_cpu {
namespace {

const Kernels& kernels(){SKETCHFAST_RETURN_KERNELS_OF_CHOSEN_ISA}

std::tuple<Tensor, Tensor, Tensor, Tensor> sinkhorn_schur(Tensor plan, Tensor row_rhs,
                                                          Tensor column_rhs, Tensor gamma,
                                                          Tensor epsilon) {
  check(plan.dim() == 3 && plan.size(1) >= 1 && plan.size(2) >= 1,
        "plan must have shape [N, K >= 1, E >= 1], got ", shape_of(plan));
  const int64_t count = plan.size(0), rows = plan.size(1), columns = plan.size(2);
  check_tensor("plan", plan, ScalarType::Double, {count, rows, columns});
  check_tensor("row_rhs", row_rhs, ScalarType::Double, {count, rows});
  check_tensor("column_rhs", column_rhs, ScalarType::Double, {count, columns});
  check_tensor("gamma", gamma, ScalarType::Double, {count, columns});
  check_tensor("epsilon", epsilon, ScalarType::Double, {count});
  const auto from = [](const Tensor& x) { return static_cast<const double*>(x.const_data_ptr()); };
  const auto to = [](Tensor& x) { return static_cast<double*>(x.mutable_data_ptr()); };
  const auto like = [](const Tensor& x) {
    return torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Double);
  };
  Tensor lam = like(row_rhs), mu = like(column_rhs), grad_a = like(row_rhs),
         grad_b = like(column_rhs);
  const Systems systems{
      count,       rows,          columns, from(plan), from(row_rhs), from(column_rhs),
      from(gamma), from(epsilon), to(lam), to(mu),     to(grad_a),    to(grad_b)};
  share_problems(count, rows * columns, [&](int64_t begin, int64_t end, const Team& team) {
    kernels().solve(systems, begin, end, team);
  });
  return {lam, mu, grad_a, grad_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sketchfast, CPU, library) {
  library.impl("sinkhorn_schur_native", TORCH_BOX(&sinkhorn_schur));
}

}  // namespace sinkhorn_schur_cpu
}  // namespace sketchfast

#endif  // SKETCHFAST_ISA_baseline
