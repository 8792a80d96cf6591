// The CUDA kernels of the triplet losses as torch ops: checks, memory and the stream. Schemas are
// those of sketchfast/ops/triplet.py; what runs is chosen in triplet_launch.h.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "context.h"
#include "triplet_launch.h"

namespace sketchfast {
namespace {

namespace kernels = triplet::cuda;
using device::check_device;
using device::Context;
using OptionalTensor = std::optional<Tensor>;
using Gradients = std::tuple<Tensor, Tensor>;

// --- arguments

// `tensor` of this type and shape, contiguous and on the device of `like`: its elements.
template <typename T>
const T* elements(const char* name, const Tensor& tensor, ScalarType dtype,
                  std::initializer_list<int64_t> shape, const Tensor& like) {
  check_tensor(name, tensor, dtype, shape);
  check_device(name, tensor, like);
  return static_cast<const T*>(tensor.const_data_ptr());
}

const int64_t* integers(const char* name, const OptionalTensor& tensor,
                        std::initializer_list<int64_t> shape, const Tensor& like) {
  if (!tensor.has_value()) return nullptr;
  return elements<int64_t>(name, *tensor, ScalarType::Long, shape, like);
}

template <typename T>
T* new_elements(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

void check_batch(int64_t batch) {
  check(batch <= 0x7fffffff / 2, "a batch must have less than 2^30 rows, got ", batch);
}

kernels::Embeddings embeddings_of(const Tensor& query, const Tensor& gallery, bool squared) {
  check(query.dim() == 2, "query must have shape [B, D], got ", shape_of(query));
  check(query.is_cuda(), "query must be a CUDA tensor");
  const int64_t batch = query.size(0), dimensions = query.size(1);
  check_batch(batch);
  check(dimensions >= 1 && dimensions <= 0x7fffff, "query must have 1 to 2^23 - 1 columns, got ",
        dimensions);
  return {elements<float>("query", query, ScalarType::Float, {batch, dimensions}, query),
          elements<float>("gallery", gallery, ScalarType::Float, {batch, dimensions}, query), batch,
          static_cast<int>(dimensions), squared};
}

// The teacher as it is, of any strides, for a batch.
kernels::Teacher teacher_of(const Tensor& teacher, const OptionalTensor& indices, int64_t batch,
                            const Tensor& like) {
  const bool square = teacher.dim() == 2 && teacher.size(0) == teacher.size(1);
  if (indices.has_value()) {
    check(square && (teacher.size(0) > 0 || batch == 0), "teacher must be square, got ",
          shape_of(teacher));
  } else {
    check(square && teacher.size(0) == batch, "teacher must have shape [", batch, ", ", batch,
          "], got ", shape_of(teacher));
  }
  check_device("teacher", teacher, like);
  kernels::Teacher out{};
  out.wide = teacher.scalar_type() == ScalarType::Double;
  if (out.wide) {
    out.doubles = static_cast<const double*>(teacher.const_data_ptr());
  } else {
    out.values = device::input_of("teacher", teacher);
  }
  out.rows = teacher.size(0);
  out.row_stride = teacher.stride(0);
  out.column_stride = teacher.stride(1);
  out.indices = integers("indices", indices, {batch}, like);
  return out;
}

int64_t batch_of_matrix(const Tensor& dist) {
  check(dist.dim() == 2, "dist must have shape [B, B], got ", shape_of(dist));
  check(dist.is_cuda(), "dist must be a CUDA tensor");
  check_batch(dist.size(0));
  return dist.size(0);
}

void check_samples(int64_t samples) {
  check(samples >= 1 && samples <= 0x7fffffff, "samples must lie in [1, 2^31 - 1], got ", samples);
}

const float* scale_of(const Tensor& scale, const Tensor& like) {
  return elements<float>("scale", scale, ScalarType::Float, {}, like);
}

// --- ops

std::tuple<Tensor, Tensor> ranking_fwd(const Tensor& query, const Tensor& gallery,
                                       const Tensor& teacher, const OptionalTensor& indices,
                                       double margin, bool squared, int64_t tree_from) {
  const kernels::Embeddings embeddings = embeddings_of(query, gallery, squared);
  const int64_t batch = embeddings.batch;
  const kernels::Teacher rows = teacher_of(teacher, indices, batch, query);
  Context context(query);
  Tensor loss = new_tensor(query, {}, ScalarType::Float);
  Tensor weights = new_tensor(query, {batch, batch}, ScalarType::Int);
  kernels::ranking(context, &embeddings, nullptr, batch, rows, margin, tree_from,
                   new_elements<float>(loss), new_elements<int32_t>(weights));
  return {loss, weights};
}

Gradients embedding_bwd(const Tensor& scale, const Tensor& weights, const Tensor& query,
                        const Tensor& gallery, bool squared) {
  const kernels::Embeddings embeddings = embeddings_of(query, gallery, squared);
  const int64_t batch = embeddings.batch;
  Context context(query);
  Tensor grad_query = torch::stable::empty_like(query);
  Tensor grad_gallery = torch::stable::empty_like(gallery);
  kernels::embedding_backward(
      context, embeddings, scale_of(scale, query),
      elements<int32_t>("weights", weights, ScalarType::Int, {batch, batch}, query),
      new_elements<float>(grad_query), new_elements<float>(grad_gallery));
  return {grad_query, grad_gallery};
}

std::tuple<Tensor, Tensor> sampled_fwd(const Tensor& query, const Tensor& gallery,
                                       const Tensor& teacher, const OptionalTensor& indices,
                                       double margin, bool squared, int64_t samples,
                                       const Tensor& seed) {
  const kernels::Embeddings embeddings = embeddings_of(query, gallery, squared);
  check_samples(samples);
  const kernels::Teacher rows = teacher_of(teacher, indices, embeddings.batch, query);
  Context context(query);
  Tensor loss = new_tensor(query, {}, ScalarType::Float);
  Tensor active = new_tensor(query, {embeddings.batch, samples}, ScalarType::Char);
  kernels::sampled(context, embeddings, rows, margin, samples, integers("seed", seed, {}, query),
                   new_elements<float>(loss), new_elements<int8_t>(active));
  return {loss, active};
}

Gradients sampled_bwd(const Tensor& scale, const Tensor& active, const Tensor& seed,
                      const Tensor& query, const Tensor& gallery, bool squared) {
  const kernels::Embeddings embeddings = embeddings_of(query, gallery, squared);
  check(active.dim() == 2, "active must have shape [B, samples], got ", shape_of(active));
  const int64_t samples = active.size(1);
  check_samples(samples);
  Context context(query);
  Tensor grad_query = torch::stable::empty_like(query);
  Tensor grad_gallery = torch::stable::empty_like(gallery);
  kernels::sampled_backward(
      context, embeddings, scale_of(scale, query),
      elements<int8_t>("active", active, ScalarType::Char, {embeddings.batch, samples}, query),
      samples, integers("seed", seed, {}, query), new_elements<float>(grad_query),
      new_elements<float>(grad_gallery));
  return {grad_query, grad_gallery};
}

std::tuple<Tensor, Tensor> matrix_fwd(const Tensor& dist, const Tensor& teacher,
                                      const OptionalTensor& indices, double margin, int64_t samples,
                                      const OptionalTensor& seed, int64_t tree_from) {
  const int64_t batch = batch_of_matrix(dist);
  const float* values = elements<float>("dist", dist, ScalarType::Float, {batch, batch}, dist);
  const kernels::Teacher rows = teacher_of(teacher, indices, batch, dist);
  Context context(dist);
  Tensor loss = new_tensor(dist, {}, ScalarType::Float);
  Tensor weights = new_tensor(dist, {batch, batch}, ScalarType::Int);
  if (samples == 0) {
    kernels::ranking(context, nullptr, values, batch, rows, margin, tree_from,
                     new_elements<float>(loss), new_elements<int32_t>(weights));
  } else {
    check_samples(samples);
    check(seed.has_value(), "seed must be given with samples");
    kernels::sampled_matrix(context, values, batch, rows, margin, samples,
                            integers("seed", seed, {}, dist), new_elements<float>(loss),
                            new_elements<int32_t>(weights));
  }
  return {loss, weights};
}

kernels::Mining mining_of(const std::string& name) {
  if (name == "all") return kernels::Mining::kAll;
  if (name == "hardest") return kernels::Mining::kHardest;
  if (name == "semihard") return kernels::Mining::kSemihard;
  check(name == "random", "mining must be all, hardest, semihard or random, got ", name);
  return kernels::Mining::kRandom;
}

std::tuple<Tensor, Tensor, Tensor> pairs_fwd(const Tensor& query, const Tensor& gallery,
                                             const OptionalTensor& labels, double margin,
                                             bool squared, std::string mining,
                                             const OptionalTensor& seed) {
  const kernels::Embeddings embeddings = embeddings_of(query, gallery, squared);
  const int64_t batch = embeddings.batch;
  const kernels::Pairing pairing{integers("labels", labels, {batch}, query),
                                 integers("seed", seed, {}, query), mining_of(mining), margin};
  check(pairing.seed || pairing.mining != kernels::Mining::kRandom,
        "seed must be given with mining random");
  Context context(query);
  Tensor loss = new_tensor(query, {}, ScalarType::Float);
  Tensor state = pairing.mining == kernels::Mining::kAll
                     ? new_tensor(query, {batch, batch}, ScalarType::Int)
                     : new_tensor(query, {batch}, ScalarType::Int);
  Tensor considered = new_tensor(query, {}, ScalarType::Long);
  kernels::pairs(context, embeddings, pairing, new_elements<float>(loss),
                 new_elements<int32_t>(state), new_elements<int64_t>(considered));
  return {loss, state, considered};
}

Gradients chosen_bwd(const Tensor& scale, const Tensor& chosen, const Tensor& query,
                     const Tensor& gallery, bool squared) {
  const kernels::Embeddings embeddings = embeddings_of(query, gallery, squared);
  Context context(query);
  Tensor grad_query = torch::stable::empty_like(query);
  Tensor grad_gallery = torch::stable::empty_like(gallery);
  kernels::chosen_backward(
      context, embeddings, scale_of(scale, query),
      elements<int32_t>("chosen", chosen, ScalarType::Int, {embeddings.batch}, query),
      new_elements<float>(grad_query), new_elements<float>(grad_gallery));
  return {grad_query, grad_gallery};
}

}  // namespace
}  // namespace sketchfast

STABLE_TORCH_LIBRARY_IMPL(sketchfast, CUDA, m) {
  m.impl("triplet_ranking_fwd_native", TORCH_BOX(&sketchfast::ranking_fwd));
  m.impl("triplet_embedding_bwd_native", TORCH_BOX(&sketchfast::embedding_bwd));
  m.impl("triplet_sampled_fwd_native", TORCH_BOX(&sketchfast::sampled_fwd));
  m.impl("triplet_sampled_bwd_native", TORCH_BOX(&sketchfast::sampled_bwd));
  m.impl("triplet_matrix_fwd_native", TORCH_BOX(&sketchfast::matrix_fwd));
  m.impl("triplet_pairs_fwd_native", TORCH_BOX(&sketchfast::pairs_fwd));
  m.impl("triplet_chosen_bwd_native", TORCH_BOX(&sketchfast::chosen_bwd));
}
