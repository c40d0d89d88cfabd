// On which grid rope runs: a pure function of the params and the GPU.
#pragma once

#include <algorithm>

#include "common/cuda/plan.h"
#include "ops/rope/rope.h"

namespace llmkernels::cuda {

constexpr int kRopeThreads = 256;
constexpr int kRopeThreadsPerSm = 1024;  // at 64 registers each
// Heads that one thread turns by the same cos and sin, all loaded before the first is stored: enough bytes in flight.
constexpr int kRopeHeads = 4;

struct RopePlan {
  bool wide;  // 16-byte vectors of q and k; otherwise single elements
  Launch launch;
};

// Items of work: kRopeHeads heads of one place.
inline int64_t rope_items_of_place(const RopeParams& p) {
  return ceil_div(p.tensors[0].heads, kRopeHeads) + ceil_div(p.tensors[1].heads, kRopeHeads);
}

inline bool rope_is_wide(const RopeParams& p) {
  const int64_t bytes = element_bytes(p.dtype), table_bytes = element_bytes(p.table_dtype);
  bool wide = p.half * bytes % 16 == 0 && p.cols * bytes % 16 == 0;
  for (const RopeTensor& t : p.tensors) {
    if (t.heads == 0) continue;
    wide &= aligned(t.x, 16) && aligned(t.y, 16);
    for (const int64_t stride :
         {t.x_batch_stride, t.x_seq_stride, t.x_head_stride, t.y_batch_stride, t.y_seq_stride, t.y_head_stride}) {
      wide &= stride * bytes % 16 == 0;
    }
  }
  wide &= aligned(p.cos, 16) && aligned(p.sin, 16);
  for (const int64_t stride : {p.cos_batch_stride, p.cos_row_stride, p.sin_batch_stride, p.sin_row_stride}) {
    wide &= stride * table_bytes % 16 == 0;
  }
  return wide;
}

// Threads of a block lie along the pairs of a head, as many as it needs, and the rest of them along the items. Blocks
// stay and step over the items.
inline RopePlan plan_rope(const RopeParams& p, const Gpu& gpu) {
  RopePlan plan{};
  plan.wide = rope_is_wide(p);
  const int64_t vectors = plan.wide ? p.half * element_bytes(p.dtype) / 16 : p.half;
  int64_t across = 1;
  while (across < vectors && across < kRopeThreads) across *= 2;
  const int64_t down = kRopeThreads / across, items = p.batch * p.seq * rope_items_of_place(p);
  const int64_t resident = int64_t{gpu.multiprocessors} * (kRopeThreadsPerSm / kRopeThreads);
  plan.launch.block[0] = static_cast<unsigned>(across);
  plan.launch.block[1] = static_cast<unsigned>(down);
  plan.launch.grid[0] = static_cast<unsigned>(std::clamp<int64_t>(ceil_div(items, down), 1, resident));
  return plan;
}

}  // namespace llmkernels::cuda
