// The CUDA kernels of the mixture density loss as torch ops: checks, memory and the stream. Schemas
// are those of sketchfast/ops/mixture.py; what runs is chosen in mixture_launch.h.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "context.h"
#include "mixture_launch.h"

namespace sketchfast {
namespace {

namespace kernels = mixture::cuda;
using device::check_device;
using device::Context;

// `tensor`, float32 of this shape, contiguous and on the device of `like`: its elements.
const float* floats(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape,
                    const Tensor& like) {
  check_tensor(name, tensor, ScalarType::Float, shape);
  check_device(name, tensor, like);
  return static_cast<const float*>(tensor.const_data_ptr());
}

float* new_floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

void check_head(const char* name, const Tensor& tensor) {
  check(tensor.dim() == 2 && tensor.size(1) >= 9 && (tensor.size(1) - 3) % 6 == 0, name,
        " must have shape [N, 3 + 6 M], got ", shape_of(tensor));
  check(tensor.is_cuda(), name, " must be a CUDA tensor");
  check(tensor.size(1) <= 0x3fffffff, name, " must have less than 2^30 columns, got ",
        tensor.size(1));
}

std::tuple<Tensor, Tensor, Tensor> mixture_fwd(const Tensor& output, const Tensor& target,
                                               bool with_rows) {
  check_head("output", output);
  const int64_t positions = output.size(0), width = output.size(1);
  check_tensor("output", output, output.scalar_type(), {positions, width});
  const float* wanted = floats("target", target, {positions, 5}, output);
  Context context(output);
  Tensor pen = torch::stable::new_empty(target, {}, ScalarType::Float);
  Tensor stroke = torch::stable::new_empty(target, {}, ScalarType::Float);
  Tensor rows =
      torch::stable::new_empty(target, {with_rows ? positions : 0, width}, ScalarType::Float);
  kernels::forward(context, device::input_of("output", output), wanted, positions,
                   static_cast<int>((width - 3) / 6), new_floats(pen), new_floats(stroke),
                   with_rows ? new_floats(rows) : nullptr);
  return {pen, stroke, rows};
}

Tensor mixture_bwd(const Tensor& grad_pen, const Tensor& grad_stroke, const Tensor& rows,
                   ScalarType dtype) {
  check_head("rows", rows);
  const int64_t positions = rows.size(0), width = rows.size(1);
  const float* values = floats("rows", rows, {positions, width}, rows);
  Context context(rows);
  Tensor grad = torch::stable::new_empty(rows, {positions, width}, dtype);
  kernels::backward(context, {values, floats("grad_pen", grad_pen, {}, rows),
                              floats("grad_stroke", grad_stroke, {}, rows),
                              device::output_of("dtype", grad), positions, width});
  return grad;
}

}  // namespace
}  // namespace sketchfast

STABLE_TORCH_LIBRARY_IMPL(sketchfast, CUDA, m) {
  m.impl("mixture_fwd_native", TORCH_BOX(&sketchfast::mixture_fwd));
  m.impl("mixture_bwd_native", TORCH_BOX(&sketchfast::mixture_bwd));
}
