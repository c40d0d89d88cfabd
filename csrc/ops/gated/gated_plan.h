// On which grid a gated kernel runs: a pure function of the params and the GPU.
#pragma once

#include <algorithm>

#include "common/cuda/plan.h"
#include "ops/gated/gated.h"

namespace llmkernels::cuda {

constexpr int kGatedThreads = 256;
constexpr int kGatedThreadsPerSm = 2048;  // every thread waits for memory: as many as fit

struct GatedPlan {
  bool wide;  // 16-byte vectors; otherwise single elements
  Launch launch;
};

// Threads of a block lie along the columns, as many as a row needs, and the rest of them along the rows. Blocks stay
// and step over both.
inline GatedPlan plan_gated(int64_t rows, int64_t cols, int64_t bytes, bool wide, const Gpu& gpu) {
  GatedPlan plan{};
  plan.wide = wide;
  const int64_t vectors = wide ? cols * bytes / 16 : cols;
  int64_t across = 32;  // at least a warp, for whole lines of memory
  while (across < vectors && across < kGatedThreads) across *= 2;
  const int64_t down = kGatedThreads / across;
  const int64_t resident = int64_t{gpu.multiprocessors} * (kGatedThreadsPerSm / kGatedThreads);
  const int64_t columns = std::clamp<int64_t>(ceil_div(vectors, across), 1, resident);
  plan.launch.block[0] = static_cast<unsigned>(across);
  plan.launch.block[1] = static_cast<unsigned>(down);
  plan.launch.grid[0] = static_cast<unsigned>(columns);
  plan.launch.grid[1] =
      static_cast<unsigned>(std::clamp<int64_t>(ceil_div(rows, down), 1, std::max<int64_t>(1, resident / columns)));
  return plan;
}

inline GatedPlan plan_gated_fwd(const GatedFwdParams& p, const Gpu& gpu) {
  const int64_t bytes = element_bytes(p.dtype);
  bool wide = p.cols * bytes % 16 == 0 && aligned(p.y, 16);
  wide &= rows_are_wide(p.gate, p.gate_row_stride, p.rows, bytes);
  wide &= rows_are_wide(p.up, p.up_row_stride, p.rows, bytes);
  return plan_gated(p.rows, p.cols, bytes, wide, gpu);
}

inline GatedPlan plan_gated_bwd(const GatedBwdParams& p, const Gpu& gpu) {
  const int64_t bytes = element_bytes(p.dtype);
  bool wide = p.cols * bytes % 16 == 0;
  wide &= rows_are_wide(p.dy, p.dy_row_stride, p.rows, bytes);
  wide &= rows_are_wide(p.gate, p.gate_row_stride, p.rows, bytes);
  wide &= rows_are_wide(p.up, p.up_row_stride, p.rows, bytes);
  wide &= rows_are_wide(p.dgate, p.grad_row_stride, p.rows, bytes);
  wide &= rows_are_wide(p.dup, p.grad_row_stride, p.rows, bytes);
  return plan_gated(p.rows, p.cols, bytes, wide, gpu);
}

}  // namespace llmkernels::cuda
