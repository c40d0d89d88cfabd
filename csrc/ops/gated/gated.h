// swiglu, geglu and reglu: y = act(gate) * up. The contract between kernels and bindings.
//
//   silu(g) = g / (1 + exp(-g));  gelu(g) = g * Phi(g), Phi the cumulative normal distribution;  relu(g) = max(g, 0)
//   gelu_tanh(g) = g / 2 * (1 + tanh(u)) = g / (1 + exp(-2 u)),  u = sqrt(2 / pi) * (g + 0.044715 g^3)
//
// Shazeer 2020, arXiv:2002.05202 (gated units); Hendrycks, Gimpel 2016, arXiv:1606.08415 (gelu).
//
// T is the element type of every tensor: double, float, bfloat16 or float16. The kernels compute in double for double
// and in float otherwise, and round once. Strides are in elements; the last dimension of every tensor is contiguous. No
// pointer needs more than the alignment of its element type. A packed tensor [rows, 2 * cols] is gate and up at once:
// two pointers with the same row stride.
#pragma once

#include "common/dtype.h"

namespace llmkernels {

enum class Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

constexpr double kGeluTanhScale = 1.5957691216057308;  // 2 * sqrt(2 / pi)
constexpr double kGeluTanhCubic = 0.044715;

struct GatedFwdParams {
  const void* gate;  // [rows, cols]  T, row stride gate_row_stride
  const void* up;    // [rows, cols]  T, row stride up_row_stride
  void* y;           // [rows, cols]  T, contiguous
  int64_t rows;
  int64_t cols;
  int64_t gate_row_stride;
  int64_t up_row_stride;
  DType dtype;
  Activation activation;
};

// dgate = dy * up * act'(gate),  dup = dy * act(gate); nothing of the forward is saved.
struct GatedBwdParams {
  const void* dy;    // [rows, cols]  T, row stride dy_row_stride
  const void* gate;  // [rows, cols]  T, row stride gate_row_stride
  const void* up;    // [rows, cols]  T, row stride up_row_stride
  void* dgate;       // [rows, cols]  T, row stride grad_row_stride; null: not wanted
  void* dup;         // [rows, cols]  T, row stride grad_row_stride; null: not wanted
  int64_t rows;
  int64_t cols;
  int64_t dy_row_stride;
  int64_t gate_row_stride;
  int64_t up_row_stride;
  int64_t grad_row_stride;
  DType dtype;
  Activation activation;
};

}  // namespace llmkernels
