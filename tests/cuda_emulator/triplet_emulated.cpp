// The kernels of csrc/cuda/triplet_kernels.cuh and the choices of triplet_launch.h, run by the
// emulator behind a C interface for ctypes. Each function returns null or a message.
#include "cuda/triplet_launch.h"
#include "emulated_context.h"

namespace {

using namespace sketchfast::triplet::cuda;
using emulator::Context;
using emulator::guarded;
using sketchfast::device::Dtype;

constexpr int64_t kFloat64 = 3;  // of teacher_dtype

}  // namespace

extern "C" {

// As the tests fill it in; the order is theirs too.
struct Call {
  const float *query, *gallery, *dist;
  const void* teacher;
  const int64_t *indices, *labels, *seed;
  const float* scale;
  const int32_t* weights_in;
  const int8_t* active_in;
  float* loss;
  int32_t* weights;
  int8_t* active;
  int64_t* considered;
  float *grad_query, *grad_gallery;
  int64_t batch, dimensions, squared, teacher_dtype, teacher_rows, row_stride, column_stride,
      samples, mining, tree_from, shared_limit;
  double margin;

  Embeddings embeddings() const {
    return {query, gallery, batch, static_cast<int>(dimensions), squared != 0};
  }
  Teacher teacher_rows_of() const {
    Teacher out{};
    out.wide = teacher_dtype == kFloat64;
    if (out.wide) {
      out.doubles = static_cast<const double*>(teacher);
    } else {
      out.values = {teacher, static_cast<Dtype>(teacher_dtype)};
    }
    out.rows = teacher_rows;
    out.row_stride = row_stride;
    out.column_stride = column_stride;
    out.indices = indices;
    return out;
  }
};

void set_schedule(int schedule, unsigned seed) {
  emulator::machine.schedule = static_cast<emulator::Schedule>(schedule);
  emulator::machine.seed = seed;
}

int launches() { return Context::launches; }

// Of dist where there is one, else of the embeddings; of samples where there are some.
const char* triplet_forward(const Call* c) {
  return guarded(c->shared_limit, [&](Context& context) {
    const Embeddings embeddings = c->embeddings();
    const Teacher teacher = c->teacher_rows_of();
    if (c->samples == 0) {
      ranking(context, c->dist ? nullptr : &embeddings, c->dist, c->batch, teacher, c->margin,
              c->tree_from, c->loss, c->weights);
    } else if (c->dist) {
      sampled_matrix(context, c->dist, c->batch, teacher, c->margin, c->samples, c->seed, c->loss,
                     c->weights);
    } else {
      sampled(context, embeddings, teacher, c->margin, c->samples, c->seed, c->loss, c->active);
    }
  });
}

// weights: the state, [batch, batch] or [batch].
const char* triplet_pairs(const Call* c) {
  return guarded(c->shared_limit, [&](Context& context) {
    const Pairing pairing{c->labels, c->seed, static_cast<Mining>(c->mining), c->margin};
    pairs(context, c->embeddings(), pairing, c->loss, c->weights, c->considered);
  });
}

const char* triplet_embedding_backward(const Call* c) {
  return guarded(c->shared_limit, [&](Context& context) {
    embedding_backward(context, c->embeddings(), c->scale, c->weights_in, c->grad_query,
                       c->grad_gallery);
  });
}

const char* triplet_sampled_backward(const Call* c) {
  return guarded(c->shared_limit, [&](Context& context) {
    sampled_backward(context, c->embeddings(), c->scale, c->active_in, c->samples, c->seed,
                     c->grad_query, c->grad_gallery);
  });
}

const char* triplet_chosen_backward(const Call* c) {
  return guarded(c->shared_limit, [&](Context& context) {
    chosen_backward(context, c->embeddings(), c->scale, c->weights_in, c->grad_query,
                    c->grad_gallery);
  });
}

}  // extern "C"
