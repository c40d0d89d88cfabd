// Barriers of a block and of a cluster, and fences.
#include "async.h"
#include "checker.h"
#include "compiler_impl.h"
#include "lanes.h"
#include "machine.h"
#include "opcodes.h"

namespace ptxsim {
void resolve_warp_barrier(Build& b);

namespace {

enum Kind : uint8_t { kSync, kArrive, kPopc, kAnd, kOr };

void complete(Block& block, uint32_t id, Barrier& barrier) {
  if (block.machine->checker != nullptr) block.machine->checker->barrier_done(block, id, barrier);
  for (const Barrier::Waiter& waiter : barrier.waiters) {
    if (!waiter.sync) continue;
    waiter.warp->at_barrier &= ~waiter.lanes;
    waiter.warp->blocked = false;
    const Inst& in = *waiter.inst;
    if (in.kind == kSync) continue;
    const uint32_t mask = waiter.warp->mask;
    if (in.kind == kPopc) {
      for (uint32_t m = waiter.lanes; m != 0; m &= m - 1)
        waiter.warp->row<uint32_t>(in.o[0])[__builtin_ctz(m)] = barrier.votes;
    } else {
      const bool r = in.kind == kAnd ? barrier.votes == barrier.voters : barrier.votes != 0;
      uint32_t& p = *waiter.warp->row<uint32_t>(in.o[0]);
      p = (p & ~waiter.lanes) | (r ? waiter.lanes : 0);
    }
    waiter.warp->mask = mask;
  }
  ++block.machine->events;
  barrier.waiters.clear();
  barrier.arrived = barrier.expected = barrier.votes = barrier.voters = 0;
  barrier.first = nullptr;
  ++barrier.times;
}

void arrive(Warp& w, const Inst& in, uint32_t id, uint32_t count, uint32_t lanes) {
  Block& block = *w.block;
  if (id > 15) fault(w, in, Fault::kBarrier, "barrier " + std::to_string(id) + " of 16", lanes);
  if (count % 32 != 0)
    fault(w, in, Fault::kBarrier, "a thread count of " + std::to_string(count) + ", which is no multiple of 32", lanes);
  Barrier& barrier = block.barriers[id];
  if (barrier.first == nullptr) {
    barrier.first = &in;
    barrier.expected = count;
  } else if (barrier.expected != count) {
    const auto text = [](uint32_t n) { return n == 0 ? std::string("all") : std::to_string(n); };
    fault(w, in, Fault::kBarrier, "barrier " + std::to_string(id) + " waits for " + text(barrier.expected) +
          " threads, but this expects " + text(count), lanes);
  } else if (barrier.first != &in && count == 0 && block.machine->checker != nullptr) {
    fault(w, in, Fault::kDivergence, "other warps of the block wait for barrier " + std::to_string(id) +
          " at another place, " + describe_location(w.machine->module, *w.machine->program, *barrier.first), lanes);
  }
  // An aligned arrival counts the whole warp, with lanes that have exited or never existed.
  const uint32_t threads = in.aligned && count != 0 ? 32 : static_cast<uint32_t>(__builtin_popcount(lanes));
  barrier.arrived += threads;
  barrier.waiters.push_back({&w, lanes, &in, in.kind != kArrive});
  if (in.kind >= kPopc) {
    const uint32_t p = w.pred(in.o[3]) ^ (in.flags & 1 ? kFull : 0);
    barrier.votes += static_cast<uint32_t>(__builtin_popcount(p & lanes));
    barrier.voters += static_cast<uint32_t>(__builtin_popcount(lanes));
  }
  if (in.kind == kArrive && block.machine->checker != nullptr) block.machine->checker->barrier_arrive(w, id, lanes);
  if (in.kind != kArrive) {
    for (uint32_t m = lanes; m != 0; m &= m - 1) w.lane_pc[__builtin_ctz(m)] = w.here(in) + 1;
    w.at_barrier |= lanes;
    w.group &= ~lanes;
    w.reschedule = true;
  }
  if (count != 0 && barrier.arrived > count)
    fault(w, in, Fault::kBarrier, std::to_string(barrier.arrived) + " threads arrived at barrier " + std::to_string(id) +
          ", which expects " + std::to_string(count), lanes);
  if (barrier.arrived >= (count == 0 ? block.live : count)) complete(block, id, barrier);
}

// o: d (of reductions, else unused), id, count, predicate.
void barrier(Warp& w, const Inst& in) {
  if (in.aligned && !aligned_here(w, in, false)) return;
  const uint32_t* id = w.row<uint32_t>(in.o[1]);
  const uint32_t* count = w.row<uint32_t>(in.o[2]);
  for (uint32_t rest = w.mask; rest != 0;) {
    const int first = __builtin_ctz(rest);
    uint32_t same = 0;
    for (uint32_t m = rest; m != 0; m &= m - 1)
      if (id[__builtin_ctz(m)] == id[first]) same |= m & -m;
    if (in.aligned && same != w.mask)
      fault(w, in, Fault::kBarrier, "lanes of a warp name different barriers", same);
    arrive(w, in, id[first], count[first], same);
    rest &= ~same;
  }
}

void barrier_resolver(Build& b) {
  b.in.aligned = b.base == "bar";
  b.take("cta");
  if (b.take("cluster")) return resolve_cluster_barrier(b);
  if (b.take("warp")) {
    b.take("sync");
    return resolve_warp_barrier(b);
  }
  b.in.aligned |= b.take("aligned");
  const int form = b.take_one({"sync", "arrive", "red"}, -1);
  size_t at = 0;
  if (form == 2) {
    b.in.kind = static_cast<uint8_t>(kPopc + b.take_one({"popc", "and", "or"}, 0));
    b.need_type();
    b.operands(3, 4);
    if (b.in.kind == kPopc) b.dst(0, Type::kU32);
    else b.dst_pred(b.ops[0]);
    at = 1;
  } else {
    b.in.kind = form == 0 ? kSync : kArrive;
    b.operands(1, 2);
    b.append(b.constant(0, false));
  }
  const size_t numbers = b.ops.size() - at - (form == 2 ? 1 : 0);
  b.src(at, Type::kU32);
  if (numbers == 2) b.src(at + 1, Type::kU32);
  else b.append(b.constant(0, false));
  if (form == 2) {
    b.src_pred(b.ops.back());
    b.in.flags = b.ops.back().negated;
  }
  if (form >= 0) b.in.fn = barrier;
}

void fence_memory(Warp& w, const Inst& in) {
  if (w.machine->checker != nullptr) w.machine->checker->fence(w, in.scope);
}

void fence_proxy(Warp& w, const Inst&) {
  if (w.machine->checker != nullptr) w.machine->checker->proxy_fence(w);
}

void membar(Build& b) {
  b.in.scope = static_cast<uint8_t>(b.take_one({"cta", "gl", "sys"}, 1));
  if (b.in.scope > 0) ++b.in.scope;
  if (b.take("proxy")) {
    b.mods.clear();
    b.in.fn = fence_proxy;
    return;
  }
  b.in.fn = fence_memory;
}

// fence.proxy.async and its kin order generic and asynchronous accesses; fence.mbarrier_init makes an initialised
// mbarrier visible to the cluster, which it is here from the start.
void fence(Build& b) {
  if (b.base == "fence" && b.take("proxy")) {
    if (b.has("tensormap::generic")) return resolve_tensormap_fence(b);
    b.mods.clear();
    b.in.fn = fence_proxy;
    return;
  }
  b.take("mbarrier_init");
  b.take("sc"), b.take("acq_rel"), b.take("acquire"), b.take("release");
  b.take("sync_restrict::shared::cta"), b.take("sync_restrict::shared::cluster"), b.take("sync_restrict::shared::cta.cluster");
  b.in.scope = static_cast<uint8_t>(b.take_one({"cta", "cluster", "gpu", "sys"}, 2));
  b.in.fn = fence_memory;
}

}  // namespace

void recheck_barriers(Block& block) {
  for (auto& [id, barrier] : block.barriers)
    if (barrier.first != nullptr && barrier.expected == 0 && block.live > 0 && barrier.arrived >= block.live)
      complete(block, id, barrier);
  if (block.cluster != nullptr) release_cluster(*block.cluster);
}

void add_barrier(OpcodeTable& table) {
  table["bar"] = barrier_resolver;
  table["barrier"] = barrier_resolver;
  table["membar"] = membar;
  table["fence"] = fence;
}

}  // namespace ptxsim
