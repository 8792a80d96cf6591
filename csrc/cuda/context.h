// Where the kernels of every op here run: the device, stream and scratch memory of a call, and its
// tensors as kernels take them. What is launched is chosen in the *_launch.h headers.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../check.h"
#include "device.cuh"

namespace sketchfast {
namespace device {

inline void check_cuda(cudaError_t error, const char* what) {
  check(error == cudaSuccess, what, " failed: ", cudaGetErrorString(error));
}

// The device and stream of a call's first tensor, and its scratch memory. torch's allocator gives
// the memory back to this stream only, so it may be released while the kernels still run.
class Context {
 public:
  explicit Context(const Tensor& like) : like_(like), guard_(like.get_device_index()) {
    const int device = like.get_device_index();
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    int limit = 0;
    check_cuda(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "cudaDeviceGetAttribute");
    shared_limit = static_cast<size_t>(limit);
    check_cuda(cudaDeviceGetAttribute(&major_, cudaDevAttrComputeCapabilityMajor, device),
               "cudaDeviceGetAttribute");
  }

  size_t shared_limit;

  void* scratch(size_t bytes) {
    buffers_.push_back(
        torch::stable::new_empty(like_, {static_cast<int64_t>(bytes)}, ScalarType::Byte));
    return buffers_.back().mutable_data_ptr();
  }

  template <typename Params>
  void launch(void (*kernel)(Params), int64_t blocks, int threads, size_t shared,
              const Params& params, int cluster = 1) {
    check(blocks <= 0x7fffffff, "too many blocks for one launch: ", blocks);
    allow(kernel, shared, cluster);
    if (cluster == 1) {
      kernel<<<static_cast<unsigned>(blocks), threads, shared, stream_>>>(params);
    } else {
      cudaLaunchAttribute attribute;
      const cudaLaunchConfig_t config = config_of(blocks, threads, shared, cluster, &attribute);
      check_cuda(cudaLaunchKernelEx(&config, kernel, params), "cudaLaunchKernelEx");
    }
    check_cuda(cudaGetLastError(), "a kernel launch");
  }

  // Whether a CTA of this kernel, or a cluster of them, finds room on the device at all. Asks the
  // driver and waits for nothing.
  template <typename Params>
  bool runs(void (*kernel)(Params), int threads, size_t shared, int cluster) const {
    if (shared > shared_limit) return false;
    if (cluster == 1) return true;
    if (major_ < 9) return false;
    allow(kernel, shared, cluster);
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = config_of(cluster, threads, shared, cluster, &attribute);
    int clusters = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error != cudaSuccess) cudaGetLastError();  // an answer, not a failure: forget it
    return error == cudaSuccess && clusters > 0;
  }

 private:
  template <typename Params>
  static void allow(void (*kernel)(Params), size_t shared, int cluster) {
    if (shared > 48 * 1024) {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared)),
                 "cudaFuncSetAttribute");
    }
    if (cluster > 8) {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
                 "cudaFuncSetAttribute");
    }
  }

  cudaLaunchConfig_t config_of(int64_t blocks, int threads, size_t shared, int cluster,
                               cudaLaunchAttribute* attribute) const {
    attribute->id = cudaLaunchAttributeClusterDimension;
    attribute->val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = static_cast<unsigned>(blocks);
    config.blockDim = static_cast<unsigned>(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream_;
    config.attrs = attribute;
    config.numAttrs = 1;
    return config;
  }

  const Tensor& like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int major_ = 0;
  std::vector<Tensor> buffers_;
};

// --- arguments

inline Dtype dtype_of(const char* name, ScalarType type) {
  if (type == ScalarType::Float) return Dtype::kFloat32;
  if (type == ScalarType::Half) return Dtype::kFloat16;
  check(type == ScalarType::BFloat16, name,
        " must be float32, float16 or bfloat16 on CUDA, got scalar type ", static_cast<int>(type));
  return Dtype::kBFloat16;
}

// Every tensor of a call is on the first one's device: a kernel would read another's memory.
inline void check_device(const char* name, const Tensor& tensor, const Tensor& like) {
  check(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
        " must be on CUDA device ", like.get_device_index());
}

inline Input input_of(const char* name, const Tensor& tensor) {
  return {tensor.const_data_ptr(), dtype_of(name, tensor.scalar_type())};
}

inline Output output_of(const char* name, const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), dtype_of(name, tensor.scalar_type())};
}

}  // namespace device
}  // namespace sketchfast
