// The mathematics of stroke rasterization, for one pixel and one segment, on host and device.
//
// `V` is a real number on the GPU and a vector of them on the CPU, so that the CPU tests exercise the very
// expressions the GPU runs. Functions on V need overloads of minimum, maximum, exponential and logarithm
// and a comparison that `select` takes (scalars: below; CPU vectors: cpu/simd.h).
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SKETCHFAST_HD __host__ __device__ __forceinline__
#else
#define SKETCHFAST_HD inline
#endif

namespace sketchfast {

SKETCHFAST_HD float minimum(float a, float b) { return a < b ? a : b; }
SKETCHFAST_HD float maximum(float a, float b) { return a > b ? a : b; }
SKETCHFAST_HD double minimum(double a, double b) { return a < b ? a : b; }
SKETCHFAST_HD double maximum(double a, double b) { return a > b ? a : b; }
SKETCHFAST_HD float select(bool condition, float a, float b) { return condition ? a : b; }
SKETCHFAST_HD double select(bool condition, double a, double b) { return condition ? a : b; }
#if defined(__CUDA_ARCH__)
SKETCHFAST_HD float exponential(float x) { return expf(x); }
SKETCHFAST_HD float logarithm(float x) { return logf(x); }
#else
inline float exponential(float x) { return std::exp(x); }
inline float logarithm(float x) { return std::log(x); }
#endif
SKETCHFAST_HD double exponential(double x) { return ::exp(x); }
SKETCHFAST_HD double logarithm(double x) { return ::log(x); }

namespace raster {

// Ink below the cutoff is dropped: images may lose intensities under 2^-24 (2^-54 in float64), the loss,
// whose logarithm starts at 1e-7, must stay within 1e-6.
template <typename real>
constexpr double kImageCutoff = sizeof(real) == 8 ? 5.5e-17 : 5.9e-8;
template <typename real>
constexpr double kLossCutoff = sizeof(real) == 8 ? 5.5e-17 : 1e-13;
// A segment shorter than the root of this is a dot: the inverse of its squared length would overflow.
template <typename real>
constexpr double kDotLength2 = sizeof(real) == 8 ? 1e-290 : 1e-30;

// The distance in pixels past which ink = sigmoid(offset - sharpness * d2) is below `cutoff`; negative
// where ink never reaches it.
SKETCHFAST_HD double reach(double sharpness, double offset, double cutoff) {
  const double reach2 = (offset - ::log(cutoff / (1 - cutoff))) / sharpness;
  return reach2 > 0 ? ::sqrt(reach2) : -1.0;
}

// A segment as the inner loops read it.
template <typename real>
struct Segment {
  real x, y;    // start, in pixels
  real dx, dy;  // end - start
  real ux, uy;  // (dx, dy) / length^2; 0 for a dot
  real first;   // fraction along the whole segment = first + scale * fraction along this part
  real scale;
};

// The part of a..b inside the rectangle, or false. In double, so that ends far off the canvas cost no
// precision: a pixel inside sees the same nearest point as with the whole segment wherever that point is
// inside too. Coordinates up to 1e150 do not overflow.
template <typename real>
SKETCHFAST_HD bool clip(double ax, double ay, double bx, double by, double x0, double y0, double x1,
                        double y1, Segment<real>* out) {
  const double dx = bx - ax, dy = by - ay;
  double first = 0, last = 1;
  if (dx == 0) {
    if (ax < x0 || ax > x1) return false;
  } else {
    const double at0 = (x0 - ax) / dx, at1 = (x1 - ax) / dx;
    first = maximum(first, minimum(at0, at1));
    last = minimum(last, maximum(at0, at1));
  }
  if (dy == 0) {
    if (ay < y0 || ay > y1) return false;
  } else {
    const double at0 = (y0 - ay) / dy, at1 = (y1 - ay) / dy;
    first = maximum(first, minimum(at0, at1));
    last = minimum(last, maximum(at0, at1));
  }
  if (!(first <= last)) return false;
  const double cx = first > 0 ? ax + first * dx : ax, cy = first > 0 ? ay + first * dy : ay;
  const double ex = last < 1 ? ax + last * dx : bx, ey = last < 1 ? ay + last * dy : by;
  const double px = ex - cx, py = ey - cy, length2 = px * px + py * py;
  const double inverse = length2 > kDotLength2<real> ? 1 / length2 : 0;
  out->x = static_cast<real>(cx);
  out->y = static_cast<real>(cy);
  out->dx = static_cast<real>(inverse > 0 ? px : 0);
  out->dy = static_cast<real>(inverse > 0 ? py : 0);
  out->ux = static_cast<real>(px * inverse);
  out->uy = static_cast<real>(py * inverse);
  out->first = static_cast<real>(first);
  out->scale = static_cast<real>(last - first);
  return true;
}

// From the nearest point of a segment to the pixel: the gap, and where along the segment the point lies.
template <typename V>
struct Gap {
  V x, y, fraction;
};

// (from_x, from_y) is pixel - start.
template <typename V, typename real>
SKETCHFAST_HD Gap<V> gap_to(const Segment<real>& s, V from_x, V from_y) {
  const V along = from_x * s.ux + from_y * s.uy;
  const V fraction = minimum(maximum(along, V{} + real(0)), V{} + real(1));
  return {from_x - fraction * s.dx, from_y - fraction * s.dy, fraction};
}

template <typename V>
SKETCHFAST_HD V squared_length(const Gap<V>& gap) {
  return gap.x * gap.x + gap.y * gap.y;
}

// ink = sigmoid(offset - sharpness * d2)
template <typename V, typename real>
SKETCHFAST_HD V ink_at(V distance2, real sharpness, real offset) {
  return real(1) / (real(1) + exponential(sharpness * distance2 - offset));
}

// d loss / d d2 from d loss / d ink
template <typename V, typename real>
SKETCHFAST_HD V distance2_slope(V grad_ink, V ink, real sharpness) {
  return -sharpness * grad_ink * ink * (real(1) - ink);
}

// d loss / d (start x, start y, end x, end y) summed over a segment's pixels. The nearest point is
// (1 - u) start + u end, so by the envelope theorem d d2/d start = -2 (1-u) gap, d d2/d end = -2 u gap.
template <typename V>
struct SegmentGrad {
  V start_x, start_y, end_x, end_y;
};

template <typename V, typename real>
SKETCHFAST_HD void accumulate(SegmentGrad<V>* sum, const Segment<real>& s, const Gap<V>& gap,
                              V grad_distance2) {
  const V fraction = s.first + s.scale * gap.fraction;
  const V grad_x = real(-2) * grad_distance2 * gap.x, grad_y = real(-2) * grad_distance2 * gap.y;
  sum->end_x += fraction * grad_x;
  sum->end_y += fraction * grad_y;
  sum->start_x += grad_x - fraction * grad_x;
  sum->start_y += grad_y - fraction * grad_y;
}

// Two-sided cross-entropy of one pixel, p clamped to [1e-7, 1 - 1e-7], and its slope in p (0 where the
// clamp holds). 1 - p is clamped for itself: rounding 1 - 1e-7 to float would lose a sixth of it.
template <typename V>
struct Loss {
  V value, slope;
};

template <typename V, typename real>
SKETCHFAST_HD Loss<V> cross_entropy(V p, V target, real clamp = real(1e-7)) {
  const V paper = real(1) - p;
  const V p_safe = maximum(p, V{} + clamp), paper_safe = maximum(paper, V{} + clamp);
  const V value =
      -(target * logarithm(p_safe) + (real(1) - target) * logarithm(paper_safe));
  const V slope = (p - target) / (p_safe * paper_safe);
  const V zero = V{} + real(0);
  return {value, select(p < clamp, zero, select(paper < clamp, zero, slope))};
}

}  // namespace raster
}  // namespace sketchfast
