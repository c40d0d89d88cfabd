// Which cross entropy kernel runs a call, and on which grid: a pure function of the params and the GPU.
#pragma once

#include <algorithm>

#include "common/cuda/plan.h"
#include "ops/cross_entropy/cross_entropy.h"

namespace llmkernels::cuda {

constexpr int kCrossEntropyWarpThreads = 128;   // of the kernels with one warp per row
constexpr int kCrossEntropyBlockThreads = 512;  // of the kernels with one block per row
constexpr int kCrossEntropyWarpCols = 1024;     // the longest row of a warp
constexpr int kCrossEntropyThreadsPerSm = 1024;

struct CrossEntropyPlan {
  bool wide;   // 16-byte vectors of logits; otherwise single elements
  bool block;  // one block per row; otherwise one warp
  Launch launch;
};

inline bool cross_entropy_is_wide(const CrossEntropyInputs& p) {
  const int64_t bytes = element_bytes(p.dtype), acc_bytes = p.dtype == DType::kFloat64 ? 8 : 4;
  bool wide = p.cols * bytes % 16 == 0 && rows_are_wide(p.input, p.input_row_stride, p.rows, bytes);
  if (p.kind == TargetKind::kProbabilities) {
    wide &= rows_are_wide(p.target, p.target_row_stride, p.rows, p.wide_target ? acc_bytes : bytes);
  }
  return wide && aligned(p.weight, 16) && aligned(p.dinput, 16);
}

// Blocks stay and step over the rows. `pieces` blocks share a row, where nothing is summed over it.
inline CrossEntropyPlan plan_cross_entropy(const CrossEntropyInputs& p, bool pieces, const Gpu& gpu) {
  CrossEntropyPlan plan{};
  plan.wide = cross_entropy_is_wide(p);
  plan.block = p.cols > kCrossEntropyWarpCols;
  const int64_t threads = plan.block ? kCrossEntropyBlockThreads : kCrossEntropyWarpThreads;
  const int64_t resident = gpu.multiprocessors * (kCrossEntropyThreadsPerSm / threads);
  const int64_t row_blocks = plan.block ? p.rows : ceil_div(p.rows, threads / 32);
  plan.launch.block[0] = static_cast<unsigned>(threads);
  plan.launch.grid[0] = static_cast<unsigned>(std::clamp<int64_t>(row_blocks, 1, resident));
  if (pieces && plan.block) {
    const int64_t vectors = plan.wide ? p.cols * element_bytes(p.dtype) / 16 : p.cols;
    plan.launch.grid[1] = static_cast<unsigned>(
        std::clamp<int64_t>(ceil_div(vectors, threads), 1, std::max<int64_t>(1, resident / plan.launch.grid[0])));
  }
  return plan;
}

inline CrossEntropyPlan plan_cross_entropy_fwd(const CrossEntropyFwdParams& p, const Gpu& gpu) {
  return plan_cross_entropy(p, false, gpu);
}

inline CrossEntropyPlan plan_cross_entropy_bwd(const CrossEntropyBwdParams& p, const Gpu& gpu) {
  return plan_cross_entropy(p, true, gpu);
}

}  // namespace llmkernels::cuda
