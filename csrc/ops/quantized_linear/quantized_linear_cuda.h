// Host launchers of the CUDA kernels of quantized_linear: planned params in, CUDA's error sentence out (null for none).
#pragma once

#include "ops/quantized_linear/quantized_linear_plan.h"

namespace llmkernels::cuda {

// Memory that the binding allocates for a call.
struct QuantizedWorkspace {
  void* partial = nullptr;     // [splits, M, N] float, or int32 of int8 with rounded activations; null with one part
  int8_t* rounded = nullptr;   // [M, rounded_pitch(K)], zeros beyond K; see kRoundedBlock
  float* x_scales = nullptr;   // [M]
};

// The RMS norm of rows of x before they are rounded to int8: x / sqrt(mean(x^2) + eps) * weight, in T.
struct QuantizedNorm {
  float* rstd = nullptr;         // [M], written; null: no norm
  const void* weight = nullptr;  // [K]  T or float; null: ones
  float eps = 0.0f;
  bool is_float = false;  // weight
  bool is_wide = false;   // weight is aligned to vectors
};

// What the kernels of a forward are told.
struct QuantizedLinearArgs {
  QuantizedLinearFwdParams p;
  QuantizedWorkspace work;
  QuantizedNorm norm;
  int weight_unit, x_unit, group_shift;
};

struct QuantizedLinearBwdArgs {
  QuantizedLinearBwdParams p;
  int weight_unit, dy_unit, group_shift, column_blocks;
};

// A norm only where activations are rounded to int8.
const char* quantized_linear_fwd(const QuantizedLinearFwdParams& params, const QuantizedLinearPlan& plan,
                                 const QuantizedWorkspace& work, const QuantizedNorm& norm, void* stream);
const char* quantized_linear_bwd(const QuantizedLinearBwdParams& params, const QuantizedLinearBwdPlan& plan,
                                 void* stream);

// The parts of a forward; each for plans of its way.
const char* quantized_matvec(const QuantizedLinearArgs& args, const QuantizedLinearPlan& plan, void* stream);
const char* quantized_tokens(const QuantizedLinearArgs& args, const QuantizedLinearPlan& plan, void* stream);
const char* quantized_round_rows(const QuantizedLinearArgs& args, void* stream);
const char* quantized_int8(const QuantizedLinearArgs& args, const QuantizedLinearPlan& plan, void* stream);
const char* quantized_w4a8(const QuantizedLinearArgs& args, const QuantizedLinearPlan& plan, void* stream);

}  // namespace llmkernels::cuda
