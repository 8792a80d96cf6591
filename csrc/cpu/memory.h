// Memory of the CPU kernels, apart for every instruction set.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "simd.h"

namespace sketchfast {
inline namespace SKETCHFAST_ISA {

// Not std::fill: an instance of it merged by the linker could be another instruction set's.
template <typename T>
SKETCHFAST_INLINE void fill(T* to, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// Memory of one solver, taken at once.
class Arena {
 public:
  explicit Arena(int64_t bytes)
      : data_(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Arena() { std::free(data_); }
  Arena(const Arena&) = delete;

  template <typename T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(data_ + used_);
    used_ += bytes_of<T>(count);
    return taken;
  }
  template <typename T>
  static int64_t bytes_of(int64_t count) {
    return (count * int64_t(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  char* data_;
  int64_t used_ = 0;
};

}  // namespace SKETCHFAST_ISA
}  // namespace sketchfast
