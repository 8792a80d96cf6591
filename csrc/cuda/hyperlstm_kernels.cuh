// CUDA kernels of the HyperLSTM between its matrix products (sketchfast/kernels/hyperlstm_loop.py
// says what each computes): no torch types, so that tests/cuda_emulator compiles this very source
// with a host compiler. hyperlstm_launch.h chooses kernels and sizes, hyperlstm.cu is the door to
// torch.
//
// A team of threads has one row of the batch, at all steps of a call; what it keeps between two
// passes over the row's units lies in registers where a thread has four neighbouring units (rows up
// to kMostNarrow, everything aligned), else in shared memory. Nothing is added atomically and the
// order of sums depends on sizes alone: results repeat bit for bit.
#pragma once

#include <cstring>

#include "../hyperlstm_math.h"
#include "device.cuh"

namespace sketchfast {
namespace hyperlstm {
namespace cuda {

using namespace device;

constexpr int kMostThreads = 512;  // a CTA; leaves a thread 128 registers
constexpr int kUnits = 4;          // a thread's units where it has neighbours
constexpr int kMostNarrow = kUnits * kMostThreads;
constexpr int kGates = 4;     // i, j, f, o
constexpr int kMostSums = 8;  // added up over a team at a time

// --- units: V neighbours in memory, of any dtype; arithmetic is float32

template <int V>
struct alignas(sizeof(float) * V) Floats {
  float value[V];
  __device__ float& operator[](int k) { return value[k]; }
  __device__ float operator[](int k) const { return value[k]; }
};

template <typename D, int V>
struct alignas(sizeof(D) * V) Packed {
  D value[V];
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void put(float* to, float x) { *to = x; }
__device__ inline void put(__half* to, float x) { *to = __float2half_rn(x); }
__device__ inline void put(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

#if defined(__CUDACC__)
// What a GPU moves at once.
template <size_t kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};
#endif

// Of memory that is aligned for it.
template <typename Units>
__device__ inline Units read(const void* from) {
#if defined(__CUDACC__)
  return *static_cast<const Units*>(from);
#else
  emulator::check_aligned(from, alignof(Units));
  Units units;
  std::memcpy(&units, from, sizeof(Units));
  return units;
#endif
}

// To global memory. An assignment the compiler would split into one store a unit or two.
template <typename Units>
__device__ inline void write_global(void* to, const Units& units) {
#if defined(__CUDACC__)
  typename WordOf<sizeof(Units)>::type word;
  memcpy(&word, &units, sizeof(Units));
  __stwb(static_cast<decltype(word)*>(to), word);
#else
  emulator::check_aligned(to, alignof(Units));
  std::memcpy(to, &units, sizeof(Units));
#endif
}

template <int V, typename D>
__device__ inline Floats<V> load_units(const D* from) {
  const auto packed = read<Packed<D, V>>(from);
  Floats<V> out;
#pragma unroll
  for (int k = 0; k < V; ++k) out[k] = to_float(packed.value[k]);
  return out;
}

template <int V, typename D>
__device__ inline void store_units(D* to, const Floats<V>& units) {
  Packed<D, V> packed;
#pragma unroll
  for (int k = 0; k < V; ++k) put(&packed.value[k], units[k]);
  write_global(to, packed);
}

// In shared memory, or wherever the compiler finds it to be.
template <int V>
__device__ inline void keep_units(float* to, const Floats<V>& units) {
#if defined(__CUDACC__)
  *reinterpret_cast<Floats<V>*>(to) = units;
#else
  emulator::check_aligned(to, alignof(Floats<V>));
  std::memcpy(to, &units, sizeof(units));
#endif
}

template <int V>
__device__ inline Floats<V> all_units(float value) {
  Floats<V> out;
#pragma unroll
  for (int k = 0; k < V; ++k) out[k] = value;
  return out;
}

__device__ inline float inverse_root(float x) {
#if defined(__CUDA_ARCH__)
  return rsqrtf(x);
#else
  return 1 / std::sqrt(x);
#endif
}

template <int V>
__device__ inline float sum_of_units(const Floats<V>& units) {
  float sum = units[0];
#pragma unroll
  for (int k = 1; k < V; ++k) sum += units[k];
  return sum;
}

// Rows of contiguous units; strides in elements. No data: not given.
template <typename T>
struct Rows {
  T* data;
  int64_t step, row;
  __device__ T* at(int64_t s, int64_t b) const { return data + s * step + b * row; }
};

// The same where the dtype is known at run time: one access a unit and step.
struct AnyRows {
  void* data;
  Dtype dtype;
  int64_t step, row;

  template <typename T>
  __device__ T* at(int64_t s, int64_t b) const {
    return static_cast<T*>(data) + s * step + b * row;
  }
  template <int V>
  __device__ Floats<V> load(int64_t s, int64_t b, int unit) const {
    if (dtype == Dtype::kFloat32) return load_units<V>(at<float>(s, b) + unit);
    if (dtype == Dtype::kFloat16) return load_units<V>(at<__half>(s, b) + unit);
    return load_units<V>(at<__nv_bfloat16>(s, b) + unit);
  }
  template <int V>
  __device__ void store(int64_t s, int64_t b, int unit, const Floats<V>& units) const {
    if (dtype == Dtype::kFloat32) {
      store_units(at<float>(s, b) + unit, units);
    } else if (dtype == Dtype::kFloat16) {
      store_units(at<__half>(s, b) + unit, units);
    } else {
      store_units(at<__nv_bfloat16>(s, b) + unit, units);
    }
  }
};

// --- arguments

// All [.., width] float32, contiguous; null without layer norm.
struct Norm {
  const float *weight, *bias;            // [4, width]
  const float *cell_weight, *cell_bias;  // [width]
};

struct Dropout {
  const int64_t* seed;  // null: none
  uint64_t threshold;
  float scale;  // of what is kept
};

// What all kernels are told.
struct Setting {
  int batch, width, steps;
  float share;             // of a unit in a mean: 1 / width
  int64_t first;           // number of the first step
  uint32_t counter;        // of dropout, at the first step
  const int64_t* lengths;  // [batch]; null: every row takes every step
  Norm norm;
  Dropout dropout;
  float forget_bias;

  __device__ bool is_live(int s, int64_t row) const { return !lengths || first + s < lengths[row]; }
};

// What becomes of the units' tanh(j): 0 or the scale, 1 without dropout.
template <int V>
__device__ inline Floats<V> draw(const Setting& p, uint64_t seed, uint32_t stream, int s,
                                 int64_t row, int unit) {
  if (!p.dropout.seed) return all_units<V>(1.0f);
  const int64_t element = row * p.width + unit;
  const PhiloxWords words = philox(seed, p.counter + static_cast<uint32_t>(s), stream,
                                   static_cast<uint32_t>(element / 4));
  Floats<V> out;
  if (V == 1) {
    const int at = static_cast<int>(element % 4);
    const uint32_t low = at & 1 ? words.word[1] : words.word[0];
    const uint32_t high = at & 1 ? words.word[3] : words.word[2];
    out[0] = (at & 2 ? high : low) >= p.dropout.threshold ? p.dropout.scale : 0.0f;
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      out[k] = words.word[k] >= p.dropout.threshold ? p.dropout.scale : 0.0f;
    }
  }
  return out;
}

// --- a team: the threads of one row

struct Team {
  int rank, threads;
  int memory;  // where its [2][warps][kMostSums] floats of the CTA's shared memory begin
  int turn = 0;

  SKETCHFAST_HD static int64_t memory_size(int threads) {
    return 2 * (threads / kWarp) * kMostSums;
  }
};

// A number the compiler knows nothing about: what it computes from it, such as addresses, it does
// not hold in registers from one pass to the next.
__device__ inline int opaque(int number) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(number));
#endif
  return number;
}
__device__ inline int64_t opaque(int64_t number) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(number));
#endif
  return number;
}

// body(unit) for the first of every V units that this thread has: one at most unless kWide.
template <int V, bool kWide, typename Body>
__device__ inline void for_units(const Team& team, int end, Body body) {
  int unit = opaque(team.rank) * V;
  if (kWide) {
    for (; unit < end; unit += team.threads * V) body(unit);
  } else if (unit < end) {
    body(unit);
  }
}

// The warp's sum of value[lane / (32 / N)], N a power of two: with each exchange a lane gives half
// of its values away, N + 4 - log2(N) exchanges rather than 5 N.
template <int N>
__device__ inline float scattered_sum_of_warp(float (&value)[N]) {
  const int lane = lane_index();
  int step = kWarp / 2;
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2, step /= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const float mine = upper ? value[k + half] : value[k];
      const float other = upper ? value[k] : value[k + half];
      value[k] = mine + __shfl_xor_sync(kAllLanes, other, step);
    }
  }
#pragma unroll
  for (; step > 0; step /= 2) value[0] += __shfl_xor_sync(kAllLanes, value[0], step);
  return value[0];
}

// Sums over the team, in all of its threads. Every thread of the CTA takes part: a barrier.
template <int N>
__device__ inline void sum_over_team(float (&value)[N], Team& team) {
  constexpr int kSums = N <= 1 ? 1 : N <= 2 ? 2 : N <= 4 ? 4 : 8;
  constexpr int kAtOnce = kSums < 4 ? kSums : 4;
  constexpr int kLanes = kWarp / kSums;
  static_assert(N <= kMostSums, "more sums than the team has memory for");
  float part[kSums] = {};
#pragma unroll
  for (int n = 0; n < N; ++n) part[n] = value[n];
  const float sum = scattered_sum_of_warp(part);
  const int warps = team.threads / kWarp;
  SKETCHFAST_SHARED_MEMORY(shared);
  float* of_warps = reinterpret_cast<float*>(shared) + team.memory + team.turn * warps * kMostSums;
  team.turn ^= 1;  // the next sums must not overwrite what others still read
  if (lane_index() % kLanes == 0) {
    of_warps[team.rank / kWarp * kSums + lane_index() / kLanes] = sum;
  }
  __syncthreads();
  Floats<kAtOnce> total[kSums / kAtOnce] = {};
#pragma unroll 4
  for (int w = 0; w < warps; ++w) {
#pragma unroll
    for (int n = 0; n < kSums / kAtOnce; ++n) {
      const Floats<kAtOnce> add = load_units<kAtOnce>(of_warps + w * kSums + n * kAtOnce);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) total[n][k] += add[k];
    }
  }
#pragma unroll
  for (int n = 0; n < N; ++n) value[n] = total[n / kAtOnce][n % kAtOnce];
}

// What a thread keeps of its units from pass to pass: in shared memory [kCount, width], or in
// registers where it has V units at most.
template <int V, bool kInMemory, int kCount>
struct Kept {
  float* memory;
  int width;
  __device__ Kept(float* memory, int width) : memory(memory), width(width) {}
  __device__ Floats<V> get(int which, int unit) const {
    return load_units<V>(memory + which * width + unit);
  }
  __device__ void set(int which, int unit, const Floats<V>& units) {
    keep_units(memory + which * width + unit, units);
  }
};

template <int V, int kCount>
struct Kept<V, false, kCount> {
  Floats<V> held[kCount];
  __device__ Kept(float*, int) {}
  __device__ Floats<V> get(int which, int) const { return held[which]; }
  __device__ void set(int which, int, const Floats<V>& units) { held[which] = units; }
};

// Reads ahead of a barrier what is needed behind it, where there are registers to hold it.
template <int V, bool kHolds, int kCount>
struct Ahead {
  Floats<V> held[kHolds ? kCount : 1];
  __device__ Ahead() {}  // registers that hold nothing yet

  template <typename Load>
  __device__ void fetch(int which, Load load) {
    if (kHolds) held[which] = load();
  }
  template <typename Load>
  __device__ Floats<V> get(int which, Load load) const {
    return kHolds ? held[which] : load();
  }
};

// Mean and inverse deviation of a layer norm, of N arrays over the units.
template <int N>
struct Moments {
  float mean[N], inverse[N];
};

// `sum` over the thread's units becomes the mean; `square(unit, mean, to)` adds to `to` the squares
// of a unit's distances to it.
template <int V, bool kWide, int N, typename Square>
__device__ inline Moments<N> moments_of(float (&sum)[N], Team& team, int end, float share,
                                        Square square) {
  Moments<N> out;
  sum_over_team(sum, team);
  float squares[N] = {};
#pragma unroll
  for (int n = 0; n < N; ++n) out.mean[n] = sum[n] * share;
  for_units<V, kWide>(team, end, [&](int unit) { square(unit, out.mean, squares); });
  sum_over_team(squares, team);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    out.inverse[n] = inverse_root(squares[n] * share + static_cast<float>(kLayerNormEps));
  }
  return out;
}

template <int V>
__device__ inline void add_squares(const Floats<V>& units, float mean, float* to) {
#pragma unroll
  for (int k = 0; k < V; ++k) *to += (units[k] - mean) * (units[k] - mean);
}

// --- where the gates before their layer norm come from

template <typename D>
struct HyperGates {
  static constexpr bool kMain = false;
  static constexpr uint32_t kStream = kHyperStream;
  using Low = D;
  Rows<D> gates;         // with x_part the recurrent part, to which it is added
  Rows<const D> x_part;  // or null

  template <int V>
  __device__ void load(int s, int64_t row, int width, int unit, Floats<V> (&gate)[kGates]) const {
    D* at = gates.at(s, row) + unit;
#pragma unroll
    for (int g = 0; g < kGates; ++g) gate[g] = load_units<V>(at + g * width);
    if (!x_part.data) return;
    const D* from_x = x_part.at(s, row) + unit;
    Floats<V> add[kGates];
#pragma unroll
    for (int g = 0; g < kGates; ++g) add[g] = load_units<V>(from_x + g * width);
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        D rounded;  // as backward will read it
        put(&rounded, gate[g][k] + add[g][k]);
        gate[g][k] = to_float(rounded);
      }
      store_units(at + g * width, gate[g]);
    }
  }

  template <int V>
  __device__ void store_zeros(int s, int64_t row, int width, int unit) const {
    if (!x_part.data) return;
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      store_units(gates.at(s, row) + unit + g * width, all_units<V>(0.0f));
    }
  }
};

template <typename D>
struct MainGates {
  static constexpr bool kMain = true;
  static constexpr uint32_t kStream = kMainStream;
  using Low = D;
  Rows<const D> recurrent, x_part, scales;
  int64_t of_scale;   // from one of the twelve scales to the next
  const float* bias;  // [4, width]

  template <int V>
  __device__ void load(int s, int64_t row, int width, int unit, Floats<V> (&gate)[kGates]) const {
    const D* from_h = recurrent.at(s, row) + unit;
    const D* from_x = x_part.at(s, row) + unit;
    const D* scale = scales.at(s, row) + unit;
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      const Floats<V> x = load_units<V>(from_x + g * width), h = load_units<V>(from_h + g * width);
      const Floats<V> of_x = load_units<V>(scale + g * of_scale);
      const Floats<V> of_h = load_units<V>(scale + (kGates + g) * of_scale);
      const Floats<V> beta = load_units<V>(scale + (2 * kGates + g) * of_scale);
      const Floats<V> b = load_units<V>(bias + g * width + unit);
#pragma unroll
      for (int k = 0; k < V; ++k) gate[g][k] = of_x[k] * x[k] + of_h[k] * h[k] + beta[k] + b[k];
    }
  }

  template <int V>
  __device__ void store_zeros(int, int64_t, int, int) const {}
};

// --- forward

template <typename Gates>
struct ForwardParams {
  using D = typename Gates::Low;
  Setting setting;
  Gates gates;
  Rows<float> cell;   // in place
  Rows<D> hidden;     // main: of the last step alone; hyper: of every step
  AnyRows shown;      // main: out; hyper: last, whose step stride is 0
  Rows<float> cells;  // after each step
};

// Of one row in shared memory.
struct ForwardMemory {
  float* kept;

  SKETCHFAST_HD ForwardMemory(Arena& arena, int threads, int width, bool wide) {
    arena.take<float>(Team::memory_size(threads));  // first, where teams look for it
    kept = arena.take<float>(wide ? kGates * static_cast<int64_t>(width) : 0);
  }
};

// A row at a step.
template <typename Gates, int V, bool kWide>
struct ForwardStep {
  using Units = Floats<V>;
  const ForwardParams<Gates>& p;
  Team& team;
  uint64_t seed;
  int64_t row;
  int s;
  Kept<V, kWide, kGates> kept;  // the gates; then the cell in 0 and the output gate in 3
  Ahead<V, !kWide, 2 * kGates + 3> ahead;

  // Places in `ahead`: weights, biases, and
  static constexpr int kCell = 2 * kGates, kCellWeight = kCell + 1, kCellBias = kCell + 2;

  template <typename Body>
  __device__ void units(Body body) const {
    for_units<V, kWide>(team, p.setting.width, body);
  }

  __device__ Units from(const float* array, int which, int unit) const {
    return load_units<V>(array + which * p.setting.width + unit);
  }

  __device__ void read_ahead() {
    const Norm& norm = p.setting.norm;
    units([&](int unit) {
      ahead.fetch(kCell, [&] { return load_units<V>(p.cell.at(0, row) + unit); });
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        if (!norm.weight) break;
        ahead.fetch(g, [&] { return from(norm.weight, g, unit); });
        ahead.fetch(kGates + g, [&] { return from(norm.bias, g, unit); });
      }
      if (!norm.cell_weight) return;
      ahead.fetch(kCellWeight, [&] { return from(norm.cell_weight, 0, unit); });
      ahead.fetch(kCellBias, [&] { return from(norm.cell_bias, 0, unit); });
    });
  }

  // After a step at which the row is past its end.
  __device__ void store_zeros() const {
    const Units zeros = all_units<V>(0.0f);
    const bool last = s == p.setting.steps - 1;
    units([&](int unit) {
      p.gates.template store_zeros<V>(s, row, p.setting.width, unit);
      if (p.hidden.data && (last || !Gates::kMain)) {
        store_units(p.hidden.at(s, row) + unit, zeros);
      }
      if (p.shown.data && Gates::kMain) p.shown.store(s, row, unit, zeros);
      if (p.cells.data) store_units(p.cells.at(s, row) + unit, zeros);
    });
  }

  __device__ Moments<kGates> read_gates() {
    float sum[kGates] = {};
    units([&](int unit) {
      Units gate[kGates];
      p.gates.load(s, row, p.setting.width, unit, gate);
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        kept.set(g, unit, gate[g]);
        sum[g] += sum_of_units(gate[g]);
      }
    });
    read_ahead();
    if (!p.setting.norm.weight) return {};
    const Setting& setting = p.setting;
    return moments_of<V, kWide>(sum, team, setting.width, setting.share,
                                [&](int unit, const float (&mean)[kGates], float (&to)[kGates]) {
#pragma unroll
                                  for (int g = 0; g < kGates; ++g) {
                                    add_squares(kept.get(g, unit), mean[g], &to[g]);
                                  }
                                });
  }

  __device__ Units gate_of(int g, int unit, const Moments<kGates>& moments) {
    const Norm& norm = p.setting.norm;
    Units gate = kept.get(g, unit);
    if (!norm.weight) return gate;
    const Units weight = ahead.get(g, [&] { return from(norm.weight, g, unit); });
    const Units bias = ahead.get(kGates + g, [&] { return from(norm.bias, g, unit); });
#pragma unroll
    for (int k = 0; k < V; ++k) {
      gate[k] = (gate[k] - moments.mean[g]) * moments.inverse[g] * weight[k] + bias[k];
    }
    return gate;
  }

  // Leaves the new cell and the output gate in `kept`; the cells' sum over this thread's units.
  __device__ float next_cells(const Moments<kGates>& moments) {
    float sum = 0;
    units([&](int unit) {
      float* at = p.cell.at(0, row) + unit;
      Units cell = ahead.get(kCell, [&] { return load_units<V>(at); });
      const Units drop = draw<V>(p.setting, seed, Gates::kStream, s, row, unit);
      Units gate[kGates];
#pragma unroll
      for (int g = 0; g < kGates; ++g) gate[g] = gate_of(g, unit, moments);
      Units output;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const Activations<float> act =
            activate(gate[0][k], gate[1][k], gate[2][k], gate[3][k], p.setting.forget_bias);
        cell[k] = next_cell(act, cell[k], drop[k]);
        output[k] = act.output;
      }
      kept.set(0, unit, cell);
      kept.set(3, unit, output);
      store_units(at, cell);
      if (p.cells.data) store_units(p.cells.at(s, row) + unit, cell);
      sum += sum_of_units(cell);
    });
    return sum;
  }

  __device__ void store_hidden(const Moments<1>& moments) {
    const Norm& norm = p.setting.norm;
    const bool last = s == p.setting.steps - 1;
    units([&](int unit) {
      Units cell = kept.get(0, unit), hidden;
      const Units output = kept.get(3, unit);
      if (norm.cell_weight) {
        const Units weight =
            ahead.get(kCellWeight, [&] { return from(norm.cell_weight, 0, unit); });
        const Units bias = ahead.get(kCellBias, [&] { return from(norm.cell_bias, 0, unit); });
#pragma unroll
        for (int k = 0; k < V; ++k) {
          cell[k] = (cell[k] - moments.mean[0]) * moments.inverse[0] * weight[k] + bias[k];
        }
      }
#pragma unroll
      for (int k = 0; k < V; ++k) hidden[k] = hyperbolic_tangent(cell[k]) * output[k];
      if (p.hidden.data && (last || !Gates::kMain)) {
        store_units(p.hidden.at(s, row) + unit, hidden);
      }
      if (p.shown.data) p.shown.store(s, row, unit, hidden);
    });
  }

  __device__ void run() {
    const Moments<kGates> moments = read_gates();
    float sum[1] = {next_cells(moments)};
    if (!p.hidden.data && !p.shown.data) return;  // the cells were all that was wanted
    Moments<1> of_cell{};
    if (p.setting.norm.cell_weight) {
      const Setting& setting = p.setting;
      of_cell = moments_of<V, kWide>(sum, team, setting.width, setting.share,
                                     [&](int unit, const float (&mean)[1], float (&to)[1]) {
                                       add_squares(kept.get(0, unit), mean[0], &to[0]);
                                     });
    }
    store_hidden(of_cell);
  }
};

// A CTA a row.
template <typename Gates, int V, bool kWide>
__global__ void __launch_bounds__(kMostThreads, 1)
    forward_kernel(const __grid_constant__ ForwardParams<Gates> p) {
  SKETCHFAST_SHARED_MEMORY(shared);
  Arena arena{shared, 0};
  const int threads = static_cast<int>(blockDim.x), width = p.setting.width;
  const ForwardMemory memory(arena, threads, width, kWide);
  const int64_t* seed = p.setting.dropout.seed;
  const uint64_t key = seed ? static_cast<uint64_t>(*seed) : 0;
  const int64_t row = blockIdx.x;
  Team team{static_cast<int>(threadIdx.x), threads, 0};
#pragma unroll 1
  for (int s = 0; s < p.setting.steps; ++s) {
    ForwardStep<Gates, V, kWide> step{p, team, key, row, s, {memory.kept, width}, {}};
    if (p.setting.is_live(s, row)) {
      step.run();
    } else {
      step.store_zeros();
    }
  }
}

// --- where gradients of the gates before their layer norm go

template <typename D>
struct HyperGradients : HyperGates<D> {
  static constexpr int kPartials = 10, kCellPartial = 8;
  Rows<D> grad_gates;

  template <int V>
  __device__ void store(int64_t row, int width, int unit, const Floats<V> (&grad)[kGates]) const {
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      store_units(grad_gates.at(0, row) + g * width + unit, grad[g]);
    }
  }
};

template <typename D>
struct MainGradients : MainGates<D> {
  static constexpr int kPartials = 14, kCellPartial = 12;
  Rows<D> grad_recurrent, grad_x_part, grad_scales;
  int64_t of_grad_scale;

  template <int V>
  struct Factors {
    Floats<V> x, h, of_x, of_h;
  };
  template <int V>
  __device__ Factors<V> factors(int64_t row, int width, int unit, int g) const {
    const D* scale = this->scales.at(0, row) + unit + g * this->of_scale;
    return {load_units<V>(this->x_part.at(0, row) + g * width + unit),
            load_units<V>(this->recurrent.at(0, row) + g * width + unit), load_units<V>(scale),
            load_units<V>(scale + kGates * this->of_scale)};
  }

  // What `load` read is read again: a first cache has it more cheaply than registers.
  template <int V>
  __device__ void store(int64_t row, int width, int unit, const Floats<V> (&grad)[kGates]) const {
    D* to_h = grad_recurrent.at(0, row) + unit;
    D* to_x = grad_x_part.at(0, row) + unit;
    D* to_scale = grad_scales.at(0, row) + unit;
    constexpr bool kEarly = sizeof(D) == 2;  // of float32 the registers hold one gate's
    Factors<V> next = factors<V>(row, width, unit, 0);
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      const Factors<V> now = kEarly || g == 0 ? next : factors<V>(row, width, unit, g);
      if (kEarly && g + 1 < kGates) next = factors<V>(row, width, unit, g + 1);
      store_units(to_h + g * width, product(grad[g], now.of_h));
      store_units(to_x + g * width, product(grad[g], now.of_x));
      store_units(to_scale + g * of_grad_scale, product(grad[g], now.x));
      store_units(to_scale + (kGates + g) * of_grad_scale, product(grad[g], now.h));
      store_units(to_scale + (2 * kGates + g) * of_grad_scale, grad[g]);
    }
  }

  template <int V>
  __device__ static Floats<V> product(const Floats<V>& a, const Floats<V>& b) {
    Floats<V> out;
#pragma unroll
    for (int k = 0; k < V; ++k) out[k] = a[k] * b[k];
    return out;
  }
};

// Zeros in place of `Gradients::store`, without reading anything.
template <int V, typename D>
__device__ inline void store_no_gradient(const HyperGradients<D>& to, int64_t row, int width,
                                         int unit) {
#pragma unroll
  for (int g = 0; g < kGates; ++g) {
    store_units(to.grad_gates.at(0, row) + g * width + unit, all_units<V>(0.0f));
  }
}

template <int V, typename D>
__device__ inline void store_no_gradient(const MainGradients<D>& to, int64_t row, int width,
                                         int unit) {
  const Floats<V> zeros = all_units<V>(0.0f);
#pragma unroll
  for (int g = 0; g < kGates; ++g) {
    store_units(to.grad_recurrent.at(0, row) + g * width + unit, zeros);
    store_units(to.grad_x_part.at(0, row) + g * width + unit, zeros);
  }
#pragma unroll
  for (int g = 0; g < 3 * kGates; ++g) {
    store_units(to.grad_scales.at(0, row) + g * to.of_grad_scale + unit, zeros);
  }
}

// --- backward, of one step

template <typename Gradients>
struct BackwardParams {
  using D = typename Gradients::Low;
  Setting setting;
  Gradients gates;
  Rows<const float> cell_before, cell_after;
  AnyRows grad_out;     // or null
  Rows<D> grad_hidden;  // 0 afterwards
  Rows<float> grad_cell;
  float* partials;  // [CTAs and more, Gradients::kPartials, width]
  int teams;        // a CTA
};

// Of one CTA in shared memory.
struct BackwardMemory {
  float *normed, *kept, *partials;

  SKETCHFAST_HD BackwardMemory(Arena& arena, int threads, int teams, int width, int partial_count,
                               bool wide) {
    arena.take<float>(Team::memory_size(threads));  // first, where teams look for it
    normed = arena.take<float>(static_cast<int64_t>(teams) * kGates * width);
    kept = arena.take<float>(wide ? kGates * static_cast<int64_t>(width) : 0);
    partials = arena.take<float>(wide ? 0 : static_cast<int64_t>(teams) * partial_count * width);
  }
};

// A row, which may be past its end or past the batch: then it only joins the barriers.
template <typename Gradients, int V, bool kWide>
struct BackwardStep {
  using Units = Floats<V>;
  using D = typename Gradients::Low;
  const BackwardParams<Gradients>& p;
  Team& team;
  uint64_t seed;
  int row;
  int end;                       // of the row's units; 0 where there is nothing to do
  float* partials;               // [kPartials, width] of this team
  Kept<V, true, kGates> normed;  // gates; registers do not hold all that backward keeps
  Kept<V, kWide, kGates> kept;   // first what is named below, then the gates' gradients
  static constexpr bool kHolds = !kWide && (sizeof(D) == 2 || !Gradients::kMain);
  Ahead<V, kHolds, 4> ahead;  // of float32 the main LSTM's gates fill the registers

  static constexpr int kGradNormed = 0, kGradOutput = 1, kOutput = 2;            // places in `kept`
  static constexpr int kBefore = 0, kAfter = 1, kGradCell = 2, kGradHidden = 3;  // in `ahead`

  template <typename Body>
  __device__ void units(Body body) {
    row = opaque(row);
    for_units<V, kWide>(team, end, body);
  }

  __device__ Units from(const float* array, int which, int unit) const {
    return load_units<V>(array + which * p.setting.width + unit);
  }

  __device__ Units after(int unit) const {
    return ahead.get(kAfter, [&] { return load_units<V>(p.cell_after.at(0, row) + unit); });
  }

  // From the output and from later steps.
  __device__ Units hidden_gradient(int unit) const {
    Units grad = load_units<V>(p.grad_hidden.at(0, row) + unit);
    if (!p.grad_out.data) return grad;
    const Units add = p.grad_out.template load<V>(0, row, unit);
#pragma unroll
    for (int k = 0; k < V; ++k) grad[k] += add[k];
    return grad;
  }

  __device__ void add(int partial, int unit, const Units& units) {
    float* at = partials + partial * p.setting.width + unit;
    Units sum = load_units<V>(at);
#pragma unroll
    for (int k = 0; k < V; ++k) sum[k] += units[k];
    keep_units(at, sum);
  }

  __device__ void read_ahead() {
    units([&](int unit) {
      ahead.fetch(kAfter, [&] { return load_units<V>(p.cell_after.at(0, row) + unit); });
      ahead.fetch(kGradHidden, [&] { return hidden_gradient(unit); });
    });
  }

  // Of the four gates and of the cell after the step.
  __device__ Moments<kGates + 1> read_gates() {
    float sum[kGates + 1] = {};
    units([&](int unit) {
      Units gate[kGates];
      p.gates.load(0, row, p.setting.width, unit, gate);
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        normed.set(g, unit, gate[g]);
        sum[g] += sum_of_units(gate[g]);
      }
    });
    read_ahead();
    const Norm& norm = p.setting.norm;
    Moments<kGates + 1> moments{};
    if (norm.weight || norm.cell_weight) {
      units([&](int unit) { sum[kGates] += sum_of_units(after(unit)); });
      moments = moments_of<V, kWide>(
          sum, team, end, p.setting.share,
          [&](int unit, const float (&mean)[kGates + 1], float (&to)[kGates + 1]) {
#pragma unroll
            for (int g = 0; g < kGates; ++g) add_squares(normed.get(g, unit), mean[g], &to[g]);
            add_squares(after(unit), mean[kGates], &to[kGates]);
          });
    }
    if (norm.weight) {
      units([&](int unit) {
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          Units gate = normed.get(g, unit);
#pragma unroll
          for (int k = 0; k < V; ++k) gate[k] = (gate[k] - moments.mean[g]) * moments.inverse[g];
          normed.set(g, unit, gate);
        }
      });
    }
    return moments;
  }

  __device__ Units gate_of(int g, int unit) {
    const Norm& norm = p.setting.norm;
    Units gate = normed.get(g, unit);
    if (!norm.weight) return gate;
    const Units weight = from(norm.weight, g, unit);
    const Units bias = from(norm.bias, g, unit);
#pragma unroll
    for (int k = 0; k < V; ++k) gate[k] = gate[k] * weight[k] + bias[k];
    return gate;
  }

  // Through h' = tanh(LN(c')) s(o): leaves in `kept` the gradient of c', normed where there is a
  // layer norm, that of s(o), and s(o) itself.
  __device__ void hidden_backward(float mean, float inverse, float (&sums)[2]) {
    const Norm& norm = p.setting.norm;
    constexpr int kWeight = Gradients::kCellPartial, kBias = kWeight + 1;
    units([&](int unit) {
      const Units grad = ahead.get(kGradHidden, [&] { return hidden_gradient(unit); });
      store_units(p.grad_hidden.at(0, row) + unit, all_units<V>(0.0f));
      const Units cell = after(unit), gate = gate_of(3, unit);
      Units weight = all_units<V>(1.0f), bias = all_units<V>(0.0f), centred = cell;
      if (norm.cell_weight) {
        weight = from(norm.cell_weight, 0, unit);
        bias = from(norm.cell_bias, 0, unit);
#pragma unroll
        for (int k = 0; k < V; ++k) centred[k] = (cell[k] - mean) * inverse;
      }
      Units grad_shown, of_weight, grad_normed, grad_output, output;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        output[k] = logistic(gate[k]);
        const float shown = hyperbolic_tangent(centred[k] * weight[k] + bias[k]);
        grad_output[k] = grad[k] * shown;
        grad_shown[k] = grad[k] * output[k] * (1 - shown * shown);
        of_weight[k] = grad_shown[k] * centred[k];
        grad_normed[k] = grad_shown[k] * weight[k];
        sums[0] += grad_normed[k];
        sums[1] += grad_normed[k] * centred[k];
      }
      kept.set(kGradNormed, unit, grad_normed);
      kept.set(kGradOutput, unit, grad_output);
      kept.set(kOutput, unit, output);
      if (norm.cell_weight) {
        add(kWeight, unit, of_weight);
        add(kBias, unit, grad_shown);
      }
      ahead.fetch(kGradCell, [&] { return load_units<V>(p.grad_cell.at(0, row) + unit); });
      ahead.fetch(kBefore, [&] { return load_units<V>(p.cell_before.at(0, row) + unit); });
    });
  }

  // The gradient of the cell after the step, with what comes from later steps.
  __device__ Units cell_after_gradient(int unit, float mean, float inverse,
                                       const float (&means)[2]) {
    Units grad = ahead.get(kGradCell, [&] { return load_units<V>(p.grad_cell.at(0, row) + unit); });
    const Units normed_grad = kept.get(kGradNormed, unit), cell = after(unit);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      grad[k] += p.setting.norm.cell_weight
                     ? layer_norm_gradient(normed_grad[k], (cell[k] - mean) * inverse, means[0],
                                           means[1], inverse)
                     : normed_grad[k];
    }
    return grad;
  }

  // Leaves the gates' gradients, where there is a layer norm those of the normed ones, in `kept`.
  __device__ void cell_backward(float mean, float inverse, const float (&means)[2],
                                float (&sums)[2 * kGates]) {
    const Norm& norm = p.setting.norm;
    units([&](int unit) {
      const Units grad_cell = cell_after_gradient(unit, mean, inverse, means);
      const Units before =
          ahead.get(kBefore, [&] { return load_units<V>(p.cell_before.at(0, row) + unit); });
      const Units grad_output = kept.get(kGradOutput, unit), output = kept.get(kOutput, unit);
      const Units drop = draw<V>(p.setting, seed, Gradients::kStream, 0, row, unit);
      const Units i = gate_of(0, unit), j = gate_of(1, unit), f = gate_of(2, unit);
      Units to_before, grad[kGates];
#pragma unroll
      for (int k = 0; k < V; ++k) {
        Activations<float> act = activate(i[k], j[k], f[k], 0.0f, p.setting.forget_bias);
        act.output = output[k];
        const CellGradient<float> found =
            cell_gradient(act, before[k], drop[k], grad_cell[k], grad_output[k]);
        to_before[k] = found.cell;
        grad[0][k] = found.i;
        grad[1][k] = found.j;
        grad[2][k] = found.f;
        grad[3][k] = found.o;
      }
      store_units(p.grad_cell.at(0, row) + unit, to_before);
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        if (norm.weight) to_normed(g, unit, grad[g], &sums[2 * g]);
        kept.set(g, unit, grad[g]);
      }
    });
  }

  // From the gradient of a layer norm's result to that of the normed gate; sums of it and of its
  // product with the gate.
  __device__ void to_normed(int g, int unit, Units& grad, float* sums) {
    const float* weights = p.setting.norm.weight;
    const Units gate = normed.get(g, unit);
    const Units weight = from(weights, g, unit);
    Units of_weight;
#pragma unroll
    for (int k = 0; k < V; ++k) of_weight[k] = grad[k] * gate[k];
    add(g, unit, of_weight);
    add(kGates + g, unit, grad);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      grad[k] *= weight[k];
      sums[0] += grad[k];
      sums[1] += grad[k] * gate[k];
    }
  }

  __device__ void store_gradients(const Moments<kGates + 1>& moments,
                                  const float (&means)[2 * kGates]) {
    units([&](int unit) {
      Units grad[kGates];
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        grad[g] = kept.get(g, unit);
        if (p.setting.norm.weight) {
          const Units gate = normed.get(g, unit);
#pragma unroll
          for (int k = 0; k < V; ++k) {
            grad[g][k] = layer_norm_gradient(grad[g][k], gate[k], means[2 * g], means[2 * g + 1],
                                             moments.inverse[g]);
          }
        }
        if (Gradients::kMain) add(2 * kGates + g, unit, grad[g]);
      }
      p.gates.store(row, p.setting.width, unit, grad);
    });
  }

  template <int N>
  __device__ void mean_over_team(float (&sum)[N]) {
    sum_over_team(sum, team);
#pragma unroll
    for (int n = 0; n < N; ++n) sum[n] *= p.setting.share;
  }

  __device__ void run() {
    const Moments<kGates + 1> moments = read_gates();
    const float mean = moments.mean[kGates], inverse = moments.inverse[kGates];
    float of_cell[2] = {}, of_gates[2 * kGates] = {};
    hidden_backward(mean, inverse, of_cell);
    if (p.setting.norm.cell_weight) mean_over_team(of_cell);
    cell_backward(mean, inverse, of_cell, of_gates);
    if (p.setting.norm.weight) mean_over_team(of_gates);
    store_gradients(moments, of_gates);
  }
};

// The CTA's sums, team after team, to its row of partials.
template <int V>
__device__ inline void add_teams(const float* of_teams, int teams, int count, float* total) {
  for (int k = static_cast<int>(threadIdx.x) * V; k < count;
       k += static_cast<int>(blockDim.x) * V) {
    Floats<V> sum = load_units<V>(total + k);
    for (int n = 0; n < teams; ++n) {
      const Floats<V> part = load_units<V>(of_teams + n * count + k);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += part[v];
    }
    store_units(total + k, sum);
  }
}

// A CTA has one row of `partials` and, in order, as many rows of the batch at a time as teams.
template <typename Gradients, int V, bool kWide>
__global__ void __launch_bounds__(kMostThreads, 1)
    backward_kernel(const __grid_constant__ BackwardParams<Gradients> p) {
  SKETCHFAST_SHARED_MEMORY(shared);
  Arena arena{shared, 0};
  const Setting& setting = p.setting;
  const int width = setting.width, all = static_cast<int>(blockDim.x), threads = all / p.teams;
  const int count = Gradients::kPartials * width;
  const BackwardMemory memory(arena, all, p.teams, width, Gradients::kPartials, kWide);
  const int number = static_cast<int>(threadIdx.x) / threads;
  const uint64_t key = setting.dropout.seed ? static_cast<uint64_t>(*setting.dropout.seed) : 0;
  Team team{static_cast<int>(threadIdx.x) % threads, threads,
            static_cast<int>(number * Team::memory_size(threads))};
  float* total = p.partials + static_cast<int64_t>(blockIdx.x) * count;
  float* own = kWide ? total : memory.partials + number * count;
  if (!kWide) {
    for_units<V, kWide>(team, width, [&](int unit) {
      for (int n = 0; n < Gradients::kPartials; ++n) {
        keep_units(own + n * width + unit, all_units<V>(0.0f));
      }
    });
  }
#pragma unroll 1
  for (int first = static_cast<int>(blockIdx.x) * p.teams; first < setting.batch;
       first += static_cast<int>(gridDim.x) * p.teams) {
    const int row = first + number;
    const bool inside = row < setting.batch, live = inside && setting.is_live(0, row);
    BackwardStep<Gradients, V, kWide> step{p,
                                           team,
                                           key,
                                           row,
                                           live ? width : 0,
                                           own,
                                           {memory.normed + number * kGates * width, width},
                                           {memory.kept, width},
                                           {}};
    step.run();
    if (live || !inside) continue;
    for_units<V, kWide>(team, width,
                        [&](int unit) { store_no_gradient<V>(p.gates, row, width, unit); });
  }
  if (kWide) return;
  __syncthreads();
  add_teams<V>(memory.partials, p.teams, count, total);
}

}  // namespace cuda
}  // namespace hyperlstm
}  // namespace sketchfast
