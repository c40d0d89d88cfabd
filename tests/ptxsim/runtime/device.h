// The GPU that a thread sees: its settings, the kernels that host code registered, and how one of them is launched.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ptxsim.h"

namespace ptxsim {

struct Device {
  Options options;          // options.arch says which PTX runs
  int multiprocessors = 1;  // so that persistent grids loop in small cases; still several blocks
  int registers = 65536;    // of a multiprocessor: what planners are told; launches are not held against it
  bool record = false;      // keep every launch for `take_launches`
};

// Each thread has its own.
Device& device();

struct Launched {
  std::string kernel;  // demangled
  Dim3 grid, block, cluster;
  uint32_t dynamic_shared = 0;
  Counters counters;
};
std::vector<Launched> take_launches();
// To be called after every launch.
void record(const Launch& launch, const Counters& counters);

// The facts of the architecture that launches are checked against.
struct Limits {
  int major, minor;
  uint32_t shared_per_block;  // the most a kernel can opt in to, static and dynamic
  uint32_t shared_per_multiprocessor;
};
const Limits& limits();
constexpr uint32_t kSharedWithoutOptIn = 48 << 10;
constexpr uint32_t kSharedReserved = 1 << 10;  // of each block, by the driver
constexpr uint32_t kThreadsPerMultiprocessor = 2048;
constexpr uint32_t kBlocksPerMultiprocessor = 32;

// A kernel as host code knows it: `host` is the address of its stub.
void register_kernel(const void* host, const char* name);
void register_variable(const void* host, const char* name);

// One that was registered, with what has been set for it on the current architecture.
struct Kernel {
  std::string name;
  uint32_t dynamic_shared_limit = 0;  // 0: not set
  bool any_cluster = false;           // more than 8 blocks allowed
};
Kernel* find_kernel(const void* host);

// The module whose PTX has `kernel`, for the current architecture; throws std::runtime_error.
const Module& module_of(const std::string& kernel);
// The address of a registered device variable.
void* variable(const void* host, size_t* bytes);

int blocks_per_multiprocessor(const Kernel& kernel, uint32_t threads, uint32_t dynamic_shared);

// Checks what the CUDA runtime checks, then runs the kernel to its end. Returns an error's sentence, empty for none.
std::string run(const Kernel& kernel, Launch launch, void** arguments, bool cooperative);

}  // namespace ptxsim
