// What the HyperLSTM's kernels compute of one unit, on CPU and GPU alike (HYPERLSTM.md). Written
// over V, a number or a vector of units.
#pragma once

#include "elementary.h"
#include "philox.h"

namespace sketchfast {
#if defined(SKETCHFAST_ISA)
inline namespace SKETCHFAST_ISA {
#endif

constexpr double kLayerNormEps = 1e-3;
// Streams of the dropout masks.
constexpr uint32_t kMainStream = 0, kHyperStream = 1;

// For divisors of 1 at least. A GPU's exact division is ten instructions, and a call for the rare
// divisor; these are two, and within two units in the last place.
template <typename V>
SKETCHFAST_HD V reciprocal(V x) {
  return 1 / x;
}
template <typename V>
SKETCHFAST_HD V quotient(V a, V b) {
  return a / b;
}
#if defined(__CUDA_ARCH__)
SKETCHFAST_HD float reciprocal(float x) { return __fdividef(1.0f, x); }
SKETCHFAST_HD float quotient(float a, float b) { return __fdividef(a, b); }
#endif

// NaN stays NaN: on CPU `exponential`, which clamps its argument, would make a number of it.
template <typename V>
SKETCHFAST_HD V logistic(V x) {
  return select(x == x, reciprocal(1 + exponential(-x)), x);
}

// The type of one of V's numbers.
template <typename V>
struct NumberOf {
  using type = V;
};
#if defined(SKETCHFAST_ISA)
template <>
struct NumberOf<FloatV> {
  using type = float;
};
template <>
struct NumberOf<DoubleV> {
  using type = double;
};
#endif

// Near 0, where 1 - e^-2x would lose digits, by its series; so too NaN, which stays NaN.
template <typename V>
SKETCHFAST_HD V hyperbolic_tangent(V x) {
  using real = typename NumberOf<V>::type;
  const V magnitude = maximum(x, -x), decay = exponential(-2 * magnitude);
  const V far = quotient(1 - decay, 1 + decay), x2 = x * x;
  V series = x2 * real(21844.0 / 6081075) - real(1382.0 / 155925);
  series = series * x2 + real(62.0 / 2835);
  series = series * x2 - real(17.0 / 315);
  series = series * x2 + real(2.0 / 15);
  series = series * x2 - real(1.0 / 3);
  return select(magnitude >= real(0.125), select(x < 0, -far, far), x + x * x2 * series);
}

// Gates before their activations are i, j, f, o; j is the new input. `kept` is what dropout leaves
// of tanh(j): 0 or 1 / (1 - p), and 1 without it.
template <typename V>
struct Activations {
  V input, update, forget, output;
};

template <typename V, typename real>
SKETCHFAST_HD Activations<V> activate(V i, V j, V f, V o, real forget_bias) {
  return {logistic(i), hyperbolic_tangent(j), logistic(f + forget_bias), logistic(o)};
}

// c' = c s(f + forget_bias) + s(i) drop(tanh(j))
template <typename V>
SKETCHFAST_HD V next_cell(const Activations<V>& gate, V cell, V kept) {
  return cell * gate.forget + gate.input * (gate.update * kept);
}

// Gradients of the gates before their activations, and of the cell before the step.
template <typename V>
struct CellGradient {
  V i, j, f, o, cell;
};

// From the gradient of c' (layer norm and tanh of it included) and that of s(o).
template <typename V>
SKETCHFAST_HD CellGradient<V> cell_gradient(const Activations<V>& gate, V cell, V kept, V grad_cell,
                                            V grad_output) {
  return {
      grad_cell * (gate.update * kept) * gate.input * (1 - gate.input),
      grad_cell * gate.input * kept * (1 - gate.update * gate.update),
      grad_cell * cell * gate.forget * (1 - gate.forget),
      grad_output * gate.output * (1 - gate.output),
      grad_cell * gate.forget,
  };
}

// Gradient through (x - mean) / deviation, `normed`, where `grad` is that of the normed value:
// mean_grad and mean_product are the means over the units of grad and of grad * normed.
template <typename V>
SKETCHFAST_HD V layer_norm_gradient(V grad, V normed, V mean_grad, V mean_product,
                                    V inverse_deviation) {
  return inverse_deviation * (grad - mean_grad - normed * mean_product);
}

// Dropout's element b * width + unit is word element % 4 of counter (step, stream, element / 4, 0),
// kept iff word / 2^32 >= p: iff it is at least this. (p below 1 by less than 2^-32 keeps nothing.)
inline uint64_t dropout_threshold(double p) { return uint64_t(::ceil(p * 4294967296.0)); }

#if defined(SKETCHFAST_ISA)
}  // namespace SKETCHFAST_ISA
#endif
}  // namespace sketchfast
