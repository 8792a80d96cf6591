// Runs CUDA kernels on the CPU, so that a host compiler and a machine without GPU can test their
// source.
//
// Cluster after cluster (of one CTA, where a launch asks for no more); each thread of a cluster is
// a fiber (ucontext) that runs until it meets a barrier, a shuffle or a ballot, so barriers are
// real: leave one out and, in one of the schedules, a thread reads what another has not written
// yet. Shared memory starts as NaN and has guard zones; that of a CTA that has ended is NaN again,
// as it belongs to nobody. Deadlocks (a barrier or a warp primitive that some threads do not reach)
// throw.
//
// It does not show: the memory model between CTAs or within a warp, timing, bank conflicts,
// alignment faults (unless a kernel asks: check_aligned), nvcc's contraction of products into fused
// multiply-adds, or limits on registers.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define SKETCHFAST_SHARED_MEMORY(name) unsigned char* name = emulator::shared_memory()

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
inline Index3 threadIdx, blockIdx, blockDim, gridDim;

// --- 16-bit floats
// -----------------------------------------------------------------------------------------

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half h) {
  _Float16 value;
  std::memcpy(&value, &h, 2);
  return static_cast<float>(value);
}
inline __half __float2half_rn(float f) {
  const _Float16 value = static_cast<_Float16>(f);
  __half h;
  std::memcpy(&h, &value, 2);
  return h;
}
inline float __bfloat162float(__nv_bfloat16 b) {
  const uint32_t bits = static_cast<uint32_t>(b.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (f != f) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

namespace emulator {

// kGreedy runs a warp as far as it gets, then its CTA, then the next: what is ahead is far ahead.
enum class Schedule : int { kForward, kReverse, kShuffled, kGreedy };

constexpr size_t kStack = 128 * 1024, kGuard = 256;
constexpr unsigned char kPoison = 0xff;  // as floats NaN, as integers -1
constexpr unsigned char kGuardByte = 0xa5;

// Where threads meet: those of a CTA at a barrier, those of a warp at a shuffle or ballot.
struct Meeting {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
  bool any = false, result = false;  // of __syncthreads_or
  uint64_t value[2][32];             // by parity: a fast lane is at most one exchange ahead

  unsigned arrive() {
    const unsigned mine = generation;
    if (++arrived == expected) {
      arrived = 0;
      result = any;
      any = false;
      ++generation;
    }
    return mine;
  }
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  const Meeting* waits = nullptr;
  unsigned generation = 0;
  bool done = false;

  bool runnable() const { return !done && (!waits || waits->generation != generation); }
};

// What one CTA of the running cluster has to itself.
struct Cta {
  Meeting barrier;
  std::vector<unsigned char> shared;
  unsigned char* shared_base = nullptr;
  unsigned alive = 0;
  bool started = false;
};

struct Machine {
  Schedule schedule = Schedule::kForward;
  uint32_t seed = 1;
  std::vector<Fiber> fibers;   // of the cluster, CTA after CTA
  std::vector<Meeting> warps;  // likewise
  std::vector<Cta> ctas;
  Meeting cluster;
  std::string fault;     // found in a fiber, which cannot throw
  unsigned threads = 0;  // a CTA
  ucontext_t scheduler;
  std::function<void()> body;
  unsigned current = 0;
};

inline Machine machine;
inline unsigned cluster_rank() { return machine.current / machine.threads; }
inline Cta& this_cta() { return machine.ctas[cluster_rank()]; }
inline unsigned char* shared_memory() { return this_cta().shared_base; }

inline void wait(Meeting* meeting, unsigned generation) {
  Machine& m = machine;
  Fiber& self = m.fibers[m.current];
  if (meeting->generation != generation) return;
  self.waits = meeting;
  self.generation = generation;
  swapcontext(&self.context, &m.scheduler);
  self.waits = nullptr;
}

inline void run_thread() {
  Machine& m = machine;
  m.body();
  m.fibers[m.current].done = true;
  swapcontext(&m.fibers[m.current].context, &m.scheduler);
}

inline uint32_t random(uint32_t* state) {
  *state ^= *state << 13;
  *state ^= *state >> 17;
  return *state ^= *state << 5;
}

// An order of 0..count-1.
inline std::vector<unsigned> order(int64_t count, Schedule schedule, uint32_t* seed) {
  std::vector<unsigned> out(count);
  for (int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<unsigned>(schedule == Schedule::kReverse ? count - 1 - i : i);
  }
  if (schedule != Schedule::kShuffled) return out;
  for (int64_t i = count - 1; i > 0; --i) std::swap(out[i], out[random(seed) % (i + 1)]);
  return out;
}

inline void start_fibers(unsigned count) {
  Machine& m = machine;
  if (m.fibers.size() < count) m.fibers.resize(count);
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = m.fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    fiber.done = false;
    fiber.waits = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_thread, 0);
  }
  m.warps.assign(count / 32, Meeting{});
  for (Meeting& warp : m.warps) warp.expected = 32;
}

inline void poison_shared(Cta* cta, size_t bytes) {
  cta->shared.assign(bytes + 2 * kGuard + 16, kGuardByte);
  const uintptr_t first = reinterpret_cast<uintptr_t>(cta->shared.data()) + kGuard;
  cta->shared_base = reinterpret_cast<unsigned char*>((first + 15) / 16 * 16);
  std::memset(cta->shared_base, kPoison, bytes);
}

inline void check_shared(const Cta& cta, size_t bytes) {
  for (const unsigned char* p = cta.shared.data(); p < cta.shared.data() + cta.shared.size(); ++p) {
    const bool guard = p < cta.shared_base || p >= cta.shared_base + bytes;
    if (guard && *p != kGuardByte)
      throw std::runtime_error("a kernel wrote outside its shared memory");
  }
}

// Nothing may touch the shared memory of a CTA that has ended.
inline void end_cta(Cta* cta, size_t bytes) {
  check_shared(*cta, bytes);
  std::memset(cta->shared_base, kPoison, bytes);
}

inline void check_ended(const Cta& cta, size_t bytes) {
  check_shared(cta, bytes);
  for (size_t i = 0; i < bytes; ++i) {
    if (cta.shared_base[i] != kPoison)
      throw std::runtime_error("a kernel wrote to a CTA that had ended");
  }
}

// Gives turns to fibers first .. first + count - 1 until none gets on, each part (of the first of
// `sizes`) as far as it goes before the next.
inline bool run_greedily(unsigned first, unsigned count, std::vector<unsigned> sizes,
                         const std::function<bool(unsigned)>& turn) {
  if (count == 1) return turn(first);
  const unsigned size = sizes.front();
  sizes.erase(sizes.begin());
  bool any = false;
  for (bool progress = true; progress;) {
    progress = false;
    for (unsigned part = 0; part < count; part += size) {
      progress = run_greedily(first + part, size, sizes, turn) || progress;
    }
    any = any || progress;
  }
  return any;
}

// Runs the CTAs first .. first + size - 1, whose threads take turns.
inline void run_cluster(unsigned first, unsigned size, unsigned threads, size_t shared) {
  Machine& m = machine;
  m.threads = threads;
  m.cluster = Meeting{};
  m.fault.clear();
  m.cluster.expected = static_cast<int>(size * threads);
  m.ctas.assign(size, Cta{});
  for (Cta& cta : m.ctas) {
    cta.barrier.expected = static_cast<int>(threads);
    cta.alive = threads;
    poison_shared(&cta, shared);
  }
  start_fibers(size * threads);
  const auto turn = [&](unsigned i) {
    if (!m.fibers[i].runnable()) return false;
    m.current = i;
    m.ctas[i / threads].started = true;
    threadIdx.x = i % threads;
    blockIdx.x = first + i / threads;
    swapcontext(&m.scheduler, &m.fibers[i].context);
    if (m.fibers[i].done && --m.ctas[i / threads].alive == 0) {
      end_cta(&m.ctas[i / threads], shared);
    }
    return true;
  };
  const unsigned count = size * threads;
  if (m.schedule == Schedule::kGreedy) {
    run_greedily(0, count, {threads, 32, 1}, turn);
  } else {
    for (bool progress = true; progress;) {
      progress = false;
      for (unsigned i : order(count, m.schedule, &m.seed)) progress = turn(i) || progress;
    }
  }
  for (const Cta& cta : m.ctas) {
    if (cta.alive > 0)
      throw std::runtime_error("deadlock: threads wait where others do not arrive");
  }
  if (!m.fault.empty()) throw std::runtime_error(m.fault);
  for (const Cta& cta : m.ctas) check_ended(cta, shared);
}

template <typename Params>
void launch(void (*kernel)(Params), int64_t blocks, int threads, size_t shared,
            const Params& params, int cluster = 1) {
  Machine& m = machine;
  if (blocks < 1 || blocks > 0x7fffffff) throw std::runtime_error("grid size out of range");
  if (threads < 32 || threads > 1024 || threads % 32) throw std::runtime_error("block size");
  if (cluster < 1 || cluster > 16 || blocks % cluster) throw std::runtime_error("cluster size");
  blockDim.x = static_cast<unsigned>(threads);
  gridDim.x = static_cast<unsigned>(blocks);
  m.body = [&] { kernel(params); };
  for (unsigned i : order(blocks / cluster, m.schedule, &m.seed)) {
    run_cluster(i * cluster, cluster, static_cast<unsigned>(threads), shared);
  }
}

// All lanes of the warp leave a value and read lane `from` of it.
template <typename T>
T exchange(unsigned mask, T value, int from, unsigned* ballot = nullptr) {
  if (mask != 0xffffffffu) throw std::runtime_error("only whole warps are emulated");
  Machine& m = machine;
  const unsigned lane = m.current % 32;
  Meeting& warp = m.warps[m.current / 32];
  const unsigned parity = warp.generation & 1;
  warp.value[parity][lane] = 0;
  std::memcpy(&warp.value[parity][lane], &value, sizeof(T));
  wait(&warp, warp.arrive());
  if (ballot) {
    *ballot = 0;
    for (unsigned i = 0; i < 32; ++i) *ballot |= static_cast<unsigned>(warp.value[parity][i]) << i;
  }
  T out;
  std::memcpy(&out, &warp.value[parity][from], sizeof(T));
  return out;
}

}  // namespace emulator

inline void __syncthreads() {
  emulator::Meeting& cta = emulator::this_cta().barrier;
  emulator::wait(&cta, cta.arrive());
}

inline bool __syncthreads_or(bool value) {
  emulator::Meeting& cta = emulator::this_cta().barrier;
  cta.any = cta.any || value;
  emulator::wait(&cta, cta.arrive());
  const bool result = cta.result;
  __syncthreads();  // no later vote may overwrite the result before all have read it
  return result;
}

inline void __syncwarp() {
  emulator::Meeting& warp = emulator::machine.warps[emulator::machine.current / 32];
  emulator::wait(&warp, warp.arrive());
}

namespace emulator {

// Where a GPU would fault. Of kernels that ask.
inline void check_aligned(const void* address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    machine.fault = "a kernel reached for memory that is not aligned";
  }
}

inline void cluster_barrier() { wait(&machine.cluster, machine.cluster.arrive()); }

// The same place in the shared memory of CTA `rank` of the cluster.
template <typename T>
T* in_shared_memory_of(T* mine, unsigned rank) {
  const Cta& other = machine.ctas.at(rank);
  if (!other.started) machine.fault = "a kernel reached for a CTA that had not started";
  if (other.alive == 0) machine.fault = "a kernel reached for a CTA that had ended";
  const size_t offset = reinterpret_cast<unsigned char*>(mine) - shared_memory();
  return reinterpret_cast<T*>(other.shared_base + offset);
}

}  // namespace emulator

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulator::exchange(mask, value, static_cast<int>(emulator::machine.current % 32) ^ lanes);
}

inline unsigned __ballot_sync(unsigned mask, bool value) {
  unsigned ballot = 0;
  emulator::exchange<uint64_t>(mask, value ? 1 : 0, 0, &ballot);
  return ballot;
}

inline unsigned atomicOr(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address |= value;
  return old;
}

template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;
  return old;
}

// Fibers take turns at barriers only: what one wrote the next one sees.
inline void __threadfence() {}
