// Which kernels of hyperlstm_kernels.cuh a call takes, and with what sizes.
//
// Context is where they run: the CUDA device (hyperlstm.cu) or tests/cuda_emulator. It gives
//   size_t shared_limit             bytes of shared memory a CTA may have
//   void launch(kernel, int64_t blocks, int threads, size_t shared, const Params&)
// Nothing here depends on values, only on sizes and alignment, and nothing is allocated: calls can
// be captured in a CUDA graph.
#pragma once

#include "hyperlstm_kernels.cuh"

namespace sketchfast {
namespace hyperlstm {
namespace cuda {

// Of the GPUs this is for.
constexpr int64_t kMultiprocessors = 132;

// Calls `call` with a value of the C++ type of `dtype`.
template <typename Call>
auto with_dtype(Dtype dtype, Call call) {
  if (dtype == Dtype::kFloat32) return call(float{});
  if (dtype == Dtype::kFloat16) return call(__half{});
  return call(__nv_bfloat16{});
}

inline Dropout dropout_of(const int64_t* seed, double dropout) {
  if (dropout <= 0) return {nullptr, 0, 1};
  return {seed, dropout_threshold(dropout), 1.0f / static_cast<float>(1 - dropout)};
}

// --- alignment: whether all units can be read kUnits at a time

inline bool aligned(const void* data, size_t element) {
  return reinterpret_cast<uintptr_t>(data) % (kUnits * element) == 0;
}
template <typename T>
bool aligned(const Rows<T>& rows) {
  const bool strides = rows.step % kUnits == 0 && rows.row % kUnits == 0;
  return !rows.data || (strides && aligned(rows.data, sizeof(T)));
}
inline bool aligned(const AnyRows& rows) {
  const bool strides = rows.step % kUnits == 0 && rows.row % kUnits == 0;
  return !rows.data || (strides && aligned(rows.data, rows.dtype == Dtype::kFloat32 ? 4 : 2));
}
template <typename D>
bool aligned(const HyperGates<D>& gates) {
  return aligned(gates.gates) && aligned(gates.x_part);
}
template <typename D>
bool aligned(const MainGates<D>& gates) {
  return aligned(gates.recurrent) && aligned(gates.x_part) && aligned(gates.scales) &&
         gates.of_scale % kUnits == 0 && aligned(gates.bias, 4);
}
template <typename D>
bool aligned(const HyperGradients<D>& to) {
  return aligned(static_cast<const HyperGates<D>&>(to)) && aligned(to.grad_gates);
}
template <typename D>
bool aligned(const MainGradients<D>& to) {
  return aligned(static_cast<const MainGates<D>&>(to)) && aligned(to.grad_recurrent) &&
         aligned(to.grad_x_part) && aligned(to.grad_scales) && to.of_grad_scale % kUnits == 0;
}
inline bool is_narrow(const Setting& setting) {
  const Norm& norm = setting.norm;
  return setting.width % kUnits == 0 && setting.width <= kMostNarrow && aligned(norm.weight, 4) &&
         aligned(norm.bias, 4) && aligned(norm.cell_weight, 4) && aligned(norm.cell_bias, 4);
}

// Threads for `parts` of a row: whole warps.
inline int team_threads(int64_t parts) {
  const int64_t threads = ceil_div(parts, kWarp) * kWarp;
  return static_cast<int>(threads < kMostThreads ? threads : kMostThreads);
}

// --- the calls; false where a row does not fit into shared memory

template <typename Gates, typename Context>
bool forward(Context& context, const ForwardParams<Gates>& p) {
  const Setting& setting = p.setting;
  if (setting.batch == 0 || setting.steps == 0) return true;
  const bool narrow = is_narrow(setting) && aligned(p.gates) && aligned(p.cell) &&
                      aligned(p.hidden) && aligned(p.shown) && aligned(p.cells);
  const int threads = team_threads(narrow ? ceil_div(setting.width, kUnits) : setting.width);
  Arena arena{nullptr, 0};
  ForwardMemory(arena, threads, setting.width, !narrow);
  if (arena.used > context.shared_limit) return false;
  auto* const kernel =
      narrow ? forward_kernel<Gates, kUnits, false> : forward_kernel<Gates, 1, true>;
  context.launch(kernel, setting.batch, threads, arena.used, p);
  return true;
}

// How many rows a CTA has at a time: a CTA adds its sums to memory once, which costs as much as a
// row, so that there are no more of them than the multiprocessors.
template <typename Gradients, typename Context>
int team_count(const Context& context, const Setting& setting, int threads) {
  const int64_t wanted = ceil_div(setting.batch, kMultiprocessors);
  const int64_t most = kMostThreads / threads;
  int64_t teams = wanted < most ? wanted : most;
  for (; teams > 0; --teams) {
    Arena arena{nullptr, 0};
    BackwardMemory(arena, static_cast<int>(teams) * threads, static_cast<int>(teams), setting.width,
                   Gradients::kPartials, false);
    if (arena.used <= context.shared_limit) break;
  }
  return static_cast<int>(teams);
}

// `slots`: rows of p.partials.
template <typename Gradients, typename Context>
bool backward(Context& context, BackwardParams<Gradients> p, int64_t slots) {
  const Setting& setting = p.setting;
  if (setting.batch == 0) return true;
  bool narrow = is_narrow(setting) && aligned(p.gates) && aligned(p.cell_before) &&
                aligned(p.cell_after) && aligned(p.grad_out) && aligned(p.grad_hidden) &&
                aligned(p.grad_cell) && aligned(p.partials, 4);
  int threads = team_threads(narrow ? ceil_div(setting.width, kUnits) : setting.width);
  p.teams = narrow ? team_count<Gradients>(context, setting, threads) : 1;
  if (p.teams == 0) {  // sums over rows do not fit either: they stay in memory
    narrow = false;
    p.teams = 1;
    threads = team_threads(setting.width);
  }
  Arena arena{nullptr, 0};
  BackwardMemory(arena, p.teams * threads, p.teams, setting.width, Gradients::kPartials, !narrow);
  if (arena.used > context.shared_limit) return false;
  const int64_t wanted = ceil_div(setting.batch, p.teams);
  const int64_t useful = p.teams * threads > kMostThreads / 2 ? kMultiprocessors : slots;
  int64_t ctas = wanted < slots ? wanted : slots;
  if (useful < ctas) ctas = useful;
  auto* const kernel =
      narrow ? backward_kernel<Gradients, kUnits, false> : backward_kernel<Gradients, 1, true>;
  context.launch(kernel, ctas, p.teams * threads, arena.used, p);
  return true;
}

}  // namespace cuda
}  // namespace hyperlstm
}  // namespace sketchfast
