// Checks and views shared by the bindings: whatever would make a raw pointer wrong raises here, with op, argument, got
// and wanted. The meaning of arguments is checked in Python, once for all backends.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <c10/util/Exception.h>

#include <optional>

namespace llmkernels {

inline const at::Tensor* get(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() ? &*tensor : nullptr;
}

inline void check_device(const char* op, const char* name, const at::Tensor& tensor, c10::Device device) {
  TORCH_CHECK_VALUE(tensor.device() == device, op, ": ", name, " is on ", tensor.device(), ", expected ", device);
}

inline void check_dtype(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, op, ": ", name, " has dtype ", tensor.scalar_type(), ", expected ",
                   dtype);
}

inline void check_shape(const char* op, const char* name, const at::Tensor& tensor, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, op, ": ", name, " has shape ", tensor.sizes(), ", expected ", shape);
}

// at::empty without the dispatcher where the device is known: a call's outputs take a third less time to allocate.
inline at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return options.device().is_cpu() ? at::cpu::empty(sizes, options) : at::empty(sizes, options);
}

// A tensor seen as rows: `owner` keeps the memory alive (a copy if the layout asks for one).
struct Rows {
  at::Tensor owner;
  int64_t stride = 0;  // in elements
  void* data() const { return owner.defined() ? owner.data_ptr() : nullptr; }
};

// `tensor` as [rows, cols] with a contiguous last dimension, copied only if its strides do not allow a view.
inline Rows as_rows(const at::Tensor& tensor, int64_t rows, int64_t cols) {
  if (tensor.is_contiguous()) return {tensor, cols};
  at::Tensor flat = tensor.reshape({rows, cols});
  if (cols > 1 && flat.stride(1) != 1) flat = flat.contiguous();
  if (cols == 1 && rows > 1) return {flat, flat.stride(0)};
  return {flat, rows > 1 ? flat.stride(0) : cols};
}

}  // namespace llmkernels
