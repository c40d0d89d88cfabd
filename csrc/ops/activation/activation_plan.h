// On which grid a kernel of activations with a bias runs: a pure function of the params and the GPU.
#pragma once

#include "ops/activation/activation.h"
#include "ops/gated/gated_plan.h"

namespace llmkernels::cuda {

// Rows of a thread at least where it sums over them: the sums are then a small part of the data.
constexpr int64_t kActivationRowsPerSum = 16;

inline GatedPlan plan_activation_fwd(const ActivationFwdParams& p, const Gpu& gpu) {
  const int64_t bytes = element_bytes(p.dtype);
  bool wide = p.cols * bytes % 16 == 0 && aligned(p.bias, 16) && aligned(p.y, 16);
  wide &= rows_are_wide(p.input, p.input_row_stride, p.rows, bytes);
  return plan_gated(p.rows, p.cols, bytes, wide, gpu);
}

// The same whether or not there are sums yet: their number follows from it.
inline GatedPlan plan_activation_bwd(const ActivationBwdParams& p, bool sums, const Gpu& gpu) {
  const int64_t bytes = element_bytes(p.dtype);
  bool wide = p.cols * bytes % 16 == 0 && aligned(p.bias, 16) && aligned(p.dinput, 16);
  wide &= rows_are_wide(p.dy, p.dy_row_stride, p.rows, bytes);
  wide &= rows_are_wide(p.input, p.input_row_stride, p.rows, bytes);
  GatedPlan plan = plan_gated(p.rows, p.cols, bytes, wide, gpu);
  if (sums) {
    const int64_t most = std::max<int64_t>(1, p.rows / (plan.launch.block[1] * kActivationRowsPerSum));
    plan.launch.grid[1] = static_cast<unsigned>(std::min<int64_t>(plan.launch.grid[1], most));
  }
  return plan;
}

inline int64_t activation_partial_rows(const GatedPlan& plan) {
  return int64_t{plan.launch.grid[1]} * plan.launch.block[1];
}

}  // namespace llmkernels::cuda
