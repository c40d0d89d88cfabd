// What exists while a kernel runs: the launch, its clusters, blocks and warps.
#pragma once

#include <algorithm>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "memory.h"
#include "program.h"

namespace ptxsim {

constexpr int kLanes = 32;
constexpr uint32_t kFull = 0xffffffffu;
constexpr uint32_t kNever = 0xffffffffu;

// Generic addresses: shared memory of rank r is kSharedWindow + its 32-bit address, local memory kLocalWindow + its own.
constexpr uint64_t kSharedWindow = uint64_t{1} << 56;
constexpr uint64_t kLocalWindow = uint64_t{1} << 57;
constexpr uint64_t kLocalBase = 0x100;
constexpr uint32_t kLocalLimit = 128 << 10;  // bytes of local memory and stack of one thread
constexpr int kRankShift = 24;               // shared::cluster addresses: (rank + 1) << 24 | address; 0: own block
constexpr size_t kMostCalls = 4096;
constexpr uint32_t kMostLoops = 32;           // of one group of lanes before a random one has its turn

struct Machine;
struct Block;
struct Cluster;
struct ClusterClock;
class Checker;

struct KernelFault : std::exception {
  KernelFault(Fault fault, std::string message) : fault(fault), message(std::move(message)) {}
  const char* what() const noexcept override { return message.c_str(); }
  Fault fault;
  std::string message;
};

// Bytes aligned as a kernel may ask of its parameters.
class AlignedBytes {
 public:
  void assign(const std::vector<unsigned char>& bytes) {
    store_.assign(bytes.size() + 128, 0);
    size_ = bytes.size();
    data_ = store_.data() + (128 - reinterpret_cast<uintptr_t>(store_.data()) % 128) % 128;
    std::copy(bytes.begin(), bytes.end(), data_);
  }
  unsigned char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  std::vector<unsigned char> store_;
  unsigned char* data_ = nullptr;
  size_t size_ = 0;
};

struct Random {  // splitmix64
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  uint32_t below(uint32_t bound) { return static_cast<uint32_t>((next() >> 32) * bound >> 32); }
};

// One cp.async of one lane, or a bulk copy: from issue until its wait.
struct AsyncCopy {
  uint64_t source = 0;   // global host address
  uint32_t target = 0;   // shared address
  uint32_t bytes = 0, source_bytes = 0;
  bool landed = false;
  const Inst* inst = nullptr;
};

struct LaneAsync {
  std::vector<AsyncCopy> open;               // not yet committed
  std::deque<std::vector<AsyncCopy>> groups;
};

struct CallFrame {
  uint32_t return_pc;
  uint32_t frame;              // of the caller
  const Program::CallSite* site;
  int callee;
  std::vector<uint64_t> saved;  // registers of the callee, if it was active before
};

struct WgmmaState;
struct BulkState;

struct Warp {
  unsigned char* base[2] = {};   // registers, constants
  uint32_t mask = 0;             // lanes that execute the current instruction
  uint32_t group = 0;            // lanes at pc
  uint32_t live = 0;
  uint32_t pc = 0;
  uint32_t next_pc = kNever;     // the lowest pc of the other lanes: there the group has to look around
  bool reschedule = false;       // a handler changed group, pc or the state of lanes
  bool yield = false;            // ends the quantum
  bool polls = false;            // it was ended by a load of what other warps write
  bool blocked = false;          // no lane can go on
  bool pending_wgmma = false;
  uint32_t waiting = 0;          // lanes that wait for other lanes of the warp
  uint32_t at_barrier = 0;       // lanes that wait for other warps
  uint32_t at_cluster = 0;       // those of them that wait at the barrier of the cluster
  uint32_t polled = 0;           // lanes whose last try_wait failed ...
  uint64_t poll_event = 0;       // ... when the machine had seen so many events
  uint32_t poll_pc = 0;          // and where that was
  uint32_t lone = 0;             // loops while other lanes were elsewhere
  uint32_t lane_pc[kLanes] = {};
  uint32_t frame[kLanes] = {};
  int index = 0;                 // in the block
  uint32_t born = 0;             // lanes that exist
  Block* block = nullptr;
  Machine* machine = nullptr;
  std::vector<unsigned char> local[kLanes], local_known[kLanes];
  std::vector<CallFrame> calls[kLanes];
  std::vector<LaneAsync> async;  // 32, or empty: no cp.async yet
  std::shared_ptr<WgmmaState> wgmma;
  std::shared_ptr<BulkState> bulk;
  std::vector<unsigned char> registers;  // over-allocated
  uint64_t priority = 0;

  template <class R>
  R* row(Offset offset) const {
    return reinterpret_cast<R*>(base[offset & 1] + (offset & ~1u));
  }
  uint32_t pred(Offset offset) const { return *row<uint32_t>(offset); }
  uint32_t here(const Inst& in) const;  // the pc of `in`
};

struct Barrier {
  struct Waiter {
    Warp* warp;
    uint32_t lanes;
    const Inst* inst;
    bool sync;
  };
  std::vector<Waiter> waiters;
  uint32_t arrived = 0;    // threads
  uint32_t expected = 0;   // 0: all of the block
  const Inst* first = nullptr;
  uint32_t votes = 0, voters = 0;
  int64_t times = 0;       // completed
};

struct MBarrier;
struct PendingOp;  // an asynchronous copy of the block that has not landed

struct Block {
  Machine* machine = nullptr;
  Cluster* cluster = nullptr;
  uint32_t linear = 0, rank = 0;
  uint32_t slot = 0;             // among the resident blocks
  Dim3 id;
  unsigned char* shared = nullptr;
  std::vector<unsigned char> shared_store;
  uint32_t shared_bytes = 0;     // from kSharedBase
  std::vector<std::unique_ptr<Warp>> warps;
  uint32_t live = 0, threads = 0;
  std::map<uint32_t, Barrier> barriers;
  std::map<uint32_t, std::shared_ptr<MBarrier>> mbarriers;
  std::string name() const;      // "block (1,0,0)"
};

struct Cluster {
  std::vector<Block*> blocks;
  Dim3 id;
  std::vector<uint64_t> arrivals;  // per thread of the cluster: phases it has arrived for
  uint64_t phase = 0;
  uint32_t live = 0, arrived = 0;
  std::shared_ptr<ClusterClock> clock;
};

struct Machine {
  Machine(const ModuleImpl& module, std::shared_ptr<const Program> program, const Launch& launch, const Options& options);
  ~Machine();

  const ModuleImpl& module;
  std::shared_ptr<const Program> program;
  const Launch& launch;
  const Options& options;
  MemoryView memory;
  Random random;
  Counters counters;
  std::string printed;
  AlignedBytes params;
  std::unique_ptr<Checker> checker;  // null: no checks
  std::vector<std::unique_ptr<Block>> blocks;      // resident
  std::vector<std::unique_ptr<Cluster>> clusters;  // resident
  std::vector<std::shared_ptr<PendingOp>> pending; // asynchronous operations that have not landed
  std::vector<unsigned char> grid_workspace;       // what cooperative_groups finds in %envreg1 and 2
  std::vector<std::unique_ptr<unsigned char[]>> heap;
  uint64_t events = 1;               // anything that a polling warp may be waiting for
  uint32_t threads = 0, warps = 0;   // of a block
  uint32_t shared_bytes = 0;
  Dim3 cluster_dim, cluster_grid;
  bool clock_seen = false;
};

// ---- control.cpp: divergence ----

void start_warp(Warp& w, uint32_t lanes);
// Picks the lanes that run next; false if none can.
bool regroup(Warp& w);
// Lanes stop at `in`, to execute it once more later; the others of the group have executed it.
void wait_here(Warp& w, const Inst& in, uint32_t lanes);
void exit_lanes(Warp& w, const Inst& in, uint32_t lanes);
// For *.sync instructions: the lanes of w.mask whose member mask is complete; the rest has been sent to wait.
uint32_t ready_lanes(Warp& w, const Inst& in, const uint32_t* member_masks, bool exited_allowed);
// For .aligned instructions: true if all live lanes are here; false: they wait for the rest.
bool aligned_here(Warp& w, const Inst& in, bool whole_warp);
void recheck_barriers(Block& block);
void release_cluster(Cluster& cluster);
std::string describe_waits(Machine& m);

// ---- faults ----

[[noreturn]] void fault(const Warp& w, const Inst& in, Fault kind, const std::string& what, uint32_t lanes);
std::string place(const Warp& w, const Inst& in, uint32_t lanes);
std::string lanes_text(uint32_t lanes);
std::string hex(uint64_t value);

// ---- scheduler.cpp ----

void run_blocks(Machine& m);

}  // namespace ptxsim
