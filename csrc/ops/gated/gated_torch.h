// What the CPU and the CUDA binding of the gated family share: tensors -> params, with every check that protects
// memory. Only the device differs, and who runs the params.
#pragma once

#include <array>
#include <initializer_list>
#include <string_view>
#include <tuple>

#include "ops/gated/gated.h"
#include "torch/checks.h"

namespace llmkernels {

inline Activation activation_of(const char* op, std::string_view name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  TORCH_CHECK_VALUE(false, op, ": activation is ", name, ", expected silu, gelu, gelu_tanh or relu");
}

// The two factors of a call as rows. Without `up`, `gate` is packed: both, side by side in each row.
struct GatedInputs {
  at::DimVector sizes;  // of y
  int64_t rows = 1, cols = 1;
  Rows gate, up;
  const void* up_data = nullptr;

  GatedInputs(const char* op, const at::Tensor& given, const at::Tensor* separate) : sizes(given.sizes()) {
    const bool packed = separate == nullptr;
    TORCH_CHECK_VALUE(!packed || (!sizes.empty() && sizes.back() % 2 == 0), op, ": packed gate has shape ",
                      given.sizes(), ", expected an even last dimension");
    if (packed) sizes.back() /= 2;
    if (!sizes.empty()) cols = sizes.back();
    for (size_t i = 0; i + 1 < sizes.size(); ++i) rows *= sizes[i];
    gate = as_rows(given, rows, packed ? 2 * cols : cols);
    up = packed ? gate : rows_like(op, "up", separate, given, sizes, rows, cols);
    up_data = packed ? static_cast<const char*>(gate.data()) + cols * given.element_size() : up.data();
  }
};

// Rows that lie behind each other in every tensor are one long row: no rest of a vector at the end of each.
inline void join_rows(int64_t& rows, int64_t& cols, std::initializer_list<int64_t> strides) {
  for (const int64_t stride : strides) {
    if (stride != cols) return;
  }
  cols *= rows;
  rows = 1;
}

// `run(params)` fills the output; it is not called when there is nothing to fill.
template <class Run>
at::Tensor gated_fwd_call(const char* op, const at::Tensor& gate, const at::Tensor* up, std::string_view activation,
                          Run&& run) {
  GatedFwdParams p{};
  p.dtype = dtype_of(op, "gate", gate);
  p.activation = activation_of(op, activation);
  const GatedInputs in(op, gate, up);
  at::Tensor y = empty(in.sizes, gate.options());
  p.gate = in.gate.data();
  p.up = in.up_data;
  p.y = y.data_ptr();
  p.rows = in.rows;
  p.cols = in.cols;
  p.gate_row_stride = in.gate.stride;
  p.up_row_stride = in.up.stride;
  join_rows(p.rows, p.cols, {p.gate_row_stride, p.up_row_stride});
  if (y.numel() > 0) run(p);
  return y;
}

// Returns (dgate, dup); one packed gradient and an empty tensor if `gate` is packed.
template <class Run>
std::tuple<at::Tensor, at::Tensor> gated_bwd_call(const char* op, const at::Tensor& dy, const at::Tensor& gate,
                                                  const at::Tensor* up, std::string_view activation,
                                                  std::array<bool, 2> wanted, Run&& run) {
  GatedBwdParams p{};
  p.dtype = dtype_of(op, "gate", gate);
  p.activation = activation_of(op, activation);
  const GatedInputs in(op, gate, up);
  const Rows dy_rows = rows_like(op, "dy", &dy, gate, in.sizes, in.rows, in.cols);
  const bool packed = up == nullptr;
  at::Tensor dgate = empty(wanted[0] ? gate.sizes() : at::IntArrayRef{0}, gate.options());
  at::Tensor dup = empty(wanted[1] && !packed ? gate.sizes() : at::IntArrayRef{0}, gate.options());
  p.dy = dy_rows.data();
  p.gate = in.gate.data();
  p.up = in.up_data;
  if (wanted[0]) p.dgate = dgate.data_ptr();
  if (packed) {
    if (wanted[0]) p.dup = static_cast<char*>(p.dgate) + in.cols * gate.element_size();
  } else if (wanted[1]) {
    p.dup = dup.data_ptr();
  }
  p.rows = in.rows;
  p.cols = in.cols;
  p.dy_row_stride = dy_rows.stride;
  p.gate_row_stride = in.gate.stride;
  p.up_row_stride = in.up.stride;
  p.grad_row_stride = packed ? 2 * in.cols : in.cols;
  join_rows(p.rows, p.cols, {p.dy_row_stride, p.gate_row_stride, p.up_row_stride, p.grad_row_stride});
  if (dy.numel() > 0 && (p.dgate != nullptr || p.dup != nullptr)) run(p);
  return {dgate, dup};
}

}  // namespace llmkernels
