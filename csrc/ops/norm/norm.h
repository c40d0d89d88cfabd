// layer_norm and rms_norm, each with an optional fused residual add: the contract between kernels and bindings.
//
//   s    = x + residual                      rounded to T, as the unfused pair would; s = x without a residual
//   xhat = (s - mean) * rstd                 layer_norm: rstd = 1 / sqrt(var + eps), var biased
//   xhat = s * rstd                          rms_norm:   rstd = 1 / sqrt(mean(s^2) + eps)
//   y    = xhat * (weight + weight_offset) + bias
//
// Ba, Kiros, Hinton 2016, arXiv:1607.06450 (layer norm); Zhang, Sennrich 2019, arXiv:1910.07467 (RMS norm).
//
// T is the element type of every activation: double, float, bfloat16 or float16. Acc, the type of statistics and
// sums, is double for double and float otherwise. W, the type of weight and bias, is T or Acc.
// Strides are in elements; the last dimension of every tensor is contiguous. No pointer needs more than the
// alignment of its element type.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace llmkernels {

enum class NormKind : int { kLayerNorm = 0, kRmsNorm = 1 };

struct NormFwdParams {
  const void* x;         // [rows, cols]  T, row stride x_row_stride
  const void* residual;  // [rows, cols]  T, row stride residual_row_stride; null: nothing is added
  const void* weight;    // [cols]        W; null means ones (weight_offset is then 0)
  const void* bias;      // [cols]        W; null means zeros
  void* y;               // [rows, cols]  T, contiguous
  void* new_residual;    // [rows, cols]  T, contiguous; null if and only if residual is null
  void* mean;            // [rows]        Acc; null if and only if the kind is rms_norm
  void* rstd;            // [rows]        Acc
  int64_t rows;
  int64_t cols;
  int64_t x_row_stride;
  int64_t residual_row_stride;
  double eps;
  double weight_offset;
  DType dtype;         // T
  DType weight_dtype;  // W
  NormKind kind;
};

// With g = dy * (weight + weight_offset):
//   layer_norm: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dresidual
//   rms_norm:   dx = rstd * (g           - xhat * mean(g * xhat)) + dresidual
//   dweight = sum over rows of dy * xhat,  dbias = sum over rows of dy
struct NormBwdParams {
  const void* dy;         // [rows, cols]  T, row stride dy_row_stride
  const void* dresidual;  // [rows, cols]  T, row stride dresidual_row_stride; null: zero
  const void* x;          // [rows, cols]  T, row stride x_row_stride: the s of the forward
  const void* weight;     // [cols]        W; null means ones
  const void* mean;       // [rows]        Acc; null if and only if the kind is rms_norm
  const void* rstd;       // [rows]        Acc
  void* dx;               // [rows, cols]  T, contiguous; null: not wanted
  void* dweight;          // [cols]        W; null: not wanted
  void* dbias;            // [cols]        W; null: not wanted
  void* partial;          // workspace, Acc, uninitialised: [blocks, cols] for dweight, then [blocks, cols] for
                          // dbias, each present only if wanted; owned by the caller for the length of the call
  int64_t partial_blocks;
  int64_t rows;
  int64_t cols;
  int64_t x_row_stride;
  int64_t dy_row_stride;
  int64_t dresidual_row_stride;
  double weight_offset;
  DType dtype;
  DType weight_dtype;
  NormKind kind;
};

}  // namespace llmkernels
