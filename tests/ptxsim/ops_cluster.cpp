// The barrier of a cluster, and stores into other blocks that report to an mbarrier.
#include <cstring>

#include "access.h"
#include "async.h"
#include "compiler_impl.h"
#include "lanes.h"
#include "mbarrier.h"
#include "opcodes.h"

namespace ptxsim {

struct ClusterClock {
  SyncClock arriving, done;
};

namespace {

ClusterClock& clock_of(Cluster& c) {
  if (c.clock == nullptr) c.clock = std::make_shared<ClusterClock>();
  return *c.clock;
}

size_t thread_index(const Warp& w, int lane) {
  return size_t{w.block->rank} * w.machine->threads + static_cast<size_t>(w.index) * kLanes + static_cast<size_t>(lane);
}

// kind 0: arrive, 1: wait; sem 0: relaxed.
void cluster_barrier(Warp& w, const Inst& in) {
  if (in.aligned && !aligned_here(w, in, false)) return;
  Cluster& c = *w.block->cluster;
  if (in.kind == 0) {
    for (uint32_t m = w.mask; m != 0; m &= m - 1) {
      const int lane = __builtin_ctz(m);
      uint64_t& mine = c.arrivals[thread_index(w, lane)];
      if (mine > c.phase) fault(w, in, Fault::kBarrier, "a second arrival at the cluster barrier without a wait", m & -m);
      mine = c.phase + 1;
      ++c.arrived;
      if (in.sem && w.machine->checker != nullptr) w.machine->checker->release(w, lane, clock_of(c).arriving);
    }
    release_cluster(c);
    return;
  }
  uint32_t late = 0;
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    const uint64_t mine = c.arrivals[thread_index(w, lane)];
    if (mine == 0) fault(w, in, Fault::kBarrier, "a wait at the cluster barrier without an arrival", m & -m);
    if (mine > c.phase) late |= m & -m;
    else if (w.machine->checker != nullptr) w.machine->checker->acquire(w, lane, clock_of(c).done);
  }
  if (late == 0) return;
  for (uint32_t m = late; m != 0; m &= m - 1) w.lane_pc[__builtin_ctz(m)] = w.here(in);
  w.at_barrier |= late;
  w.at_cluster |= late;
  w.group &= ~late;
  w.reschedule = true;
}

}  // namespace

void release_cluster(Cluster& c) {
  if (c.arrived < c.live || c.live == 0) return;
  for (const Block* block : c.blocks)
    for (const auto& warp : block->warps)
      for (uint32_t m = warp->live; m != 0; m &= m - 1)
        if (c.arrivals[thread_index(*warp, __builtin_ctz(m))] <= c.phase) return;
  ++c.phase;
  c.arrived = 0;
  if (c.clock != nullptr) {
    c.clock->done.join(c.clock->arriving);
    c.clock->arriving = {};
  }
  for (const Block* block : c.blocks) {
    for (const auto& warp : block->warps) {
      warp->at_barrier &= ~warp->at_cluster;
      warp->at_cluster = 0;
      warp->blocked = false;
      ++warp->machine->events;
    }
  }
}

void resolve_cluster_barrier(Build& b) {
  b.in.kind = static_cast<uint8_t>(b.take_one({"arrive", "wait"}, 0));
  b.in.sem = !b.take("relaxed");
  b.take("release"), b.take("acquire");
  b.in.aligned = b.take("aligned");
  b.in.fn = cluster_barrier;
}

namespace {

// st.async and red.async.add: o: base, sources, mbarrier. imm2: constant part of the mbarrier; kind: 1 adds.
template <class R>
void store_async(Warp& w, const Inst& in) {
  uint64_t addresses[kLanes];
  gather_addresses(w, in, 0, addresses);
  const Offset* o = in.operands();
  const Offset barrier_row = o[1 + in.vec];
  const uint32_t bytes = sizeof(R) * in.vec;
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    auto address = static_cast<uint32_t>(addresses[lane]);
    if (address % bytes != 0) fault(w, in, Fault::kMisaligned, "shared address " + hex(address), m & -m);
    Block& owner = shared_owner(w, in, address, lane);
    unsigned char* p = shared_pointer(w, in, owner, address, bytes, m & -m);
    const auto barrier_address = static_cast<uint32_t>(
        (in.sem ? w.row<uint64_t>(barrier_row)[lane] : w.row<uint32_t>(barrier_row)[lane]) + static_cast<uint64_t>(in.imm2));
    MBarrier& barrier = find_mbarrier(w, in, barrier_address, lane);
    auto known = std::make_shared<SyncClock>();
    if (w.machine->checker != nullptr) {
      if (!in.kind) w.machine->checker->shared_range(w, in, owner, address, bytes, lane, true, Checker::Agent::kAsyncProxy);
      if (!in.kind) w.machine->checker->in_flight(owner, address, bytes, true);
      *known = w.machine->checker->snapshot(w, lane);
    }
    std::vector<R> values;
    for (int v = 0; v < in.vec; ++v) values.push_back(w.row<R>(o[1 + v])[lane]);
    Warp* warp = &w;
    Block* target = &owner;
    const std::shared_ptr<MBarrier> signal = barrier.shared_from_this();
    const Inst* inst = &in;
    start_operation(*w.machine, [=] {
      if (inst->kind) {
        R old;
        std::memcpy(&old, p, sizeof old);
        old += values[0];
        std::memcpy(p, &old, sizeof old);
      } else {
        std::memcpy(p, values.data(), bytes);
      }
      if (warp->machine->checker != nullptr) warp->machine->checker->in_flight(*target, address, bytes, false);
      signal->arriving.join(*known);
      add_tx(*warp, *inst, lane, *signal, -int64_t{bytes}, *warp->machine);
    }, &owner, place(w, in, m & -m));
  }
}

void common(Build& b, bool adds) {
  b.take("weak"), b.take("relaxed"), b.take("cluster"), b.take("mbarrier::complete_tx::bytes");
  b.take_space();
  if (adds && !b.take("add")) b.fail("only .add is implemented");
  b.in.kind = adds;
  b.in.vec = static_cast<uint8_t>(b.take("v2") ? 2 : b.take("v4") ? 4 : 1);
  const Type type = b.need_type();
  b.operands(3, 3);
  b.address(b.ops[0]);
  if (b.ops[1].kind == Operand::Kind::kVector) for (const Operand& part : b.ops[1].parts) b.src(part, type);
  else b.src(b.ops[1], type);
  bool wide = true;
  b.address(b.ops[2], b.in.imm2, wide);
  b.in.sem = wide;
  b.in.fn = bits_of(type) == 64 ? &store_async<uint64_t> : &store_async<uint32_t>;
}

}  // namespace

void resolve_st_async(Build& b) { common(b, false); }
void resolve_red_async(Build& b) { common(b, true); }

}  // namespace ptxsim
