// What the mixture density loss computes of one bivariate Gaussian and of one pen state, on CPU and
// GPU alike (sketchfast/ops/mixture.py). Written over V, a number or a vector of components.
#pragma once

#include "elementary.h"

namespace sketchfast {
#if defined(SKETCHFAST_ISA)
inline namespace SKETCHFAST_ISA {
#endif

// As in kernels/reference/mixture.py.
constexpr float kLogSigmaLimit = 7, kCorrelationLimit = 5;
// log(4 pi): what `log_density` leaves out, the same for every component.
constexpr double kLogFourPi = 2.5310242469692907;

// NaN stays.
template <typename V>
SKETCHFAST_HD V clamped(V x, float limit) {
  const V high = V{} + limit;
  return select(x > high, high, select(x < -high, -high, x));
}
// `grad` through `clamped`; none at the limit itself.
template <typename V>
SKETCHFAST_HD V clamped_gradient(V x, float limit, V grad) {
  const V high = V{} + limit;
  return select((x > -high) & (x < high), grad, V{});
}

// e^x of x <= 0: a share of a sum that is at least 1. 0 where it would be next to nothing, so that
// a component infinitely far has no gradient.
template <typename V>
SKETCHFAST_HD V share(V x) {
  return select(x < V{} - 87.0f, V{}, exponential(x));
}

// log density of an offset under one Gaussian, less log(4 pi), and its gradient to the five numbers
// the head gives for it.
template <typename V>
struct Density {
  V log_density;
  V mean_x, mean_y, log_sigma_x, log_sigma_y, correlation;
};

// p(x) p(y | x). With e = exp(-2 |u|), u = atanh rho: rho = (1 - e) / (1 + e) with the sign of u
// and 1 - rho^2 = 4 e / (1 + e)^2, which does not cancel.
template <typename V>
SKETCHFAST_HD Density<V> density(V offset_x, V offset_y, V mean_x, V mean_y, V raw_sigma_x,
                                 V raw_sigma_y, V raw_correlation) {
  const V log_sigma_x = clamped(raw_sigma_x, kLogSigmaLimit);
  const V log_sigma_y = clamped(raw_sigma_y, kLogSigmaLimit);
  const V u = clamped(raw_correlation, kCorrelationLimit);
  const V scale_x = exponential(-log_sigma_x), scale_y = exponential(-log_sigma_y);
  const V magnitude = maximum(u, -u), decay = exponential(-2 * magnitude), sum = 1 + decay;
  const V tangent = (1 - decay) / sum;
  const V rho = select(u < V{}, -tangent, tangent);
  const V x = (offset_x - mean_x) * scale_x, y = (offset_y - mean_y) * scale_y;
  const V apart = y - rho * x, pull_y = apart * (sum * sum / (4 * decay)),
          pull_x = x - rho * pull_y;
  Density<V> out;
  out.log_density =
      magnitude + logarithm(sum) - log_sigma_x - log_sigma_y - (x * x + apart * pull_y) * 0.5f;
  out.mean_x = pull_x * scale_x;
  out.mean_y = pull_y * scale_y;
  out.log_sigma_x = clamped_gradient(raw_sigma_x, kLogSigmaLimit, pull_x * x - 1);
  out.log_sigma_y = clamped_gradient(raw_sigma_y, kLogSigmaLimit, pull_y * y - 1);
  out.correlation = clamped_gradient(raw_correlation, kCorrelationLimit, apart * pull_x + rho);
  return out;
}

// `factor` of a component's gradient; none where the factor is 0, be the gradient infinite.
template <typename V>
SKETCHFAST_HD V weighted(V factor, V grad) {
  return select(factor == V{}, V{}, factor * grad);
}

// The pen state asked for: of the three numbers the first that is greatest, NaN above all.
template <typename T>
SKETCHFAST_HD int pen_state(T down, T lifted, T ended) {
  const bool second = lifted > down || (lifted != lifted && down == down);
  const T first = second ? lifted : down;
  const bool third = ended > first || (ended != ended && first == first);
  return third ? 2 : second;
}

#if defined(SKETCHFAST_ISA)
}  // namespace SKETCHFAST_ISA
#endif
}  // namespace sketchfast
