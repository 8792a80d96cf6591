// Vectors of the instruction set this file is compiled for, through the compiler's vector
// extension: the same source serves AVX-512, AVX2, SSE2 and NEON. Nothing here may be shared
// between instruction sets, so all of it lives in the namespace of one, and no standard container
// is used.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define SKETCHFAST_INLINE inline __attribute__((always_inline))

namespace sketchfast {
inline namespace SKETCHFAST_ISA {

#if defined(SKETCHFAST_ISA_avx512)
constexpr int kVectorBytes = 64;
#elif defined(SKETCHFAST_ISA_avx2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Subnormal results cost a hundred cycles each and weigh nothing here. Inputs stay as they are:
// half precision is widened through subnormal numbers.
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  FlushSubnormals() : before_(__builtin_ia32_stmxcsr()) {
    __builtin_ia32_ldmxcsr(before_ | 0x8000);
  }
  ~FlushSubnormals() { __builtin_ia32_ldmxcsr(before_); }

 private:
  unsigned before_;
#else
  FlushSubnormals() {}
  ~FlushSubnormals() {}
#endif
};

typedef float FloatV __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int32V __attribute__((vector_size(kVectorBytes)));
typedef double DoubleV __attribute__((vector_size(kVectorBytes)));
typedef int64_t Int64V __attribute__((vector_size(kVectorBytes)));

template <typename real>
struct Simd;
template <>
struct Simd<float> {
  using V = FloatV;
  using I = Int32V;
  using Index = int32_t;
};
template <>
struct Simd<double> {
  using V = DoubleV;
  using I = Int64V;
  using Index = int64_t;
};
template <typename real>
constexpr int kLanes = kVectorBytes / sizeof(real);

template <typename V, typename T>
SKETCHFAST_INLINE V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}
template <typename V, typename T>
SKETCHFAST_INLINE void store(T* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

#define SKETCHFAST_VECTOR_FUNCTIONS(V, I)                                         \
  SKETCHFAST_INLINE V minimum(V a, V b) { return a < b ? a : b; }                 \
  SKETCHFAST_INLINE V maximum(V a, V b) { return a > b ? a : b; }                 \
  SKETCHFAST_INLINE V select(I condition, V a, V b) { return condition ? a : b; } \
  SKETCHFAST_INLINE I select(I condition, I a, I b) { return condition ? a : b; }
SKETCHFAST_VECTOR_FUNCTIONS(FloatV, Int32V)
SKETCHFAST_VECTOR_FUNCTIONS(DoubleV, Int64V)
#undef SKETCHFAST_VECTOR_FUNCTIONS

// Stores the first `count` lanes.
SKETCHFAST_INLINE void store_first(float* to, FloatV v, int64_t count) {
#if defined(SKETCHFAST_ISA_avx512)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), reinterpret_cast<__m512>(v));
#elif defined(SKETCHFAST_ISA_avx2)
  const Int32V lane = {0, 1, 2, 3, 4, 5, 6, 7};
  const Int32V stored = lane < static_cast<int32_t>(count);
  _mm256_maskstore_ps(to, reinterpret_cast<__m256i>(stored), reinterpret_cast<__m256>(v));
#else
  for (int64_t i = 0; i < count; ++i) to[i] = v[i];
#endif
}

SKETCHFAST_INLINE void store_first(double* to, DoubleV v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = v[i];
}

// The first `count` lanes, 0 in the others.
SKETCHFAST_INLINE DoubleV load_first(const double* from, int64_t count) {
#if defined(SKETCHFAST_ISA_avx512)
  return (DoubleV)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), from);
#elif defined(SKETCHFAST_ISA_avx2)
  const Int64V lane = {0, 1, 2, 3};
  return (DoubleV)_mm256_maskload_pd(from, reinterpret_cast<__m256i>(lane < count));
#else
  DoubleV v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = from[i];
  return v;
#endif
}

SKETCHFAST_INLINE FloatV load_first(const float* from, int64_t count) {
#if defined(SKETCHFAST_ISA_avx512)
  return (FloatV)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
#elif defined(SKETCHFAST_ISA_avx2)
  const Int32V lane = {0, 1, 2, 3, 4, 5, 6, 7};
  const Int32V loaded = lane < static_cast<int32_t>(count);
  return (FloatV)_mm256_maskload_ps(from, reinterpret_cast<__m256i>(loaded));
#else
  FloatV v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = from[i];
  return v;
#endif
}

// In double, halves added onto halves: the order is fixed and the chain of additions short.
template <typename V>
SKETCHFAST_INLINE double sum_of_lanes(V v) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  double sums[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) sums[i] = v[i];
#pragma GCC unroll 4
  for (int half = lanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

// Lane t is lane `from[t]` of a and b, one after the other.
template <int... from, typename V>
SKETCHFAST_INLINE V shuffle(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, from...);
#else
  typedef std::conditional_t<sizeof(a[0]) == 8, Int64V, Int32V> Index;
  return __builtin_shuffle(a, b, Index{from...});
#endif
}

// Lanes of two vectors to add: of every `block` lanes, the first of each pair of blocks (or the
// second), a's pairs and b's taking turns.
template <int block, bool second, typename V, int... t>
SKETCHFAST_INLINE V take_blocks(V a, V b, std::integer_sequence<int, t...>) {
  constexpr int lanes = sizeof...(t);
  return shuffle<((t / block) % 2 * lanes + ((t / block) / 2 * 2 + second) * block + t % block)...>(
      a, b);
}

template <int block, int lanes, typename V>
SKETCHFAST_INLINE V fold_rows(V* r) {
  if constexpr (block < lanes) {
    constexpr auto all = std::make_integer_sequence<int, lanes>();
#pragma GCC unroll 8
    for (int i = 0; i < lanes / (2 * block); ++i)
      r[i] = take_blocks<block, false>(r[2 * i], r[2 * i + 1], all) +
             take_blocks<block, true>(r[2 * i], r[2 * i + 1], all);
    return fold_rows<2 * block, lanes>(r);
  } else {
    return r[0];
  }
}

// Of two rows `block` apart in a block of 2 * block by 2 * block: the first (or second) row of its
// transpose by quarters.
template <int block, bool second, typename V, int... t>
SKETCHFAST_INLINE V swap_quarters(V a, V b, std::integer_sequence<int, t...>) {
  constexpr int lanes = sizeof...(t);
  return shuffle<(t & block ? lanes + t - (second ? 0 : block) : t + (second ? block : 0))...>(a,
                                                                                               b);
}

// Lane t of row r becomes lane r of row t, for as many rows as there are lanes.
template <int block = 1, typename V>
SKETCHFAST_INLINE void transpose(V* rows) {
  constexpr int lanes = sizeof(V) / sizeof(rows[0][0]);
  if constexpr (block < lanes) {
    constexpr auto all = std::make_integer_sequence<int, lanes>();
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) {
      if (r & block) continue;
      const V a = rows[r], b = rows[r + block];
      rows[r] = swap_quarters<block, false>(a, b, all);
      rows[r + block] = swap_quarters<block, true>(a, b, all);
    }
    transpose<2 * block>(rows);
  }
}

// e^x to 1 ulp or so. Cody and Waite's reduction to |r| <= ln(2)/2, then the series; x is clamped
// to where the result is a normal number.
SKETCHFAST_INLINE FloatV exponential(FloatV x) {
  x = minimum(maximum(x, FloatV{} - 87.33f), FloatV{} + 88.37f);
  const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const FloatV biased = x * 1.44269504088896341f + to_integer;
  const FloatV n = biased - to_integer;
  FloatV r = x - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723e-6f;
  FloatV series = FloatV{} + 1.0f / 5040;
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r * r + r + 1.0f;
  Int32V bits, integer;
  std::memcpy(&bits, &series, sizeof(bits));
  std::memcpy(&integer, &biased, sizeof(integer));
  bits += integer << 23;
  std::memcpy(&series, &bits, sizeof(bits));
  return series;
}

// log(x) for normal x > 0: x = 2^n m with m in [sqrt(1/2), sqrt(2)), log m = 2 artanh((m-1)/(m+1)).
SKETCHFAST_INLINE FloatV logarithm(FloatV x) {
  Int32V bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const Int32V exponent = (bits - 0x3f3504f3) >> 23;
  bits -= exponent << 23;
  FloatV m;
  std::memcpy(&m, &bits, sizeof(m));
  const FloatV n = __builtin_convertvector(exponent, FloatV);
  const FloatV t = (m - 1.0f) / (m + 1.0f), t2 = t * t;
  FloatV series = FloatV{} + 2.0f / 9;
  series = series * t2 + 2.0f / 7;
  series = series * t2 + 2.0f / 5;
  series = series * t2 + 2.0f / 3;
  return n * 0.693147180559945f + (t * 2.0f + t * t2 * series);
}

// float64 serves checks, not speed.
SKETCHFAST_INLINE DoubleV exponential(DoubleV x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
SKETCHFAST_INLINE DoubleV logarithm(DoubleV x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_log(x[i]);
  return x;
}

}  // namespace SKETCHFAST_ISA
}  // namespace sketchfast
