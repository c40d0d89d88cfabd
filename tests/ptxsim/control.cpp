// Which lanes of a warp run: divergence, waiting for each other, calls, exits.
//
// Lanes of a warp that are at different places run group by group, the group with the lowest pc first, which brings
// them together again where the compiler laid out a common place. That rule alone would starve lanes that another group
// spins for, so a group that has run long without meeting anybody gives way to a random one for a while.
#include <algorithm>

#include "async.h"
#include "checker.h"
#include "machine.h"

namespace ptxsim {

uint32_t Warp::here(const Inst& in) const { return static_cast<uint32_t>(&in - machine->program->code.data()); }

void start_warp(Warp& w, uint32_t lanes) {
  w.born = w.live = w.group = lanes;
  w.pc = 0;
  w.next_pc = kNever;
  w.reschedule = w.yield = w.blocked = false;
  w.waiting = w.at_barrier = w.at_cluster = w.polled = 0;
  w.lone = 0;
  w.pending_wgmma = false;
  w.async.clear();
  w.wgmma.reset();
  w.bulk.reset();
}

bool regroup(Warp& w) {
  for (uint32_t m = w.group; m != 0; m &= m - 1) w.lane_pc[__builtin_ctz(m)] = w.pc;
  w.reschedule = false;
  uint32_t ready = w.live & ~w.waiting & ~w.at_barrier;
  if (w.polled != 0 && w.poll_event != w.machine->events) w.polled = 0;
  if (ready & ~w.polled) ready &= ~w.polled;
  w.group = 0;
  w.next_pc = kNever;
  if (ready == 0) {
    w.blocked = w.live != 0;
    if (w.waiting != 0 && w.at_barrier == 0) {
      const uint32_t lane = static_cast<uint32_t>(__builtin_ctz(w.waiting));
      const Inst& in = w.machine->program->code[w.lane_pc[lane]];
      uint32_t same = 0, elsewhere = 0;
      for (uint32_t m = w.waiting; m != 0; m &= m - 1)
        (w.lane_pc[__builtin_ctz(m)] == w.lane_pc[lane] ? same : elsewhere) |= m & -m;
      std::string what = "lanes " + lanes_text(same) + " wait for others of their warp";
      if (elsewhere != 0) {
        const Inst& other = w.machine->program->code[w.lane_pc[__builtin_ctz(elsewhere)]];
        what += ", but lanes " + lanes_text(elsewhere) + " are at `" + std::string(other.opcode) + "` (" +
                describe_location(w.machine->module, *w.machine->program, other) + ")";
      }
      if (const uint32_t gone = w.born & ~w.live; gone != 0) what += "; lanes " + lanes_text(gone) + " have exited";
      fault(w, in, Fault::kDivergence, what, same);
    }
    return false;
  }
  w.blocked = false;
  uint32_t lowest = kNever;
  for (uint32_t m = ready; m != 0; m &= m - 1) lowest = std::min(lowest, w.lane_pc[__builtin_ctz(m)]);
  if (w.lone > kMostLoops) {  // somebody else's turn
    w.lone = 0;
    uint32_t pick = w.machine->random.below(static_cast<uint32_t>(__builtin_popcount(ready)));
    uint32_t m = ready;
    while (pick-- > 0) m &= m - 1;
    lowest = w.lane_pc[__builtin_ctz(m)];
  }
  for (uint32_t m = w.live & ~w.at_barrier; m != 0; m &= m - 1) {
    const uint32_t pc = w.lane_pc[__builtin_ctz(m)];
    if (pc == lowest) w.group |= m & -m;
    else if (pc > lowest) w.next_pc = std::min(w.next_pc, pc);
  }
  w.waiting &= ~w.group;
  w.polled &= ~w.group;
  w.pc = lowest;
  return true;
}

void wait_here(Warp& w, const Inst& in, uint32_t lanes) {
  const uint32_t pc = w.here(in);
  uint32_t before = 0;  // wait here already: lanes that came by a jump back were not stopped in front of them
  for (uint32_t m = w.waiting & ~w.group; m != 0; m &= m - 1)
    if (w.lane_pc[__builtin_ctz(m)] == pc) before |= m & -m;
  for (uint32_t m = lanes; m != 0; m &= m - 1) w.lane_pc[__builtin_ctz(m)] = pc;
  if (before != 0) w.waiting &= ~before;  // all of them look again, together
  else w.waiting |= lanes;
  w.group &= ~lanes;
  w.reschedule = true;
}

uint32_t ready_lanes(Warp& w, const Inst& in, const uint32_t* member_masks, bool exited_allowed) {
  uint32_t ready = 0, late = 0;
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    const uint32_t members = member_masks[lane];
    if (!((members >> lane) & 1))
      fault(w, in, Fault::kDivergence, "its member mask " + hex(members) + " does not name the lane itself", m & -m);
    if (!exited_allowed && (members & ~w.live))
      fault(w, in, Fault::kDivergence,
            "its member mask " + hex(members) + " names lanes " + lanes_text(members & ~w.live) +
                (members & ~w.born ? ", which do not exist" : ", which have exited"),
            w.mask);
    if ((members & w.live & ~w.mask) == 0) ready |= m & -m;
    else late |= m & -m;
  }
  if (late != 0) {
    // Those that name a lane of the group which does not execute this (its guard is false) can never be complete here.
    wait_here(w, in, late);
  }
  return ready;
}

bool aligned_here(Warp& w, const Inst& in, bool whole_warp) {
  if (whole_warp && w.live != kFull)
    fault(w, in, Fault::kDivergence,
          "it needs all 32 lanes of the warp, but lanes " + lanes_text(~w.live) +
              (w.born != kFull ? " do not exist" : " have exited"),
          w.mask);
  if (w.mask == w.live) return true;
  if (w.group == w.live)
    fault(w, in, Fault::kDivergence, "it is .aligned, but its guard is false in lanes " + lanes_text(w.live & ~w.mask),
          w.mask);
  wait_here(w, in, w.mask);
  return false;
}

void exit_lanes(Warp& w, const Inst& in, uint32_t lanes) {
  check_exit(w, in, lanes);
  w.live &= ~lanes;
  w.group &= ~lanes;
  w.waiting = 0;  // whoever waits for them looks again
  w.block->live -= static_cast<uint32_t>(__builtin_popcount(lanes));
  if (w.block->cluster != nullptr) w.block->cluster->live -= static_cast<uint32_t>(__builtin_popcount(lanes));
  w.reschedule = true;
  ++w.machine->events;
  recheck_barriers(*w.block);
}

std::string lanes_text(uint32_t lanes) {
  if (lanes == kFull) return "0-31";
  std::string text;
  for (int first = 0; first < kLanes; ++first) {
    if (!((lanes >> first) & 1)) continue;
    int last = first;
    while (last + 1 < kLanes && ((lanes >> (last + 1)) & 1)) ++last;
    if (!text.empty()) text += ",";
    text += std::to_string(first);
    if (last > first) text += "-" + std::to_string(last);
    first = last;
  }
  return text.empty() ? "none" : text;
}

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string Block::name() const {
  return "block (" + std::to_string(id.x) + "," + std::to_string(id.y) + "," + std::to_string(id.z) + ")";
}

std::string place(const Warp& w, const Inst& in, uint32_t lanes) {
  return "`" + std::string(in.opcode) + "` at " + describe_location(w.machine->module, *w.machine->program, in) + ", " +
         w.block->name() + ", warp " + std::to_string(w.index) + ", lane" +
         (__builtin_popcount(lanes) == 1 ? " " : "s ") + lanes_text(lanes);
}

void fault(const Warp& w, const Inst& in, Fault kind, const std::string& what, uint32_t lanes) {
  throw KernelFault(kind, what + ": " + place(w, in, lanes));
}

}  // namespace ptxsim
