// Scalars of the mathematics headers: what they take of V where V is a number.
//
// A mathematics header (raster_math.h, sinkhorn_math.h, ...) is written once over `V`, a real
// number on the GPU and a vector of them on the CPU. It needs overloads of minimum, maximum,
// exponential and logarithm and a comparison that `select` takes: scalars here, CPU vectors in
// cpu/simd.h.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(SKETCHFAST_ISA)
#include "cpu/simd.h"  // first: overloads on vectors are not found by argument
#endif

#if defined(__CUDACC__)
#define SKETCHFAST_HD __host__ __device__ __forceinline__
#else
#define SKETCHFAST_HD inline
#endif

namespace sketchfast {
// Each instruction set's copy has a namespace of its own: merged by the linker, the widest could
// end up in the path of a machine that lacks it.
#if defined(SKETCHFAST_ISA)
inline namespace SKETCHFAST_ISA {
#endif

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

#if defined(SKETCHFAST_ISA)
}  // namespace SKETCHFAST_ISA
#endif
}  // namespace sketchfast
