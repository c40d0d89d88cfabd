// On which grid a softmax kernel runs: a pure function of the params and the GPU.
#pragma once

#include <algorithm>

#include "common/cuda/plan.h"
#include "ops/softmax/softmax.h"

namespace llmkernels::cuda {

constexpr int kSoftmaxWarpThreads = 128;   // of the kernels with one warp per row
constexpr int kSoftmaxBlockThreads = 512;  // of the kernels with one block per row
constexpr int kSoftmaxWarpCols = 1024;     // longer rows get a block
constexpr int kSoftmaxThreadsPerSm = 1024;

// Rows of up to kSoftmaxWarpCols columns get a warp, longer ones a block.
struct SoftmaxPlan {
  bool wide;       // 16-byte vectors of x, y and dy; otherwise single elements
  bool wide_mask;  // whole vectors of the mask
  bool block;
  Launch launch;
};

inline SoftmaxPlan plan_softmax(int64_t rows, int64_t cols, bool wide, const Gpu& gpu) {
  SoftmaxPlan plan{};
  plan.wide = wide;
  plan.block = cols > kSoftmaxWarpCols;
  const int64_t threads = plan.block ? kSoftmaxBlockThreads : kSoftmaxWarpThreads;
  const int64_t rows_of_block = plan.block ? 1 : threads / 32;
  const int64_t resident = int64_t{gpu.multiprocessors} * (kSoftmaxThreadsPerSm / threads);
  plan.launch.grid[0] = static_cast<unsigned>(std::clamp<int64_t>(ceil_div(rows, rows_of_block), 1, resident));
  plan.launch.block[0] = static_cast<unsigned>(threads);
  return plan;
}

inline SoftmaxPlan plan_softmax_fwd(const SoftmaxFwdParams& p, const Gpu& gpu) {
  const int64_t bytes = element_bytes(p.dtype);
  const bool wide = p.cols * bytes % 16 == 0 && aligned(p.y, 16) && rows_are_wide(p.x, p.x_row_stride, p.rows, bytes);
  SoftmaxPlan plan = plan_softmax(p.rows, p.cols, wide, gpu);
  const int64_t acc_bytes = bytes == 8 ? 8 : 4;
  const int64_t each = p.mask.kind == MaskKind::kBool ? 1 : p.mask.kind == MaskKind::kOwn ? bytes : acc_bytes;
  // A vector of the mask has as many elements as one of x, and asks for its size or 16 bytes.
  const int64_t vector = std::min<int64_t>(16, 16 / bytes * each);
  plan.wide_mask = wide && aligned(p.mask.data, vector);
  for (const int64_t stride : p.mask.strides) plan.wide_mask &= stride * each % vector == 0;
  return plan;
}

inline SoftmaxPlan plan_softmax_bwd(const SoftmaxBwdParams& p, const Gpu& gpu) {
  const int64_t bytes = element_bytes(p.dtype);
  bool wide = p.cols * bytes % 16 == 0 && aligned(p.dx, 16) && aligned(p.ds, 16);
  wide &= rows_are_wide(p.dy, p.dy_row_stride, p.rows, bytes);
  wide &= rows_are_wide(p.y, p.y_row_stride, p.rows, bytes);
  return plan_softmax(p.rows, p.cols, wide, gpu);
}

}  // namespace llmkernels::cuda
