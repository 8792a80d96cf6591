// Tensor elements of the CPU kernels: a dtype known at run time, half precision by hand.
#pragma once

#include <cstdint>
#include <cstring>

namespace sketchfast {

enum class Dtype : int32_t { float16, bfloat16, float32, float64 };

inline namespace SKETCHFAST_ISA {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float widen_bfloat16(uint16_t bits) { return bits_to_float(uint32_t(bits) << 16); }
inline uint16_t narrow_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  if (value != value) return 0x7fc0;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// By hand: compilers before GCC 12 have no _Float16 on x86.
inline float widen_float16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = uint32_t(half & 0x7fff) << 13;
  if ((half & 0x7c00) == 0x7c00) return bits_to_float(sign | 0x7f800000 | magnitude);
  const float value = bits_to_float(magnitude) * bits_to_float(uint32_t(127 + 112) << 23);
  return bits_to_float(sign | float_to_bits(value));
}
inline uint16_t narrow_float16(float value) {
  const uint32_t bits = float_to_bits(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;   // NaN
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (magnitude < 0x38800000)  // below the normal numbers: adding 1/2 rounds to their spacing
    return sign | uint16_t(float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f));
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return sign | uint16_t((rounded - (uint32_t(112) << 23)) >> 13);
}

inline double element(const void* data, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::float16:
      return widen_float16(static_cast<const uint16_t*>(data)[i]);
    case Dtype::bfloat16:
      return widen_bfloat16(static_cast<const uint16_t*>(data)[i]);
    case Dtype::float32:
      return static_cast<const float*>(data)[i];
    default:
      return static_cast<const double*>(data)[i];
  }
}

template <typename real>
void store_elements(void* data, Dtype dtype, int64_t first, const real* from, int64_t count) {
  switch (dtype) {
    case Dtype::float16:
      for (int64_t i = 0; i < count; ++i)
        static_cast<uint16_t*>(data)[first + i] = narrow_float16(float(from[i]));
      break;
    case Dtype::bfloat16:
      for (int64_t i = 0; i < count; ++i)
        static_cast<uint16_t*>(data)[first + i] = narrow_bfloat16(float(from[i]));
      break;
    case Dtype::float32:
      if constexpr (sizeof(real) == 4) {
        std::memcpy(static_cast<float*>(data) + first, from, count * sizeof(float));
      } else {
        for (int64_t i = 0; i < count; ++i) static_cast<float*>(data)[first + i] = float(from[i]);
      }
      break;
    case Dtype::float64:
      for (int64_t i = 0; i < count; ++i) static_cast<double*>(data)[first + i] = from[i];
  }
}

template <typename real>
void load_elements(const void* data, Dtype dtype, int64_t first, real* to, int64_t count) {
  if (dtype == Dtype::float32 && sizeof(real) == 4) {
    std::memcpy(to, static_cast<const float*>(data) + first, count * sizeof(float));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = real(element(data, dtype, first + i));
  }
}

}  // namespace SKETCHFAST_ISA
}  // namespace sketchfast
