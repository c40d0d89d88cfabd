// A launch from start to end: which blocks are resident, which warp runs next and for how long.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "async.h"
#include "checker.h"
#include "machine.h"

namespace ptxsim {
namespace {

uint64_t count(const Dim3& d) { return uint64_t{d.x} * d.y * d.z; }

std::string text(const Dim3& d) {
  return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
}

[[noreturn]] void bad_launch(const Launch& launch, const std::string& why) {
  throw KernelFault(Fault::kBadLaunch, "launch of `" + launch.kernel + "`: " + why);
}

void fill_special(Warp& w, const Program::SpecialRow& row) {
  const Machine& m = *w.machine;
  const Block& b = *w.block;
  const Dim3 block = m.launch.block, grid = m.launch.grid, cluster = m.cluster_dim;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const uint32_t thread = static_cast<uint32_t>(w.index) * kLanes + lane;
    uint64_t value = 0;
    switch (row.special) {
      case Special::kTidX: value = thread % block.x; break;
      case Special::kTidY: value = thread / block.x % block.y; break;
      case Special::kTidZ: value = thread / block.x / block.y; break;
      case Special::kNtidX: value = block.x; break;
      case Special::kNtidY: value = block.y; break;
      case Special::kNtidZ: value = block.z; break;
      case Special::kCtaidX: value = b.id.x; break;
      case Special::kCtaidY: value = b.id.y; break;
      case Special::kCtaidZ: value = b.id.z; break;
      case Special::kNctaidX: value = grid.x; break;
      case Special::kNctaidY: value = grid.y; break;
      case Special::kNctaidZ: value = grid.z; break;
      case Special::kLaneId: value = lane; break;
      case Special::kWarpId: value = static_cast<uint32_t>(w.index); break;
      case Special::kNwarpId: value = 64; break;
      case Special::kSmId: value = b.slot; break;
      case Special::kNsmId: value = m.blocks.size(); break;
      case Special::kLanemaskEq: value = 1u << lane; break;
      case Special::kLanemaskLt: value = (1u << lane) - 1; break;
      case Special::kLanemaskLe: value = (2u << lane) - 1; break;
      case Special::kLanemaskGe: value = ~((1u << lane) - 1); break;
      case Special::kLanemaskGt: value = ~((2u << lane) - 1); break;
      case Special::kClusterIdX: value = b.id.x / cluster.x; break;
      case Special::kClusterIdY: value = b.id.y / cluster.y; break;
      case Special::kClusterIdZ: value = b.id.z / cluster.z; break;
      case Special::kNclusterIdX: value = m.cluster_grid.x; break;
      case Special::kNclusterIdY: value = m.cluster_grid.y; break;
      case Special::kNclusterIdZ: value = m.cluster_grid.z; break;
      case Special::kClusterCtaidX: value = b.id.x % cluster.x; break;
      case Special::kClusterCtaidY: value = b.id.y % cluster.y; break;
      case Special::kClusterCtaidZ: value = b.id.z % cluster.z; break;
      case Special::kClusterNctaidX: value = cluster.x; break;
      case Special::kClusterNctaidY: value = cluster.y; break;
      case Special::kClusterNctaidZ: value = cluster.z; break;
      case Special::kClusterCtarank: value = b.rank; break;
      case Special::kClusterNctarank: value = count(cluster); break;
      case Special::kIsExplicitCluster: value = count(cluster) > 1; break;
      case Special::kDynamicSmem: value = m.launch.dynamic_shared; break;
      case Special::kTotalSmem:
      case Special::kAggrSmem: value = m.shared_bytes; break;
      default: {
        const auto workspace = reinterpret_cast<uint64_t>(m.grid_workspace.data());
        if (row.special == static_cast<Special>(static_cast<int>(Special::kEnvreg0) + 1)) value = workspace >> 32;
        if (row.special == static_cast<Special>(static_cast<int>(Special::kEnvreg0) + 2)) value = workspace & 0xffffffffu;
      }
    }
    if (row.wide) w.row<uint64_t>(row.row)[lane] = value;
    else w.row<uint32_t>(row.row)[lane] = static_cast<uint32_t>(value);
  }
}

void start_block(Machine& m, Block& b, uint64_t linear, Cluster* cluster, uint32_t rank, const Dim3& id) {
  b.linear = static_cast<uint32_t>(linear);
  b.id = id;
  b.cluster = cluster;
  b.rank = rank;
  b.threads = b.live = m.threads;
  b.barriers.clear();
  b.mbarriers.clear();
  std::memset(b.shared, kPoison, m.shared_bytes);
  if (m.options.seed % 2 == 1 && m.shared_bytes > 0) {  // what nobody wrote differs between odd and even seeds
    Random random{m.options.seed ^ 0x5eed};
    for (uint32_t i = 0; i + 8 <= m.shared_bytes; i += 8) {
      const uint64_t bits = random.next();
      std::memcpy(b.shared + i, &bits, 8);
    }
  }
  if (m.checker != nullptr) m.checker->start_block(b);
  for (auto& warp : b.warps) {
    Warp& w = *warp;
    const uint32_t first = static_cast<uint32_t>(w.index) * kLanes;
    const uint32_t lanes = std::min<uint32_t>(kLanes, m.threads - first);
    start_warp(w, lanes == kLanes ? kFull : (1u << lanes) - 1);
    std::memset(w.base[0], kPoison, m.program->register_bytes);
    for (const auto& special : m.program->specials) fill_special(w, special);
    for (int lane = 0; lane < kLanes; ++lane) {
      w.local[lane].assign(m.program->frame_bytes, kPoison);
      w.local_known[lane].assign(m.checker != nullptr ? m.program->frame_bytes : 0, 0);
      w.calls[lane].clear();
      w.frame[lane] = 0;
    }
    w.priority = m.random.next();
  }
}

void make_block(Machine& m, uint32_t slot) {
  auto block = std::make_unique<Block>();
  Block& b = *block;
  b.machine = &m;
  b.slot = slot;
  b.shared_bytes = m.shared_bytes;
  b.shared_store.resize(m.shared_bytes + 1024);
  const auto address = reinterpret_cast<uintptr_t>(b.shared_store.data());
  b.shared = b.shared_store.data() + (1024 - address % 1024) % 1024;
  for (uint32_t i = 0; i < m.warps; ++i) {
    auto warp = std::make_unique<Warp>();
    warp->index = static_cast<int>(i);
    warp->block = &b;
    warp->machine = &m;
    warp->registers.resize(m.program->register_bytes + 128);
    const auto registers = reinterpret_cast<uintptr_t>(warp->registers.data());
    warp->base[0] = warp->registers.data() + (64 - registers % 64) % 64;
    warp->base[1] = m.program->constants;
    b.warps.push_back(std::move(warp));
  }
  m.blocks.push_back(std::move(block));
}

// Runs one warp for up to `quantum` instructions.
void run_warp(Machine& m, Warp& w, int64_t quantum) {
  const Inst* code = m.program->code.data();
  w.yield = w.polls = false;
  if (w.group == 0 && !regroup(w)) return;
  int64_t left = quantum;
  const int64_t start = left;
  while (left > 0) {
    const Inst& in = code[w.pc];
    --left;
    ++w.pc;
    w.mask = w.group;
    if (in.guard != kNoOffset) {
      const uint32_t p = w.pred(in.guard);
      w.mask &= in.guard_not ? ~p : p;
      if (w.mask == 0) {
        if (w.pc >= w.next_pc && !regroup(w)) break;
        continue;
      }
    }
    in.fn(w, in);
    if (w.reschedule || w.pc >= w.next_pc) {
      if (!regroup(w)) break;
    }
    if (w.yield) break;
  }
  m.counters.warp_instructions += start - left;
}

bool runnable(const Warp& w) { return w.live != 0 && !w.blocked; }

bool polls(const Machine& m, const Warp& w) {
  return w.polled != 0 && w.poll_event == m.events && ((w.live & ~w.waiting & ~w.at_barrier) & ~w.polled) == 0;
}

}  // namespace

Machine::Machine(const ModuleImpl& module, std::shared_ptr<const Program> program, const Launch& launch,
                 const Options& options)
    : module(module), program(std::move(program)), launch(launch), options(options), memory(Memory::global()),
      random{options.seed * 0x2545f4914f6cdd1dull + 0x1234567} {}

Machine::~Machine() = default;

void run_blocks(Machine& m) {
  const Launch& launch = m.launch;
  const uint64_t threads = count(launch.block), blocks = count(launch.grid);
  if (threads == 0 || blocks == 0) bad_launch(launch, "an empty grid " + text(launch.grid) + " or block " + text(launch.block));
  if (threads > 1024 || launch.block.z > 64) bad_launch(launch, "a block of " + std::to_string(threads) + " threads " + text(launch.block));
  if (launch.grid.x > 0x7fffffffu || launch.grid.y > 65535 || launch.grid.z > 65535)
    bad_launch(launch, "a grid of " + text(launch.grid) + " blocks");
  const Function& entry = *m.program->entry;
  if (entry.max_threads != 0 && threads > entry.max_threads)
    bad_launch(launch, std::to_string(threads) + " threads in a block, but it was compiled for at most " + std::to_string(entry.max_threads));
  if (entry.required[0] != 0 && (launch.block.x != entry.required[0] || launch.block.y != entry.required[1] || launch.block.z != entry.required[2]))
    bad_launch(launch, "a block of " + text(launch.block) + " threads, but it was compiled for (" + std::to_string(entry.required[0]) +
               "," + std::to_string(entry.required[1]) + "," + std::to_string(entry.required[2]) + ")");
  if (launch.params.size() < entry.param_bytes)
    bad_launch(launch, std::to_string(launch.params.size()) + " bytes of parameters instead of " + std::to_string(entry.param_bytes));

  m.cluster_dim = launch.cluster;
  if (entry.cluster[0] != 0) {
    const Dim3 required{entry.cluster[0], entry.cluster[1], entry.cluster[2]};
    if (count(launch.cluster) > 1 && (launch.cluster.x != required.x || launch.cluster.y != required.y || launch.cluster.z != required.z))
      bad_launch(launch, "clusters of " + text(launch.cluster) + ", but it was compiled for " + text(required));
    m.cluster_dim = required;
  }
  const Dim3 c = m.cluster_dim;
  if (count(c) == 0 || count(c) > 16 || launch.grid.x % c.x || launch.grid.y % c.y || launch.grid.z % c.z)
    bad_launch(launch, "a grid of " + text(launch.grid) + " blocks in clusters of " + text(c));
  if (count(c) > 1 && m.options.arch.rfind("sm_8", 0) == 0) bad_launch(launch, "clusters need sm_90");
  m.cluster_grid = {launch.grid.x / c.x, launch.grid.y / c.y, launch.grid.z / c.z};

  const uint64_t shared = m.program->dynamic_offset + uint64_t{launch.dynamic_shared};
  const uint32_t limit = m.options.arch.rfind("sm_8", 0) == 0 ? 163u << 10 : 227u << 10;
  m.shared_bytes = launch.dynamic_shared > 0 ? static_cast<uint32_t>(std::min<uint64_t>(shared, 1u << 30)) : m.program->static_shared;
  if (m.shared_bytes > limit)
    bad_launch(launch, std::to_string(m.shared_bytes) + " bytes of shared memory; " + m.options.arch + " has " + std::to_string(limit));
  if (m.program->static_shared > 48u << 10)
    bad_launch(launch, std::to_string(m.program->static_shared) + " bytes of static shared memory; at most 49152 are possible");
  if (m.program->frame_bytes > kLocalLimit) bad_launch(launch, std::to_string(m.program->frame_bytes) + " bytes of local memory a thread");

  m.threads = static_cast<uint32_t>(threads);
  m.warps = (m.threads + kLanes - 1) / kLanes;
  m.params.assign(launch.params);
  m.memory.add(m.params.data(), m.params.size(), "kernel parameters", true);
  for (const auto& [name, symbol] : m.module.symbols)
    if (symbol->data != nullptr) m.memory.add(symbol->data, symbol->bytes, symbol->name, symbol->space == Space::kConst);
  m.grid_workspace.assign(256, 0);
  m.memory.add(m.grid_workspace.data(), m.grid_workspace.size(), "grid workspace", false);

  const uint64_t per_cluster = count(c), clusters = blocks / per_cluster;
  uint64_t resident = std::max<uint64_t>(1, static_cast<uint64_t>(std::max(1, m.options.resident_blocks)) / per_cluster);
  if (m.options.cooperative) resident = clusters;
  resident = std::min(resident, clusters);
  if (resident * per_cluster * m.warps > 1u << 16)
    bad_launch(launch, std::to_string(resident * per_cluster) + " resident blocks are more than a GPU holds");
  if (m.options.check) m.checker = std::make_unique<Checker>(m);

  uint64_t next = 0;
  const auto start_cluster = [&](size_t slot) {
    Cluster& cluster = *m.clusters[slot];
    const uint64_t index = next++;
    const Dim3 id{static_cast<uint32_t>(index % m.cluster_grid.x), static_cast<uint32_t>(index / m.cluster_grid.x % m.cluster_grid.y),
                  static_cast<uint32_t>(index / m.cluster_grid.x / m.cluster_grid.y)};
    cluster.id = id;
    cluster.phase = 0;
    cluster.arrived = 0;
    cluster.clock.reset();
    cluster.live = static_cast<uint32_t>(per_cluster * threads);
    cluster.arrivals.assign(per_cluster * threads, 0);
    for (uint32_t r = 0; r < per_cluster; ++r) {
      const Dim3 block{id.x * c.x + r % c.x, id.y * c.y + r / c.x % c.y, id.z * c.z + r / c.x / c.y};
      const uint64_t linear = block.x + uint64_t{launch.grid.x} * (block.y + uint64_t{launch.grid.y} * block.z);
      start_block(m, *cluster.blocks[r], linear, &cluster, r, block);
    }
  };
  for (uint64_t i = 0; i < resident; ++i) {
    m.clusters.push_back(std::make_unique<Cluster>());
    for (uint64_t r = 0; r < per_cluster; ++r) {
      make_block(m, static_cast<uint32_t>(m.blocks.size()));
      m.clusters.back()->blocks.push_back(m.blocks.back().get());
    }
  }
  for (uint64_t i = 0; i < resident; ++i) start_cluster(i);

  std::vector<Warp*> warps;
  for (auto& block : m.blocks)
    for (auto& warp : block->warps) warps.push_back(warp.get());
  // Half of the seeds schedule by turns of random length; the others let the warp of the highest priority run on, with
  // changes of priority now and then, which brings warps much further apart.
  const bool by_priority = m.random.below(2) == 1;
  const auto n = static_cast<uint32_t>(warps.size());
  uint64_t idle_event = 0;
  int64_t idle_rounds = 0;
  uint64_t running = resident;
  while (running > 0) {
    Warp* chosen = nullptr;
    uint32_t candidates = 0, polling = 0;
    const uint32_t begin = m.random.below(n);
    for (uint32_t i = 0; i < n; ++i) {
      Warp* w = warps[begin + i < n ? begin + i : begin + i - n];
      if (!runnable(*w)) continue;
      if (polls(m, *w)) {
        ++polling;
        continue;
      }
      ++candidates;
      if (!by_priority) {
        chosen = w;
        break;
      }
      if (chosen == nullptr || w->priority > chosen->priority) chosen = w;
    }
    if (chosen == nullptr) {
      // Everybody waits. Copies may land; pollers may still have something else to do than poll.
      if (land_something(m, false)) continue;
      if (polling == 0) throw KernelFault(Fault::kDeadlock, describe_waits(m));
      if (idle_event != m.events) idle_event = m.events, idle_rounds = 0;
      if (++idle_rounds > 64 + 8 * int64_t{n}) throw KernelFault(Fault::kDeadlock, describe_waits(m));
      uint32_t pick = m.random.below(polling);
      for (uint32_t i = 0; i < n && chosen == nullptr; ++i)
        if (runnable(*warps[i]) && pick-- == 0) chosen = warps[i];
      if (chosen == nullptr) throw KernelFault(Fault::kDeadlock, describe_waits(m));
    }
    const int64_t quantum = by_priority ? 1 + m.random.below(2048) : 1 + m.random.below(256);
    run_warp(m, *chosen, quantum);
    // Who polls goes last; otherwise its high priority would keep the one it waits for from running.
    if (by_priority && chosen->polls) chosen->priority = 0;
    else if (by_priority && m.random.below(4) == 0) chosen->priority = m.random.next();
    if (!m.pending.empty()) land_at_random(m);
    if (m.counters.warp_instructions > m.options.max_instructions)
      throw KernelFault(Fault::kLimit, "more than " + std::to_string(m.options.max_instructions) +
                        " warp instructions\n" + describe_waits(m));
    if (chosen->live == 0 && chosen->block->live == 0) {
      Cluster& cluster = *chosen->block->cluster;
      if (cluster.live != 0) continue;
      for (Block* block : cluster.blocks)
        if (m.checker != nullptr) m.checker->end_block(*block);
      size_t slot = 0;
      while (m.clusters[slot].get() != &cluster) ++slot;
      if (next < clusters) start_cluster(slot);
      else --running;
    }
  }
}

std::string describe_waits(Machine& m) {
  std::string text = "who waits where:";
  int lines = 0;
  for (auto& block : m.blocks) {
    if (block->live == 0) continue;
    for (auto& warp : block->warps) {
      Warp& w = *warp;
      if (w.live == 0) continue;
      if (w.group != 0)
        for (uint32_t l = w.group; l != 0; l &= l - 1) w.lane_pc[__builtin_ctz(l)] = w.pc;
      for (uint32_t rest = w.live; rest != 0;) {
        if (++lines > 200) return text + "\n  ...";
        const int first = __builtin_ctz(rest);
        uint32_t same = 0;
        for (uint32_t l = rest; l != 0; l &= l - 1) {
          const int lane = __builtin_ctz(l);
          if (w.lane_pc[lane] == w.lane_pc[first] && ((w.at_barrier >> lane) & 1) == ((w.at_barrier >> first) & 1)) same |= l & -l;
        }
        const bool barrier = (w.at_barrier >> first) & 1, waits = (w.waiting >> first) & 1;
        const bool poll = !barrier && !waits && ((w.polled >> first) & 1);
        const uint32_t pc = poll ? w.poll_pc : std::min<uint32_t>(barrier && w.lane_pc[first] > 0 ? w.lane_pc[first] - 1 : w.lane_pc[first],
                                               static_cast<uint32_t>(m.program->code.size() - 1));
        const Inst& in = m.program->code[pc];
        text += "\n  " + block->name() + " warp " + std::to_string(w.index) + " lanes " + lanes_text(same) + ": " +
                (barrier || poll ? "waits at" : waits ? "waits for lanes of its warp at" : "is at") + " `" + std::string(in.opcode) +
                "` " + describe_location(m.module, *m.program, in);
        if (poll) text += describe_mbarrier_wait(w);
        rest &= ~same;
      }
    }
    for (auto& [id, barrier] : block->barriers)
      if (barrier.first != nullptr)
        text += "\n  " + block->name() + " barrier " + std::to_string(id) + ": " + std::to_string(barrier.arrived) + " of " +
                std::to_string(barrier.expected == 0 ? block->live : barrier.expected) + " threads have arrived";
  }
  return text;
}

Result launch(const Module& module, const Launch& launch, const Options& options) {
  Result result;
  const unsigned control = _mm_getcsr();
  _mm_setcsr(0x1f80);  // the caller may flush subnormals
  try {
    const auto& impl = dynamic_cast<const ModuleImpl&>(module);
    std::shared_ptr<const Program> program;
    try {
      program = impl.program(launch.kernel);
    } catch (const UnknownInstruction& error) {
      result.fault = Fault::kUnknownInstruction;
      result.message = std::string(error.what()) + ", in kernel `" + launch.kernel + "` of " + impl.name();
    } catch (const std::exception& error) {
      result.fault = Fault::kBadLaunch;
      result.message = error.what();
    }
    if (program != nullptr) {
      Machine machine(impl, std::move(program), launch, options);
      try {
        run_blocks(machine);
      } catch (const KernelFault& error) {
        result.fault = error.fault;
        result.message = std::string(fault_name(error.fault)) + ": " + error.message + "\nin kernel `" + launch.kernel + "`";
      } catch (const std::bad_alloc&) {
        result.fault = Fault::kBadLaunch;
        result.message = "bad launch: the interpreter has no memory left";
      }
      result.printed = std::move(machine.printed);
      result.counters = machine.counters;
    }
  } catch (const std::exception& error) {
    result.fault = Fault::kBadLaunch;
    result.message = error.what();
  }
  _mm_setcsr(control);
  return result;
}

const char* fault_name(Fault fault) {
  switch (fault) {
    case Fault::kNone: return "none";
    case Fault::kUnknownInstruction: return "unknown instruction";
    case Fault::kBadLaunch: return "bad launch";
    case Fault::kOutOfBounds: return "out of bounds";
    case Fault::kMisaligned: return "misaligned";
    case Fault::kUninitialized: return "uninitialized";
    case Fault::kRace: return "race";
    case Fault::kAsyncInFlight: return "async in flight";
    case Fault::kProxy: return "proxy";
    case Fault::kDivergence: return "divergence";
    case Fault::kBarrier: return "barrier";
    case Fault::kDeadlock: return "deadlock";
    case Fault::kLimit: return "limit";
    default: return "trap";
  }
}

}  // namespace ptxsim
