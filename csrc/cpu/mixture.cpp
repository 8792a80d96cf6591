// Mixture density loss on the CPU: positions in blocks of 64, lanes over the components of one
// position, and over the positions of a block for the pen states.
#include <limits>

#include "../mixture_math.h"
#include "elements.h"
#include "isa.h"
#include "memory.h"

namespace sketchfast {
namespace mixture_cpu {

constexpr int64_t kBlock = 64;  // positions whose losses are added up apart, whatever the threads

struct Problem {
  const void* output;  // [positions, 3 + 6 components] of `dtype`
  Dtype dtype;
  const void* target;  // [positions, 5] in the dtype of the arithmetic
  int64_t positions, components;
  bool is_double;
  void* rows;  // [positions, 3 + 6 components] in the dtype of the arithmetic, or null
};
struct Scaling {
  const void* rows;
  int64_t positions, width;
  bool is_double;
  double pen, stroke;
  void* grad;
  Dtype dtype;
};

// What one instruction set offers. `losses` [blocks, 2]: sums of pen and stroke over each block.
struct Kernels {
  void (*forward)(const Problem&, double* losses, int64_t begin_block, int64_t end_block);
  void (*backward)(const Scaling&, int64_t begin, int64_t end);
};
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels;
#endif
extern const Kernels baseline_kernels;

inline namespace SKETCHFAST_ISA {

// A padding position whose numbers are all smaller than this has a finite likelihood, which counts
// nothing: it is not computed.
constexpr float kModerate = 1e12f;

template <typename V>
double greatest_lane(V v) {
  double greatest = v[0];
  for (int i = 1; i < int(sizeof(V) / sizeof(v[0])); ++i)
    if (v[i] > greatest) greatest = v[i];
  return greatest;
}

template <typename I>
bool any_lane(I condition) {
  bool any = false;
  for (int i = 0; i < int(sizeof(I) / sizeof(condition[0])); ++i) any |= condition[i] != 0;
  return any;
}

// The components of one position after another: `row` points behind the pen logits.
template <typename real>
class Components {
 public:
  using V = typename Simd<real>::V;
  using I = typename Simd<real>::I;
  static constexpr int64_t lanes = kLanes<real>;

  explicit Components(int64_t count)
      : count_(count),
        padded_((count + lanes - 1) / lanes * lanes),
        arena_(8 * Arena::bytes_of<real>(padded_) + Arena::bytes_of<real>(3 + 6 * count)) {
    for (real*& part : parts_) part = arena_.template take<real>(padded_);
    row_ = arena_.template take<real>(3 + 6 * count);
    for (int64_t i = 0; i < lanes; ++i) lane_[i] = typename Simd<real>::Index(i);
  }

  // A position's numbers in the dtype of the arithmetic.
  const real* read(const Problem& from, int64_t position) {
    const int64_t width = 3 + 6 * count_;
    const bool as_it_is = from.dtype == (sizeof(real) == 4 ? Dtype::float32 : Dtype::float64);
    if (as_it_is) return static_cast<const real*>(from.output) + position * width;
    load_elements(from.output, from.dtype, position * width, row_, width);
    return row_;
  }

  // -live * log p(x, y); its gradient to `grad` where that is not null.
  double loss(const real* row, real x, real y, real live, real* grad) const {
    if (live == 0 && is_moderate(row, x, y)) {
      if (grad) fill(grad, 6 * count_, real(0));
      return 0;
    }
    V top = V{} - std::numeric_limits<real>::infinity();
    for (int64_t k = 0; k < count_; k += lanes) top = maximum(top, weights(row, k));
    const V most = V{} + real(greatest_lane(top));
    V best = V{} - std::numeric_limits<real>::infinity(), weight_sum = {};
    I broken = {};
    for (int64_t k = 0; k < count_; k += lanes) {
      const Density<V> d = density(V{} + x, V{} + y, part(row, 1, k), part(row, 2, k),
                                   part(row, 3, k), part(row, 4, k), part(row, 5, k));
      const V weight = weights(row, k) - most, prior = share(weight), log = weight + d.log_density;
      weight_sum += prior;
      broken |= log != log;
      best = maximum(best, log);
      store(parts_[0] + k, prior);
      store(parts_[1] + k, log);
      if (!grad) continue;
      store(parts_[2] + k, d.mean_x);
      store(parts_[3] + k, d.mean_y);
      store(parts_[4] + k, d.log_sigma_x);
      store(parts_[5] + k, d.log_sigma_y);
      store(parts_[6] + k, d.correlation);
    }
    const double greatest = greatest_lane(best);
    const double limit = std::numeric_limits<real>::max();
    if (any_lane(broken) || !(greatest >= -limit && greatest <= limit))
      return not_finite(live, greatest < -limit && !any_lane(broken), grad);
    V sum = {};
    for (int64_t k = 0; k < count_; k += lanes) {
      const V posterior = share(load<V>(parts_[1] + k) - real(greatest));
      sum += posterior;
      store(parts_[1] + k, posterior);
    }
    const double total = sum_of_lanes(sum), total_weight = sum_of_lanes(weight_sum);
    if (grad) write_gradient(real(-live / total), real(live / total_weight), grad);
    return -double(live) * (greatest + double(logarithm(real(total / total_weight))) - kLogFourPi);
  }

 private:
  V part(const real* row, int which, int64_t k) const {
    const real* from = row + which * count_ + k;
    return k + lanes <= count_ ? load<V>(from) : load_first(from, count_ - k);
  }
  // Lanes past the end weigh nothing.
  V weights(const real* row, int64_t k) const {
    if (k + lanes <= count_) return load<V>(row + k);
    const V least = V{} - std::numeric_limits<real>::infinity();
    return select(lane_ < typename Simd<real>::Index(count_ - k), part(row, 0, k), least);
  }

  bool is_moderate(const real* row, real x, real y) const {
    const V limit = V{} + kModerate;
    I large = {};
    const auto look = [&](V v) { large |= ~((v < limit) & (v > -limit)); };
    look(V{} + x);
    look(V{} + y);
    const int64_t size = 6 * count_;
    for (int64_t i = 0; i < size; i += lanes)
      look(i + lanes <= size ? load<V>(row + i) : load_first(row + i, size - i));
    return !any_lane(large);
  }

  // All components infinitely far, or not a number.
  double not_finite(real live, bool far, real* grad) const {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    if (grad) fill(grad, 6 * count_, real(nan));
    return far ? live * std::numeric_limits<double>::infinity() : nan;
  }

  void write_gradient(real posterior_scale, real prior_scale, real* grad) const {
    for (int64_t k = 0; k < count_; k += lanes) {
      const V factor = load<V>(parts_[1] + k) * posterior_scale;
      put(grad, 0, k, factor + load<V>(parts_[0] + k) * prior_scale);
      for (int i = 1; i < 6; ++i) put(grad, i, k, weighted(factor, load<V>(parts_[i + 1] + k)));
    }
  }
  void put(real* grad, int which, int64_t k, V value) const {
    real* to = grad + which * count_ + k;
    if (k + lanes <= count_) return store(to, value);
    store_first(to, value, count_ - k);
  }

  int64_t count_, padded_;
  Arena arena_;
  real* parts_[7];  // prior, log density or posterior, gradients to the five numbers
  real* row_;
  I lane_ = {};
};

// Cross-entropies of a block's pen states, lanes over its positions.
template <typename real>
class Pens {
 public:
  using V = typename Simd<real>::V;

  void read(int64_t i, const real* row, const real* target) {
    for (int s = 0; s < 3; ++s) logits_[s][i] = row[s];
    state_[i] = pen_state(target[2], target[3], target[4]);
  }

  // Of the first `count`: the sum of the losses; gradients take the place of the logits.
  double loss(int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes<real>) {
      V x[3], sum = {}, poison = {};
      for (int s = 0; s < 3; ++s) x[s] = load<V>(logits_[s] + i);
      const V most = maximum(maximum(x[0], x[1]), x[2]);
      for (int s = 0; s < 3; ++s) {
        x[s] -= most;
        poison = select(x[s] == x[s], poison, x[s]);
        const V e = share(x[s]);
        sum += e;
        store(logits_[s] + i, e);
      }
      // A logit that is no number makes the whole position none.
      const V log_sum = logarithm(sum) + poison, inverse = 1 / sum + poison;
      for (int s = 0; s < 3; ++s) {
        store(loss_[s] + i, log_sum - x[s]);
        store(logits_[s] + i, load<V>(logits_[s] + i) * inverse);
      }
    }
    double total = 0;
    for (int64_t i = 0; i < count; ++i) {
      logits_[state_[i]][i] -= 1;
      total += loss_[state_[i]][i];
    }
    return total;
  }

  void write(int64_t i, real* row) const {
    for (int s = 0; s < 3; ++s) row[s] = logits_[s][i];
  }

 private:
  real logits_[3][kBlock] = {}, loss_[3][kBlock];
  int state_[kBlock];
};

template <typename real>
void forward_of(const Problem& from, double* losses, int64_t begin_block, int64_t end_block) {
  FlushSubnormals flush;
  Components<real> components(from.components);
  const int64_t width = 3 + 6 * from.components;
  for (int64_t block = begin_block; block < end_block; ++block) {
    const int64_t first = block * kBlock;
    const int64_t count = from.positions - first < kBlock ? from.positions - first : kBlock;
    real* rows = from.rows ? static_cast<real*>(from.rows) + first * width : nullptr;
    Pens<real> pens;
    double stroke = 0;
    for (int64_t i = 0; i < count; ++i) {
      const real* row = components.read(from, first + i);
      const real* target = static_cast<const real*>(from.target) + (first + i) * 5;
      pens.read(i, row, target);
      stroke += components.loss(row + 3, target[0], target[1], 1 - target[4],
                                rows ? rows + i * width + 3 : nullptr);
    }
    losses[2 * block] = pens.loss(count);
    losses[2 * block + 1] = stroke;
    if (rows)
      for (int64_t i = 0; i < count; ++i) pens.write(i, rows + i * width);
  }
}

void forward(const Problem& from, double* losses, int64_t begin_block, int64_t end_block) {
  if (from.is_double) return forward_of<double>(from, losses, begin_block, end_block);
  forward_of<float>(from, losses, begin_block, end_block);
}

template <typename real>
void backward_of(const Scaling& of, int64_t begin, int64_t end) {
  const real pen = real(of.pen), stroke = real(of.stroke);
  const bool as_it_is = of.dtype == (sizeof(real) == 4 ? Dtype::float32 : Dtype::float64);
  Arena arena(Arena::bytes_of<real>(of.width));
  real* scaled = arena.take<real>(of.width);
  for (int64_t position = begin; position < end; ++position) {
    const real* row = static_cast<const real*>(of.rows) + position * of.width;
    real* to = as_it_is ? static_cast<real*>(of.grad) + position * of.width : scaled;
    for (int64_t i = 0; i < 3; ++i) to[i] = row[i] * pen;
    for (int64_t i = 3; i < of.width; ++i) to[i] = row[i] * stroke;
    if (!as_it_is) store_elements(of.grad, of.dtype, position * of.width, scaled, of.width);
  }
}

void backward(const Scaling& of, int64_t begin, int64_t end) {
  if (of.is_double) return backward_of<double>(of, begin, end);
  backward_of<float>(of, begin, end);
}

}  // namespace SKETCHFAST_ISA

extern const Kernels SKETCHFAST_KERNELS_OF(SKETCHFAST_ISA);
const Kernels SKETCHFAST_KERNELS_OF(SKETCHFAST_ISA) = {forward, backward};

}  // namespace mixture_cpu
}  // namespace sketchfast

// --- torch ops, compiled once -------------------------------------------------------------------

#if defined(SKETCHFAST_ISA_baseline)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "../check.h"
#include "dtype_of.h"

namespace sketchfast {
namespace mixture_cpu {
namespace {

using torch::stable::new_empty;

constexpr int64_t kNumbersPerThread = 1 << 15;  // of a head's output, worth a thread of its own

const Kernels& kernels() { SKETCHFAST_RETURN_KERNELS_OF_CHOSEN_ISA }

template <typename Work>
void over_range(int64_t count, int64_t numbers_each, Work work) {
  const int64_t grain = std::max<int64_t>(1, kNumbersPerThread / numbers_each);
  torch::stable::parallel_for(0, count, grain, work);
}

ScalarType compute_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor scalar(const Tensor& like, double value) {
  Tensor out = new_empty(like, {}, like.scalar_type());
  store_elements(out.mutable_data_ptr(), dtype_of("target", like.scalar_type()), 0, &value, 1);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> mixture_fwd(const Tensor& output, const Tensor& target,
                                               bool with_rows) {
  check(output.dim() == 2 && output.size(1) >= 9 && (output.size(1) - 3) % 6 == 0,
        "output must have shape [N, 3 + 6 M], got ", shape_of(output));
  const int64_t positions = output.size(0), width = output.size(1);
  const Dtype dtype = dtype_of("output", output.scalar_type());
  const ScalarType type = compute_type(output.scalar_type());
  check_tensor("output", output, output.scalar_type(), {positions, width});
  check_tensor("target", target, type, {positions, 5});
  Tensor rows = new_empty(target, {with_rows ? positions : 0, width}, type);
  const int64_t blocks = (positions + kBlock - 1) / kBlock;
  Tensor sums = new_empty(target, {blocks, 2}, ScalarType::Double);
  const Problem problem{output.const_data_ptr(),
                        dtype,
                        target.const_data_ptr(),
                        positions,
                        (width - 3) / 6,
                        type == ScalarType::Double,
                        with_rows ? rows.mutable_data_ptr() : nullptr};
  double* losses = static_cast<double*>(sums.mutable_data_ptr());
  over_range(blocks, kBlock * width,
             [&](int64_t begin, int64_t end) { kernels().forward(problem, losses, begin, end); });
  double pen = 0, stroke = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    pen += losses[2 * block];
    stroke += losses[2 * block + 1];
  }
  const double count = double(std::max<int64_t>(1, positions));
  return {scalar(target, pen / count), scalar(target, stroke / count), rows};
}

double gradient(const char* name, const Tensor& grad, const Tensor& like) {
  check_tensor(name, grad, like.scalar_type(), {});
  return element(grad.const_data_ptr(), dtype_of(name, grad.scalar_type()), 0);
}

Tensor mixture_bwd(const Tensor& grad_pen, const Tensor& grad_stroke, const Tensor& rows,
                   ScalarType dtype) {
  check(rows.dim() == 2 && rows.size(1) >= 9, "rows must have shape [N, 3 + 6 M], got ",
        shape_of(rows));
  const int64_t positions = rows.size(0), width = rows.size(1);
  check_tensor("rows", rows, compute_type(rows.scalar_type()), {positions, width});
  Tensor grad = new_empty(rows, {positions, width}, dtype);
  const double count = double(std::max<int64_t>(1, positions));
  const Scaling scaling{rows.const_data_ptr(),
                        positions,
                        width,
                        rows.scalar_type() == ScalarType::Double,
                        gradient("grad_pen", grad_pen, rows) / count,
                        gradient("grad_stroke", grad_stroke, rows) / count,
                        grad.mutable_data_ptr(),
                        dtype_of("dtype", dtype)};
  over_range(positions, width,
             [&](int64_t begin, int64_t end) { kernels().backward(scaling, begin, end); });
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sketchfast, CPU, library) {
  library.impl("mixture_fwd_native", TORCH_BOX(&mixture_fwd));
  library.impl("mixture_bwd_native", TORCH_BOX(&mixture_bwd));
}

}  // namespace mixture_cpu
}  // namespace sketchfast

#endif  // SKETCHFAST_ISA_baseline
