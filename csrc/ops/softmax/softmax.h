// softmax and log_softmax along rows, with scale and mask. The contract between kernels and bindings.
//
//   s = scale * x + mask, or -inf where a boolean mask is false;  m = max(s);  l = sum(exp(s - m))
//   y = exp(s - m) / l, or s - m - log(l);  a row that is -inf everywhere gives 0, or -inf
//   softmax:      ds = y * (dy - sum(dy * y))
//   log_softmax:  ds = dy - exp(y) * sum(dy), where y is -inf as if dy were 0;    dx = scale * ds
//
// T is the element type of x and y: double, float, bfloat16 or float16. Acc, in which the kernels compute, is double for
// double and float otherwise. Strides are in elements; the last dimension of every tensor is contiguous. No pointer needs
// more than the alignment of its element type.
#pragma once

#include "common/dtype.h"

namespace llmkernels {

// kOwn: elements of T, added; kAcc: elements of Acc, added; kBool: bytes, 0 for what takes no part.
enum class MaskKind : int { kNone = 0, kBool = 1, kOwn = 2, kAcc = 3 };

constexpr int kMaskDims = 4;

// The row of a mask for row r of x: r counts places of `sizes`, the last of which runs fastest.
struct MaskRows {
  const void* data;
  int64_t sizes[kMaskDims];
  int64_t strides[kMaskDims];
  MaskKind kind;
};

#if defined(__CUDACC__)
#define LLMKERNELS_HOST_DEVICE __host__ __device__
#else
#define LLMKERNELS_HOST_DEVICE
#endif

static LLMKERNELS_HOST_DEVICE inline int64_t mask_offset(const MaskRows& mask, int64_t row) {
  int64_t offset = 0;
  for (int d = kMaskDims - 1; d > 0; --d) {
    if (mask.sizes[d] == 1) continue;
    const int64_t rest = row / mask.sizes[d];
    offset += (row - rest * mask.sizes[d]) * mask.strides[d];
    row = rest;
  }
  return offset + row * mask.strides[0];
}

struct SoftmaxFwdParams {
  const void* x;  // [rows, cols]  T, row stride x_row_stride
  void* y;        // [rows, cols]  T, contiguous
  MaskRows mask;  // [rows, cols]
  int64_t rows;
  int64_t cols;
  int64_t x_row_stride;
  double scale;
  DType dtype;
  bool log;
};

struct SoftmaxBwdParams {
  const void* dy;  // [rows, cols]  T, row stride dy_row_stride
  const void* y;   // [rows, cols]  T, row stride y_row_stride
  void* dx;        // [rows, cols]  T, contiguous; null: not wanted
  void* ds;        // [rows, cols]  Acc, contiguous; null: not wanted
  int64_t rows;
  int64_t cols;
  int64_t dy_row_stride;
  int64_t y_row_stride;
  double scale;
  DType dtype;
  bool log;
};

}  // namespace llmkernels
