// layer_norm and rms_norm, each with an optional fused residual add: the contract between kernels and bindings.
//
//   s    = x + residual                      rounded to T, as the unfused pair would; s = x without a residual
//   s    = keep * x / (1 - p) + residual     with dropout: also the quotient is rounded to T
//   xhat = (s - mean) * rstd                 layer_norm: rstd = 1 / sqrt(var + eps), var biased
//   xhat = s * rstd                          rms_norm:   rstd = 1 / sqrt(mean(s^2) + eps)
//   y    = xhat * (weight + weight_offset) + bias
//
// Ba, Kiros, Hinton 2016, arXiv:1607.06450 (layer norm); Zhang, Sennrich 2019, arXiv:1910.07467 (RMS norm).
// `keep` is a function of the seed, the row and the column: common/random.h.
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
  uint32_t dropout_threshold;  // round(p * 2^24)
  double dropout_scale;        // 1 / (1 - p); 0 where p is 1
  const int64_t* seed;         // []  of dropout, only with a residual; null: nothing is dropped
};

// With g = dy * (weight + weight_offset):
//   layer_norm: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dresidual
//   rms_norm:   dx = rstd * (g           - xhat * mean(g * xhat)) + dresidual
//   dx_dropped = keep / (1 - p) * dx: with dropout dx is the gradient of residual, and this that of x
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
  uint32_t dropout_threshold;
  double dropout_scale;
  const int64_t* seed;  // []; null: nothing was dropped
  void* dx_dropped;     // [rows, cols]  T, contiguous; null if seed or dx is
};

}  // namespace llmkernels
