// What the CPU and the CUDA binding of activations with a bias share: tensors -> params, with every check that protects
// memory. Only the device differs, and who runs the params.
#pragma once

#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <string_view>
#include <tuple>

#include "ops/activation/activation.h"
#include "ops/gated/gated_torch.h"

namespace llmkernels {

// `given` as rows; without a bias, rows that lie behind each other are one long row.
struct ActivationCall {
  int64_t rows = 1, cols = 1;
  Rows input;
  at::Tensor bias;

  ActivationCall(const char* op, const at::Tensor& given, const at::Tensor* given_bias) {
    const auto sizes = given.sizes();
    if (!sizes.empty()) cols = sizes.back();
    for (size_t i = 0; i + 1 < sizes.size(); ++i) rows *= sizes[i];
    input = as_rows(given, rows, cols);
    if (given_bias == nullptr) return;
    check_device(op, "bias", *given_bias, given.device());
    check_dtype(op, "bias", *given_bias, acc_of(given));
    check_shape(op, "bias", *given_bias, {cols});
    bias = given_bias->contiguous();
  }
};

// `run(params)` fills the output; it is not called when there is nothing to fill.
template <class Run>
at::Tensor activation_fwd_call(const char* op, const at::Tensor& input, const at::Tensor* bias,
                               std::string_view activation, Run&& run) {
  ActivationFwdParams p{};
  p.dtype = dtype_of(op, "input", input);
  p.activation = activation_of(op, activation);
  const ActivationCall call(op, input, bias);
  at::Tensor y = empty(input.sizes(), input.options());
  p.input = call.input.data();
  p.bias = pointer(call.bias);
  p.y = y.data_ptr();
  p.rows = call.rows;
  p.cols = call.cols;
  p.input_row_stride = call.input.stride;
  if (bias == nullptr) join_rows(p.rows, p.cols, {p.input_row_stride});
  if (y.numel() > 0) run(p);
  return y;
}

// Returns (dinput, dbias), the latter in the type of sums; what is not wanted is an empty tensor. `partial_rows(params)`
// says how many rows of sums `run(params)` fills.
template <class PartialRows, class Run>
std::tuple<at::Tensor, at::Tensor> activation_bwd_call(const char* op, const at::Tensor& dy, const at::Tensor& input,
                                                       const at::Tensor* bias, std::string_view activation,
                                                       std::array<bool, 2> wanted, PartialRows&& partial_rows,
                                                       Run&& run) {
  ActivationBwdParams p{};
  p.dtype = dtype_of(op, "input", input);
  p.activation = activation_of(op, activation);
  const ActivationCall call(op, input, bias);
  const Rows dy_rows = rows_like(op, "dy", &dy, input, input.sizes(), call.rows, call.cols);
  const at::TensorOptions acc = input.options().dtype(acc_of(input));
  at::Tensor dinput = empty(wanted[0] ? input.sizes() : at::IntArrayRef{0}, input.options());
  p.dy = dy_rows.data();
  p.input = call.input.data();
  p.bias = pointer(call.bias);
  if (wanted[0]) p.dinput = dinput.data_ptr();
  p.rows = call.rows;
  p.cols = call.cols;
  p.dy_row_stride = dy_rows.stride;
  p.input_row_stride = call.input.stride;
  if (!wanted[1]) {
    if (bias == nullptr) join_rows(p.rows, p.cols, {p.dy_row_stride, p.input_row_stride});
    if (dy.numel() > 0 && wanted[0]) run(p);
    return {dinput, empty({0}, acc)};
  }
  if (dy.numel() == 0) return {dinput, at::zeros({p.cols}, acc)};
  p.partial_rows = partial_rows(p);
  const at::Tensor partial = empty({p.partial_rows, p.cols}, acc);
  p.partial = partial.data_ptr();
  run(p);
  return {dinput, at::sum(partial, 0)};
}

}  // namespace llmkernels
