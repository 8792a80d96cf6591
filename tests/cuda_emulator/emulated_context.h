// The Context of the *_launch.h headers on the emulator: guarded scratch memory, launches counted.
#pragma once

#include "cuda_emulator.h"

namespace emulator {

struct Context {
  size_t shared_limit;
  std::vector<std::vector<unsigned char>> buffers;
  std::vector<size_t> sizes;

  explicit Context(int64_t limit) : shared_limit(static_cast<size_t>(limit)) {}

  void* scratch(size_t bytes) {
    buffers.emplace_back(bytes + 2 * kGuard, kGuardByte);
    sizes.push_back(bytes);
    std::memset(buffers.back().data() + kGuard, kPoison, bytes);
    return buffers.back().data() + kGuard;
  }

  void check_guards() const {
    for (size_t i = 0; i < buffers.size(); ++i) {
      for (size_t j = 0; j < buffers[i].size(); ++j) {
        const bool guard = j < kGuard || j >= kGuard + sizes[i];
        if (guard && buffers[i][j] != kGuardByte) {
          throw std::runtime_error("a kernel wrote outside its scratch memory");
        }
      }
    }
  }

  template <typename Params>
  void launch(void (*kernel)(Params), int64_t blocks, int threads, size_t shared,
              const Params& params, int cluster = 1) {
    ++launches;
    if (shared > shared_limit) throw std::runtime_error("more shared memory than the limit");
    emulator::launch(kernel, blocks, threads, shared, params, cluster);
  }

  template <typename Params>
  bool runs(void (*)(Params), int, size_t shared, int) const {
    return shared <= shared_limit;
  }

  inline static int launches = 0;
};

inline std::string message;

template <typename Call>
const char* guarded(int64_t limit, Call call) {
  try {
    Context::launches = 0;
    Context context(limit);
    call(context);
    context.check_guards();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace emulator
