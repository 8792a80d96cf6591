// The mathematics of Sinkhorn's iterations in scaling form with log absorption, on host and device.
//
// With scaled potentials phi = f / epsilon, gamma = g / epsilon, the kernel matrix is held as
// K~ = exp(phi_i + gamma_j - C_ij / epsilon), and the plan is u_i K~_ij v_j: the iterations change
// u and v by multiplications alone. What is "absorbed" into phi and gamma is added as a logarithm.
// Entries of K~ too small for their type are flushed to 0; as long as the scales u, v stay within
// bounds, nothing that was flushed could have mattered. Where they do not, that half-step is taken
// in log form from the cost, the scales are absorbed, and K~ is formed again.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "elementary.h"

namespace sketchfast {
#if defined(SKETCHFAST_ISA)
inline namespace SKETCHFAST_ISA {
#endif
namespace sinkhorn {

// exp() of less is flushed to 0: it would not be a normal number.
template <typename real>
constexpr double kLeastExponent = sizeof(real) == 8 ? -707.0 : -87.0;
// A scale beyond this, or under its inverse, is absorbed.
template <typename real>
constexpr real kScaleLimit = real(1 << 20);
// A sum of scaled kernel entries below this may lack entries that were flushed. Those are below
// e^-87, scales below 2^20: 4096 of them weigh 2^-94, which is 2^-28 of this.
template <typename real>
constexpr real kLeastSum = real(1e-20);

// Whether scale = marginal / sum cannot be trusted: beyond the limits, or its sum too small.
// NaN passes for trusted, so that it shows in the result.
template <typename real, typename V>
SKETCHFAST_HD auto needs_log_form(V scale, V sum) {
  return (scale > kScaleLimit<real>) | (scale < 1 / kScaleLimit<real>) | (sum < kLeastSum<real>);
}

// log(marginal) as a scaled potential's constant: -inf where there is no mass.
SKETCHFAST_HD double log_mass(double marginal) {
  return marginal > 0 ? ::log(marginal) : -std::numeric_limits<double>::infinity();
}

// One scaled potential after its half-step in log form: log(marginal) - log_sum, where log_sum is
// -inf if nothing is live. Without mass, or without a live entry, -inf: such a line of the plan is
// empty.
SKETCHFAST_HD double log_half_step(double marginal, double log_sum) {
  const double minus_infinity = -std::numeric_limits<double>::infinity();
  return marginal > 0 && log_sum != minus_infinity ? ::log(marginal) - log_sum : minus_infinity;
}

// Mass that no entry can carry: the problem is infeasible.
SKETCHFAST_HD bool is_infeasible(double marginal, double potential) {
  return marginal > 0 && potential == -std::numeric_limits<double>::infinity();
}

// The unscaled potential a caller sees: epsilon * (scaled + shift); -inf without mass, +inf where
// mass finds no entry.
SKETCHFAST_HD double shown_potential(double scaled, double shift, double epsilon, double marginal) {
  if (scaled == -std::numeric_limits<double>::infinity())
    return marginal > 0 ? std::numeric_limits<double>::infinity() : scaled;
  return epsilon * (scaled + shift);
}

}  // namespace sinkhorn
#if defined(SKETCHFAST_ISA)
}  // namespace SKETCHFAST_ISA
#endif
}  // namespace sketchfast
