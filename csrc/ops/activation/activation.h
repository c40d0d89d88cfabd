// gelu and silu with a bias: y = act(input + bias). The contract between kernels and bindings; the activations are those
// of ops/gated/gated.h.
//
// T is the element type of `input`, `y`, `dy` and `dinput`: double, float, bfloat16 or float16; Acc is double for double
// and float otherwise. The kernels compute in Acc and round once. Strides are in elements; the last dimension of every
// tensor is contiguous. No pointer needs more than the alignment of its element type.
#pragma once

#include "ops/gated/gated.h"

namespace llmkernels {

struct ActivationFwdParams {
  const void* input;  // [rows, cols]  T, row stride input_row_stride
  const void* bias;   // [cols]        Acc; null: none
  void* y;            // [rows, cols]  T, contiguous
  int64_t rows;
  int64_t cols;
  int64_t input_row_stride;
  DType dtype;
  Activation activation;
};

// dinput = dy * act'(input + bias); dbias is the sum of `partial` over its rows, each of which is the sum of dinput,
// not rounded, over some rows.
struct ActivationBwdParams {
  const void* dy;     // [rows, cols]  T, row stride dy_row_stride
  const void* input;  // [rows, cols]  T, row stride input_row_stride
  const void* bias;   // [cols]        Acc; null: none
  void* dinput;       // [rows, cols]  T, contiguous; null: not wanted
  void* partial;      // [partial_rows, cols]  Acc, contiguous; null: not wanted
  int64_t rows;
  int64_t cols;
  int64_t partial_rows;
  int64_t dy_row_stride;
  int64_t input_row_stride;
  DType dtype;
  Activation activation;
};

}  // namespace llmkernels
