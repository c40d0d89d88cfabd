// quantized_linear for CUDA tensors: allocate, plan, launch on torch's current stream.
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "ops/norm/norm_cuda.h"
#include "ops/norm/norm_torch.h"
#include "ops/quantized_linear/quantized_linear_cuda.h"
#include "ops/quantized_linear/quantized_linear_torch.h"
#include "torch/cuda.h"

namespace llmkernels {
namespace {

using Optional = const std::optional<at::Tensor>&;

// What the kernels' numbers of 32 bits and groups can hold. op.py refuses what else they do not do.
void check_sizes(const char* op, const QuantizedWeight& w, int64_t M, int64_t blocks) {
  const int64_t most = cuda::kQuantizedMostSize;
  TORCH_CHECK_VALUE(M < most && w.N < most && w.K < most, op, ": x has ", M, " rows and the weight shape (", w.N, ", ",
                    w.K, "), expected less than ", most, " of each");
  TORCH_CHECK_VALUE(w.group_size == 0 || w.group_size == 32 || w.group_size == 64 || w.group_size == 128, op,
                    ": group_size is ", w.group_size, ", expected 32, 64, 128 or 0, the whole row");
  TORCH_CHECK_VALUE(blocks <= 0x7fffffff, op, ": a grid of ", blocks, " blocks is asked for, expected fewer than 2^31");
}

void check_fwd(const char* op, const QuantizedLinearFwdParams& p) {
  const QuantizedWeight& w = p.weight;
  check_sizes(op, w, p.M, cuda::ceil_div(p.M, 16) * cuda::ceil_div(w.N, cuda::kInt8Rows));
  if (p.activations == Activations::kPlain) {
    const int64_t most = p.dtype == DType::kFloat32 ? cuda::kQuantizedMostFloatRows : cuda::kQuantizedMostRows;
    TORCH_CHECK_VALUE(p.M <= most, op, ": x has ", p.M, " rows, expected at most ", most, " of its dtype");
    return;
  }
  TORCH_CHECK_VALUE(p.activations == Activations::kInt8, op, ": activations is fp8, expected int8 or nothing");
  const int64_t most = w.format == WeightFormat::kInt8 ? cuda::kQuantizedMostColumns : cuda::kQuantizedMostSize;
  TORCH_CHECK_VALUE(w.K <= most, op, ": the weight has ", w.K, " columns, expected at most ", most,
                    ": sums have 32 bits");
}

void run_fwd(const CudaCall& call, const char* op, const QuantizedLinearFwdParams& p, const at::TensorOptions& options,
             const cuda::QuantizedNorm& norm = {}) {
  check_fwd(op, p);
  const cuda::QuantizedLinearPlan plan = cuda::plan_quantized_linear_fwd(p, call.gpu);
  at::Tensor partial, rounded, x_scales;
  cuda::QuantizedWorkspace work;
  if (plan.parts.splits > 1) {
    partial = empty({plan.parts.bytes(p.M, p.weight.N)}, options.dtype(at::kByte));
    work.partial = partial.data_ptr();
  }
  if (plan.way == cuda::QuantizedWay::kInt8) {
    rounded = empty({p.M, cuda::rounded_pitch(p.weight.K)}, options.dtype(at::kChar));
    x_scales = empty({p.M}, options.dtype(at::kFloat));
    work.rounded = static_cast<int8_t*>(rounded.data_ptr());
    work.x_scales = x_scales.data_ptr<float>();
  }
  check_cuda(op, cuda::quantized_linear_fwd(p, plan, work, norm, call.stream));
}

at::Tensor quantized_linear_fwd(const at::Tensor& x, const at::Tensor& data, const at::Tensor& scales, Optional zeros,
                                Optional second_scales, Optional bias, std::string_view format, int64_t group_size,
                                std::string_view activations) {
  constexpr const char* op = "quantized_linear_fwd";
  const CudaCall call(op, x.device());
  return quantized_linear_fwd_call(
      op, x, data, scales, get(zeros), get(second_scales), get(bias), format, group_size, activations,
      [&](const QuantizedLinearFwdParams& p) { run_fwd(call, op, p, x.options()); });
}

// The norm is part of the kernel that rounds activations to int8, and otherwise a kernel of its own.
std::tuple<at::Tensor, at::Tensor> rms_norm_quantized_linear_fwd(
    const at::Tensor& x, Optional norm_weight, double eps, const at::Tensor& data, const at::Tensor& scales,
    Optional zeros, Optional second_scales, Optional bias, std::string_view format, int64_t group_size,
    std::string_view activations) {
  constexpr const char* op = "rms_norm_quantized_linear_fwd";
  const CudaCall call(op, x.device());
  const auto linear = [&](const at::Tensor& rows, auto&& run) {
    return quantized_linear_fwd_call(op, rows, data, scales, get(zeros), get(second_scales), get(bias), format,
                                     group_size, activations, run);
  };
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": x has shape ", x.sizes(), ", expected 2-D");
  if (activations != "int8" || data.size(0) == 0) {
    const auto normed = norm_fwd_call(op, NormKind::kRmsNorm, x, nullptr, get(norm_weight), nullptr, {x.size(1)}, eps,
                                      0.0, std::numeric_limits<int64_t>::max(), [&](const NormFwdParams& p) {
                                        check_cuda(op, cuda::norm_fwd(p, cuda::plan_norm_fwd(p, call.gpu), call.stream));
                                      });
    const auto run = [&](const QuantizedLinearFwdParams& p) { run_fwd(call, op, p, x.options()); };
    return {linear(std::get<0>(normed), run), std::get<3>(normed)};
  }
  const int64_t columns[] = {x.size(1)};
  const at::Tensor weight = norm_parameter(op, "norm_weight", get(norm_weight), x, NormShape(op, x, columns));
  const at::Tensor rstd = empty({x.size(0)}, x.options().dtype(at::kFloat));
  const at::Tensor y = linear(x, [&](const QuantizedLinearFwdParams& p) {
    cuda::QuantizedNorm norm;
    norm.rstd = rstd.data_ptr<float>();
    norm.weight = pointer(weight);
    norm.eps = static_cast<float>(eps);
    norm.is_float = weight.defined() && weight.scalar_type() == at::kFloat;
    norm.is_wide = cuda::aligned(norm.weight, 16);
    run_fwd(call, op, p, x.options(), norm);
  });
  return {y, rstd};
}

at::Tensor quantized_linear_bwd(const at::Tensor& dy, const at::Tensor& data, const at::Tensor& scales, Optional zeros,
                                Optional second_scales, int64_t columns, std::string_view format, int64_t group_size) {
  constexpr const char* op = "quantized_linear_bwd";
  const CudaCall call(op, dy.device());
  return quantized_linear_bwd_call(
      op, dy, data, scales, get(zeros), get(second_scales), columns, format, group_size,
      [&](const QuantizedLinearBwdParams& p) {
        check_sizes(op, p.weight, p.M, cuda::ceil_div(p.M, 16) * cuda::ceil_div(p.weight.K, cuda::kDxColumns));
        const cuda::QuantizedLinearBwdPlan plan = cuda::plan_quantized_linear_bwd(p);
        check_cuda(op, cuda::quantized_linear_bwd(p, plan, call.stream));
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cuda, LLMKERNELS_CUDA_KEY, m) {
  m.impl("quantized_linear_fwd", quantized_linear_fwd);
  m.impl("rms_norm_quantized_linear_fwd", rms_norm_quantized_linear_fwd);
  m.impl("quantized_linear_bwd", quantized_linear_bwd);
}

}  // namespace llmkernels
