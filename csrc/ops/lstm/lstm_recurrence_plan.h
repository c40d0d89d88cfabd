// How the recurrence of an LSTM layer runs: whether its weights stay with the blocks for all steps, where, and on which
// grid. A pure function of the sizes and the GPU.
//
// The units are cut into groups. A group's slice of w_hh is, forward, the rows of its units' four gates with one
// element for each of h; backward, the columns of its units with one element for each gate of all units. "Depth" is
// that other dimension, rounded up.
//
// A block that has a multiprocessor to itself has one group, of 8 or 16 units, and keeps the first part of the depth in
// its threads' registers and the rest in shared memory. Where there are more groups of 16 units than multiprocessors,
// two blocks share one, with any number of groups of 8 units each, all of them in shared memory.
#pragma once

#include <algorithm>

#include "common/cuda/plan.h"
#include "ops/lstm/lstm.h"

namespace llmkernels::cuda {

constexpr int kRecurrenceThreads = 256;
constexpr int kRecurrenceWarps = kRecurrenceThreads / 32;
constexpr int kGroupUnits = 8;  // of blocks that share a multiprocessor
constexpr int kMostUnits = 16;  // of a block alone: a thread for each unit of 16 rows
constexpr int kDepthUnit = 32;  // elements of depth that a warp takes at a time

// Blocks on a multiprocessor. Two leave each thread 128 registers, which fp64's sums do not fit.
constexpr int recurrence_blocks_per_sm(int64_t bytes, bool alone) { return alone || bytes == 8 ? 1 : 2; }

// Registers of a thread that hold weights, of a block alone. With 128 of them ptxas spills a few of the others.
constexpr int kWeightRegisters = 96;

// Tiles of rows that a block takes one after the other at each step. Beyond, a product of matrices is the better way: an
// estimate, from when the step's arithmetic takes longer than the launches that the kernel saves. Not measured.
constexpr int64_t kMostTiles = 16;

constexpr int kFwdColumns = 4, kBwdColumns = 1;  // of the weights, for each unit

// The distance of columns in shared memory, in 16-bit elements: an odd multiple of 64 bytes, so that the eight threads
// that a wide load serves at once, of two columns, find 32 different banks.
constexpr int64_t column_stride(int64_t depth) { return depth % 64 == 0 && depth > 0 ? depth + 32 : depth; }

// The same for the rows of partial sums: the pairs of a warp's fragments find different banks.
constexpr int part_stride(int columns) { return columns % 16 == 0 ? columns + 8 : columns; }

// How many threads' sums an element of the product is the sum of. The tensor cores' fragments of a warp are whole; else
// each lane has a column or several, and lanes that are left over share the depth.
constexpr int product_parts(int64_t bytes, int columns) {
  return bytes == 2 || columns >= 32 ? kRecurrenceWarps : kRecurrenceWarps * (32 / columns);
}

// The product goes through the depth in rounds of all warps: how many elements they take in one, and how many registers
// of a thread the weights of a round fill.
constexpr int product_round(int64_t bytes, int columns) {
  return bytes == 2 ? kRecurrenceWarps * kDepthUnit : product_parts(bytes, columns) * 16 / static_cast<int>(bytes);
}
constexpr int round_registers(int64_t bytes, int columns) {
  return bytes == 2 ? columns / 2 : 4 * (columns >= 32 ? columns / 32 : 1);
}

struct LSTMRecurrencePlan {
  bool resident = false;  // weights stay with the blocks; otherwise a product of matrices and a small kernel each step
  bool alone = false;     // a block has a multiprocessor to itself, and its weights are in registers too
  int rows = 0;           // of a tile
  int units = 0;          // of a group
  int groups = 0;         // of units, of a block
  int blocks = 0;         // of a direction
  int depth = 0;
  int kept = 0;                // the first elements of depth, whose weights are in registers
  int64_t stride = 0;          // elements of shared memory for each column of weights
  int64_t padded_batch = 0;    // whole tiles
  int64_t exchange_bytes = 0;  // of a direction's h or gradients of gates: two buffers [padded_batch, depth] of T
  Launch launch;
};

inline int64_t recurrence_shared(const LSTMRecurrencePlan& plan, int64_t bytes, int64_t batch, bool forward) {
  const int64_t acc = std::max<int64_t>(bytes, 4);
  const int columns = (forward ? kFwdColumns : kBwdColumns) * plan.units;
  const int64_t weights = plan.groups * columns * plan.stride * bytes;
  const int64_t parts = acc * product_parts(bytes, columns) * plan.rows * part_stride(columns);
  const int64_t states = acc * batch * plan.groups * plan.units * (forward ? 1 : 2);  // c; or dc and dh
  return weights + parts + states;
}

// `directions` is 1, or 2 for a launch of both at once: half of the blocks each.
inline LSTMRecurrencePlan plan_lstm_recurrence(DType dtype, const LSTMSteps& at, bool projection, bool forward,
                                               int directions, const Gpu& gpu) {
  const int64_t bytes = element_bytes(dtype);
  LSTMRecurrencePlan plan{};
  plan.rows = bytes == 2 ? 16 : bytes == 4 && at.batch == 1 ? 1 : 8;
  plan.depth = ceil_div(forward ? at.hidden : 4 * at.hidden, kDepthUnit) * kDepthUnit;
  const int64_t tiles = ceil_div(at.batch, plan.rows);
  plan.padded_batch = tiles * plan.rows;
  plan.exchange_bytes = 2 * plan.padded_batch * plan.depth * bytes;
  // A projection would need a second exchange and barrier each step.
  if (projection || tiles > kMostTiles) return plan;

  // Plans blocks of `groups` groups of `units` units, at most `most` on a multiprocessor; whether all fit at once.
  const auto fits = [&](int units, int groups, int registers, int64_t most) {
    const int columns = (forward ? kFwdColumns : kBwdColumns) * units;
    const int64_t rounds = registers / round_registers(bytes, columns);
    plan.units = units;
    plan.groups = groups;
    plan.blocks = static_cast<int>(ceil_div(at.hidden, units * groups));
    plan.kept = std::min<int64_t>(plan.depth, rounds * product_round(bytes, columns));
    const int64_t left = plan.depth - plan.kept;
    plan.stride = bytes == 2 ? column_stride(left) : left;
    const int64_t shared = recurrence_shared(plan, bytes, at.batch, forward);
    plan.launch.grid[0] = static_cast<unsigned>(directions * plan.blocks);
    plan.launch.block[0] = kRecurrenceThreads;
    plan.launch.shared = static_cast<unsigned>(shared);
    if (shared > gpu.shared_per_block) return false;
    const int64_t per_sm = std::min(most, gpu.shared_per_multiprocessor / (shared + gpu.shared_reserved));
    return directions * plan.blocks <= gpu.multiprocessors * per_sm;
  };
  // Fewer units are less work for a block; two of 8 on a multiprocessor would each read all of h, one of 16 once.
  const int64_t spare = gpu.registers_per_multiprocessor / kRecurrenceThreads - kWeightRegisters;
  const int registers = static_cast<int>(std::clamp<int64_t>(spare, 0, kWeightRegisters));
  plan.alone = bytes <= 4 && registers > 0;
  if (plan.alone && (fits(kGroupUnits, 1, registers, 1) || fits(kMostUnits, 1, registers, 1))) {
    plan.resident = true;
    return plan;
  }
  plan.alone = false;
  for (int groups = 1; groups <= ceil_div(at.hidden, kGroupUnits) && !plan.resident; ++groups) {
    plan.resident = fits(kGroupUnits, groups, 0, recurrence_blocks_per_sm(bytes, false));
  }
  return plan;
}

// What a kernel that keeps its weights gets of a direction. In `p.at`, `first` and `count` are on the device, or null
// where every step has all sequences.
template <class Params>
struct LSTMDirection {
  Params p;
  bool reverse;       // of the steps; read only where `p.at.first` is null
  void* exchange;     // [2, padded, depth]  T
  unsigned* arrived;  // 0 at the start: the barrier of the direction's blocks
};

template <class Params>
struct LSTMResident {
  LSTMDirection<Params> of[2];  // the second one where the launch has both directions
  int blocks;                   // as planned, and so are the others
  int groups;
  int depth;
  int kept;
  int64_t stride;
  int64_t padded;  // the plan's padded_batch
};

}  // namespace llmkernels::cuda
