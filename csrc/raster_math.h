// The mathematics of stroke rasterization, for one pixel and one segment, on host and device.
//
// `V` is a real number on the GPU and a vector of them on the CPU, so that the CPU tests exercise
// the very expressions the GPU runs (elementary.h has what they are made of).
#pragma once

#include <cmath>
#include <cstdint>

#include "elementary.h"

namespace sketchfast {
#if defined(SKETCHFAST_ISA)
inline namespace SKETCHFAST_ISA {
#endif

namespace raster {

// Ink below the cutoff is dropped. An image may lose all under 2^-24, but the slopes of a long
// segment's many dim pixels add up, so the cutoff is lower; the loss, whose logarithm starts at
// 1e-7, must stay within 1e-6.
template <typename real>
constexpr double kImageCutoff = sizeof(real) == 8 ? 5.5e-17 : 2e-10;
template <typename real>
constexpr double kLossCutoff = sizeof(real) == 8 ? 5.5e-17 : 1e-13;
// A segment shorter than the root of this is a dot: the inverse of its squared length would
// overflow.
template <typename real>
constexpr double kDotLength2 = sizeof(real) == 8 ? 1e-290 : 1e-30;

// The distance in pixels past which ink = sigmoid(offset - sharpness * d2) is below `cutoff`;
// negative where ink never reaches it.
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

// Whether a..b meets the rectangle, and the segment to compute with: a..b itself, whose ends are
// exact, or, where an end lies so far off that float32 would lose the pixel grid, the part inside
// the rectangle. There a pixel sees the same nearest point as with the whole segment wherever that
// point is inside too. In double: coordinates up to 1e150 do not overflow.
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
  const double extent = maximum(maximum(::fabs(ax), ::fabs(ay)), maximum(::fabs(bx), ::fabs(by)));
  if (extent <= 4 * maximum(x1, y1)) {
    first = 0;
    last = 1;
  }
  const double cx = first > 0 ? ax + first * dx : ax, cy = first > 0 ? ay + first * dy : ay;
  const double ex = last < 1 ? ax + last * dx : bx, ey = last < 1 ? ay + last * dy : by;
  // Rounded first: the projection must be on the very direction that `gap_to` walks along.
  const double px = static_cast<real>(ex - cx), py = static_cast<real>(ey - cy);
  const double length2 = px * px + py * py;
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

// The part of a..b between the fractions first and last of its length.
template <typename real>
SKETCHFAST_HD void segment_part(double ax, double ay, double bx, double by, double first,
                                double last, Segment<real>* out) {
  const double dx = bx - ax, dy = by - ay;
  const double px = static_cast<real>((last - first) * dx);
  const double py = static_cast<real>((last - first) * dy);
  const double length2 = px * px + py * py;
  const double inverse = length2 > kDotLength2<real> ? 1 / length2 : 0;
  out->x = static_cast<real>(ax + first * dx);
  out->y = static_cast<real>(ay + first * dy);
  out->dx = static_cast<real>(inverse > 0 ? px : 0);
  out->dy = static_cast<real>(inverse > 0 ? py : 0);
  out->ux = static_cast<real>(px * inverse);
  out->uy = static_cast<real>(py * inverse);
  out->first = static_cast<real>(first);
  out->scale = static_cast<real>(last - first);
}

// The part of a..b where the nearest points of the rectangle's pixels lie: between the outermost
// projections of its corners. Distances from inside the rectangle stay exact, and no end is
// needlessly far off.
template <typename real>
SKETCHFAST_HD void trim(double ax, double ay, double bx, double by, double x0, double y0, double x1,
                        double y1, Segment<real>* out) {
  const double dx = bx - ax, dy = by - ay, length2 = dx * dx + dy * dy;
  double first = 0, last = 0;
  if (length2 > 0) {
    const double corner = ((x0 - ax) * dx + (y0 - ay) * dy) / length2;
    const double across = (x1 - x0) * dx / length2, down = (y1 - y0) * dy / length2;
    first = corner + minimum(across, 0.0) + minimum(down, 0.0);
    last = corner + maximum(across, 0.0) + maximum(down, 0.0);
    first = minimum(maximum(first, 0.0), 1.0);
    last = minimum(maximum(last, 0.0), 1.0);
  }
  segment_part(ax, ay, bx, by, first, last, out);
}

// From the nearest point of a segment to the pixel: the gap, and where along the segment the point
// lies.
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

// The gap with its part along the segment, which rounding left, taken out: the squared length does
// not feel it, but the gradient by the envelope theorem does, to first order.
template <typename V, typename real>
SKETCHFAST_HD Gap<V> refined(const Segment<real>& s, const Gap<V>& gap) {
  const V along = gap.x * s.ux + gap.y * s.uy;
  const auto inside = (gap.fraction > real(0)) & (gap.fraction < real(1));
  const V excess = select(inside, along, V{} + real(0));
  return {gap.x - excess * s.dx, gap.y - excess * s.dy, gap.fraction};
}

template <typename V>
SKETCHFAST_HD V squared_length(const Gap<V>& gap) {
  return gap.x * gap.x + gap.y * gap.y;
}

// ink = sigmoid(offset - sharpness * d2). The exponent is held where ink is far below every cutoff
// and yet no denormal: dividing into those takes a hundred times as long.
template <typename V, typename real>
SKETCHFAST_HD V ink_at(V distance2, real sharpness, real offset) {
  const V exponent = sharpness * distance2 - offset;
  const real most = sizeof(real) == 8 ? real(700) : real(40);
  return real(1) / (real(1) + exponential(minimum(exponent, V{} + most)));
}

// d loss / d d2 from d loss / d ink
template <typename V, typename real>
SKETCHFAST_HD V distance2_slope(V grad_ink, V ink, real sharpness) {
  return -sharpness * grad_ink * ink * (real(1) - ink);
}

// d loss / d (start x, start y, end x, end y) summed over a segment's pixels. The nearest point is
// (1 - u) start + u end, so by the envelope theorem d d2/d start = -2 (1-u) gap, d d2/d end = -2 u
// gap.
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

// Two-sided cross-entropy of one pixel, p clamped to [1e-7, 1 - 1e-7], and its slope in p (0 where
// the clamp holds). log(1 - p) gets back what rounding took from 1 - p, and 1 - p its own clamp:
// most pixels of a sketch have p near 0, and float32 would lose them.
template <typename V>
struct Loss {
  V value, slope;
};

template <typename V, typename real>
SKETCHFAST_HD Loss<V> cross_entropy(V p, V target) {
  const real least = real(1e-7), most = real(1) - least;
  const V safe_p = maximum(p, V{} + least);
  const V rounded = real(1) - safe_p, lost = (real(1) - rounded) - safe_p;
  const V paper = maximum(rounded, V{} + least);
  const V log_ink = logarithm(minimum(safe_p, V{} + most));
  const V log_paper = logarithm(paper) + lost / paper;
  const V value = -(target * log_ink + (real(1) - target) * log_paper);
  const V slope = (p - target) / (safe_p * paper);
  const V zero = V{} + real(0);
  return {value, select(p < least, zero, select(p > most, zero, slope))};
}

// The value of a pixel without ink where the target has none either: -log(1 - 1e-7).
constexpr double kBlankLoss = 1.00000005e-7;

}  // namespace raster
#if defined(SKETCHFAST_ISA)
}
#endif
}  // namespace sketchfast
