// The dtype of a tensor as the CPU kernels know it.
#pragma once

#include "../check.h"
#include "elements.h"

namespace sketchfast {

inline Dtype dtype_of(const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    default:
      check(false, name, " must be of a floating dtype, got scalar type ", static_cast<int>(type));
  }
  return Dtype::float32;
}

}  // namespace sketchfast
