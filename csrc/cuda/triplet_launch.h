// Which kernels of triplet_kernels.cuh a call takes, and with what sizes.
//
// Context is where they run: the CUDA device (triplet.cu) or tests/cuda_emulator. It gives
//   size_t shared_limit             bytes of shared memory a CTA may have
//   void* scratch(size_t bytes)     device memory that lives until the call's kernels are done
//   void launch(kernel, int64_t blocks, int threads, size_t shared, const Params&)
// Nothing here depends on values, only on sizes: calls can be captured in a CUDA graph.
#pragma once

#include "triplet_kernels.cuh"

namespace sketchfast {
namespace triplet {
namespace cuda {

// What the CTAs of the GPUs this is for keep busy: two for each multiprocessor.
constexpr int64_t kWantedCtas = 264;

template <typename T, typename Context>
T* scratch(Context& context, int64_t count) {
  return static_cast<T*>(context.scratch(static_cast<size_t>(count) * sizeof(T)));
}

// The result of a call: a loss and what it is the mean over.
struct Loss {
  float* loss;
  int64_t* considered;  // or null
  double divisor;       // 0: what is considered
};

template <typename Context>
Totals totals_of(Context& context, const Loss& loss, int64_t ctas, double margin = 0) {
  Totals totals{};
  totals.sums = scratch<double>(context, 2 * ctas + 1);  // one allocation, for a short call
  totals.counts = reinterpret_cast<int64_t*>(totals.sums + ctas);
  totals.ticket = reinterpret_cast<unsigned*>(totals.counts + ctas);
  totals.loss = loss.loss;
  totals.considered = loss.considered;
  totals.margin = margin;
  totals.divisor = loss.divisor;
  return totals;
}

template <typename Context>
void start(Context& context, const Totals& totals) {
  context.launch(start_kernel, 1, kWarp, 0, totals);
}

// The loss of no triplets at all.
template <typename Context>
void no_triplets(Context& context, const Loss& loss) {
  start(context, totals_of(context, loss, 1));
}

inline double triplets_of(int64_t batch) {
  const double count = static_cast<double>(batch);
  return batch < 3 ? 1.0 : count * (count - 1) * (count - 2);
}

// --- distances, and what gradients pull by

template <int M, typename Context>
void launch_tiles(Context& context, const DistanceParams& p) {
  const int64_t tiles = ceil_div(p.embeddings.batch, 16 * M);
  context.launch(distance_kernel<M>, tiles * tiles, kThreads, sizeof(DistanceMemory<M>), p);
}

// Tiles of 64 x 64 where they are enough, else 32 x 32 or 16 x 16.
template <typename Context>
void launch_distances(Context& context, const DistanceParams& p) {
  const auto enough = [&](int64_t tile) {
    const int64_t tiles = ceil_div(p.embeddings.batch, tile);
    return tiles * tiles >= kWantedCtas - 8;
  };
  if (enough(64)) {
    launch_tiles<4>(context, p);
  } else if (enough(32)) {
    launch_tiles<2>(context, p);
  } else {
    launch_tiles<1>(context, p);
  }
}

// Distances [batch, batch] in scratch memory; zeroes the ticket of the launch that reads them.
template <typename Context>
const float* distances(Context& context, const Embeddings& embeddings, const Totals& totals) {
  DistanceParams p{};
  p.embeddings = embeddings;
  p.out = scratch<float>(context, embeddings.batch * embeddings.batch);
  p.ticket = totals.ticket;
  launch_distances(context, p);
  return p.out;
}

// --- all ranking triplets: the rule
//
// A CTA an anchor, its columns sorted in shared memory: by pairs below tree_from, by the tree from
// there on. The sort takes 20 bytes a column, 28 with a float64 teacher: 227 KB hold 11 600 columns
// (8 200), 163 KB 8 300 (5 900). Larger batches are counted column by column from global memory.
template <typename Key, typename Context>
bool count_in_shared_memory(Context& context, CountParams p, const Loss& loss, double margin,
                            const Embeddings* embeddings, int64_t tree_from) {
  const int64_t columns = p.batch - 1;
  size_t bytes = 0;
  if (columns > 0xffff) return false;
  RowMemory<Key>(nullptr, &bytes, columns);
  if (bytes > context.shared_limit) return false;
  p.tree = p.batch >= tree_from;
  p.columns_a_lane = columns < 512 ? 1 : 4;
  const int64_t warps = ceil_div(ceil_div(columns, p.columns_a_lane), kWarp);
  const bool two_fit = 2 * (bytes + 1024) <= context.shared_limit;  // on a multiprocessor
  const int64_t most = (two_fit ? kMostThreads / 2 : kMostThreads) / kWarp;
  const int threads = static_cast<int>(warps < 1 ? 1 : warps < most ? warps : most) * kWarp;
  p.totals = totals_of(context, loss, p.batch, margin);
  if (embeddings) {
    p.dist = distances(context, *embeddings, p.totals);
  } else {
    start(context, p.totals);
  }
  context.launch(count_kernel<Key>, p.batch, threads, bytes, p);
  return true;
}

template <typename Context>
void count_columns(Context& context, CountParams p, const Loss& loss, double margin,
                   const Embeddings* embeddings) {
  const int64_t ctas = p.batch * ceil_div(p.batch, kThreads);
  p.totals = totals_of(context, loss, ctas, margin);
  if (embeddings) {
    p.dist = distances(context, *embeddings, p.totals);
  } else {
    start(context, p.totals);
  }
  context.launch(count_columns_kernel, ctas, kThreads, sizeof(Reduction), p);
}

// Of embeddings, or where those are null of dist [batch, batch]. weights [batch, batch].
template <typename Context>
void ranking(Context& context, const Embeddings* embeddings, const float* dist, int64_t batch,
             const Teacher& teacher, double margin, int64_t tree_from, float* loss_out,
             int32_t* weights) {
  const Loss loss{loss_out, nullptr, triplets_of(batch)};
  if (batch == 0) return no_triplets(context, loss);
  CountParams p{};
  p.dist = dist;
  p.teacher = teacher;
  p.batch = batch;
  p.margin = static_cast<float>(margin);
  p.weights = weights;
  const bool counted =
      teacher.wide
          ? count_in_shared_memory<WideKey>(context, p, loss, margin, embeddings, tree_from)
          : count_in_shared_memory<NarrowKey>(context, p, loss, margin, embeddings, tree_from);
  if (!counted) count_columns(context, p, loss, margin, embeddings);
}

// scale times the gradient of <weights, D>.
template <typename Context>
void embedding_backward(Context& context, const Embeddings& embeddings, const float* scale,
                        const int32_t* weights, float* grad_query, float* grad_gallery) {
  if (embeddings.batch == 0) return;
  DistanceParams p{};
  p.embeddings = embeddings;
  p.out = scratch<float>(context, embeddings.batch * embeddings.batch);
  p.weights = weights;
  p.scale = scale;
  launch_distances(context, p);
  const PullParams pull{embeddings, p.out, grad_query, grad_gallery};
  const auto ctas = [&](int64_t tile) {
    return 2 * ceil_div(embeddings.batch, tile) * ceil_div(embeddings.dimensions, tile);
  };
  if (ctas(64) >= kWantedCtas / 2) {
    context.launch(pull_kernel<4>, ctas(64), kThreads, sizeof(PullMemory<4>), pull);
  } else {
    context.launch(pull_kernel<2>, ctas(32), kThreads, sizeof(PullMemory<2>), pull);
  }
}

// --- sampled triplets

inline SampledParams sampled_params(const Teacher& teacher, int64_t batch, int64_t samples,
                                    const int64_t* seed, double margin) {
  SampledParams p{};
  p.teacher = teacher;
  p.batch = batch;
  p.samples = samples;
  p.seed = seed;
  p.margin = static_cast<float>(margin);
  p.wide_margin = margin;
  return p;
}

inline Loss sampled_loss(float* loss, int64_t batch, int64_t samples) {
  return {loss, nullptr, static_cast<double>(batch) * static_cast<double>(samples)};
}

// active [batch, samples]. Anchors are split where they alone would leave the GPU idle.
template <typename Context>
void sampled(Context& context, const Embeddings& embeddings, const Teacher& teacher, double margin,
             int64_t samples, const int64_t* seed, float* loss, int8_t* active) {
  const int64_t batch = embeddings.batch;
  SampledParams p = sampled_params(teacher, batch, samples, seed, margin);
  p.embeddings = embeddings;
  p.active = active;
  if (batch == 0) return no_triplets(context, sampled_loss(loss, 1, 1));
  const int64_t parts = ceil_div(8 * kWantedCtas * kSampleWarps, batch);
  p.parts = static_cast<int>(parts < samples ? parts : samples);
  const int64_t ctas = ceil_div(batch * p.parts, kSampleWarps);
  p.totals = totals_of(context, sampled_loss(loss, batch, samples), ctas);
  start(context, p.totals);
  context.launch(sampled_kernel, ctas, kSampleWarps * kWarp, sizeof(Reduction), p);
}

// Of dist [batch, batch]; weights [batch, batch].
template <typename Context>
void sampled_matrix(Context& context, const float* dist, int64_t batch, const Teacher& teacher,
                    double margin, int64_t samples, const int64_t* seed, float* loss,
                    int32_t* weights) {
  SampledParams p = sampled_params(teacher, batch, samples, seed, margin);
  p.dist = dist;
  p.weights = weights;
  if (batch == 0) return no_triplets(context, sampled_loss(loss, 1, 1));
  p.totals = totals_of(context, sampled_loss(loss, batch, samples), batch);
  start(context, p.totals);
  context.launch(sampled_matrix_kernel, batch, kThreads, sizeof(Reduction), p);
}

// --- pairs

struct Pairing {
  const int64_t* labels;  // [batch], or null
  const int64_t* seed;    // for random negatives
  Mining mining;
  double margin;
};

// state: weights [batch, batch] where all negatives are taken, else [batch].
template <typename Context>
void pairs(Context& context, const Embeddings& embeddings, const Pairing& pairing, float* loss,
           int32_t* state, int64_t* considered) {
  if (embeddings.batch == 0) return no_triplets(context, Loss{loss, considered, 0});
  PairsParams p{};
  p.embeddings = embeddings;
  p.labels = pairing.labels;
  p.seed = pairing.seed;
  p.mining = pairing.mining;
  p.margin = static_cast<float>(pairing.margin);
  p.wide_margin = pairing.margin;
  p.state = state;
  p.totals = totals_of(context, Loss{loss, considered, 0}, embeddings.batch);
  if (pairing.mining == Mining::kRandom) {
    start(context, p.totals);
  } else {
    p.dist = distances(context, embeddings, p.totals);
  }
  context.launch(pairs_kernel, embeddings.batch, kThreads, sizeof(PairsMemory), p);
}

// --- gradients of few triplets

// Rows a CTA: few where the batch is small, so that there are enough CTAs and short queues.
template <typename List, typename Context>
void list_backward(Context& context, const Embeddings& embeddings, const List& list,
                   const float* scale, float* grad_query, float* grad_gallery) {
  const int64_t batch = embeddings.batch;
  if (batch == 0) return;
  ListParams<List> p{embeddings, list, scale, 0, grad_query, grad_gallery};
  p.rows = batch <= 512 ? 2 : kOwnRows;
  const int64_t ctas = 2 * ceil_div(batch, p.rows) * ceil_div(embeddings.dimensions, kThreads);
  context.launch(list_kernel<List>, ctas, kThreads, sizeof(ListMemory), p);
}

template <typename Context>
void sampled_backward(Context& context, const Embeddings& embeddings, const float* scale,
                      const int8_t* active, int64_t samples, const int64_t* seed, float* grad_query,
                      float* grad_gallery) {
  const SampledList list{active, seed, samples, embeddings.batch};
  list_backward(context, embeddings, list, scale, grad_query, grad_gallery);
}

template <typename Context>
void chosen_backward(Context& context, const Embeddings& embeddings, const float* scale,
                     const int32_t* chosen, float* grad_query, float* grad_gallery) {
  const ChosenList list{chosen, 1, embeddings.batch};
  list_backward(context, embeddings, list, scale, grad_query, grad_gallery);
}

}  // namespace cuda
}  // namespace triplet
}  // namespace sketchfast
