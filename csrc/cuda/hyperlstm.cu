// The CUDA kernels of the HyperLSTM as torch ops: checks and the stream. Schemas are those of
// sketchfast/ops/hyperlstm.py, what the arguments are says sketchfast/kernels/hyperlstm_loop.py;
// what runs is chosen in hyperlstm_launch.h.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "context.h"
#include "hyperlstm_launch.h"

namespace sketchfast {
namespace {

namespace kernels = hyperlstm::cuda;
using device::check_device;
using device::Context;
using device::Dtype;
using kernels::AnyRows;
using kernels::Rows;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::initializer_list<int64_t>;

// --- arguments

// The stride of a dimension; of one element any will do.
int64_t stride_of(const Tensor& tensor, int64_t dimension) {
  return tensor.size(dimension) > 1 ? tensor.stride(dimension) : 0;
}

// `tensor` of this shape on the device of `like`, its last dimension contiguous.
void check_rows(const char* name, const Tensor& tensor, Shape shape, const Tensor& like) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (int64_t size : shape) fits = fits && tensor.size(i++) == size;
  std::string wanted;
  for (int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  check(fits, name, " must have shape [", wanted, "], got ", shape_of(tensor));
  const int64_t last = tensor.dim() - 1;
  check(tensor.size(last) <= 1 || tensor.stride(last) == 1, name,
        " must be contiguous in its last dimension");
  check_device(name, tensor, like);
}

// Strides of [S, B, W], or of [B, W]: no step then.
AnyRows any_rows(const char* name, const OptionalTensor& tensor, Shape shape, const Tensor& like) {
  if (!tensor.has_value()) return {nullptr, Dtype::kFloat32, 0, 0};
  check_rows(name, *tensor, shape, like);
  const int64_t dimensions = tensor->dim();
  return {const_cast<void*>(tensor->const_data_ptr()),
          device::dtype_of(name, tensor->scalar_type()),
          dimensions == 3 ? stride_of(*tensor, 0) : 0, stride_of(*tensor, dimensions - 2)};
}

template <typename T>
Rows<T> as(const AnyRows& rows) {
  return {static_cast<T*>(rows.data), rows.step, rows.row};
}

AnyRows rows_of(const char* name, const OptionalTensor& tensor, Dtype dtype, Shape shape,
                const Tensor& like) {
  const AnyRows rows = any_rows(name, tensor, shape, like);
  check(!rows.data || rows.dtype == dtype, name,
        " must be of the dtype of the products (cells: ", "float32), got scalar type ",
        tensor.has_value() ? int(tensor->scalar_type()) : -1);
  return rows;
}

// float32, contiguous: layer norm's parameters, bias and the sums over rows.
float* floats(const char* name, const OptionalTensor& tensor, Shape shape, const Tensor& like) {
  if (!tensor.has_value()) return nullptr;
  check_tensor(name, *tensor, ScalarType::Float, shape);
  check_device(name, *tensor, like);
  return static_cast<float*>(const_cast<void*>(tensor->const_data_ptr()));
}

const int64_t* integers(const char* name, const OptionalTensor& tensor, Shape shape,
                        const Tensor& like) {
  if (!tensor.has_value()) return nullptr;
  check_tensor(name, *tensor, ScalarType::Long, shape);
  check_device(name, *tensor, like);
  return static_cast<const int64_t*>(tensor->const_data_ptr());
}

// What every kernel is given last.
struct Given {
  const OptionalTensor &ln_weight, &ln_bias, &ln_c_weight, &ln_c_bias, &lengths, &seed;
  int64_t step, step_offset;
  double forget_bias, dropout;
};

// Of `steps` steps; `cell` [B, W] gives the sizes and the device.
kernels::Setting setting_of(const Tensor& cell, int64_t steps, const Given& given) {
  check(cell.is_cuda() && cell.dim() == 2, "the cell must be a CUDA tensor of shape [B, W], got ",
        shape_of(cell));
  const int64_t batch = cell.size(0), width = cell.size(1);
  check(width >= 1 && width <= 1 << 24, "a row must have 1 to 2^24 units, got ", width);
  check(batch <= 0x3fffffff && batch <= (int64_t{1} << 34) / width,
        "a batch must have less than 2^30 rows and 2^34 units, got ", batch, " x ", width);
  check(steps <= 0x7fffffff, "a call must have less than 2^31 steps, got ", steps);
  check(given.dropout >= 0 && given.dropout < 1, "dropout must lie in [0, 1), got ", given.dropout);
  check(given.dropout == 0 || given.seed.has_value(), "seed must be given with dropout");
  kernels::Setting setting{};
  setting.batch = static_cast<int>(batch);
  setting.width = static_cast<int>(width);
  setting.steps = static_cast<int>(steps);
  setting.share = 1.0f / static_cast<float>(width);
  setting.first = given.step;
  setting.counter = static_cast<uint32_t>(static_cast<uint64_t>(given.step) +
                                          static_cast<uint64_t>(given.step_offset));
  setting.lengths = integers("lengths", given.lengths, {batch}, cell);
  setting.norm = {floats("ln_weight", given.ln_weight, {4, width}, cell),
                  floats("ln_bias", given.ln_bias, {4, width}, cell),
                  floats("ln_c_weight", given.ln_c_weight, {width}, cell),
                  floats("ln_c_bias", given.ln_c_bias, {width}, cell)};
  check(!setting.norm.weight == !setting.norm.bias, "ln_weight and ln_bias go together");
  check(!setting.norm.cell_weight == !setting.norm.cell_bias,
        "ln_c_weight and ln_c_bias go together");
  setting.dropout = kernels::dropout_of(integers("seed", given.seed, {}, cell), given.dropout);
  setting.forget_bias = static_cast<float>(given.forget_bias);
  return setting;
}

int64_t steps_of(const char* name, const Tensor& tensor) {
  check(tensor.dim() == 3, name, " must have shape [S, B, 4 W], got ", shape_of(tensor));
  return tensor.size(0);
}

// scales [12, S, B, W] (or without S): rows of the first of the twelve, and the stride to the next.
AnyRows scales_of(const char* name, const Tensor& tensor, Dtype dtype, Shape shape,
                  const Tensor& like, int64_t* of_scale) {
  check_rows(name, tensor, shape, like);
  check(device::dtype_of(name, tensor.scalar_type()) == dtype, name,
        " must be of the dtype of the products, got scalar type ",
        static_cast<int>(tensor.scalar_type()));
  *of_scale = tensor.stride(0);
  const int64_t dimensions = tensor.dim();
  return {const_cast<void*>(tensor.const_data_ptr()), dtype,
          dimensions == 4 ? stride_of(tensor, 1) : 0, stride_of(tensor, dimensions - 2)};
}

int64_t slots_of(const Tensor& partials) {
  check(partials.dim() == 3 && partials.size(0) >= 1,
        "partials must have shape [slots, sums, W], got ", shape_of(partials));
  return partials.size(0);
}

void check_fits(bool fits, int64_t width) {
  check(fits, "a row of ", width, " units is more than the GPU's shared memory holds");
}

// --- ops

void hyper_fwd(const Tensor& gates, const OptionalTensor& x_part, const Tensor& cell,
               const Tensor& hidden, const OptionalTensor& last, const OptionalTensor& cells,
               const OptionalTensor& ln_weight, const OptionalTensor& ln_bias,
               const OptionalTensor& ln_c_weight, const OptionalTensor& ln_c_bias,
               const OptionalTensor& lengths, const OptionalTensor& seed, int64_t step,
               int64_t step_offset, double forget_bias, double dropout) {
  const int64_t steps = steps_of("gates", gates);
  const kernels::Setting setting = setting_of(cell, steps,
                                              {ln_weight, ln_bias, ln_c_weight, ln_c_bias, lengths,
                                               seed, step, step_offset, forget_bias, dropout});
  const int64_t batch = setting.batch, width = setting.width;
  const Dtype dtype = device::dtype_of("gates", gates.scalar_type());
  const Shape all{steps, batch, width}, of_gates{steps, batch, 4 * width};
  const AnyRows whole = rows_of("gates", gates, dtype, of_gates, cell);
  const AnyRows from_x = rows_of("x_part", x_part, dtype, of_gates, cell);
  const AnyRows to_hidden = rows_of("hidden", hidden, dtype, all, cell);
  const AnyRows to_cells = rows_of("cells", cells, Dtype::kFloat32, all, cell);
  const AnyRows carried = rows_of("cell", cell, Dtype::kFloat32, {batch, width}, cell);
  const AnyRows shown = any_rows("last", last, {batch, width}, cell);
  Context context(cell);
  const bool fits = kernels::with_dtype(dtype, [&](auto tag) {
    using D = decltype(tag);
    const kernels::HyperGates<D> from{as<D>(whole), as<const D>(from_x)};
    return kernels::forward(context, kernels::ForwardParams<kernels::HyperGates<D>>{
                                         setting, from, as<float>(carried), as<D>(to_hidden), shown,
                                         as<float>(to_cells)});
  });
  check_fits(fits, width);
}

void main_fwd(const Tensor& recurrent, const Tensor& x_part, const Tensor& scales,
              const Tensor& bias, const Tensor& cell, const OptionalTensor& out,
              const OptionalTensor& hidden, const OptionalTensor& cells,
              const OptionalTensor& ln_weight, const OptionalTensor& ln_bias,
              const OptionalTensor& ln_c_weight, const OptionalTensor& ln_c_bias,
              const OptionalTensor& lengths, const OptionalTensor& seed, int64_t step,
              int64_t step_offset, double forget_bias, double dropout) {
  const int64_t steps = steps_of("recurrent", recurrent);
  const kernels::Setting setting = setting_of(cell, steps,
                                              {ln_weight, ln_bias, ln_c_weight, ln_c_bias, lengths,
                                               seed, step, step_offset, forget_bias, dropout});
  const int64_t batch = setting.batch, width = setting.width;
  const Dtype dtype = device::dtype_of("recurrent", recurrent.scalar_type());
  const Shape all{steps, batch, width}, of_gates{steps, batch, 4 * width};
  const AnyRows from_h = rows_of("recurrent", recurrent, dtype, of_gates, cell);
  const AnyRows from_x = rows_of("x_part", x_part, dtype, of_gates, cell);
  int64_t of_scale = 0;
  const AnyRows scale =
      scales_of("scales", scales, dtype, {12, steps, batch, width}, cell, &of_scale);
  const float* biases = floats("bias", bias, {4, width}, cell);
  const AnyRows carried = rows_of("cell", cell, Dtype::kFloat32, {batch, width}, cell);
  const AnyRows shown = any_rows("out", out, all, cell);
  const AnyRows to_hidden = rows_of("hidden", hidden, dtype, {batch, width}, cell);
  const AnyRows to_cells = rows_of("cells", cells, Dtype::kFloat32, all, cell);
  Context context(cell);
  const bool fits = kernels::with_dtype(dtype, [&](auto tag) {
    using D = decltype(tag);
    const kernels::MainGates<D> from{as<const D>(from_h), as<const D>(from_x), as<const D>(scale),
                                     of_scale, biases};
    return kernels::forward(context, kernels::ForwardParams<kernels::MainGates<D>>{
                                         setting, from, as<float>(carried), as<D>(to_hidden), shown,
                                         as<float>(to_cells)});
  });
  check_fits(fits, width);
}

void main_bwd(const Tensor& recurrent, const Tensor& x_part, const Tensor& scales,
              const Tensor& bias, const Tensor& cell_before, const Tensor& cell_after,
              const OptionalTensor& grad_out, const Tensor& grad_hidden, const Tensor& grad_cell,
              const Tensor& grad_recurrent, const Tensor& grad_x_part, const Tensor& grad_scales,
              const Tensor& partials, const OptionalTensor& ln_weight,
              const OptionalTensor& ln_bias, const OptionalTensor& ln_c_weight,
              const OptionalTensor& ln_c_bias, const OptionalTensor& lengths,
              const OptionalTensor& seed, int64_t step, int64_t step_offset, double forget_bias,
              double dropout) {
  const Tensor& like = cell_before;
  const kernels::Setting setting = setting_of(like, 1,
                                              {ln_weight, ln_bias, ln_c_weight, ln_c_bias, lengths,
                                               seed, step, step_offset, forget_bias, dropout});
  const int64_t batch = setting.batch, width = setting.width;
  const Dtype dtype = device::dtype_of("recurrent", recurrent.scalar_type());
  const Shape row{batch, width}, gate_rows{batch, 4 * width}, scale_rows{12, batch, width};
  const AnyRows from_h = rows_of("recurrent", recurrent, dtype, gate_rows, like);
  const AnyRows from_x = rows_of("x_part", x_part, dtype, gate_rows, like);
  const AnyRows to_h = rows_of("grad_recurrent", grad_recurrent, dtype, gate_rows, like);
  const AnyRows to_x = rows_of("grad_x_part", grad_x_part, dtype, gate_rows, like);
  int64_t of_scale = 0, of_grad_scale = 0;
  const AnyRows scale = scales_of("scales", scales, dtype, scale_rows, like, &of_scale);
  const AnyRows to_scale =
      scales_of("grad_scales", grad_scales, dtype, scale_rows, like, &of_grad_scale);
  const float* biases = floats("bias", bias, {4, width}, like);
  const AnyRows before = rows_of("cell_before", cell_before, Dtype::kFloat32, row, like);
  const AnyRows after = rows_of("cell_after", cell_after, Dtype::kFloat32, row, like);
  const AnyRows from_out = any_rows("grad_out", grad_out, row, like);
  const AnyRows from_hidden = rows_of("grad_hidden", grad_hidden, dtype, row, like);
  const AnyRows carried = rows_of("grad_cell", grad_cell, Dtype::kFloat32, row, like);
  const int64_t slots = slots_of(partials);
  float* const sums = floats("partials", partials, {slots, 14, width}, like);
  Context context(like);
  const bool fits = kernels::with_dtype(dtype, [&](auto tag) {
    using D = decltype(tag);
    const kernels::MainGates<D> from{as<const D>(from_h), as<const D>(from_x), as<const D>(scale),
                                     of_scale, biases};
    const kernels::MainGradients<D> to{from, as<D>(to_h), as<D>(to_x), as<D>(to_scale),
                                       of_grad_scale};
    return kernels::backward(context,
                             kernels::BackwardParams<kernels::MainGradients<D>>{
                                 setting, to, as<const float>(before), as<const float>(after),
                                 from_out, as<D>(from_hidden), as<float>(carried), sums, 0},
                             slots);
  });
  check_fits(fits, width);
}

void hyper_bwd(const Tensor& gates, const Tensor& cell_before, const Tensor& cell_after,
               const Tensor& grad_hidden, const Tensor& grad_cell, const Tensor& grad_gates,
               const Tensor& partials, const OptionalTensor& ln_weight,
               const OptionalTensor& ln_bias, const OptionalTensor& ln_c_weight,
               const OptionalTensor& ln_c_bias, const OptionalTensor& lengths,
               const OptionalTensor& seed, int64_t step, int64_t step_offset, double forget_bias,
               double dropout) {
  const Tensor& like = cell_before;
  const kernels::Setting setting = setting_of(like, 1,
                                              {ln_weight, ln_bias, ln_c_weight, ln_c_bias, lengths,
                                               seed, step, step_offset, forget_bias, dropout});
  const int64_t batch = setting.batch, width = setting.width;
  const Dtype dtype = device::dtype_of("gates", gates.scalar_type());
  const Shape row{batch, width}, gate_rows{batch, 4 * width};
  const AnyRows whole = rows_of("gates", gates, dtype, gate_rows, like);
  const AnyRows to_gates = rows_of("grad_gates", grad_gates, dtype, gate_rows, like);
  const AnyRows before = rows_of("cell_before", cell_before, Dtype::kFloat32, row, like);
  const AnyRows after = rows_of("cell_after", cell_after, Dtype::kFloat32, row, like);
  const AnyRows from_hidden = rows_of("grad_hidden", grad_hidden, dtype, row, like);
  const AnyRows carried = rows_of("grad_cell", grad_cell, Dtype::kFloat32, row, like);
  const int64_t slots = slots_of(partials);
  float* const sums = floats("partials", partials, {slots, 10, width}, like);
  Context context(like);
  const bool fits = kernels::with_dtype(dtype, [&](auto tag) {
    using D = decltype(tag);
    const kernels::HyperGradients<D> to{{as<D>(whole), {nullptr, 0, 0}}, as<D>(to_gates)};
    return kernels::backward(
        context,
        kernels::BackwardParams<kernels::HyperGradients<D>>{setting,
                                                            to,
                                                            as<const float>(before),
                                                            as<const float>(after),
                                                            {nullptr, Dtype::kFloat32, 0, 0},
                                                            as<D>(from_hidden),
                                                            as<float>(carried),
                                                            sums,
                                                            0},
        slots);
  });
  check_fits(fits, width);
}

}  // namespace
}  // namespace sketchfast

STABLE_TORCH_LIBRARY_IMPL(sketchfast, CUDA, m) {
  m.impl("hyperlstm_hyper_fwd_native", TORCH_BOX(&sketchfast::hyper_fwd));
  m.impl("hyperlstm_main_fwd_native", TORCH_BOX(&sketchfast::main_fwd));
  m.impl("hyperlstm_main_bwd_native", TORCH_BOX(&sketchfast::main_bwd));
  m.impl("hyperlstm_hyper_bwd_native", TORCH_BOX(&sketchfast::hyper_bwd));
}
