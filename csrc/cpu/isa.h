// Which instruction set a call runs on. Every kernel source is compiled once a set
// (CMakeLists.txt), its code in the namespace of that set; this picks one at run time.
#pragma once

#include <cstdlib>
#include <cstring>

namespace sketchfast {

enum class Isa { baseline, avx2, avx512 };

inline Isa widest_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

// SKETCHFAST_ISA=baseline|avx2 asks for a narrower one (the tests run each); never for a wider one.
inline Isa chosen_isa() {
  static const Isa isa = [] {
    const Isa widest = widest_isa();
    const char* asked = std::getenv("SKETCHFAST_ISA");
    if (asked && !std::strcmp(asked, "baseline")) return Isa::baseline;
    if (asked && !std::strcmp(asked, "avx2") && widest == Isa::avx512) return Isa::avx2;
    return widest;
  }();
  return isa;
}

}  // namespace sketchfast

// A kernel source defines `<isa>_kernels`, a table of its functions, once an instruction set.
#define SKETCHFAST_CONCATENATE(a, b) a##b
#define SKETCHFAST_KERNELS_OF(isa) SKETCHFAST_CONCATENATE(isa, _kernels)
#if defined(__x86_64__)
#define SKETCHFAST_RETURN_KERNELS_OF_CHOSEN_ISA \
  switch (chosen_isa()) {                       \
    case Isa::avx512:                           \
      return avx512_kernels;                    \
    case Isa::avx2:                             \
      return avx2_kernels;                      \
    default:                                    \
      return baseline_kernels;                  \
  }
#else
#define SKETCHFAST_RETURN_KERNELS_OF_CHOSEN_ISA return baseline_kernels;
#endif
