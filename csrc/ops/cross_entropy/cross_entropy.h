// Cross entropy of rows of logits x with a target. The contract between kernels and bindings.
//
//   u = softcap * tanh(x / softcap), or x where softcap is 0;   lse = log(sum_c exp(u_c));   p_c = exp(u_c - lse)
//   loss = sum_c q_c (lse - u_c) + z_loss * lse^2
//   dx_c = dloss * (p_c (sum_c q_c + 2 z_loss lse) - q_c) * (1 - (u_c / softcap)^2)
//
// q is what the target says, with label smoothing s over C classes and class weights w (1 where absent):
//   index t:        q_c = (1 - s) w_t [c == t] + s / C w_c
//   probabilities:  q_c = w_c ((1 - s) target_c + s / C)
//
// A row whose index is ignore_index has loss and gradient zero; one whose index is no class at all has NaN in both.
//
// Szegedy et al. 2015, arXiv:1512.00567 (label smoothing); Chowdhery et al. 2022, arXiv:2204.02311 (z-loss);
// Gemma Team 2024, arXiv:2408.00118 (softcap).
//
// T is the element type of the logits: double, float, bfloat16 or float16; Acc is double for double and float
// otherwise. Strides are in elements; the last dimension of every tensor is contiguous. No pointer needs more than the
// alignment of its element type.
#pragma once

#include "common/dtype.h"

namespace llmkernels {

enum class TargetKind : int { kIndex = 0, kSmoothedIndex = 1, kProbabilities = 2 };

// Rows of `stats`: what the backward needs of a row, kept apart because lse = max + log_sum has too few digits where
// logits are large.
constexpr int kStatMax = 0;     // of u
constexpr int kStatLogSum = 1;  // log(sum_c exp(u_c - max))
constexpr int kStatMass = 2;    // sum_c q_c
constexpr int kStats = 3;

// What both directions are given.
struct CrossEntropyInputs {
  const void* input;    // [rows, cols]  T, row stride input_row_stride
  const void* target;   // [rows]        int64, contiguous; or [rows, cols] T or Acc, row stride target_row_stride
  const void* weight;   // [cols]        Acc; null: ones
  const void* dloss;    // [rows]        Acc, stride dloss_stride, which may be 0; null: no gradient is wanted
  void* dinput;         // [rows, cols]  T, contiguous; null if dloss is
  void* stats;          // [kStats, rows] Acc, contiguous: written forward, read backward
  int64_t rows;
  int64_t cols;
  int64_t input_row_stride;
  int64_t target_row_stride;
  int64_t dloss_stride;
  int64_t ignore_index;
  double label_smoothing;
  double z_loss;
  double softcap;       // 0: none
  DType dtype;
  TargetKind kind;
  bool wide_target;     // probabilities are of type Acc
};

struct CrossEntropyFwdParams : CrossEntropyInputs {
  void* loss;           // [rows]        Acc, contiguous
};

struct CrossEntropyBwdParams : CrossEntropyInputs {};

}  // namespace llmkernels
