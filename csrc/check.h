// Checks that guard memory. Arguments are validated in Python; these repeat only what a kernel's
// pointer arithmetic relies on, with the value in the message.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace sketchfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << "]";
  return text.str();
}

template <typename... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error("sketchfast: " + text.str());
}

// `tensor` is contiguous, of this dtype and shape.
inline void check_tensor(const char* name, const Tensor& tensor, ScalarType dtype,
                         std::initializer_list<int64_t> shape) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  if (fits) {
    int64_t i = 0;
    for (int64_t size : shape) fits = fits && tensor.size(i++) == size;
  }
  std::ostringstream wanted;
  for (int64_t size : shape) wanted << (wanted.tellp() > 0 ? ", " : "") << size;
  check(fits, name, " must have shape [", wanted.str(), "], got ", shape_of(tensor));
  check(tensor.is_contiguous(), name, " must be contiguous");
  check(tensor.scalar_type() == dtype, name, " must be of scalar type ", static_cast<int>(dtype),
        ", got ", static_cast<int>(tensor.scalar_type()));
}

}  // namespace sketchfast
