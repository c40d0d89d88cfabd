// How the recurrence of an LSTM layer runs: whether its weights stay in shared memory for all steps, and on which grid.
// A pure function of the sizes and the GPU.
//
// The units are cut into groups of eight. A group's slice of w_hh is, forward, the rows of its units' four gates, 32 of
// them with one element for each of h; backward, the columns of its units, 8 of them with one element for each gate of
// all units. "Depth" is that other dimension, rounded up.
#pragma once

#include <algorithm>

#include "common/cuda/plan.h"
#include "ops/lstm/lstm.h"

namespace llmkernels::cuda {

constexpr int kRecurrenceThreads = 256;
constexpr int kRecurrenceWarps = kRecurrenceThreads / 32;
constexpr int kRecurrenceBlocksPerSm = 2;  // the launch bounds leave each thread 128 registers
constexpr int kGroupUnits = 8;
constexpr int kDepthUnit = 32;  // elements of depth that a warp takes at a time

// Tiles of rows that a block takes one after the other at each step. Beyond, a product of matrices is the better way: an
// estimate, from when the step's arithmetic takes longer than the launches that the kernel saves. Not measured.
constexpr int64_t kMostTiles = 16;

constexpr int kFwdColumns = 4 * kGroupUnits, kBwdColumns = kGroupUnits;  // of a group's weights

// The distance of columns in shared memory, in 16-bit elements: an odd multiple of 64 bytes, so that the eight threads
// that a wide load serves at once, of two columns, find 32 different banks.
constexpr int64_t column_stride(int64_t depth) { return depth % 64 == 0 ? depth + 32 : depth; }

// The same for the rows of partial sums: the pairs of a warp's fragments find different banks.
constexpr int part_stride(int columns) { return columns == 32 ? 40 : columns; }

// How many threads' sums an element of the product is the sum of. The tensor cores' fragments of a warp are whole; else
// each lane has a column, and lanes that are left over share the depth.
constexpr int product_parts(int64_t bytes, int columns) {
  return bytes == 2 ? kRecurrenceWarps : kRecurrenceWarps * (32 / columns);
}

struct LSTMRecurrencePlan {
  bool resident = false;  // weights stay in shared memory; otherwise a product of matrices and a small kernel each step
  int rows = 0;           // of a tile
  int groups = 0;         // of units, of a block
  int64_t depth = 0;
  int64_t stride = 0;          // elements of shared memory for each column of weights
  int64_t padded_batch = 0;    // whole tiles
  int64_t exchange_bytes = 0;  // of what the blocks tell each other: two buffers [padded_batch, depth] of T
  Launch launch;
};

inline int64_t recurrence_shared(const LSTMRecurrencePlan& plan, int64_t bytes, int64_t batch, bool forward) {
  const int64_t acc = std::max<int64_t>(bytes, 4);
  const int columns = forward ? kFwdColumns : kBwdColumns;
  const int64_t weights = plan.groups * columns * plan.stride * bytes;
  const int64_t parts = acc * product_parts(bytes, columns) * plan.rows * part_stride(columns);
  const int64_t states = acc * batch * plan.groups * kGroupUnits * (forward ? 1 : 2);  // c; or dc and dh
  return weights + parts + states;
}

inline LSTMRecurrencePlan plan_lstm_recurrence(DType dtype, const LSTMSteps& at, bool projection, bool forward,
                                               const Gpu& gpu) {
  const int64_t bytes = element_bytes(dtype);
  LSTMRecurrencePlan plan{};
  plan.rows = bytes == 2 ? 16 : bytes == 4 && at.batch == 1 ? 1 : 8;
  plan.depth = ceil_div(forward ? at.hidden : 4 * at.hidden, kDepthUnit) * kDepthUnit;
  plan.stride = bytes == 2 ? column_stride(plan.depth) : plan.depth;
  const int64_t tiles = ceil_div(at.batch, plan.rows), groups = ceil_div(at.hidden, kGroupUnits);
  plan.padded_batch = tiles * plan.rows;
  plan.exchange_bytes = 2 * plan.padded_batch * plan.depth * bytes;
  // A projection would need a second exchange and barrier each step.
  if (projection || tiles > kMostTiles) return plan;
  for (plan.groups = 1; plan.groups <= groups; ++plan.groups) {
    const int64_t shared = recurrence_shared(plan, bytes, at.batch, forward);
    if (shared > gpu.shared_per_block) return plan;
    const int64_t per_sm = std::min<int64_t>(kRecurrenceBlocksPerSm,
                                             gpu.shared_per_multiprocessor / (shared + gpu.shared_reserved));
    const int64_t blocks = ceil_div(groups, plan.groups);
    if (blocks > gpu.multiprocessors * per_sm) continue;
    plan.resident = true;
    plan.launch.grid[0] = static_cast<unsigned>(blocks);
    plan.launch.block[0] = kRecurrenceThreads;
    plan.launch.shared = static_cast<unsigned>(shared);
    return plan;
  }
  return plan;
}

// What a kernel that keeps its weights gets. In `p.at`, `first` and `count` are on the device, or null where every step
// has all sequences.
template <class Params>
struct LSTMResident {
  Params p;
  bool reverse;       // of the steps; read only where `p.at.first` is null
  int groups;         // as planned
  int64_t depth;      // as planned
  int64_t stride;     // as planned
  int64_t padded;     // the plan's padded_batch
  void* exchange;     // [2, padded, depth]  T
  unsigned* arrived;  // 0 at the start: the grid's barrier
};

}  // namespace llmkernels::cuda
