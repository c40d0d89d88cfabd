// rope: pairs of elements of each head turned by the angle of its position. The contract between kernels and bindings.
//
//   (a, b) -> (a cos - b sin, b cos + a sin);  inverse, which is the backward: by the negative angle
//   pairs of the first 2 * half elements of a head: (j, j + half), or interleaved (2j, 2j + 1); the rest is copied
//
// Su et al. 2021, arXiv:2104.09864.
//
// T is the element type of q and k: double, float, bfloat16 or float16. W, that of cos and sin, is T or the type that
// the kernels compute in: double for double and float otherwise; they round once. Strides are in elements; the last
// dimension of every tensor is contiguous. No pointer needs more than the alignment of its element type.
#pragma once

#include "common/dtype.h"

namespace llmkernels {

// One tensor [batch, seq, heads, cols] in any order of memory. y may be x itself, but overlaps it in no other way.
struct RopeTensor {
  const void* x;  // T
  void* y;        // T
  int64_t heads;  // 0: there is no such tensor
  int64_t x_batch_stride, x_seq_stride, x_head_stride;
  int64_t y_batch_stride, y_seq_stride, y_head_stride;
};

// The row of cos and sin for place (b, s): number positions[b, s], or s of sequence b if there are no positions.
struct RopeParams {
  RopeTensor tensors[2];  // q and k
  const void* cos;        // [length, half] or [batch, seq, half]  W
  const void* sin;
  const void* positions;  // [batch, seq]  int64, or int32 if narrow_positions; null: none
  int64_t batch;
  int64_t seq;
  int64_t cols;
  int64_t half;
  int64_t length;
  int64_t cos_batch_stride, cos_row_stride;  // the first is zero unless every sequence has its own rows
  int64_t sin_batch_stride, sin_row_stride;
  int64_t position_batch_stride, position_seq_stride;
  DType dtype;
  DType table_dtype;
  bool narrow_positions;
  bool interleaved;
  bool inverse;
};

}  // namespace llmkernels
