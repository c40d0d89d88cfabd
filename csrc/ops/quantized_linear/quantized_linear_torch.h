// What the CPU and the CUDA binding of quantized_linear share: tensors -> params, with every check that protects memory.
// Only the device differs, and who runs the params.
#pragma once

#include <algorithm>
#include <string_view>

#include "ops/quantized_linear/quantized_linear.h"
#include "torch/checks.h"

namespace llmkernels {

inline WeightFormat format_of(const char* op, std::string_view name) {
  if (name == "int8") return WeightFormat::kInt8;
  if (name == "int4") return WeightFormat::kInt4;
  if (name == "nf4") return WeightFormat::kNf4;
  if (name == "fp8") return WeightFormat::kFp8;
  TORCH_CHECK_VALUE(false, op, ": format is ", name, ", expected int8, int4, nf4 or fp8");
}

inline Activations activations_of(const char* op, std::string_view name, WeightFormat format) {
  if (name.empty()) return Activations::kPlain;
  if (name == "int8" && (format == WeightFormat::kInt8 || format == WeightFormat::kInt4)) return Activations::kInt8;
  if (name == "fp8" && format == WeightFormat::kFp8) return Activations::kFp8;
  TORCH_CHECK_VALUE(false, op, ": activations is ", name,
                    ", expected nothing, int8 (of int8 or int4 weights) or fp8 (of fp8 weights)");
}

// A call's weight; `owners` keep contiguous copies alive where the given parts were not contiguous.
struct WeightParts {
  at::Tensor data, scales, zeros, second_scales;
  QuantizedWeight weight{};

  WeightParts(const char* op, const at::Tensor& x, int64_t columns, const at::Tensor& given_data,
              const at::Tensor& given_scales, const at::Tensor* given_zeros, const at::Tensor* given_second_scales,
              std::string_view format, int64_t group_size) {
    weight.format = format_of(op, format);
    const bool four_bits = weight.format == WeightFormat::kInt4 || weight.format == WeightFormat::kNf4;
    const bool blocks = weight.format == WeightFormat::kFp8 && group_size != 0;
    TORCH_CHECK_VALUE(given_data.dim() == 2, op, ": data has shape ", given_data.sizes(), ", expected 2-D");
    TORCH_CHECK_VALUE(columns >= 0, op, ": columns is ", columns, ", expected 0 or more");
    TORCH_CHECK_VALUE(group_size == 0 || (four_bits && group_size > 0 && group_size % 2 == 0) ||
                          (blocks && group_size == kFp8Block),
                      op, ": group_size is ", group_size, ", expected one that format ", format, " has");
    const int64_t N = given_data.size(0);
    weight.N = N;
    weight.K = columns;
    weight.group_size = group_size;
    weight.groups = group_size == 0 ? 1 : std::max<int64_t>(1, (columns + group_size - 1) / group_size);
    const at::ScalarType data_type = weight.format == WeightFormat::kInt8  ? at::kChar
                                     : weight.format == WeightFormat::kFp8 ? at::kFloat8_e4m3fn
                                                                           : at::kByte;
    data = part(op, "data", given_data, x, data_type, {N, four_bits ? (columns + 1) / 2 : columns});
    const bool is_double = given_second_scales != nullptr;
    TORCH_CHECK_VALUE(!is_double || weight.format == WeightFormat::kNf4, op, ": second_scales is given, format ",
                      format, " has none");
    weight.scale_type = scale_type_of(op, given_scales, four_bits, is_double);
    const int64_t scale_rows = blocks ? std::max<int64_t>(1, (N + kFp8Block - 1) / kFp8Block) : N;
    scales = part(op, "scales", given_scales, x, given_scales.scalar_type(),
                  four_bits || blocks ? at::DimVector{scale_rows, weight.groups} : at::DimVector{N});
    if (given_zeros != nullptr) {
      TORCH_CHECK_VALUE(weight.format == WeightFormat::kInt4, op, ": zeros is given, format ", format, " has none");
      zeros = part(op, "zeros", *given_zeros, x, at::kByte, {N, weight.groups});
    }
    if (is_double) {
      const int64_t steps = std::max<int64_t>(1, (N * weight.groups + kSecondScales - 1) / kSecondScales);
      second_scales = part(op, "second_scales", *given_second_scales, x, at::kFloat, {1 + steps});
    }
    weight.data = data.data_ptr();
    weight.scales = scales.data_ptr();
    weight.zeros = static_cast<const uint8_t*>(pointer(zeros));
    weight.second_scales = static_cast<const float*>(pointer(second_scales));
  }

 private:
  static at::Tensor part(const char* op, const char* name, const at::Tensor& given, const at::Tensor& x,
                         at::ScalarType dtype, at::IntArrayRef shape) {
    check_device(op, name, given, x.device());
    check_dtype(op, name, given, dtype);
    check_shape(op, name, given, shape);
    return given.contiguous();
  }

  static ScaleType scale_type_of(const char* op, const at::Tensor& scales, bool four_bits, bool is_double) {
    const at::ScalarType type = scales.scalar_type();
    if (is_double) {
      check_dtype(op, "scales", scales, at::kChar);
      return ScaleType::kInt8;
    }
    if (type == at::kFloat) return ScaleType::kFloat32;
    if (four_bits && type == at::kBFloat16) return ScaleType::kBFloat16;
    if (four_bits && type == at::kHalf) return ScaleType::kFloat16;
    TORCH_CHECK_TYPE(false, op, ": scales has dtype ", type, ", expected float32",
                     four_bits ? ", bfloat16 or float16" : "");
  }
};

inline DType narrow_dtype_of(const char* op, const char* name, const at::Tensor& tensor) {
  const DType dtype = dtype_of(op, name, tensor);
  TORCH_CHECK_TYPE(dtype != DType::kFloat64, op, ": ", name,
                   " has dtype float64, expected float32, bfloat16 or float16");
  return dtype;
}

// `run(params)` fills y; it is not called when there is nothing to fill.
template <class Run>
at::Tensor quantized_linear_fwd_call(const char* op, const at::Tensor& x, const at::Tensor& data,
                                     const at::Tensor& scales, const at::Tensor* zeros,
                                     const at::Tensor* second_scales, const at::Tensor* bias, std::string_view format,
                                     int64_t group_size, std::string_view activations, Run&& run) {
  QuantizedLinearFwdParams p{};
  p.dtype = narrow_dtype_of(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": x has shape ", x.sizes(), ", expected 2-D");
  const WeightParts parts(op, x, x.size(1), data, scales, zeros, second_scales, format, group_size);
  p.weight = parts.weight;
  p.activations = activations_of(op, activations, p.weight.format);
  p.M = x.size(0);
  const Rows rows = as_rows(x, p.M, p.weight.K);
  const Rows bias_row = rows_like(op, "bias", bias, x, {p.weight.N}, 1, p.weight.N);
  at::Tensor y = empty({p.M, p.weight.N}, x.options());
  p.x = rows.data();
  p.x_row_stride = rows.stride;
  p.bias = bias_row.data();
  p.y = y.data_ptr();
  if (y.numel() > 0) run(p);
  return y;
}

// `run(params)` fills dx; it is not called when there is nothing to fill.
template <class Run>
at::Tensor quantized_linear_bwd_call(const char* op, const at::Tensor& dy, const at::Tensor& data,
                                     const at::Tensor& scales, const at::Tensor* zeros,
                                     const at::Tensor* second_scales, int64_t columns, std::string_view format,
                                     int64_t group_size, Run&& run) {
  QuantizedLinearBwdParams p{};
  p.dtype = narrow_dtype_of(op, "dy", dy);
  const WeightParts parts(op, dy, columns, data, scales, zeros, second_scales, format, group_size);
  p.weight = parts.weight;
  TORCH_CHECK_VALUE(dy.dim() == 2 && dy.size(1) == p.weight.N, op, ": dy has shape ", dy.sizes(), ", expected [M, ",
                    p.weight.N, "]");
  p.M = dy.size(0);
  const Rows rows = as_rows(dy, p.M, p.weight.N);
  at::Tensor dx = empty({p.M, columns}, dy.options());
  p.dy = rows.data();
  p.dy_row_stride = rows.stride;
  p.dx = dx.data_ptr();
  if (dx.numel() > 0) run(p);
  return dx;
}

}  // namespace llmkernels
