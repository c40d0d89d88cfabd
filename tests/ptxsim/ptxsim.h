// ptxsim executes the PTX text that nvcc and Triton emit, on a CPU, warp by warp, and checks every access.
//
// This header is the whole interface between the interpreter (torch-free, CUDA-free C++20) and its two users: the
// emulated CUDA runtime (runtime.cpp), through which the library's own launchers reach it, and the Python binding.
//
// Addresses. Global addresses are host addresses. A kernel may touch only what lies in a region that was added to
// Memory; everything else, one byte past the end included, is an error. Shared memory starts at kSharedBase of its
// 32-bit window, so that address 0 stays invalid and swizzles, which act on absolute shared addresses, see a base that
// is aligned to 1024.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace ptxsim {

constexpr uint32_t kSharedBase = 0x400;
constexpr unsigned char kPoison = 0xff;  // NaN in every float type, -1 in every integer type

// The global memory that kernels may touch. Thread-safe: torch's allocator calls it from any thread.
class Memory {
 public:
  static Memory& global();
  // `name` appears in messages. Adding a region that overlaps another one replaces nothing: both stay known.
  void add(const void* begin, size_t bytes, std::string_view name = {});
  void remove(const void* begin);

 private:
  friend class MemoryView;
  struct State;
  std::shared_ptr<State> state_;
  Memory();
};

// When asynchronous copies land: at issue, as late as waits allow, or by coin.
enum class Async : int { kEager = 0, kLazy = 1, kRandom = 2 };

struct Options {
  uint64_t seed = 0;           // of the schedule and of Async::kRandom
  bool check = true;           // races, uninitialised shared memory, proxies; bounds and alignment are always checked
  Async async = Async::kRandom;
  int64_t max_instructions = int64_t{1} << 33;  // warp instructions in one launch: against endless loops
  int resident_blocks = 4;     // blocks that are interleaved; at least a cluster; a cooperative launch takes them all
  bool cooperative = false;
  std::string arch = "sm_80";  // "sm_80" or "sm_90a"
};

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

struct Launch {
  std::string kernel;  // the name of the .entry, mangled
  Dim3 grid, block, cluster;
  uint32_t dynamic_shared = 0;
  std::vector<unsigned char> params;  // laid out as the entry's parameter list; short is an error
};

// Facts that do not depend on the schedule: a performance report without a GPU.
struct Counters {
  int64_t warp_instructions = 0;
  int64_t global_requests = 0;   // warp-level loads and stores of global memory
  int64_t global_sectors = 0;    // 32-byte sectors they touch; 4 a request is perfect for 4-byte accesses of a warp
  int64_t shared_requests = 0;
  int64_t shared_wavefronts = 0;  // 1 a request (2 or 4 for 8- or 16-byte accesses) when there is no bank conflict
  int64_t mma_flops = 0;
};

// What stopped a kernel.
enum class Fault : int {
  kNone = 0,
  kUnknownInstruction,  // named, with its line
  kBadLaunch,           // parameters, grid or shared memory do not fit the entry
  kOutOfBounds,
  kMisaligned,
  kUninitialized,       // shared or local memory read before it was written
  kRace,
  kAsyncInFlight,       // touched while an asynchronous copy is on its way; or a thread left copies unwaited
  kProxy,               // generic write read by the async proxy without a fence, or the reverse
  kDivergence,          // a *.sync instruction whose lanes are elsewhere or have exited; barriers reached differently
  kBarrier,             // mbarrier misuse, wrong thread counts
  kDeadlock,            // with a table of who waits where
  kLimit,
  kTrap,                // trap, assert
};

struct Result {
  Fault fault = Fault::kNone;
  std::string message;  // what, where (file:line from -lineinfo, else the line of the PTX), block, warp, lanes
  std::string printed;  // of printf (vprintf) in the kernel
  Counters counters;
  bool ok() const { return fault == Fault::kNone; }
};

// Parsed once, launched often. Throws std::runtime_error with the line of the PTX for what it cannot read; an unknown
// opcode in a kernel that is never launched is not an error.
class Module {
 public:
  static std::shared_ptr<const Module> load(std::string_view ptx, std::string_view name);
  virtual ~Module() = default;
  virtual std::vector<std::string> kernels() const = 0;
  // Bytes of the entry's parameter list; throws for an unknown name.
  virtual size_t param_bytes(const std::string& kernel) const = 0;
  // Byte offset and size of each parameter of the entry.
  virtual std::vector<std::array<size_t, 2>> params(const std::string& kernel) const = 0;
  virtual uint32_t static_shared(const std::string& kernel) const = 0;
  // Device globals: the address of a .global or .const symbol, 0 if there is none.
  virtual void* symbol(const std::string& name, size_t* bytes) const = 0;
};

Result launch(const Module& module, const Launch& launch, const Options& options);

const char* fault_name(Fault fault);

// The 128 bytes of an emulated CUtensorMap; what cuTensorMapEncodeTiled checks is checked here, and a sentence comes
// back instead of an error code (empty: none). Sizes and box are innermost first, as in the driver; strides in bytes,
// without the innermost. element_type is the CUtensorMapDataType; only reductions into a tensor need it.
struct TensorMap {
  unsigned char opaque[128];
};
enum class Swizzle : int { kNone = 0, k32B = 1, k64B = 2, k128B = 3 };
std::string encode_tensor_map(TensorMap& map, int element_bytes, int rank, const void* base, const uint64_t* sizes,
                              const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                              int interleave, Swizzle swizzle, bool nan_fill, int element_type = -1);

}  // namespace ptxsim
