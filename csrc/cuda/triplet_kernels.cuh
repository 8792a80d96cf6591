// CUDA kernels of the triplet losses: no torch types, so that tests/cuda_emulator compiles this
// very source with a host compiler. triplet_launch.h chooses kernels and sizes, triplet.cu is the
// door to torch.
//
// Which triplets are active is counted in integers, so the order of threads does not show; floats
// are added up in a fixed order. Results repeat bit for bit.
#pragma once

#include <cstring>

#include "../triplet_math.h"
#include "device.cuh"

namespace sketchfast {
namespace triplet {
namespace cuda {

using namespace device;

constexpr int kThreads = 256;  // a CTA, where the launch does not say otherwise

// --- arguments

// The teacher's distances [rows, rows], any strides, read in place at the batch's rows of it.
struct Teacher {
  Input values;           // where not wide
  const double* doubles;  // where wide
  bool wide;
  int64_t rows, row_stride, column_stride;
  const int64_t* indices;  // [batch], clamped to [0, rows); or null: the batch is all rows

  __device__ int64_t place(int64_t position) const {
    if (!indices) return position;
    const int64_t index = indices[position];
    return index < 0 ? 0 : index < rows ? index : rows - 1;
  }
  __device__ int64_t offset(int64_t i, int64_t j) const {
    return place(i) * row_stride + place(j) * column_stride;
  }
  __device__ double at(int64_t i, int64_t j) const {
    return wide ? doubles[offset(i, j)] : load(values, offset(i, j));
  }
};

struct Embeddings {
  const float *query, *gallery;  // [batch, dimensions]
  int64_t batch;
  int dimensions;
  bool squared;

  __device__ const float* query_row(int64_t i) const { return query + i * dimensions; }
  __device__ const float* gallery_row(int64_t j) const { return gallery + j * dimensions; }
};

// --- sums over the CTAs of a launch

// Where each CTA leaves its part of the loss, and where the last one to finish leaves the whole.
struct Totals {
  double* sums;      // [CTAs]
  int64_t* counts;   // [CTAs]
  unsigned* ticket;  // 0 before the launch
  float* loss;
  int64_t* considered;  // or null
  double margin;        // the loss is (sum + margin * count) / divisor
  double divisor;       // 0: the count, at least 1
};

struct Reduction {
  double sum[kWarp];
  int64_t count[kWarp];
  int32_t last;
};

// The sums over the CTA, in thread 0.
__device__ inline void add_up(double* sum, int64_t* count, Reduction& memory) {
  const double warp_sum = sum_of_warp(*sum);
  const int64_t warp_count_of = sum_of_warp(*count);
  __syncthreads();
  if (lane_index() == 0) {
    memory.sum[warp_index()] = warp_sum;
    memory.count[warp_index()] = warp_count_of;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  *sum = 0;
  *count = 0;
  for (int w = 0; w < warp_count(); ++w) {
    *sum += memory.sum[w];
    *count += memory.count[w];
  }
}

// Adds the CTA's part, which its threads hold; the last CTA writes the loss.
__device__ inline void finish(const Totals& totals, double sum, int64_t count, Reduction& memory) {
  add_up(&sum, &count, memory);
  if (threadIdx.x == 0) {
    totals.sums[blockIdx.x] = sum;
    totals.counts[blockIdx.x] = count;
    __threadfence();
    memory.last = atomicAdd(totals.ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!memory.last) return;
  __threadfence();
  const volatile double* sums = totals.sums;
  const volatile int64_t* counts = totals.counts;
  sum = 0;
  count = 0;
  for (int64_t i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
    sum += sums[i];
    count += counts[i];
  }
  add_up(&sum, &count, memory);
  if (threadIdx.x > 0) return;
  const double counted = static_cast<double>(count < 1 ? 1 : count);
  const double total = sum + totals.margin * static_cast<double>(count);
  *totals.loss = static_cast<float>(total / (totals.divisor > 0 ? totals.divisor : counted));
  if (totals.considered) *totals.considered = count;
}

// Of a launch that nothing precedes; and the result of an empty batch.
__global__ void __launch_bounds__(kWarp) start_kernel(const __grid_constant__ Totals totals) {
  if (threadIdx.x > 0) return;
  *totals.ticket = 0;
  *totals.loss = 0;
  if (totals.considered) *totals.considered = 0;
}

// --- distances, tile by tile: out [batch, batch]
//
// A CTA of 16 x 16 threads has a tile of 16 M x 16 M, M x M a thread; embeddings go through shared
// memory some dimensions at a time.

struct alignas(16) Four {
  float value[4];
};

struct DistanceParams {
  Embeddings embeddings;
  float* out;
  unsigned* ticket;        // zeroed for the next launch, or null
  const int32_t* weights;  // null: distances; else what the gradient pulls by, scale * weight / D
  const float* scale;
};

template <int M>
struct DistanceMemory {
  static constexpr int kDepth = 128 / M;      // few trips to memory where tiles are small
  static constexpr int kStride = kDepth + 4;  // rows in different banks, 16-byte aligned
  float line[16 * M][kStride], term[16 * M][kStride];
};

// 16 M points from `first`, dimensions from `axis`; 0 beyond either end.
template <int M>
__device__ inline void fill_points(float (*to)[DistanceMemory<M>::kStride], const float* points,
                                   const Embeddings& e, int64_t first, int axis) {
  constexpr int kDepth = DistanceMemory<M>::kDepth;
#pragma unroll 4
  for (int step = 0; step < 16 * M * kDepth; step += kThreads) {  // a multiple of kThreads
    const int k = step + threadIdx.x;
    const int point = k / kDepth, depth = k % kDepth;
    const bool inside = first + point < e.batch && axis + depth < e.dimensions;
    to[point][depth] = inside ? points[(first + point) * e.dimensions + axis + depth] : 0.0f;
  }
}

template <int M>
__device__ inline void add_squares(const DistanceMemory<M>& memory, float (&sum)[M][M]) {
  const int row = threadIdx.x / 16, column = threadIdx.x % 16;
#pragma unroll 2
  for (int depth = 0; depth < DistanceMemory<M>::kDepth; depth += 4) {
    Four x[M], y[M];
#pragma unroll
    for (int k = 0; k < M; ++k) {
      x[k] = *reinterpret_cast<const Four*>(&memory.line[row + 16 * k][depth]);
      y[k] = *reinterpret_cast<const Four*>(&memory.term[column + 16 * k][depth]);
    }
#pragma unroll
    for (int r = 0; r < M; ++r) {
#pragma unroll
      for (int c = 0; c < M; ++c) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float difference = x[r].value[k] - y[c].value[k];
          sum[r][c] += difference * difference;
        }
      }
    }
  }
}

// What a triplet's gradient pulls by: dD/dq = (q - g) / D, that of the square 2 (q - g); 0 at 0.
__device__ inline float pull(float scaled_weight, float square, bool squared) {
  if (squared) return 2 * scaled_weight;
  return square > 0 ? scaled_weight / sqrtf(square) : 0.0f;
}

template <int M>
__global__ void __launch_bounds__(kThreads)
    distance_kernel(const __grid_constant__ DistanceParams p) {
  SKETCHFAST_SHARED_MEMORY(shared);
  DistanceMemory<M>& memory = *reinterpret_cast<DistanceMemory<M>*>(shared);
  const Embeddings& e = p.embeddings;
  const int64_t tiles = ceil_div(e.batch, 16 * M);
  const int64_t first_line = blockIdx.x / tiles * (16 * M);
  const int64_t first_term = blockIdx.x % tiles * (16 * M);
  if (p.ticket && blockIdx.x == 0 && threadIdx.x == 0) *p.ticket = 0;
  float sum[M][M] = {};
  if (!(p.weights && e.squared)) {  // else the distances are not asked for
#pragma unroll 1
    for (int axis = 0; axis < e.dimensions; axis += DistanceMemory<M>::kDepth) {
      fill_points<M>(memory.line, e.query, e, first_line, axis);
      fill_points<M>(memory.term, e.gallery, e, first_term, axis);
      __syncthreads();
      add_squares<M>(memory, sum);
      __syncthreads();
    }
  }
  const int row = threadIdx.x / 16, column = threadIdx.x % 16;
  const float scale = p.weights ? *p.scale : 0.0f;
#pragma unroll
  for (int r = 0; r < M; ++r) {
#pragma unroll
    for (int c = 0; c < M; ++c) {
      const int64_t i = first_line + row + 16 * r, j = first_term + column + 16 * c;
      if (i >= e.batch || j >= e.batch) continue;
      const int64_t at = i * e.batch + j;
      if (p.weights) {
        p.out[at] = pull(scale * static_cast<float>(p.weights[at]), sum[r][c], e.squared);
      } else {
        p.out[at] = e.squared ? sum[r][c] : sqrtf(sum[r][c]);
      }
    }
  }
}

// --- gradients of all distances: grad_i = sum_j pull_ij (own_i - other_j), for both sides
//
// A CTA of 16 x 16 threads has 16 M rows by 16 M dimensions of one side's gradient, M x M a thread.

struct PullParams {
  Embeddings embeddings;
  const float* pull;  // [batch, batch]
  float *grad_query, *grad_gallery;
};

template <int M>
struct PullMemory {
  static constexpr int kSlab = 128 / M;  // terms at a time
  float pull[kSlab][16 * M + 4], other[kSlab][16 * M + 4];
};

template <int M>
__device__ inline void fill_slab(PullMemory<M>& memory, const PullParams& p, bool of_query,
                                 int64_t first_line, int64_t first_term, int axis) {
  constexpr int kSlab = PullMemory<M>::kSlab;
  const int64_t batch = p.embeddings.batch;
  const int dimensions = p.embeddings.dimensions;
  const float* other = of_query ? p.embeddings.gallery : p.embeddings.query;
#pragma unroll 4
  for (int step = 0; step < 16 * M * kSlab; step += kThreads) {  // a multiple of kThreads
    const int k = step + threadIdx.x;
    // Neighbouring threads on neighbours in memory: a query's line is a row, a gallery's a column.
    const int term = of_query ? k % kSlab : k / (16 * M);
    const int line = of_query ? k / kSlab : k % (16 * M);
    const int64_t i = first_line + line, j = first_term + term;
    const bool inside = i < batch && j < batch;
    memory.pull[term][line] = !inside ? 0.0f : p.pull[of_query ? i * batch + j : j * batch + i];
    const int64_t from = first_term + k / (16 * M);
    const int column = k % (16 * M);
    const bool exists = from < batch && axis + column < dimensions;
    memory.other[k / (16 * M)][column] = exists ? other[from * dimensions + axis + column] : 0.0f;
  }
}

template <int M>
__global__ void __launch_bounds__(kThreads) pull_kernel(const __grid_constant__ PullParams p) {
  SKETCHFAST_SHARED_MEMORY(shared);
  PullMemory<M>& memory = *reinterpret_cast<PullMemory<M>*>(shared);
  const Embeddings& e = p.embeddings;
  const int64_t chunks = ceil_div(e.dimensions, 16 * M), lines = ceil_div(e.batch, 16 * M);
  const bool of_query = blockIdx.x < chunks * lines;
  const int64_t tile = of_query ? blockIdx.x : blockIdx.x - chunks * lines;
  const int64_t first_line = tile / chunks * (16 * M);
  const int axis = static_cast<int>(tile % chunks) * (16 * M);
  const int row = threadIdx.x / 16 * M, column = threadIdx.x % 16 * M;
  const float* own = of_query ? e.query : e.gallery;
  const auto inside = [&](int r, int c) {
    return first_line + row + r < e.batch && axis + column + c < e.dimensions;
  };
  float x[M][M], sum[M][M] = {};
#pragma unroll
  for (int r = 0; r < M; ++r) {
#pragma unroll
    for (int c = 0; c < M; ++c) {
      const int64_t at = (first_line + row + r) * e.dimensions + axis + column + c;
      x[r][c] = inside(r, c) ? own[at] : 0.0f;
    }
  }
#pragma unroll 1
  for (int64_t first_term = 0; first_term < e.batch; first_term += PullMemory<M>::kSlab) {
    fill_slab<M>(memory, p, of_query, first_line, first_term, axis);
    __syncthreads();
#pragma unroll 4
    for (int term = 0; term < PullMemory<M>::kSlab; ++term) {
      float by[M], y[M];
#pragma unroll
      for (int k = 0; k < M; ++k) {
        by[k] = memory.pull[term][row + k];
        y[k] = memory.other[term][column + k];
      }
#pragma unroll
      for (int r = 0; r < M; ++r) {
#pragma unroll
        for (int c = 0; c < M; ++c) sum[r][c] += by[r] * (x[r][c] - y[c]);
      }
    }
    __syncthreads();
  }
  float* out = of_query ? p.grad_query : p.grad_gallery;
#pragma unroll
  for (int r = 0; r < M; ++r) {
#pragma unroll
    for (int c = 0; c < M; ++c) {
      if (!inside(r, c)) continue;
      out[(first_line + row + r) * e.dimensions + axis + column + c] = sum[r][c];
    }
  }
}

// --- counting the active triplets of an anchor
//
// With g the teacher's distances and d those of the anchor, over all other columns:
//   c_j = #{k: g_k > g_j, d_k < d_j + m}, c'_k = #{j: g_j < g_k, d_j + m > d_k},
// t and t' the same over equal g: W = 2 (c - c') + (t - t'), active = sum 2 c + t.
// A CTA an anchor sorts its columns by (g, d) in shared memory. Then c counts pairs of positions
// p < q: all of them, a column a lane (`pairs`), or merging blocks of positions sorted by d, where
// counts are ranks found by bisection (`tree`). Columns of equal g are a run sorted by d: what the
// positions count there is taken back and t put in its place.

struct CountParams {
  const float* dist;  // [batch, batch]
  Teacher teacher;
  int64_t batch;
  float margin;
  bool tree;
  int columns_a_lane;  // 1 or 4, for `pairs`
  int32_t* weights;    // [batch, batch]
  Totals totals;
};

// A float as an integer of the same order; -0 as 0.
__device__ inline uint32_t ordered(float x) {
  uint32_t bits;
  x += 0.0f;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline uint64_t ordered(double x) {
  uint64_t bits;
  x += 0.0;
  memcpy(&bits, &x, sizeof bits);
  return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}
__device__ inline float from_ordered(uint32_t bits) {
  bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// What columns are sorted by: the teacher's distance, then ours. No NaN.
struct NarrowKey {  // teachers up to float32
  uint64_t bits;

  static __device__ NarrowKey of(double g, float d) {
    return {uint64_t(ordered(static_cast<float>(g))) << 32 | ordered(d)};
  }
  __device__ uint64_t teacher() const { return bits >> 32; }
  __device__ float dist() const { return from_ordered(static_cast<uint32_t>(bits)); }
  __device__ bool operator<(const NarrowKey& other) const { return bits < other.bits; }
};
struct WideKey {  // of 32-bit words, which leave no gaps
  uint32_t high, low, own;

  static __device__ WideKey of(double g, float d) {
    const uint64_t bits = ordered(g);
    return {static_cast<uint32_t>(bits >> 32), static_cast<uint32_t>(bits), ordered(d)};
  }
  __device__ uint64_t teacher() const { return uint64_t(high) << 32 | low; }
  __device__ float dist() const { return from_ordered(own); }
  __device__ bool operator<(const WideKey& other) const {
    return teacher() < other.teacher() || (teacher() == other.teacher() && own < other.own);
  }
};

// Tells the compiler that an address is one of shared memory: loads of any memory are slower.
template <typename T>
__device__ inline T* in_shared(T* address) {
#if defined(__CUDACC__)
  __builtin_assume(__isShared(address));
#endif
  return address;
}

// How many of `count` leading elements are so, where none is after the first that is not.
template <typename Test>
__device__ inline int leading(int count, Test test) {
  int found = 0;
  while (count > 1) {  // between `found` and `found + count` of them
    const int half = count / 2;
    if (test(found + half - 1)) found += half;
    count -= half;
  }
  if (count > 0 && test(found)) ++found;
  return found;
}

// Two halves of equal length (but for the end of the array) that a level merges.
struct Halves {
  int first, middle, end;

  __device__ Halves(int position, int length, int count) {
    first = position & ~(2 * length - 1);
    middle = first + length < count ? first + length : count;
    end = middle + length < count ? middle + length : count;
  }
};

// Shared memory of an anchor. Sorting goes from one half of it to the other and back; then the half
// that is free takes counts and distances, and the keys make room for the tree's second half.
// Halves are offsets from one address, so that the compiler knows that all this is shared memory.
template <typename Key>
struct RowMemory {
  Reduction* reduction;
  Key* all_keys;                // of both halves
  uint16_t* all_columns;        // likewise
  int count, padded, used = 0;  // used: where the half that holds the row begins, 0 or `padded`

  SKETCHFAST_HD RowMemory(unsigned char* base, size_t* bytes, int64_t columns_of_row) {
    Arena arena{base, 0};
    count = static_cast<int>(columns_of_row);
    padded = (count + 3) / 4 * 4;
    reduction = arena.take<Reduction>(1);
    all_keys = arena.take<Key>(2 * padded);
    all_columns = arena.take<uint16_t>(2 * padded);
    if (bytes) *bytes = arena.used;
  }

  __device__ Key* keys() const { return in_shared(all_keys + used); }
  __device__ Key* free_keys() const { return all_keys + (padded - used); }
  __device__ uint16_t* columns() const { return all_columns + used; }
  __device__ uint16_t* free_columns() const { return all_columns + (padded - used); }
  __device__ void swap() { used = padded - used; }
};

// 1 where a > b, both finite: the sign of a difference, which is half the cost of a comparison.
__device__ inline int greater(float a, float b) {
  const float difference = b - a;
  uint32_t bits;
  memcpy(&bits, &difference, sizeof bits);
  return static_cast<int>(bits >> 31);
}

// `pairs`: sums of R columns a lane over all positions before and after. All finite, but for dist
// infinite and reach -infinite from `count` to the next multiple of four.
template <int R>
__device__ inline int64_t count_pairs(int count, const float* dist, const float* reach,
                                      int32_t* counts) {
  const int padded = (count + 3) / 4 * 4;
  int64_t active = 0;
  for (int first = warp_index() * kWarp * R; first < count; first += blockDim.x * R) {
    const int last = first + kWarp * R;  // positions of this warp end here
    float d[R], s[R];
    int plus[R] = {}, minus[R] = {};
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int p = first + r * kWarp + lane_index();
      d[r] = p < count ? dist[p] : 0.0f;
      s[r] = p < count ? reach[p] : 0.0f;
    }
#pragma unroll 2
    for (int q = 0; q < first; q += 4) {
      const Four other = *reinterpret_cast<const Four*>(reach + q);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int r = 0; r < R; ++r) minus[r] += greater(other.value[k], d[r]);
      }
    }
#pragma unroll 1
    for (int q = first; q < last && q < count; ++q) {
      const float other_dist = dist[q], other_reach = reach[q];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int p = first + r * kWarp + lane_index();
        minus[r] += q < p && other_reach > d[r];
        plus[r] += q > p && s[r] > other_dist;
      }
    }
#pragma unroll 2
    for (int q = last; q < padded; q += 4) {
      const Four other = *reinterpret_cast<const Four*>(dist + q);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int r = 0; r < R; ++r) plus[r] += greater(s[r], other.value[k]);
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int p = first + r * kWarp + lane_index();
      if (p >= count) continue;
      counts[p] += 2 * (plus[r] - minus[r]);
      active += 2 * plus[r];
    }
  }
  return active;
}

// Distances and the positions they had, in shared memory.
struct Block {
  float* dist;
  uint16_t* position;
};

// `tree`: `from` starts by position; level by level blocks sorted by distance move between the two.
__device__ inline int64_t count_tree(int count, float margin, Block from, Block to,
                                     int32_t* counts) {
  int64_t active = 0;
  for (int length = 1; length < count; length *= 2) {
    for (int at = threadIdx.x; at < count; at += blockDim.x) {
      const Halves h(at, length, count);
      const float mine = from.dist[at];
      const uint16_t p = from.position[at];
      int place;
      if (at < h.middle) {  // nearer to the teacher: drawn near, those of the other half pushed off
        const float* other = in_shared(from.dist + h.middle);
        const int rank = leading(h.end - h.middle, [&](int k) { return other[k] < mine; });
        const int more = leading(h.end - h.middle - rank,
                                 [&](int k) { return is_active(mine, other[rank + k], margin); });
        counts[p] += 2 * (rank + more);
        active += 2 * (rank + more);
        place = at + rank;
      } else {
        const float* other = in_shared(from.dist + h.first);
        const int rank = leading(h.middle - h.first, [&](int j) { return !(mine < other[j]); });
        const int idle = leading(rank, [&](int j) { return !is_active(other[j], mine, margin); });
        counts[p] -= 2 * (h.middle - h.first - idle);
        place = h.first + (at - h.middle) + rank;
      }
      to.dist[place] = mine;
      to.position[place] = p;
    }
    __syncthreads();
    const Block merged = to;
    to = from;
    from = merged;
  }
  return active;
}

// A term of <W, D>: an infinite distance that no active triplet holds counts nothing, NaN shows.
__device__ inline double weighted(int32_t weight, float dist) {
  if (weight == 0 && dist - dist != 0 && dist == dist) return 0;
  return static_cast<double>(weight) * dist;
}

// Column j of anchor i against every other column, as the definition says it, NaN and all. Returns
// the active triplets that draw j near.
__device__ inline int64_t count_column(const CountParams& p, int64_t i, int64_t j,
                                       int32_t* weight) {
  const float* row = p.dist + i * p.batch;
  const float mine = row[j];
  const double g = p.teacher.at(i, j);
  int32_t drawn = 0, pushed = 0;
#pragma unroll 1
  for (int64_t k = 0; k < p.batch; ++k) {
    if (k == i || k == j) continue;
    const float other = row[k];
    const double other_g = p.teacher.at(i, k);
    const bool before = g <= other_g, after = other_g <= g;
    if (is_active(mine, other, p.margin)) drawn += before + !after;
    if (is_active(other, mine, p.margin)) pushed += after + !before;
  }
  *weight = drawn - pushed;
  return drawn;
}

// Writes the weight of column j of anchor i; adds its term and its active triplets.
__device__ inline void take_column(const CountParams& p, int64_t i, int64_t j, double* sum,
                                   int64_t* active) {
  int32_t weight = 0;
  if (i != j) {
    *active += count_column(p, i, j, &weight);
    *sum += weighted(weight, p.dist[i * p.batch + j]);
  }
  p.weights[i * p.batch + j] = weight;
}

// The anchor's columns into the first half, unsorted. Whether there is a NaN.
template <typename Key>
__device__ inline bool load_row(const CountParams& p, int64_t i, const RowMemory<Key>& memory) {
  bool nan = false;
  for (int k = threadIdx.x; k < memory.count; k += blockDim.x) {
    const int64_t j = k + (k >= i);
    const float d = p.dist[i * p.batch + j];
    const double g = p.teacher.at(i, j);
    nan = nan || d != d || g != g;
    memory.keys()[k] = Key::of(g, d);
    memory.columns()[k] = static_cast<uint16_t>(j);
  }
  return nan;
}

// Merges until all is sorted; afterwards the first half holds it.
template <typename Key>
__device__ inline void sort_row(RowMemory<Key>& memory) {
  for (int length = 1; length < memory.count; length *= 2) {
    const Key* keys = memory.keys();
    for (int at = threadIdx.x; at < memory.count; at += blockDim.x) {
      const Halves h(at, length, memory.count);
      const Key mine = keys[at];
      int to;
      if (at < h.middle) {
        to = at + leading(h.end - h.middle, [&](int k) { return keys[h.middle + k] < mine; });
      } else {
        to = h.first + (at - h.middle) +
             leading(h.middle - h.first, [&](int k) { return !(mine < keys[h.first + k]); });
      }
      memory.free_keys()[to] = mine;
      memory.free_columns()[to] = memory.columns()[at];
    }
    memory.swap();
    __syncthreads();
  }
}

// What a position's run of equal teacher distances adds to c - c' and to the active triplets, less
// what counting by positions will give them there.
template <typename Key>
__device__ inline int32_t count_run(const Key* keys, int count, int p, float margin,
                                    int64_t* active) {
  const uint64_t teacher = keys[p].teacher();
  const bool alone = (p == 0 || keys[p - 1].teacher() != teacher) &&
                     (p + 1 == count || keys[p + 1].teacher() != teacher);
  if (alone) return 0;
  const float mine = keys[p].dist();
  const int first = leading(p, [&](int k) { return keys[k].teacher() < teacher; });
  const int end = p + leading(count - p, [&](int k) { return keys[p + k].teacher() == teacher; });
  // The run is sorted by distance: the columns that p, drawn near, pushes off come first in it, and
  // those that do not push p off as well.
  const int drawn =
      leading(end - first, [&](int k) { return is_active(mine, keys[first + k].dist(), margin); });
  const int idle =
      leading(end - first, [&](int k) { return !is_active(keys[first + k].dist(), mine, margin); });
  const int self = is_active(mine, mine, margin);
  const int drawn_after = first + drawn > p + 1 ? first + drawn - (p + 1) : 0;
  const int pushed_before = first + idle < p ? p - (first + idle) : 0;
  *active += (drawn - self) - 2 * drawn_after;
  return (drawn - self) - (end - first - idle - self) - 2 * (drawn_after - pushed_before);
}

// Counts the sorted row. Writes its weights; adds its terms and its active triplets.
template <typename Key>
__device__ inline void count_row(const CountParams& p, int64_t i, const RowMemory<Key>& memory,
                                 double* sum, int64_t* active) {
  const int count = memory.count, padded = memory.padded;
  const Block by_position{reinterpret_cast<float*>(memory.free_keys()), memory.free_columns()};
  float* const second = reinterpret_cast<float*>(memory.keys());
  int32_t* counts = reinterpret_cast<int32_t*>(by_position.dist + padded);
  bool finite = true;
  for (int at = threadIdx.x; at < count; at += blockDim.x) {
    const float d = memory.keys()[at].dist(), reach = d + p.margin;
    counts[at] = count_run(memory.keys(), count, at, p.margin, active);
    by_position.dist[at] = d;
    by_position.position[at] = static_cast<uint16_t>(at);
    finite = finite && d - d == 0 && reach - reach == 0;
  }
  // After this barrier only the columns are still to be read of the keys' half.
  if (__syncthreads_or(!finite) || p.tree) {
    const Block merged{second, reinterpret_cast<uint16_t*>(second + padded)};
    *active += count_tree(count, p.margin, by_position, merged, counts);
  } else {
    float* const dist = by_position.dist;
    for (int at = threadIdx.x; at < padded; at += blockDim.x) {
      if (at >= count) dist[at] = INFINITY;
      second[at] = at < count ? dist[at] + p.margin : -INFINITY;
    }
    __syncthreads();
    *active += p.columns_a_lane == 4 ? count_pairs<4>(count, dist, second, counts)
                                     : count_pairs<1>(count, dist, second, counts);
    __syncthreads();
  }
  for (int at = threadIdx.x; at < count; at += blockDim.x) {
    const int64_t to = i * p.batch + memory.columns()[at];
    p.weights[to] = counts[at];
    *sum += weighted(counts[at], p.dist[to]);
  }
}

constexpr int kMostThreads = 1024;

template <typename Key>
__global__ void __launch_bounds__(kMostThreads)
    count_kernel(const __grid_constant__ CountParams p) {
  SKETCHFAST_SHARED_MEMORY(shared);
  RowMemory<Key> memory(shared, nullptr, p.batch - 1);
  const int64_t i = blockIdx.x;
  double sum = 0;
  int64_t active = 0;
  if (__syncthreads_or(load_row(p, i, memory))) {  // NaN has no place in an order
    for (int64_t j = threadIdx.x; j < p.batch; j += blockDim.x) take_column(p, i, j, &sum, &active);
  } else {
    if (threadIdx.x == 0) p.weights[i * p.batch + i] = 0;
    sort_row(memory);
    count_row(p, i, memory, &sum, &active);
  }
  if (p.batch < 3) sum = 0;  // no triplets: not even NaN is looked at
  finish(p.totals, sum, active, *memory.reduction);
}

// Of batches whose rows shared memory does not hold: a column a thread.
__global__ void __launch_bounds__(kThreads)
    count_columns_kernel(const __grid_constant__ CountParams p) {
  SKETCHFAST_SHARED_MEMORY(shared);
  const int64_t chunks = ceil_div(p.batch, kThreads);
  const int64_t j = blockIdx.x % chunks * kThreads + threadIdx.x;
  double sum = 0;
  int64_t active = 0;
  if (j < p.batch) take_column(p, blockIdx.x / chunks, j, &sum, &active);
  if (p.batch < 3) sum = 0;
  finish(p.totals, sum, active, *reinterpret_cast<Reduction*>(shared));
}

// --- sampled triplets

constexpr int kSampleWarps = 4;

// ||x - y||^2, in every lane of the warp.
__device__ inline float square_of_warp(const float* x, const float* y, int dimensions) {
  float sum = 0;
  for (int axis = lane_index(); axis < dimensions; axis += kWarp) {
    const float difference = x[axis] - y[axis];
    sum += difference * difference;
  }
  return sum_of_warp(sum);
}
__device__ inline float dist_of_warp(const Embeddings& e, int64_t i, int64_t j) {
  const float square = square_of_warp(e.query_row(i), e.gallery_row(j), e.dimensions);
  return e.squared ? square : sqrtf(square);
}

// The term of a triplet; adds it where it is active, or NaN.
__device__ inline bool add_term(float drawn, float pushed, float margin, double wide_margin,
                                double* sum) {
  const bool active = is_active(drawn, pushed, margin);
  const double gap = static_cast<double>(drawn) - pushed + wide_margin;
  if (active || gap != gap) *sum += gap;
  return active;
}

struct SampledParams {
  Embeddings embeddings;  // or
  const float* dist;      // [batch, batch]
  Teacher teacher;
  int64_t batch, samples;
  const int64_t* seed;
  float margin;
  double wide_margin;
  int parts;         // warps an anchor
  int8_t* active;    // [batch, samples]
  int32_t* weights;  // [batch, batch]
  Totals totals;
};

// j, k of a sample in the order of its triplet: which is drawn near and which pushed off.
__device__ inline Pair drawn_and_pushed(const SampledParams& p, int64_t i, int64_t sample,
                                        bool* nearer) {
  const Pair pair = sampled_pair(static_cast<uint64_t>(*p.seed), i, sample, p.batch);
  *nearer = p.teacher.at(i, pair.j) <= p.teacher.at(i, pair.k);
  return *nearer ? pair : Pair{pair.k, pair.j};
}

// Of embeddings: a warp a triplet.
__global__ void __launch_bounds__(kSampleWarps* kWarp)
    sampled_kernel(const __grid_constant__ SampledParams p) {
  SKETCHFAST_SHARED_MEMORY(shared);
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kSampleWarps + warp_index();
  const int64_t i = unit / p.parts;
  double sum = 0;
  for (int64_t s = unit % p.parts; i < p.batch && s < p.samples; s += p.parts) {
    if (p.batch < 3) {
      if (lane_index() == 0) p.active[i * p.samples + s] = 0;
      continue;
    }
    bool nearer;
    const Pair triplet = drawn_and_pushed(p, i, s, &nearer);
    const float drawn = dist_of_warp(p.embeddings, i, triplet.j);
    const float pushed = dist_of_warp(p.embeddings, i, triplet.k);
    const bool active = add_term(drawn, pushed, p.margin, p.wide_margin, &sum);
    if (lane_index() == 0) p.active[i * p.samples + s] = active ? (nearer ? 1 : -1) : 0;
  }
  if (lane_index() > 0) sum = 0;  // all lanes hold the same
  finish(p.totals, sum, 0, *reinterpret_cast<Reduction*>(shared));
}

// Of distances: a CTA an anchor, whose row of weights it counts up.
__global__ void __launch_bounds__(kThreads)
    sampled_matrix_kernel(const __grid_constant__ SampledParams p) {
  SKETCHFAST_SHARED_MEMORY(shared);
  const int64_t i = blockIdx.x;
  const float* dist = p.dist + i * p.batch;
  int32_t* weights = p.weights + i * p.batch;
  for (int64_t j = threadIdx.x; j < p.batch; j += kThreads) weights[j] = 0;
  __syncthreads();
  double sum = 0;
  for (int64_t s = threadIdx.x; p.batch >= 3 && s < p.samples; s += kThreads) {
    bool nearer;
    const Pair triplet = drawn_and_pushed(p, i, s, &nearer);
    if (!add_term(dist[triplet.j], dist[triplet.k], p.margin, p.wide_margin, &sum)) continue;
    atomicAdd(weights + triplet.j, 1);
    atomicAdd(weights + triplet.k, -1);
  }
  finish(p.totals, sum, 0, *reinterpret_cast<Reduction*>(shared));
}

// --- pairs: query i and gallery row i

enum class Mining : int32_t { kAll, kHardest, kSemihard, kRandom };

struct PairsParams {
  Embeddings embeddings;
  const float* dist;      // [batch, batch]; not for random negatives
  const int64_t* labels;  // or null
  const int64_t* seed;
  Mining mining;
  float margin;
  double wide_margin;
  int32_t* state;  // the weights [batch, batch] of all negatives, else the chosen one [batch]
  Totals totals;

  __device__ bool is_negative(int64_t i, int64_t k) const {
    return labels ? labels[i] != labels[k] : i != k;
  }
};

// The nearest of some negatives, of equal ones the first; NaN counts as infinitely far.
struct Nearest {
  float dist;
  int64_t column;  // -1: none

  __device__ void take(float other_dist, int64_t other_column) {
    if (other_column < 0) return;
    if (column >= 0 && other_dist > dist) return;
    if (column >= 0 && other_dist == dist && other_column > column) return;
    dist = other_dist;
    column = other_column;
  }
  __device__ void take_warp() {
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const float other_dist = __shfl_xor_sync(kAllLanes, dist, step);
      take(other_dist, __shfl_xor_sync(kAllLanes, column, step));
    }
  }
};

struct PairsMemory {
  Reduction reduction;
  Nearest nearest[kThreads / kWarp];
};

__device__ inline void take_all_pairs(const PairsParams& p, int64_t i, double* sum,
                                      int64_t* considered, PairsMemory& memory) {
  const int64_t batch = p.embeddings.batch;
  const float* dist = p.dist + i * batch;
  int64_t active = 0;
  for (int64_t k = threadIdx.x; k < batch; k += kThreads) {
    const bool negative = p.is_negative(i, k);
    const bool pushed = negative && add_term(dist[i], dist[k], p.margin, p.wide_margin, sum);
    *considered += negative;
    active += pushed;
    if (k != i) p.state[i * batch + k] = pushed ? -1 : 0;
  }
  double none = 0;
  add_up(&none, &active, memory.reduction);
  if (threadIdx.x == 0) p.state[i * batch + i] = static_cast<int32_t>(active);
}

// In thread 0.
__device__ inline int64_t nearest_negative(const PairsParams& p, int64_t i, PairsMemory& memory) {
  const int64_t batch = p.embeddings.batch;
  const float* dist = p.dist + i * batch;
  const float own = dist[i];
  Nearest nearest{0, -1};
  for (int64_t k = threadIdx.x; k < batch; k += kThreads) {
    const float d = dist[k];
    const bool allowed = p.is_negative(i, k) &&
                         (p.mining == Mining::kHardest || (d > own && is_active(own, d, p.margin)));
    if (allowed) nearest.take(d == d ? d : INFINITY, k);
  }
  nearest.take_warp();
  if (lane_index() == 0) memory.nearest[warp_index()] = nearest;
  __syncthreads();
  for (int w = 0; w < warp_count(); ++w)
    nearest.take(memory.nearest[w].dist, memory.nearest[w].column);
  return nearest.column;
}

// In warp 0 of the CTA.
__device__ inline int64_t random_negative(const PairsParams& p, int64_t i) {
  const int64_t batch = p.embeddings.batch;
  const uint32_t word = philox(static_cast<uint64_t>(*p.seed), static_cast<uint32_t>(i), 0).word[0];
  if (!p.labels) {
    if (batch < 2) return -1;
    const int64_t k = below(word, batch - 1);
    return k + (k >= i);
  }
  int64_t count = 0;
  for (int64_t k = lane_index(); k < batch; k += kWarp) count += p.is_negative(i, k);
  count = sum_of_warp(count);
  if (count == 0) return -1;
  int64_t left = below(word, count), first = 0;
  for (;; first += kWarp) {  // ends: there are more than `left` negatives
    const int64_t k = first + lane_index();
    unsigned found = __ballot_sync(kAllLanes, k < batch && p.is_negative(i, k));
    if (left >= __popc(found)) {
      left -= __popc(found);
      continue;
    }
    for (; left > 0; --left) found &= found - 1;
    return first + __ffs(found) - 1;
  }
}

__global__ void __launch_bounds__(kThreads) pairs_kernel(const __grid_constant__ PairsParams p) {
  SKETCHFAST_SHARED_MEMORY(shared);
  PairsMemory& memory = *reinterpret_cast<PairsMemory*>(shared);
  const int64_t i = blockIdx.x, batch = p.embeddings.batch;
  double sum = 0;
  int64_t considered = 0;
  if (p.mining == Mining::kAll) {
    take_all_pairs(p, i, &sum, &considered, memory);
  } else {
    int64_t chosen = -1;
    float own = 0, other = 0;
    if (p.mining != Mining::kRandom) {
      chosen = nearest_negative(p, i, memory);
      if (chosen >= 0) {
        own = p.dist[i * batch + i];
        other = p.dist[i * batch + chosen];
      }
    } else if (warp_index() == 0) {
      chosen = random_negative(p, i);
      if (chosen >= 0) {
        own = dist_of_warp(p.embeddings, i, i);
        other = dist_of_warp(p.embeddings, i, chosen);
      }
    }
    if (threadIdx.x == 0) {
      const bool active = chosen >= 0 && add_term(own, other, p.margin, p.wide_margin, &sum);
      considered = chosen >= 0;
      p.state[i] = active ? static_cast<int32_t>(chosen) : -1;
    }
  }
  finish(p.totals, sum, considered, memory.reduction);
}

// --- gradients of few triplets: those of a list, made again, that touch a CTA's rows
//
// A CTA has up to kOwnRows rows of one side's gradient by kThreads dimensions. It goes through the
// list (of its own anchors, or of all for gallery rows), queues in its order what touches its rows,
// and adds up the queue in that order: no atomics, no B x B.

constexpr int kOwnRows = 16;
constexpr int kQueue = 4 * kThreads;

// The triplets of triplet_sampled_bwd.
struct SampledList {
  const int8_t* active;  // [batch, samples]
  const int64_t* seed;
  int64_t samples, batch;

  __device__ bool at(int64_t anchor, int64_t sample, Pair* triplet) const {
    const int8_t r = active[anchor * samples + sample];
    if (r == 0) return false;
    const Pair pair = sampled_pair(static_cast<uint64_t>(*seed), anchor, sample, batch);
    *triplet = r > 0 ? pair : Pair{pair.k, pair.j};
    return true;
  }
};

// Those of triplet_chosen_bwd.
struct ChosenList {
  const int32_t* chosen;   // [batch], -1: none
  int64_t samples, batch;  // samples: 1

  __device__ bool at(int64_t anchor, int64_t, Pair* triplet) const {
    const int64_t k = chosen[anchor];
    *triplet = {anchor, k};
    return k >= 0 && k < batch;
  }
};

template <typename List>
struct ListParams {
  Embeddings embeddings;
  List list;
  const float* scale;
  int rows;  // a CTA
  float *grad_query, *grad_gallery;
};

struct ListMemory {
  double sum[kOwnRows][kThreads];  // of many triplets with the same pair, whose terms cancel
  int64_t other[kQueue];
  float pull[kQueue];
  int32_t row[kQueue];
  int32_t of_warp[kThreads / kWarp];
};

// What a CTA of list_kernel works on.
template <typename List>
struct ListWork {
  const ListParams<List>& p;
  ListMemory& memory;
  bool of_query;
  int64_t first;  // of the rows
  int rows;
  int64_t axis;  // this thread's
  int queued = 0;

  __device__ const float* own_row(int row) const {
    const Embeddings& e = p.embeddings;
    return of_query ? e.query_row(first + row) : e.gallery_row(first + row);
  }
  __device__ const float* other_row(int64_t row) const {
    const Embeddings& e = p.embeddings;
    return of_query ? e.gallery_row(row) : e.query_row(row);
  }

  // Queues what an item of the list does to the CTA's rows, in the order of threads.
  __device__ void queue(int64_t item, int64_t end) {
    Pair triplet{-1, -1};
    const int64_t anchor = item < end ? item / p.list.samples : 0;
    const bool found = item < end && p.list.at(anchor, item % p.list.samples, &triplet);
    int64_t row[2];
    bool hit[2];
    unsigned hits[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      row[k] = (of_query ? anchor : k == 0 ? triplet.j : triplet.k) - first;
      hit[k] = found && row[k] >= 0 && row[k] < rows;
      hits[k] = __ballot_sync(kAllLanes, hit[k]);
    }
    const unsigned before = (1u << lane_index()) - 1;
    if (lane_index() == 0) memory.of_warp[warp_index()] = __popc(hits[0]) + __popc(hits[1]);
    __syncthreads();
    int at = queued + __popc(hits[0] & before) + __popc(hits[1] & before);
    for (int w = 0; w < kThreads / kWarp; ++w) {
      if (w < warp_index()) at += memory.of_warp[w];
      queued += memory.of_warp[w];
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (!hit[k]) continue;
      memory.row[at] = static_cast<int32_t>(row[k]);
      memory.other[at] = of_query ? (k == 0 ? triplet.j : triplet.k) : anchor;
      memory.pull[at] = k == 0 ? 1.0f : -1.0f;
      ++at;
    }
    __syncthreads();
  }

  // Adds the queue to the sums and empties it.
  __device__ void add_queue() {
    const Embeddings& e = p.embeddings;
    const float scale = *p.scale;
    for (int k = warp_index(); k < queued; k += kThreads / kWarp) {
      const float* other = other_row(memory.other[k]);
      const float square =
          e.squared ? 0.0f : square_of_warp(own_row(memory.row[k]), other, e.dimensions);
      if (lane_index() == 0) memory.pull[k] = pull(scale * memory.pull[k], square, e.squared);
    }
    __syncthreads();
    if (axis < e.dimensions) {
#pragma unroll 4
      for (int k = 0; k < queued; ++k) {
        const int row = memory.row[k];
        const float difference = own_row(row)[axis] - other_row(memory.other[k])[axis];
        memory.sum[row][threadIdx.x] += double(memory.pull[k]) * difference;
      }
    }
    queued = 0;
    __syncthreads();
  }
};

template <typename List>
__global__ void __launch_bounds__(kThreads)
    list_kernel(const __grid_constant__ ListParams<List> p) {
  SKETCHFAST_SHARED_MEMORY(shared);
  ListMemory& memory = *reinterpret_cast<ListMemory*>(shared);
  const Embeddings& e = p.embeddings;
  const int64_t chunks = ceil_div(e.dimensions, kThreads), tiles = ceil_div(e.batch, p.rows);
  const bool of_query = blockIdx.x < tiles * chunks;
  const int64_t tile = of_query ? blockIdx.x : blockIdx.x - tiles * chunks;
  ListWork<List> work{p, memory, of_query, tile / chunks * p.rows, 0, 0};
  const int64_t left = e.batch - work.first;
  work.rows = static_cast<int>(left < p.rows ? left : p.rows);
  work.axis = tile % chunks * kThreads + threadIdx.x;
  for (int row = 0; row < work.rows; ++row) memory.sum[row][threadIdx.x] = 0;
  const int64_t begin = of_query ? work.first * p.list.samples : 0;
  const int64_t end = (of_query ? work.first + work.rows : e.batch) * p.list.samples;
  for (int64_t item = begin; item < end; item += kThreads) {
    work.queue(item + threadIdx.x, end);
    if (work.queued > kQueue - 2 * kThreads) work.add_queue();
  }
  work.add_queue();
  if (work.axis >= e.dimensions) return;
  float* out = of_query ? p.grad_query : p.grad_gallery;
  for (int row = 0; row < work.rows; ++row) {
    out[(work.first + row) * e.dimensions + work.axis] =
        static_cast<float>(memory.sum[row][threadIdx.x]);
  }
}

}  // namespace cuda
}  // namespace triplet
}  // namespace sketchfast
