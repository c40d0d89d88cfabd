// The recurrence of one layer and direction of a GRU: the contract between kernels and bindings.
//
//   r, z, x_n = the thirds of gates_x and  h_r, h_z, h_n = those of h @ w_hh^T + b_hh:
//   r = sigmoid(x_r + h_r);  z = sigmoid(x_z + h_z);  n = tanh(x_n + r * h_n);  h' = n + z * (h - n)
//
// Cho et al. 2014, arXiv:1406.1078, with r behind the product of h, as in torch and cuDNN. T, Acc and the steps are
// those of ops/lstm/lstm.h; the size of h is the hidden one. Every tensor is contiguous, with the alignment of its
// elements.
#pragma once

#include "ops/lstm/lstm.h"

namespace llmkernels {

struct GRUFwdParams {
  LSTMSteps at;
  const void* gates_x;  // [N, 3 * H]  T
  const void* h0;       // [B, H]      T
  const void* w_hh;     // [3 * H, H]  T
  const void* b_hh;     // [3 * H]     T; null: zero
  void* y;              // [N, H]      T
  void* h_n;            // [B, H]      T
  void* gates;          // [N, 4 * H]  T: r, z, n, h_n; null: not wanted
  DType dtype;
};

struct GRUBwdParams {
  LSTMSteps at;
  const void* dy;     // [N, H]      T; null: zero
  const void* dh_n;   // [B, H]      T; null: zero
  const void* h0;     // [B, H]      T
  const void* w_hh;   // [3 * H, H]  T
  const void* y;      // [N, H]      T
  const void* gates;  // [N, 4 * H]  T, as forward
  void* dgates_x;     // [N, 3 * H]  T
  void* dgates_h;     // [N, 3 * H]  T: of h @ w_hh^T + b_hh; null: not wanted
  void* dh0;          // [B, H]      T
  DType dtype;
};

}  // namespace llmkernels
