// Which norm kernel runs a call, and on which grid: a pure function of the params and the GPU.
#pragma once

#include <algorithm>

#include "common/cuda/plan.h"
#include "ops/norm/norm.h"

namespace llmkernels::cuda {

// A row is held in registers by one warp (short) or one block (longer), `vectors` vectors in each thread; `vectors` = 0
// reads it again for every pass instead.
struct RowPlan {
  bool wide;     // 16-byte vectors; otherwise single elements
  bool block;    // one block per row; otherwise one warp
  int vectors;   // 0, 1, 2, 4 or 8
  Launch launch;
};

constexpr int kNormWarpThreads = 128;    // of the kernels with one warp per row
constexpr int kNormBlockThreads = 512;   // the most of the kernels with one block per row
constexpr int kNormFwdVectors = 8;       // 32 registers of data in each thread
constexpr int kNormBwdVectors = 4;       // x, dy and two sums: 96 registers of data for 16-bit types
constexpr int kNormScalarWarpCols = 1024;
constexpr int kNormThreadsPerSm = 2048;
constexpr int kNormBwdThreadsPerSm = 512;  // at 128 registers each

inline RowPlan plan_rows(int64_t rows, int64_t cols, int64_t bytes, bool wide, int max_vectors, int threads_per_sm,
                         const Gpu& gpu) {
  RowPlan plan{};
  plan.wide = wide;
  const int64_t vectors = wide ? cols * bytes / 16 : cols;
  int64_t threads = kNormWarpThreads;
  if (!wide) {
    plan.block = cols > kNormScalarWarpCols;
    if (plan.block) threads = kNormBlockThreads;
  } else if (vectors <= 32 * 4) {
    plan.vectors = vectors <= 32 ? 1 : vectors <= 64 ? 2 : 4;
  } else {
    plan.block = true;
    plan.vectors = vectors <= 4 * kNormBlockThreads ? 4 : vectors <= int64_t{max_vectors} * kNormBlockThreads ? 8 : 0;
    threads = plan.vectors == 0 ? kNormBlockThreads : ceil_div(ceil_div(vectors, plan.vectors), 32) * 32;
  }
  const int64_t rows_per_block = plan.block ? 1 : threads / 32;
  const int64_t resident = gpu.multiprocessors * std::max<int64_t>(1, threads_per_sm / threads);
  plan.launch.grid[0] = static_cast<unsigned>(std::clamp<int64_t>(ceil_div(rows, rows_per_block), 1, resident));
  plan.launch.block[0] = static_cast<unsigned>(threads);
  return plan;
}

inline RowPlan plan_norm_fwd(const NormFwdParams& p, const Gpu& gpu) {
  const int64_t bytes = element_bytes(p.dtype);
  bool wide = p.cols * bytes % 16 == 0;
  wide &= rows_are_wide(p.x, p.x_row_stride, p.rows, bytes);
  wide &= rows_are_wide(p.residual, p.residual_row_stride, p.rows, bytes);
  for (const void* pointer : {p.weight, p.bias, static_cast<const void*>(p.y), static_cast<const void*>(p.new_residual)})
    wide &= aligned(pointer, 16);
  return plan_rows(p.rows, p.cols, bytes, wide, kNormFwdVectors, kNormThreadsPerSm, gpu);
}

// The backward: `rows` computes dx and, if the row is in registers (vectors > 0), one partial dweight and dbias for each
// of its blocks. Otherwise `columns` computes the partial sums. `reduce` adds them up.
struct NormBwdPlan {
  RowPlan rows;
  Launch columns;
  Launch reduce;
  int64_t partial_blocks;  // 0: no sum is wanted, or there are no rows
};

constexpr int kNormColumnsX = 32, kNormColumnsY = 8;  // threads of `columns` and `reduce`

inline NormBwdPlan plan_norm_bwd(const NormBwdParams& p, const Gpu& gpu) {
  const int64_t bytes = element_bytes(p.dtype);
  bool wide = p.cols * bytes % 16 == 0;
  wide &= rows_are_wide(p.x, p.x_row_stride, p.rows, bytes);
  wide &= rows_are_wide(p.dy, p.dy_row_stride, p.rows, bytes);
  wide &= rows_are_wide(p.dresidual, p.dresidual_row_stride, p.rows, bytes);
  wide &= aligned(p.weight, 16) && aligned(p.dx, 16) && aligned(p.dx_dropped, 16);
  NormBwdPlan plan{};
  plan.rows = plan_rows(p.rows, p.cols, bytes, wide, kNormBwdVectors, kNormBwdThreadsPerSm, gpu);
  // Without sums in registers nothing holds more than 2,048 threads back.
  if (plan.rows.vectors == 0) {
    plan.rows = plan_rows(p.rows, p.cols, bytes, wide, kNormBwdVectors, kNormThreadsPerSm, gpu);
  }
  const int64_t pieces = ceil_div(wide ? p.cols * bytes / 16 : p.cols, kNormColumnsX);
  const int64_t slabs = std::clamp<int64_t>(ceil_div(gpu.multiprocessors * 8, std::max<int64_t>(1, pieces)), 1,
                                            std::max<int64_t>(1, ceil_div(p.rows, 4 * kNormColumnsY)));
  plan.columns.grid[0] = static_cast<unsigned>(pieces);
  plan.columns.grid[1] = static_cast<unsigned>(slabs);
  plan.columns.block[0] = plan.reduce.block[0] = kNormColumnsX;
  plan.columns.block[1] = plan.reduce.block[1] = kNormColumnsY;
  const int sums = (p.dweight != nullptr) + (p.dbias != nullptr);
  plan.reduce.grid[0] = static_cast<unsigned>(ceil_div(p.cols, kNormColumnsX));
  plan.reduce.grid[1] = static_cast<unsigned>(std::max(1, sums));
  if (sums > 0 && p.rows > 0) plan.partial_blocks = plan.rows.vectors > 0 ? plan.rows.launch.grid[0] : slabs;
  return plan;
}

}  // namespace llmkernels::cuda
