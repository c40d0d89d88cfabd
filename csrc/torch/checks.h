// Checks and views shared by the bindings: whatever would make a raw pointer wrong raises here, with op, argument, got
// and wanted. The meaning of arguments is checked in Python, once for all backends.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "common/dtype.h"
#include "torch/empty.h"

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

// The element type of `tensor`, argument `name` of `op`.
inline DType dtype_of(const char* op, const char* name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, op, ": ", name, " has dtype ", tensor.scalar_type(),
                       ", expected float64, float32, bfloat16 or float16");
  }
}

// The type of sums over elements of `x`.
inline at::ScalarType acc_of(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

inline void* pointer(const at::Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }

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

// As `as_rows`, of an argument that may be absent and otherwise has the device and dtype of `x` and shape `sizes`.
inline Rows rows_like(const char* op, const char* name, const at::Tensor* tensor, const at::Tensor& x,
                      at::IntArrayRef sizes, int64_t rows, int64_t cols) {
  if (tensor == nullptr) return {};
  check_device(op, name, *tensor, x.device());
  check_dtype(op, name, *tensor, x.scalar_type());
  check_shape(op, name, *tensor, sizes);
  return as_rows(*tensor, rows, cols);
}

}  // namespace llmkernels
