#include <algorithm>

#include "access.h"
#include "async.h"
#include "compiler_impl.h"
#include "lanes.h"
#include "mbarrier.h"
#include "opcodes.h"

namespace ptxsim {

MBarrier* mbarrier_at(Block& owner, uint32_t address) {
  const auto it = owner.mbarriers.find(address);
  return it == owner.mbarriers.end() ? nullptr : it->second.get();
}

MBarrier& find_mbarrier(Warp& w, const Inst& in, uint32_t address, int lane, Block** owner) {
  Block& block = shared_owner(w, in, address, lane);
  if (address % 8 != 0) fault(w, in, Fault::kMisaligned, "mbarrier at shared address " + hex(address), 1u << lane);
  shared_pointer(w, in, block, address, 8, 1u << lane);
  MBarrier* barrier = mbarrier_at(block, address);
  if (barrier == nullptr)
    fault(w, in, Fault::kBarrier, "no mbarrier has been initialised at shared address " + hex(address) + " (" +
          shared_name(w, address) + (&block != w.block ? " of " + block.name() : "") + ")", 1u << lane);
  if (w.machine->checker != nullptr)
    w.machine->checker->shared_range(w, in, block, address, 8, lane, false, Checker::Agent::kThread);
  if (owner != nullptr) *owner = &block;
  return *barrier;
}

namespace {

void maybe_complete(MBarrier& barrier, Machine& m) {
  if (barrier.pending != 0 || barrier.tx != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.expected;
  barrier.done.join(barrier.arriving);
  barrier.arriving = {};
  ++m.events;
}

}  // namespace

void arrive_mbarrier(const Warp& w, const Inst& in, int lane, MBarrier& barrier, uint32_t count, bool no_complete, Machine& m) {
  if (count > barrier.pending)
    fault(w, in, Fault::kBarrier, std::to_string(count) + " arrivals at an mbarrier that expects only " +
          std::to_string(barrier.pending) + " more in this phase (of " + std::to_string(barrier.expected) + ")", 1u << lane);
  barrier.pending -= count;
  if (no_complete && barrier.pending == 0 && barrier.tx == 0)
    fault(w, in, Fault::kBarrier, "an arrival with .noComplete completes the phase", 1u << lane);
  maybe_complete(barrier, m);
}

void add_tx(const Warp& w, const Inst& in, int lane, MBarrier& barrier, int64_t bytes, Machine& m) {
  constexpr int64_t kMost = (1 << 20) - 1;
  barrier.tx += bytes;
  if (barrier.tx > kMost || barrier.tx < -kMost)
    fault(w, in, Fault::kBarrier, "the mbarrier waits for " + std::to_string(barrier.tx) + " bytes; at most 1048575 can be counted", 1u << lane);
  if (bytes < 0) maybe_complete(barrier, m);
}

void land(PendingOp& op) {
  if (op.landed) return;
  op.landed = true;
  op.land();
  op.land = nullptr;
}

std::shared_ptr<PendingOp> start_operation(Machine& m, std::function<void()> what, Block* target, std::string by) {
  auto op = std::make_shared<PendingOp>();
  op->land = std::move(what);
  op->target = target;
  op->by = std::move(by);
  const Async mode = m.options.async;
  if (mode == Async::kEager || (mode == Async::kRandom && m.random.below(4) == 0)) land(*op);
  else m.pending.push_back(op);
  return op;
}

namespace {

void land_one(Machine& m, size_t index) {
  const std::shared_ptr<PendingOp> op = m.pending[index];
  m.pending.erase(m.pending.begin() + static_cast<long>(index));
  land(*op);
  ++m.events;
}

}  // namespace

bool land_something(Machine& m, bool) {
  std::erase_if(m.pending, [](const auto& op) { return op->landed; });
  if (m.pending.empty()) return false;
  land_one(m, m.random.below(static_cast<uint32_t>(m.pending.size())));
  return true;
}

void land_at_random(Machine& m) {
  std::erase_if(m.pending, [](const auto& op) { return op->landed; });
  if (m.options.async != Async::kRandom || m.pending.empty() || m.random.below(8) != 0) return;
  land_one(m, m.random.below(static_cast<uint32_t>(m.pending.size())));
}

std::string describe_mbarrier_wait(const Warp& w) {
  std::string text;
  for (const auto& [address, barrier] : w.block->mbarriers)
    text += "\n    mbarrier at " + hex(address) + ": phase " + std::to_string(barrier->phase) + ", " +
            std::to_string(barrier->pending) + " of " + std::to_string(barrier->expected) + " arrivals missing, " +
            std::to_string(barrier->tx) + " bytes missing";
  return text;
}

namespace {

template <class F>
void each_address(Warp& w, const Inst& in, int operand, F f) {
  uint64_t addresses[kLanes];
  gather_addresses(w, in, operand, addresses);
  for (uint32_t m = w.mask; m != 0; m &= m - 1) f(__builtin_ctz(m), static_cast<uint32_t>(addresses[__builtin_ctz(m)]));
}

// o: base, count.
void init(Warp& w, const Inst& in) {
  each_address(w, in, 0, [&](int lane, uint32_t address) {
    const uint32_t count = w.row<uint32_t>(in.o[1])[lane];
    if (count == 0 || count >= 1u << 20) fault(w, in, Fault::kBarrier, "a count of " + std::to_string(count), 1u << lane);
    if (address % 8 != 0) fault(w, in, Fault::kMisaligned, "mbarrier at shared address " + hex(address), 1u << lane);
    Block& owner = shared_owner(w, in, address, lane);
    shared_pointer(w, in, owner, address, 8, 1u << lane);
    if (const MBarrier* old = mbarrier_at(owner, address); old != nullptr && (old->tx != 0 || old->pending != old->expected))
      fault(w, in, Fault::kBarrier, "an mbarrier in use is initialised again", 1u << lane);
    auto barrier = std::make_shared<MBarrier>();
    barrier->expected = barrier->pending = count;
    barrier->made = &in;
    owner.mbarriers[address] = barrier;
    if (w.machine->checker != nullptr)
      w.machine->checker->shared_range(w, in, owner, address, 8, lane, true, Checker::Agent::kThread);
  });
}

void inval(Warp& w, const Inst& in) {
  each_address(w, in, 0, [&](int lane, uint32_t address) {
    Block* owner = nullptr;
    find_mbarrier(w, in, address, lane, &owner);
    owner->mbarriers.erase(address & ((1u << kRankShift) - 1));
    if (w.machine->checker != nullptr)
      w.machine->checker->shared_range(w, in, *owner, address & ((1u << kRankShift) - 1), 8, lane, true, Checker::Agent::kThread);
  });
}

// o: state, base, count or bytes. kind bits: 1 expect_tx, 2 noComplete, 4 drop; sem 0: relaxed.
void arrive(Warp& w, const Inst& in) {
  each_address(w, in, 1, [&](int lane, uint32_t address) {
    MBarrier& barrier = find_mbarrier(w, in, address, lane);
    const uint32_t value = w.row<uint32_t>(in.o[2])[lane];
    w.row<uint64_t>(in.o[0])[lane] = barrier.phase << 32 | barrier.pending;
    if (w.machine->checker != nullptr && in.sem) w.machine->checker->release(w, lane, barrier.arriving);
    const bool expects = in.kind & 1;
    if (expects) add_tx(w, in, lane, barrier, value, *w.machine);
    if (in.kind & 4) barrier.expected -= expects ? 1 : std::min(barrier.expected, value);
    arrive_mbarrier(w, in, lane, barrier, expects ? 1 : value, in.kind & 2, *w.machine);
  });
}

void expect_tx(Warp& w, const Inst& in) {
  each_address(w, in, 0, [&](int lane, uint32_t address) {
    MBarrier& barrier = find_mbarrier(w, in, address, lane);
    const int64_t bytes = w.row<uint32_t>(in.o[1])[lane];
    add_tx(w, in, lane, barrier, in.kind ? -bytes : bytes, *w.machine);
  });
}

// o: p, base, state or parity. kind: by parity.
void wait(Warp& w, const Inst& in) {
  uint32_t passed = 0;
  each_address(w, in, 1, [&](int lane, uint32_t address) {
    MBarrier& barrier = find_mbarrier(w, in, address, lane);
    const bool done = in.kind ? (barrier.phase & 1) != (w.row<uint32_t>(in.o[2])[lane] & 1)
                              : barrier.phase > w.row<uint64_t>(in.o[2])[lane] >> 32;
    if (!done) return;
    passed |= 1u << lane;
    if (w.machine->checker != nullptr && in.sem) w.machine->checker->acquire(w, lane, barrier.done);
  });
  uint32_t& p = *w.row<uint32_t>(in.o[0]);
  p = (p & ~w.mask) | passed;
  const uint32_t failed = w.mask & ~passed;
  if (failed == 0) return;
  if (w.poll_event != w.machine->events) w.polled = 0;
  w.poll_event = w.machine->events;
  w.polled |= failed;
  w.poll_pc = w.here(in);
  w.yield = true;
  if (w.next_pc != kNever) w.reschedule = true;  // let the other lanes run
}

void take_order(Build& b) {
  b.in.sem = !b.take("relaxed");
  b.take("acquire"), b.take("release"), b.take("cta"), b.take("cluster");
  b.take_space();
  b.take_type();
}

void mbarrier(Build& b) {
  const int form = b.take_one({"init", "inval", "arrive", "arrive_drop", "expect_tx", "complete_tx", "test_wait", "try_wait", "pending_count"}, -1);
  const bool expects = (form == 2 || form == 3) && b.take("expect_tx");
  const bool no_complete = b.take("noComplete"), parity = b.take("parity");
  take_order(b);
  switch (form) {
    case 0:
      b.operands(2, 2);
      b.address(b.ops[0]), b.src(1, Type::kU32);
      b.in.fn = init;
      break;
    case 1:
      b.operands(1, 1);
      b.address(b.ops[0]);
      b.in.fn = inval;
      break;
    case 2:
    case 3: {
      size_t at = 0;
      if (b.ops.at(0).kind == Operand::Kind::kAddress) b.dst(Operand{}, Type::kB64);
      else b.dst(b.ops[at++], Type::kB64);
      b.address(b.ops.at(at++));
      if (at < b.ops.size()) b.src(b.ops[at], Type::kU32);
      else b.append(b.constant(1, false));
      b.in.kind = static_cast<uint8_t>((expects ? 1 : 0) | (no_complete ? 2 : 0) | (form == 3 ? 4 : 0));
      b.in.fn = arrive;
      break;
    }
    case 4:
    case 5:
      b.operands(2, 2);
      b.address(b.ops[0]), b.src(1, Type::kU32);
      b.in.kind = form == 5;
      b.in.fn = expect_tx;
      break;
    case 6:
    case 7:
      b.operands(3, 4);
      b.dst_pred(b.ops[0]);
      b.address(b.ops[1]);
      b.src(2, parity ? Type::kU32 : Type::kB64);
      b.in.kind = parity;
      b.in.fn = wait;
      break;
    case 8:
      b.operands(2, 2);
      b.dst(0, Type::kU32), b.src(1, Type::kB64);
      b.in.fn = [](Warp& w, const Inst& in) {
        for (uint32_t m = w.mask; m != 0; m &= m - 1)
          w.row<uint32_t>(in.o[0])[__builtin_ctz(m)] = static_cast<uint32_t>(w.row<uint64_t>(in.o[1])[__builtin_ctz(m)]);
      };
      break;
    default: break;
  }
}

// Arrives when all earlier cp.async of the lane have landed. kind: .noinc.
void cp_async_arrive(Warp& w, const Inst& in) {
  each_address(w, in, 0, [&](int lane, uint32_t address) {
    MBarrier& barrier = find_mbarrier(w, in, address, lane);
    if (!in.kind) ++barrier.pending;
    auto copies = std::make_shared<std::vector<AsyncCopy>>();
    if (!w.async.empty()) {
      LaneAsync& mine = w.async[static_cast<size_t>(lane)];
      for (auto& group : mine.groups) {
        copies->insert(copies->end(), group.begin(), group.end());
        group.clear();
      }
      copies->insert(copies->end(), mine.open.begin(), mine.open.end());
      mine.open.clear();
    }
    auto known = std::make_shared<SyncClock>();
    if (w.machine->checker != nullptr) *known = w.machine->checker->snapshot(w, lane);
    Warp* warp = &w;
    const std::shared_ptr<MBarrier> target = barrier.shared_from_this();
    const Inst* inst = &in;
    start_operation(*w.machine, [=] {
      for (AsyncCopy& copy : *copies) {
        land_copy(*warp, copy);
        if (warp->machine->checker != nullptr) warp->machine->checker->in_flight(*warp->block, copy.target, copy.bytes, false);
      }
      target->arriving.join(*known);
      arrive_mbarrier(*warp, *inst, lane, *target, 1, false, *warp->machine);
    }, w.block, place(w, in, 1u << lane));
  });
}

}  // namespace

void resolve_cp_async_mbarrier(Build& b) {
  b.take("arrive");
  b.in.kind = b.take("noinc");
  b.take_space();
  b.take_type();
  b.operands(1, 1);
  b.address(b.ops[0]);
  b.in.fn = cp_async_arrive;
}

void add_mbarrier(OpcodeTable& table) { table["mbarrier"] = mbarrier; }

}  // namespace ptxsim
