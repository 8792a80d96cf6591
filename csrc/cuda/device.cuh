// What every CUDA kernel here is made of: arrays of run-time type, shared memory, warps. No torch
// types, so that tests/cuda_emulator compiles the kernels with a host compiler.
#pragma once

#include "../elementary.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#include <cooperative_groups.h>
#endif
#define SKETCHFAST_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "cuda_emulator.h"  // in tests/cuda_emulator
#endif

namespace sketchfast {
namespace device {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

SKETCHFAST_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- clusters of CTAs (sm_90 on; elsewhere a cluster is one CTA)

#if !defined(__CUDACC__)
inline void cluster_barrier() { emulator::cluster_barrier(); }
inline int cluster_rank() { return static_cast<int>(emulator::cluster_rank()); }
template <typename T>
T* in_shared_memory_of(T* mine, int rank) {
  return emulator::in_shared_memory_of(mine, static_cast<unsigned>(rank));
}
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ inline void cluster_barrier() { cooperative_groups::this_cluster().sync(); }
__device__ inline int cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
template <typename T>
__device__ inline T* in_shared_memory_of(T* mine, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
}
#else
__device__ inline void cluster_barrier() {}
__device__ inline int cluster_rank() { return 0; }
template <typename T>
__device__ inline T* in_shared_memory_of(T* mine, int) {
  return mine;
}
#endif

// --- arguments

enum class Dtype : int32_t { kFloat32, kFloat16, kBFloat16 };

// An array whose element type is known only at run time: a uniform branch beside each access costs
// less than nine instances of every kernel.
struct Input {
  const void* data;
  Dtype dtype;
};
struct Output {
  void* data;
  Dtype dtype;
};

// --- memory

// Hands out shared memory; the host runs it over null to learn the size.
struct Arena {
  unsigned char* base;
  size_t used;

  template <typename T>
  SKETCHFAST_HD T* take(int64_t count) {
    T* out = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (static_cast<size_t>(count) * sizeof(T) + 15) / 16 * 16;
    return out;
  }
};

__device__ inline float load(const Input& in, int64_t i) {
  if (in.dtype == Dtype::kFloat32) return static_cast<const float*>(in.data)[i];
  if (in.dtype == Dtype::kFloat16) return __half2float(static_cast<const __half*>(in.data)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(in.data)[i]);
}

__device__ inline void store(const Output& out, int64_t i, float value) {
  if (out.dtype == Dtype::kFloat32) {
    static_cast<float*>(out.data)[i] = value;
  } else if (out.dtype == Dtype::kFloat16) {
    static_cast<__half*>(out.data)[i] = __float2half_rn(value);
  } else {
    static_cast<__nv_bfloat16*>(out.data)[i] = __float2bfloat16_rn(value);
  }
}

// --- threads

__device__ inline int lane_index() { return threadIdx.x % kWarp; }
__device__ inline int warp_index() { return threadIdx.x / kWarp; }
__device__ inline int warp_count() { return blockDim.x / kWarp; }

__device__ inline float least_of_warp(float value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value = minimum(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  return value;
}

template <typename T>
__device__ inline T sum_of_warp(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
}

}  // namespace device
}  // namespace sketchfast
