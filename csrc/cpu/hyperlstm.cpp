// The HyperLSTM between its matrix products on the CPU: one row of the batch at a time, everything
// of a step in the first cache (kernels/hyperlstm_loop.py says what each kernel is given).
//
// Passes over the units of a row: gates and their means; their second moments; activations and the
// new cell; its moments; the output. Backward forms the gates again the same way. Sums over rows,
// for the gradients of layer norm and bias, are kept apart for every thread.
#include "../hyperlstm_math.h"
#include "elements.h"
#include "isa.h"
#include "memory.h"

namespace sketchfast {
namespace hyperlstm_cpu {

// Rows of `width` elements; row (step, batch row) of part p begins at element
// step * step_stride + row * row_stride + p * part_stride. No data: not given.
struct Rows {
  void* data;
  Dtype dtype;
  int64_t step_stride, row_stride, part_stride;
};
// Everything in the arithmetic's dtype, [parts, width]; null without layer norm.
struct Norm {
  const void *weight, *bias, *cell_weight, *cell_bias;
};
struct Setting {
  int64_t batch, width, steps, first_step;
  const int64_t* lengths;  // null: every row takes every step
  bool drops;
  uint64_t seed;
  int64_t step_offset;
  double forget_bias, dropout;
  bool is_double;
  Norm norm;
};
struct HyperForward {
  Rows gates, x_part, cell, hidden, last, cells;
};
struct MainForward {
  Rows recurrent, x_part, scales, cell, out, hidden, cells;
  const void* bias;
};
struct MainBackward {
  Rows recurrent, x_part, scales, cell_before, cell_after, grad_out, grad_hidden, grad_cell;
  Rows grad_recurrent, grad_x_part, grad_scales;
  const void* bias;
};
struct HyperBackward {
  Rows gates, cell_before, cell_after, grad_hidden, grad_cell, grad_gates;
};

// What one instruction set offers; ranges are of batch rows. `partials` is a thread's own row.
struct Kernels {
  void (*hyper_fwd)(const Setting&, const HyperForward&, int64_t begin, int64_t end);
  void (*main_fwd)(const Setting&, const MainForward&, int64_t begin, int64_t end);
  void (*hyper_bwd)(const Setting&, const HyperBackward&, void* partials, int64_t begin,
                    int64_t end);
  void (*main_bwd)(const Setting&, const MainBackward&, void* partials, int64_t begin, int64_t end);
};

#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels;
#endif
extern const Kernels baseline_kernels;

inline namespace SKETCHFAST_ISA {

constexpr int kGates = 4;

// --- units of a row ---

// Calls body(unit, count) for vectors of units; only the last may hold fewer than all lanes.
template <typename real, typename Body>
SKETCHFAST_INLINE void over_units(int64_t width, Body body) {
  constexpr int lanes = kLanes<real>;
  int64_t unit = 0;
  for (; unit + lanes <= width; unit += lanes) body(unit, std::integral_constant<int, lanes>());
  if (unit < width) body(unit, int(width - unit));
}

template <typename real>
using VectorOf = typename Simd<real>::V;

template <typename real, typename Count>
SKETCHFAST_INLINE VectorOf<real> get(const real* from, Count count) {
  if constexpr (std::is_same_v<Count, int>) {
    VectorOf<real> v = {};
    std::memcpy(&v, from, count * sizeof(real));
    return v;
  } else {
    return load<VectorOf<real>>(from);
  }
}
template <typename real, typename Count>
SKETCHFAST_INLINE void put(real* to, VectorOf<real> v, Count count) {
  if constexpr (std::is_same_v<Count, int>) {
    std::memcpy(to, &v, count * sizeof(real));
  } else {
    store(to, v);
  }
}
// The lanes that hold a unit; the others 0.
template <typename real, typename Count>
SKETCHFAST_INLINE VectorOf<real> only(VectorOf<real> v, Count count) {
  if constexpr (std::is_same_v<Count, int>) {
    for (int i = count; i < kLanes<real>; ++i) v[i] = 0;
  }
  return v;
}

// A row's memory: a line of `width` for each name.
template <typename real>
class Scratch {
 public:
  Scratch(int64_t lines, int64_t width)
      : pitch_((width + 63) / 64 * 64), arena_(lines * pitch_ * int64_t(sizeof(real)) + 64) {
    data_ = arena_.template take<real>(lines * pitch_);
  }
  real* line(int64_t i) { return data_ + i * pitch_; }

 private:
  int64_t pitch_;
  Arena arena_;
  real* data_;
};

template <typename real>
constexpr Dtype kOwn = sizeof(real) == 8 ? Dtype::float64 : Dtype::float32;

template <typename real>
char* address(const Rows& rows, int64_t step, int64_t row, int64_t part) {
  const int64_t size = rows.dtype == Dtype::float64 ? 8 : rows.dtype == Dtype::float32 ? 4 : 2;
  return static_cast<char*>(rows.data) +
         (step * rows.step_stride + row * rows.row_stride + part * rows.part_stride) * size;
}

// A row's elements where they lie, or, of another dtype, widened into `line`.
template <typename real>
SKETCHFAST_INLINE const real* read(const Rows& rows, int64_t step, int64_t row, int64_t part,
                                   int64_t width, real* line) {
  const char* from = address<real>(rows, step, row, part);
  if (rows.dtype == kOwn<real>) return reinterpret_cast<const real*>(from);
  load_elements(from, rows.dtype, 0, line, width);
  return line;
}
// Where to write a row: in place, or into `line`, for `written` to narrow.
template <typename real>
SKETCHFAST_INLINE real* begin_row(const Rows& rows, int64_t step, int64_t row, int64_t part,
                                  real* line) {
  return rows.dtype == kOwn<real> ? reinterpret_cast<real*>(address<real>(rows, step, row, part))
                                  : line;
}
template <typename real>
SKETCHFAST_INLINE void written(const Rows& rows, int64_t step, int64_t row, int64_t part,
                               int64_t width, const real* line) {
  if (rows.dtype != kOwn<real>)
    store_elements(address<real>(rows, step, row, part), rows.dtype, 0, line, width);
}
template <typename real>
void write_zeros(const Rows& rows, int64_t step, int64_t row, int64_t parts, int64_t width) {
  const int64_t size = rows.dtype == Dtype::float64 ? 8 : rows.dtype == Dtype::float32 ? 4 : 2;
  for (int64_t part = 0; part < parts; ++part)
    std::memset(address<real>(rows, step, row, part), 0, width * size);
}

// What dropout leaves of each unit: 0 or 1 / (1 - p).
template <typename real>
void draw_mask(const Setting& s, uint32_t stream, int64_t step, int64_t row, real* kept) {
  constexpr int64_t kBlocks = 16;
  const uint64_t threshold = dropout_threshold(s.dropout);
  const real scale = real(1 / (1 - s.dropout));
  const int64_t first = row * s.width, last = first + s.width;
  for (int64_t block = first / 4; block * 4 < last; block += kBlocks) {
    real drawn[4 * kBlocks];
    for (int64_t i = 0; i < kBlocks; ++i) {
      const PhiloxWords words =
          philox(s.seed, uint32_t(step + s.step_offset), stream, uint32_t(block + i));
      for (int64_t w = 0; w < 4; ++w)
        drawn[4 * i + w] = words.word[w] >= threshold ? scale : real(0);
    }
    for (int64_t i = 0; i < 4 * kBlocks; ++i) {
      const int64_t element = block * 4 + i;
      if (element >= first && element < last) kept[element - first] = drawn[i];
    }
  }
}

struct Moments {
  double mean, inverse_deviation;
};

// Mean and biased variance of a row, the latter about the mean.
template <typename real>
Moments moments_of(const real* values, int64_t width, double sum) {
  using V = VectorOf<real>;
  const double mean = sum / double(width);
  V squares = {};
  over_units<real>(width, [&](int64_t u, auto count) {
    const V off = only<real>(get(values + u, count) - real(mean), count);
    squares += off * off;
  });
  return {mean, 1 / __builtin_sqrt(sum_of_lanes(squares) / double(width) + kLayerNormEps)};
}

template <typename real>
double sum_of(const real* values, int64_t width) {
  VectorOf<real> sum = {};
  over_units<real>(width, [&](int64_t u, auto count) { sum += get(values + u, count); });
  return sum_of_lanes(sum);
}

// --- a cell's step ---

// Pre-activations of a row, in lines of their own, and what layer norm needs of them.
template <typename real>
struct Gates {
  real* value[kGates];
  Moments moments[kGates];
};

template <typename real>
void find_moments(Gates<real>& gates, int64_t width) {
  for (int g = 0; g < kGates; ++g)
    gates.moments[g] = moments_of(gates.value[g], width, sum_of(gates.value[g], width));
}

template <typename real>
struct NormOf {
  const real *weight, *bias, *cell_weight, *cell_bias;
  explicit NormOf(const Norm& norm)
      : weight(static_cast<const real*>(norm.weight)),
        bias(static_cast<const real*>(norm.bias)),
        cell_weight(static_cast<const real*>(norm.cell_weight)),
        cell_bias(static_cast<const real*>(norm.cell_bias)) {}
};

// (x - mean) / deviation of gate g; x without layer norm.
template <typename real, typename Count>
SKETCHFAST_INLINE VectorOf<real> normed(const Gates<real>& gates, const NormOf<real>& norm, int g,
                                        int64_t u, Count count) {
  const VectorOf<real> x = get(gates.value[g] + u, count);
  if (!norm.weight) return x;
  return (x - real(gates.moments[g].mean)) * real(gates.moments[g].inverse_deviation);
}

template <typename real, typename Count>
SKETCHFAST_INLINE Activations<VectorOf<real>> activations_of(const Gates<real>& gates,
                                                             const NormOf<real>& norm,
                                                             int64_t width, real forget_bias,
                                                             int64_t u, Count count) {
  VectorOf<real> x[kGates];
#pragma GCC unroll 4
  for (int g = 0; g < kGates; ++g) {
    x[g] = normed(gates, norm, g, u, count);
    if (norm.weight)
      x[g] = x[g] * get(norm.weight + g * width + u, count) + get(norm.bias + g * width + u, count);
  }
  return activate(x[0], x[1], x[2], x[3], forget_bias);
}

// From the gates of a row: the cell in place, and h into `hidden`. `output` is a spare line.
template <typename real>
void step_cell(const Setting& s, const Gates<real>& gates, const NormOf<real>& norm,
               const real* kept, real* cell, real* hidden, real* output) {
  using V = VectorOf<real>;
  V sum = {};
  over_units<real>(s.width, [&](int64_t u, auto count) {
    const auto gate = activations_of(gates, norm, s.width, real(s.forget_bias), u, count);
    const V keep = kept ? get(kept + u, count) : V{} + real(1);
    const V after = next_cell(gate, get(cell + u, count), keep);
    put(cell + u, after, count);
    put(output + u, gate.output, count);
    sum += only<real>(after, count);
  });
  Moments m{0, 1};
  if (norm.cell_weight) m = moments_of(cell, s.width, sum_of_lanes(sum));
  over_units<real>(s.width, [&](int64_t u, auto count) {
    V x = (get(cell + u, count) - real(m.mean)) * real(m.inverse_deviation);
    if (norm.cell_weight) x = x * get(norm.cell_weight + u, count) + get(norm.cell_bias + u, count);
    put(hidden + u, hyperbolic_tangent(x) * get(output + u, count), count);
  });
}

// Sums for the gradients of the parameters between the products: of a few rows, of one call, and of
// the thread, so that none of them is long.
template <typename real>
class Partials {
 public:
  real *weight, *bias, *gate, *cell_weight, *cell_bias;  // gate: null where there is no bias

  Partials(bool has_gate, int64_t width) : count_((has_gate ? 14 : 10) * width), sums_(2, count_) {
    real* at = sums_.line(0);
    fill(at, count_, real(0));
    fill(sums_.line(1), count_, real(0));
    weight = at;
    bias = weight + kGates * width;
    gate = has_gate ? bias + kGates * width : nullptr;
    cell_weight = bias + (has_gate ? 2 : 1) * kGates * width;
    cell_bias = cell_weight + width;
  }
  // After each row.
  void end_row() {
    if (++rows_ < kRowsOfASum) return;
    rows_ = 0;
    add(sums_.line(1), sums_.line(0));
    fill(sums_.line(0), count_, real(0));
  }
  void add_to(void* partials) {
    add(sums_.line(1), sums_.line(0));
    add(static_cast<real*>(partials), sums_.line(1));
  }

 private:
  static constexpr int64_t kRowsOfASum = 16;
  int64_t count_, rows_ = 0;
  Scratch<real> sums_;

  void add(real* to, const real* from) {
    for (int64_t i = 0; i < count_; ++i) to[i] += from[i];
  }
};

// Gradients of the gates of a row into `grad` (kGates lines), of the cell in place. grad_hidden is
// the gradient of h; `work` is two spare lines.
template <typename real>
void step_cell_backward(const Setting& s, const Gates<real>& gates, const NormOf<real>& norm,
                        const real* kept, const real* before, const real* after,
                        const real* grad_hidden, real* grad_cell, real* const* grad,
                        const Partials<real>& sums, real* const* work) {
  using V = VectorOf<real>;
  const int64_t width = s.width;
  real *of_normed = work[0], *of_output = work[1];
  Moments m{0, 1};
  if (norm.cell_weight) m = moments_of(after, width, sum_of(after, width));
  V first = {}, second = {};
  over_units<real>(width, [&](int64_t u, auto count) {
    const auto gate = activations_of(gates, norm, width, real(s.forget_bias), u, count);
    const V x = (get(after + u, count) - real(m.mean)) * real(m.inverse_deviation);
    V scaled = x;
    if (norm.cell_weight)
      scaled = x * get(norm.cell_weight + u, count) + get(norm.cell_bias + u, count);
    const V shown = hyperbolic_tangent(scaled), of_hidden = get(grad_hidden + u, count);
    put(of_output + u, of_hidden * shown, count);
    V of_shown = of_hidden * gate.output * (1 - shown * shown);
    if (norm.cell_weight) {
      put(sums.cell_weight + u, get(sums.cell_weight + u, count) + of_shown * x, count);
      put(sums.cell_bias + u, get(sums.cell_bias + u, count) + of_shown, count);
      of_shown = of_shown * get(norm.cell_weight + u, count);
    }
    put(of_normed + u, of_shown, count);
    first += only<real>(of_shown, count);
    second += only<real>(of_shown * x, count);
  });
  const real mean_grad = norm.cell_weight ? real(sum_of_lanes(first) / double(width)) : real(0);
  const real mean_product = norm.cell_weight ? real(sum_of_lanes(second) / double(width)) : real(0);

  V gate_first[kGates] = {}, gate_second[kGates] = {};
  over_units<real>(width, [&](int64_t u, auto count) {
    const auto gate = activations_of(gates, norm, width, real(s.forget_bias), u, count);
    const V x = (get(after + u, count) - real(m.mean)) * real(m.inverse_deviation);
    const V of_cell = get(grad_cell + u, count) +
                      layer_norm_gradient(get(of_normed + u, count), x, V{} + mean_grad,
                                          V{} + mean_product, V{} + real(m.inverse_deviation));
    const V keep = kept ? get(kept + u, count) : V{} + real(1);
    const auto found =
        cell_gradient(gate, get(before + u, count), keep, of_cell, get(of_output + u, count));
    put(grad_cell + u, found.cell, count);
    V of_gate[kGates] = {found.i, found.j, found.f, found.o};
#pragma GCC unroll 4
    for (int g = 0; g < kGates; ++g) {
      if (norm.weight) {
        const int64_t at = g * width + u;
        const V y = normed(gates, norm, g, u, count);
        put(sums.weight + at, get(sums.weight + at, count) + of_gate[g] * y, count);
        put(sums.bias + at, get(sums.bias + at, count) + of_gate[g], count);
        of_gate[g] = of_gate[g] * get(norm.weight + at, count);
        gate_first[g] += only<real>(of_gate[g], count);
        gate_second[g] += only<real>(of_gate[g] * y, count);
      }
      put(grad[g] + u, of_gate[g], count);
    }
  });
  for (int g = 0; g < kGates; ++g) {
    real* of_gate = grad[g];
    if (norm.weight) {
      const real mean = real(sum_of_lanes(gate_first[g]) / double(width));
      const real product = real(sum_of_lanes(gate_second[g]) / double(width));
      const V inverse = V{} + real(gates.moments[g].inverse_deviation);
      over_units<real>(width, [&](int64_t u, auto count) {
        put(of_gate + u,
            layer_norm_gradient(get(of_gate + u, count), normed(gates, norm, g, u, count),
                                V{} + mean, V{} + product, inverse),
            count);
      });
    }
    if (sums.gate)
      over_units<real>(width, [&](int64_t u, auto count) {
        real* to = sums.gate + g * width + u;
        put(to, get(to, count) + get(of_gate + u, count), count);
      });
  }
}

SKETCHFAST_INLINE bool is_live(const Setting& s, int64_t step, int64_t row) {
  return !s.lengths || step < s.lengths[row];
}

// --- the four kernels ---

template <typename real>
void hyper_fwd_of(const Setting& s, const HyperForward& a, int64_t begin, int64_t end) {
  const NormOf<real> norm(s.norm);
  Scratch<real> lines(12, s.width);
  real *kept = s.drops ? lines.line(8) : nullptr, *output = lines.line(9);
  Gates<real> gates;
  for (int64_t row = begin; row < end; ++row) {
    real* cell = reinterpret_cast<real*>(address<real>(a.cell, 0, row, 0));
    for (int64_t t = 0; t < s.steps; ++t) {
      if (!is_live(s, s.first_step + t, row)) {
        write_zeros<real>(a.hidden, t, row, 1, s.width);
        if (a.cells.data) write_zeros<real>(a.cells, t, row, 1, s.width);
        if (a.x_part.data) write_zeros<real>(a.gates, t, row, kGates, s.width);
        continue;
      }
      for (int g = 0; g < kGates; ++g) {
        const real* recurrent = read(a.gates, t, row, g, s.width, lines.line(g));
        if (a.x_part.data) {
          // the sum as it is kept, rounded, is what this step goes on with
          const real* from_x = read(a.x_part, t, row, g, s.width, lines.line(4 + g));
          real* whole = begin_row(a.gates, t, row, g, lines.line(g));
          over_units<real>(s.width, [&](int64_t u, auto count) {
            put(whole + u, get(recurrent + u, count) + get(from_x + u, count), count);
          });
          written(a.gates, t, row, g, s.width, whole);
          recurrent = read(a.gates, t, row, g, s.width, lines.line(g));
        }
        gates.value[g] = const_cast<real*>(recurrent);
      }
      if (norm.weight) find_moments(gates, s.width);
      if (kept) draw_mask(s, kHyperStream, s.first_step + t, row, kept);
      real* hidden = begin_row(a.hidden, t, row, 0, lines.line(10));
      step_cell(s, gates, norm, kept, cell, hidden, output);
      written(a.hidden, t, row, 0, s.width, hidden);
      if (a.last.data)
        store_elements(address<real>(a.last, 0, row, 0), a.last.dtype, 0, hidden, s.width);
      if (a.cells.data)
        std::memcpy(address<real>(a.cells, t, row, 0), cell, s.width * sizeof(real));
    }
  }
}

// The main LSTM's pre-activations of a row into the lines of `gates`.
template <typename real, typename Arguments>
void main_gates(const Setting& s, const Arguments& a, int64_t t, int64_t row, Gates<real>& gates,
                Scratch<real>& lines, int64_t spare) {
  const real* bias = static_cast<const real*>(a.bias);
  const bool layer_norm = s.norm.weight != nullptr;
  for (int g = 0; g < kGates; ++g) {
    const int64_t width = s.width;
    const real* recurrent = read(a.recurrent, t, row, g, width, lines.line(spare));
    const real* from_x = read(a.x_part, t, row, g, width, lines.line(spare + 1));
    const real* of_x = read(a.scales, t, row, g, width, lines.line(spare + 2));
    const real* of_h = read(a.scales, t, row, 4 + g, width, lines.line(spare + 3));
    const real* beta = read(a.scales, t, row, 8 + g, width, lines.line(spare + 4));
    VectorOf<real> sum = {};
    over_units<real>(width, [&](int64_t u, auto count) {
      const auto value = get(of_x + u, count) * get(from_x + u, count) +
                         get(of_h + u, count) * get(recurrent + u, count) + get(beta + u, count) +
                         get(bias + g * width + u, count);
      put(gates.value[g] + u, value, count);
      sum += value;
    });
    if (layer_norm) gates.moments[g] = moments_of(gates.value[g], width, sum_of_lanes(sum));
  }
}

template <typename real>
void main_fwd_of(const Setting& s, const MainForward& a, int64_t begin, int64_t end) {
  const NormOf<real> norm(s.norm);
  Scratch<real> lines(12, s.width);
  real *kept = s.drops ? lines.line(9) : nullptr, *output = lines.line(10), *h = lines.line(11);
  Gates<real> gates;
  for (int g = 0; g < kGates; ++g) gates.value[g] = lines.line(g);
  for (int64_t row = begin; row < end; ++row) {
    real* cell = reinterpret_cast<real*>(address<real>(a.cell, 0, row, 0));
    for (int64_t t = 0; t < s.steps; ++t) {
      const bool live = is_live(s, s.first_step + t, row), is_last = t == s.steps - 1;
      if (live) {
        main_gates(s, a, t, row, gates, lines, 4);
        if (kept) draw_mask(s, kMainStream, s.first_step + t, row, kept);
        step_cell(s, gates, norm, kept, cell, h, output);
      } else {
        fill(h, s.width, real(0));
      }
      if (a.out.data) store_elements(address<real>(a.out, t, row, 0), a.out.dtype, 0, h, s.width);
      if (a.hidden.data && is_last)
        store_elements(address<real>(a.hidden, 0, row, 0), a.hidden.dtype, 0, h, s.width);
      if (!a.cells.data) continue;
      if (live)
        std::memcpy(address<real>(a.cells, t, row, 0), cell, s.width * sizeof(real));
      else
        write_zeros<real>(a.cells, t, row, 1, s.width);
    }
  }
}

template <typename real>
void hyper_bwd_of(const Setting& s, const HyperBackward& a, void* partials, int64_t begin,
                  int64_t end) {
  const NormOf<real> norm(s.norm);
  Scratch<real> lines(16, s.width);
  real *kept = s.drops ? lines.line(4) : nullptr, *work[2] = {lines.line(5), lines.line(6)};
  Partials<real> sums(false, s.width);
  Gates<real> gates;
  for (int64_t row = begin; row < end; ++row) {
    if (!is_live(s, s.first_step, row)) {
      write_zeros<real>(a.grad_gates, 0, row, kGates, s.width);
      continue;
    }
    real* grad[kGates];
    for (int g = 0; g < kGates; ++g) {
      gates.value[g] = const_cast<real*>(read(a.gates, 0, row, g, s.width, lines.line(g)));
      grad[g] = begin_row(a.grad_gates, 0, row, g, lines.line(8 + g));
    }
    if (norm.weight) find_moments(gates, s.width);
    if (kept) draw_mask(s, kHyperStream, s.first_step, row, kept);
    const real* grad_hidden = read(a.grad_hidden, 0, row, 0, s.width, lines.line(7));
    step_cell_backward(s, gates, norm, kept,
                       reinterpret_cast<const real*>(address<real>(a.cell_before, 0, row, 0)),
                       reinterpret_cast<const real*>(address<real>(a.cell_after, 0, row, 0)),
                       grad_hidden, reinterpret_cast<real*>(address<real>(a.grad_cell, 0, row, 0)),
                       grad, sums, work);
    for (int g = 0; g < kGates; ++g) written(a.grad_gates, 0, row, g, s.width, grad[g]);
    write_zeros<real>(a.grad_hidden, 0, row, 1, s.width);
    sums.end_row();
  }
  sums.add_to(partials);
}

template <typename real>
void main_bwd_of(const Setting& s, const MainBackward& a, void* partials, int64_t begin,
                 int64_t end) {
  const NormOf<real> norm(s.norm);
  const int64_t width = s.width;
  Scratch<real> lines(26, width);
  real *kept = s.drops ? lines.line(8) : nullptr, *work[2] = {lines.line(9), lines.line(10)};
  Partials<real> sums(true, width);
  Gates<real> gates;
  real* grad[kGates];
  for (int g = 0; g < kGates; ++g) gates.value[g] = lines.line(g), grad[g] = lines.line(4 + g);
  for (int64_t row = begin; row < end; ++row) {
    if (!is_live(s, s.first_step, row)) {
      write_zeros<real>(a.grad_recurrent, 0, row, kGates, width);
      write_zeros<real>(a.grad_x_part, 0, row, kGates, width);
      write_zeros<real>(a.grad_scales, 0, row, 3 * kGates, width);
      continue;
    }
    main_gates(s, a, 0, row, gates, lines, 16);
    if (kept) draw_mask(s, kMainStream, s.first_step, row, kept);
    const real* grad_hidden = read(a.grad_hidden, 0, row, 0, width, lines.line(11));
    if (a.grad_out.data) {
      const real* grad_out = read(a.grad_out, 0, row, 0, width, lines.line(12));
      real* both = lines.line(13);
      over_units<real>(width, [&](int64_t u, auto count) {
        put(both + u, get(grad_hidden + u, count) + get(grad_out + u, count), count);
      });
      grad_hidden = both;
    }
    step_cell_backward(s, gates, norm, kept,
                       reinterpret_cast<const real*>(address<real>(a.cell_before, 0, row, 0)),
                       reinterpret_cast<const real*>(address<real>(a.cell_after, 0, row, 0)),
                       grad_hidden, reinterpret_cast<real*>(address<real>(a.grad_cell, 0, row, 0)),
                       grad, sums, work);
    write_zeros<real>(a.grad_hidden, 0, row, 1, width);
    for (int g = 0; g < kGates; ++g) {
      const real* recurrent = read(a.recurrent, 0, row, g, width, lines.line(16));
      const real* from_x = read(a.x_part, 0, row, g, width, lines.line(17));
      const real* of_x = read(a.scales, 0, row, g, width, lines.line(18));
      const real* of_h = read(a.scales, 0, row, 4 + g, width, lines.line(19));
      real* to_recurrent = begin_row(a.grad_recurrent, 0, row, g, lines.line(20));
      real* to_x = begin_row(a.grad_x_part, 0, row, g, lines.line(21));
      real* to_of_x = begin_row(a.grad_scales, 0, row, g, lines.line(22));
      real* to_of_h = begin_row(a.grad_scales, 0, row, 4 + g, lines.line(23));
      real* to_beta = begin_row(a.grad_scales, 0, row, 8 + g, lines.line(24));
      over_units<real>(width, [&](int64_t u, auto count) {
        const auto of_gate = get(grad[g] + u, count);
        put(to_recurrent + u, of_gate * get(of_h + u, count), count);
        put(to_x + u, of_gate * get(of_x + u, count), count);
        put(to_of_x + u, of_gate * get(from_x + u, count), count);
        put(to_of_h + u, of_gate * get(recurrent + u, count), count);
        put(to_beta + u, of_gate, count);
      });
      written(a.grad_recurrent, 0, row, g, width, to_recurrent);
      written(a.grad_x_part, 0, row, g, width, to_x);
      written(a.grad_scales, 0, row, g, width, to_of_x);
      written(a.grad_scales, 0, row, 4 + g, width, to_of_h);
      written(a.grad_scales, 0, row, 8 + g, width, to_beta);
    }
    sums.end_row();
  }
  sums.add_to(partials);
}

template <typename Work>
void in_precision(const Setting& s, Work work) {
  FlushSubnormals flush;
  if (s.is_double)
    work(double{});
  else
    work(float{});
}

void hyper_fwd(const Setting& s, const HyperForward& a, int64_t begin, int64_t end) {
  in_precision(s, [&](auto real) { hyper_fwd_of<decltype(real)>(s, a, begin, end); });
}
void main_fwd(const Setting& s, const MainForward& a, int64_t begin, int64_t end) {
  in_precision(s, [&](auto real) { main_fwd_of<decltype(real)>(s, a, begin, end); });
}
void hyper_bwd(const Setting& s, const HyperBackward& a, void* partials, int64_t begin,
               int64_t end) {
  in_precision(s, [&](auto real) { hyper_bwd_of<decltype(real)>(s, a, partials, begin, end); });
}
void main_bwd(const Setting& s, const MainBackward& a, void* partials, int64_t begin, int64_t end) {
  in_precision(s, [&](auto real) { main_bwd_of<decltype(real)>(s, a, partials, begin, end); });
}

}  // namespace SKETCHFAST_ISA

extern const Kernels SKETCHFAST_KERNELS_OF(SKETCHFAST_ISA) = {hyper_fwd, main_fwd, hyper_bwd,
                                                              main_bwd};

}  // namespace hyperlstm_cpu
}  // namespace sketchfast

// --- torch -------------------------------------------------------------------------------------

#if defined(SKETCHFAST_ISA_baseline)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../check.h"
#include "dtype_of.h"

namespace sketchfast {
namespace hyperlstm_cpu {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kLeastUnits = 1 << 12;  // units of a step worth a thread of their own

const Kernels& kernels(){SKETCHFAST_RETURN_KERNELS_OF_CHOSEN_ISA}

// --- arguments ---

// [batch, parts * width], [steps, batch, parts * width] or, with `parts_first`, parts before them.
Rows rows_of(const char* name, const Tensor& tensor, const Setting& s, int64_t parts,
             bool has_steps, bool parts_first = false) {
  const int64_t lead = parts_first ? 1 : 0, dims = lead + (has_steps ? 1 : 0) + 2;
  bool fits = tensor.dim() == dims;
  if (fits && parts_first) fits = tensor.size(0) == parts;
  if (fits && has_steps) fits = tensor.size(lead) == s.steps;
  const int64_t columns = parts_first ? s.width : parts * s.width;
  fits = fits && tensor.size(dims - 2) == s.batch && tensor.size(dims - 1) == columns;
  check(fits, name, " must have ", s.batch, " rows of ", columns, ", got shape ", shape_of(tensor));
  check(tensor.stride(dims - 1) == 1 || columns <= 1, name,
        " must be contiguous in its last dimension");
  return {const_cast<void*>(tensor.const_data_ptr()), dtype_of(name, tensor.scalar_type()),
          has_steps ? tensor.stride(lead) : 0, tensor.stride(dims - 2),
          parts_first ? tensor.stride(0) : s.width};
}

Rows rows_of(const char* name, const OptionalTensor& tensor, const Setting& s, int64_t parts,
             bool has_steps) {
  if (!tensor) return {nullptr, Dtype::float32, 0, 0, 0};
  return rows_of(name, *tensor, s, parts, has_steps);
}

// A cell: of the dtype of the arithmetic.
Rows cell_of(const char* name, const Tensor& tensor, const Setting& s, bool has_steps) {
  const Rows rows = rows_of(name, tensor, s, 1, has_steps);
  check(rows.dtype == (s.is_double ? Dtype::float64 : Dtype::float32), name,
        " must be of the dtype of the arithmetic, got scalar type ",
        static_cast<int>(tensor.scalar_type()));
  return rows;
}
Rows cell_of(const char* name, const OptionalTensor& tensor, const Setting& s, bool has_steps) {
  if (!tensor) return {nullptr, Dtype::float32, 0, 0, 0};
  return cell_of(name, *tensor, s, has_steps);
}

const void* units_of(const char* name, const OptionalTensor& tensor, const Setting& s,
                     int64_t parts) {
  if (!tensor) return nullptr;
  const ScalarType type = s.is_double ? ScalarType::Double : ScalarType::Float;
  if (parts == 1)
    check_tensor(name, *tensor, type, {s.width});
  else
    check_tensor(name, *tensor, type, {parts, s.width});
  return tensor->const_data_ptr();
}

struct Given {
  const OptionalTensor &ln_weight, &ln_bias, &ln_c_weight, &ln_c_bias, &lengths, &seed;
  int64_t step, step_offset;
  double forget_bias, dropout;
};

Setting setting_of(const Tensor& cell, int64_t steps, const Given& given) {
  check(cell.dim() == 2 && cell.size(1) >= 1, "cell must have shape [B, units >= 1], got ",
        shape_of(cell));
  const ScalarType type = cell.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double,
        "cell must be float32 or float64, got scalar type ", static_cast<int>(type));
  Setting s{cell.size(0),
            cell.size(1),
            steps,
            given.step,
            nullptr,
            given.dropout > 0,
            0,
            given.step_offset,
            given.forget_bias,
            given.dropout,
            type == ScalarType::Double,
            {}};
  if (given.lengths) {
    check_tensor("lengths", *given.lengths, ScalarType::Long, {s.batch});
    s.lengths = static_cast<const int64_t*>(given.lengths->const_data_ptr());
  }
  if (s.drops) {
    check(given.dropout < 1, "dropout must be below 1, got ", given.dropout);
    check(given.seed.has_value(), "seed must be given where dropout is above 0");
    check_tensor("seed", *given.seed, ScalarType::Long, {});
    s.seed = uint64_t(*static_cast<const int64_t*>(given.seed->const_data_ptr()));
  }
  s.norm = {units_of("ln_weight", given.ln_weight, s, 4), units_of("ln_bias", given.ln_bias, s, 4),
            units_of("ln_c_weight", given.ln_c_weight, s, 1),
            units_of("ln_c_bias", given.ln_c_bias, s, 1)};
  check(!s.norm.weight == !s.norm.bias && !s.norm.cell_weight == !s.norm.cell_bias,
        "layer norm must have both weight and bias, or neither");
  return s;
}

template <typename Work>
void over_rows(const Setting& s, Work work) {
  const int64_t grain = std::max<int64_t>(1, kLeastUnits / std::max<int64_t>(1, s.width * s.steps));
  torch::stable::parallel_for(0, s.batch, grain, work);
}

// A thread to each row of `partials`, or fewer where there is little to do; work(member, begin,
// end).
template <typename Work>
void over_members(const Setting& s, const Tensor& partials, int64_t parts, Work work) {
  check(partials.dim() == 3 && partials.size(0) >= 1, "partials must have shape [slots >= 1, ",
        parts, ", ", s.width, "], got ", shape_of(partials));
  check_tensor("partials", partials, s.is_double ? ScalarType::Double : ScalarType::Float,
               {partials.size(0), parts, s.width});
  const int64_t worth = s.batch * s.width / kLeastUnits;
  const int64_t members = std::max<int64_t>(1, std::min({partials.size(0), worth, s.batch}));
  char* data = static_cast<char*>(const_cast<void*>(partials.const_data_ptr()));
  const int64_t bytes = parts * s.width * (s.is_double ? 8 : 4);
  torch::stable::parallel_for(0, members, 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      work(data + m * bytes, m * s.batch / members, (m + 1) * s.batch / members);
  });
}

int64_t steps_of(const char* name, const Tensor& tensor) {
  check(tensor.dim() == 3, name, " must have three dimensions, got shape ", shape_of(tensor));
  return tensor.size(0);
}

// --- the ops ---

void run_hyper_fwd(Tensor gates, OptionalTensor x_part, Tensor cell, Tensor hidden,
                   OptionalTensor last, OptionalTensor cells, OptionalTensor ln_weight,
                   OptionalTensor ln_bias, OptionalTensor ln_c_weight, OptionalTensor ln_c_bias,
                   OptionalTensor lengths, OptionalTensor seed, int64_t step, int64_t step_offset,
                   double forget_bias, double dropout) {
  const Setting s = setting_of(cell, steps_of("gates", gates),
                               {ln_weight, ln_bias, ln_c_weight, ln_c_bias, lengths, seed, step,
                                step_offset, forget_bias, dropout});
  const HyperForward a{rows_of("gates", gates, s, 4, true), rows_of("x_part", x_part, s, 4, true),
                       cell_of("cell", cell, s, false),     rows_of("hidden", hidden, s, 1, true),
                       rows_of("last", last, s, 1, false),  cell_of("cells", cells, s, true)};
  over_rows(s, [&](int64_t begin, int64_t end) { kernels().hyper_fwd(s, a, begin, end); });
}

void run_main_fwd(Tensor recurrent, Tensor x_part, Tensor scales, Tensor bias, Tensor cell,
                  OptionalTensor out, OptionalTensor hidden, OptionalTensor cells,
                  OptionalTensor ln_weight, OptionalTensor ln_bias, OptionalTensor ln_c_weight,
                  OptionalTensor ln_c_bias, OptionalTensor lengths, OptionalTensor seed,
                  int64_t step, int64_t step_offset, double forget_bias, double dropout) {
  const Setting s = setting_of(cell, steps_of("recurrent", recurrent),
                               {ln_weight, ln_bias, ln_c_weight, ln_c_bias, lengths, seed, step,
                                step_offset, forget_bias, dropout});
  const MainForward a{rows_of("recurrent", recurrent, s, 4, true),
                      rows_of("x_part", x_part, s, 4, true),
                      rows_of("scales", scales, s, 12, true, true),
                      cell_of("cell", cell, s, false),
                      rows_of("out", out, s, 1, true),
                      rows_of("hidden", hidden, s, 1, false),
                      cell_of("cells", cells, s, true),
                      units_of("bias", bias, s, 4)};
  over_rows(s, [&](int64_t begin, int64_t end) { kernels().main_fwd(s, a, begin, end); });
}

void run_main_bwd(Tensor recurrent, Tensor x_part, Tensor scales, Tensor bias, Tensor cell_before,
                  Tensor cell_after, OptionalTensor grad_out, Tensor grad_hidden, Tensor grad_cell,
                  Tensor grad_recurrent, Tensor grad_x_part, Tensor grad_scales, Tensor partials,
                  OptionalTensor ln_weight, OptionalTensor ln_bias, OptionalTensor ln_c_weight,
                  OptionalTensor ln_c_bias, OptionalTensor lengths, OptionalTensor seed,
                  int64_t step, int64_t step_offset, double forget_bias, double dropout) {
  const Setting s = setting_of(cell_before, 1,
                               {ln_weight, ln_bias, ln_c_weight, ln_c_bias, lengths, seed, step,
                                step_offset, forget_bias, dropout});
  const MainBackward a{rows_of("recurrent", recurrent, s, 4, false),
                       rows_of("x_part", x_part, s, 4, false),
                       rows_of("scales", scales, s, 12, false, true),
                       cell_of("cell_before", cell_before, s, false),
                       cell_of("cell_after", cell_after, s, false),
                       rows_of("grad_out", grad_out, s, 1, false),
                       rows_of("grad_hidden", grad_hidden, s, 1, false),
                       cell_of("grad_cell", grad_cell, s, false),
                       rows_of("grad_recurrent", grad_recurrent, s, 4, false),
                       rows_of("grad_x_part", grad_x_part, s, 4, false),
                       rows_of("grad_scales", grad_scales, s, 12, false, true),
                       units_of("bias", bias, s, 4)};
  over_members(s, partials, 14, [&](void* own, int64_t begin, int64_t end) {
    kernels().main_bwd(s, a, own, begin, end);
  });
}

void run_hyper_bwd(Tensor gates, Tensor cell_before, Tensor cell_after, Tensor grad_hidden,
                   Tensor grad_cell, Tensor grad_gates, Tensor partials, OptionalTensor ln_weight,
                   OptionalTensor ln_bias, OptionalTensor ln_c_weight, OptionalTensor ln_c_bias,
                   OptionalTensor lengths, OptionalTensor seed, int64_t step, int64_t step_offset,
                   double forget_bias, double dropout) {
  const Setting s = setting_of(cell_before, 1,
                               {ln_weight, ln_bias, ln_c_weight, ln_c_bias, lengths, seed, step,
                                step_offset, forget_bias, dropout});
  const HyperBackward a{
      rows_of("gates", gates, s, 4, false),        cell_of("cell_before", cell_before, s, false),
      cell_of("cell_after", cell_after, s, false), rows_of("grad_hidden", grad_hidden, s, 1, false),
      cell_of("grad_cell", grad_cell, s, false),   rows_of("grad_gates", grad_gates, s, 4, false)};
  over_members(s, partials, 10, [&](void* own, int64_t begin, int64_t end) {
    kernels().hyper_bwd(s, a, own, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sketchfast, CPU, library) {
  library.impl("hyperlstm_hyper_fwd_native", TORCH_BOX(&run_hyper_fwd));
  library.impl("hyperlstm_main_fwd_native", TORCH_BOX(&run_main_fwd));
  library.impl("hyperlstm_main_bwd_native", TORCH_BOX(&run_main_bwd));
  library.impl("hyperlstm_hyper_bwd_native", TORCH_BOX(&run_hyper_bwd));
}

}  // namespace hyperlstm_cpu
}  // namespace sketchfast

#endif  // SKETCHFAST_ISA_baseline
