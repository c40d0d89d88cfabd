// cp.async: 4, 8 or 16 bytes from global to shared memory that arrive between their issue and their wait.
#include <algorithm>
#include <cstring>

#include "access.h"
#include "async.h"
#include "checker.h"
#include "compiler_impl.h"
#include "lanes.h"
#include "opcodes.h"

namespace ptxsim {

void land_copy(Warp& w, AsyncCopy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  unsigned char* target = w.block->shared + (copy.target - kSharedBase);
  if (copy.source_bytes > 0) std::memcpy(target, reinterpret_cast<const void*>(copy.source), copy.source_bytes);
  std::memset(target + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

namespace {

// From now on the bytes are ordinary writes of the lane.
void finish_copies(Warp& w, const Inst& in, int lane, std::vector<AsyncCopy>& copies) {
  (void)in;
  for (AsyncCopy& copy : copies) {
    land_copy(w, copy);
    if (w.machine->checker != nullptr) {
      w.machine->checker->in_flight(*w.block, copy.target, copy.bytes, false);
      w.machine->checker->shared_range(w, *copy.inst, *w.block, copy.target, copy.bytes, lane, true, Checker::Agent::kThread);
    }
  }
  copies.clear();
}

// o: base of the target, base of the source, source size. imm, imm2: constant parts; size: bytes; kind: how the third
// operand is meant (0 none, 1 source bytes, 2 predicate to ignore the source); width, sem: 64-bit base of target, source.
void cp_async(Warp& w, const Inst& in) {
  alignas(64) uint64_t target[kLanes], source[kLanes];
  unsigned char* p[kLanes];
  gather_addresses(w, in, 0, target);
  const auto offset = static_cast<uint64_t>(in.imm2);
  for (int i = 0; i < kLanes; ++i)
    source[i] = in.sem ? w.row<uint64_t>(in.o[1])[i] + offset : w.row<uint32_t>(in.o[1])[i] + static_cast<uint32_t>(offset);
  uint32_t bytes[kLanes], reads = 0;
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    bytes[lane] = in.size;
    if (in.kind == 1) bytes[lane] = w.row<uint32_t>(in.o[2])[lane];
    if (in.kind == 2 && ((w.pred(in.o[2]) >> lane) & 1)) bytes[lane] = 0;
    if (bytes[lane] > in.size)
      fault(w, in, Fault::kOutOfBounds, "source size " + std::to_string(bytes[lane]) + " of a copy of " + std::to_string(in.size), m & -m);
    if (bytes[lane] > 0) reads |= m & -m;
  }
  resolve(w, in, Space::kShared, target, w.mask, in.size, Access::kWrite, p, nullptr);
  if (reads != 0) {
    uint32_t whole = 0;
    for (uint32_t m = reads; m != 0; m &= m - 1)
      if (bytes[__builtin_ctz(m)] == in.size) whole |= m & -m;
    if (whole != 0) resolve(w, in, Space::kGlobal, source, whole, in.size, Access::kRead, p, nullptr);
    for (uint32_t m = reads & ~whole; m != 0; m &= m - 1) {  // part of a copy: only these bytes are read
      const int lane = __builtin_ctz(m);
      if (source[lane] % in.size != 0)
        fault(w, in, Fault::kMisaligned, "source " + hex(source[lane]) + " is not aligned to " + std::to_string(in.size), m & -m);
      if (w.machine->memory.find(source[lane], bytes[lane]) == nullptr)
        fault(w, in, Fault::kOutOfBounds, "read of " + std::to_string(bytes[lane]) + " bytes at global address " + hex(source[lane]) +
              ": " + w.machine->memory.explain(source[lane], bytes[lane]), m & -m);
      if (w.machine->checker != nullptr)
        w.machine->checker->global_range(w, in, source[lane], bytes[lane], lane, false, Checker::Agent::kThread);
    }
  }
  if (w.async.empty()) w.async.resize(kLanes);
  const Async mode = w.machine->options.async;
  const bool now = mode == Async::kEager || (mode == Async::kRandom && w.machine->random.below(2) == 0);
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    AsyncCopy copy{source[lane], static_cast<uint32_t>(target[lane]), in.size, bytes[lane], false, &in};
    if (now) land_copy(w, copy);
    if (w.machine->checker != nullptr) w.machine->checker->in_flight(*w.block, copy.target, copy.bytes, true);
    w.async[lane].open.push_back(copy);
  }
}

void commit(Warp& w, const Inst&) {
  if (w.async.empty()) w.async.resize(kLanes);
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    LaneAsync& lane = w.async[__builtin_ctz(m)];
    lane.groups.push_back(std::move(lane.open));
    lane.open.clear();
  }
}

// imm: groups that may stay; -1: not even what was not committed.
void wait(Warp& w, const Inst& in) {
  if (w.async.empty()) return;
  const size_t keep = in.imm < 0 ? 0 : static_cast<size_t>(in.imm);
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int index = __builtin_ctz(m);
    LaneAsync& lane = w.async[index];
    while (lane.groups.size() > keep) {
      finish_copies(w, in, index, lane.groups.front());
      lane.groups.pop_front();
    }
    if (in.imm < 0) finish_copies(w, in, index, lane.open);
  }
}

void cp(Build& b) {
  if (b.has("reduce")) return resolve_reduce_bulk(b);
  if (!b.take("async")) b.fail("only cp.async exists");
  if (b.take("bulk")) return resolve_bulk(b);
  if (b.take("mbarrier")) return resolve_cp_async_mbarrier(b);
  if (b.take("commit_group")) {
    b.in.fn = commit;
    return;
  }
  if (b.take("wait_all")) {
    b.in.imm = -1;
    b.in.fn = wait;
    return;
  }
  if (b.take("wait_group")) {
    b.operands(1, 1);
    b.in.imm = static_cast<int64_t>(b.ops[0].number.bits);
    b.in.fn = wait;
    return;
  }
  b.take("ca"), b.take("cg");
  b.take_space();  // shared, then global
  b.take_space();
  for (size_t i = 0; i < b.mods.size();) {
    if (b.mods[i].starts_with("L2::")) b.mods.erase(b.mods.begin() + static_cast<long>(i));
    else ++i;
  }
  b.operands(3, 5);
  b.in.size = static_cast<uint8_t>(b.ops[2].number.bits);
  if (b.in.size != 4 && b.in.size != 8 && b.in.size != 16) b.fail("its size is not 4, 8 or 16");
  b.address(b.ops[0]);
  bool wide = true;
  b.address(b.ops[1], b.in.imm2, wide);
  b.in.sem = wide;
  if (b.ops.size() > 3) {
    const Operand& third = b.ops[3];
    const bool predicate = third.kind == Operand::Kind::kReg && b.class_of(third) == RowClass::kPred;
    if (!(third.kind == Operand::Kind::kReg && b.is_wide(third))) {  // a 64-bit one is a cache policy
      b.in.kind = predicate ? 2 : 1;
      if (predicate) b.src_pred(third);
      else b.src(third, Type::kU32);
    }
  }
  b.in.fn = cp_async;
}

}  // namespace

void check_cp_async_exit(Warp& w, const Inst& in, uint32_t lanes) {
  if (w.async.empty()) return;
  uint32_t left = 0;
  const Inst* first = nullptr;
  for (uint32_t m = lanes; m != 0; m &= m - 1) {
    LaneAsync& lane = w.async[__builtin_ctz(m)];
    bool some = !lane.open.empty();
    if (some && first == nullptr) first = lane.open.front().inst;
    for (const auto& group : lane.groups) {
      some |= !group.empty();
      if (!group.empty() && first == nullptr) first = group.front().inst;
    }
    if (some) left |= m & -m;
  }
  if (left != 0)
    fault(w, in, Fault::kAsyncInFlight, "exit with asynchronous copies that nobody waited for, issued by `" +
          std::string(first->opcode) + "` at " + describe_location(w.machine->module, *w.machine->program, *first), left);
}

void add_async(OpcodeTable& table) { table["cp"] = cp; }

}  // namespace ptxsim
