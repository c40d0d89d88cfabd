// What the CPU and the CUDA binding of the norm family share: tensors -> params, with every check that protects
// memory. Only the device differs, and who runs the params.
#pragma once

#include <array>
#include <cmath>
#include <tuple>

#include "ops/norm/norm.h"
#include "torch/checks.h"

namespace llmkernels {

// What a call drops, if anything.
struct NormDropout {
  const at::Tensor* seed = nullptr;
  double p = 0.0;

  // Fills the fields of NormFwdParams or NormBwdParams.
  template <class Params>
  void describe(const char* op, const at::Tensor& x, Params& params) const {
    if (seed == nullptr) return;
    check_device(op, "seed", *seed, x.device());
    check_dtype(op, "seed", *seed, at::kLong);
    check_shape(op, "seed", *seed, {});
    TORCH_CHECK_VALUE(p >= 0.0 && p <= 1.0, op, ": dropout_p is ", p, ", expected a probability between 0 and 1");
    params.seed = seed->data_ptr<int64_t>();
    params.dropout_threshold = static_cast<uint32_t>(std::nearbyint(p * 16777216.0));
    params.dropout_scale = p < 1.0 ? 1.0 / (1.0 - p) : 0.0;
  }
};

// How a call's tensors lie: rows x cols, and the shape of the statistics.
struct NormShape {
  int64_t rows = 1, cols = 1;
  at::IntArrayRef sizes, stats_sizes, normalized;

  NormShape(const char* op, const at::Tensor& x, at::IntArrayRef normalized_shape) : normalized(normalized_shape) {
    const int64_t dims = static_cast<int64_t>(normalized_shape.size());
    TORCH_CHECK_VALUE(dims >= 1 && dims <= x.dim() && x.sizes().slice(x.dim() - dims) == normalized_shape, op,
                      ": x has shape ", x.sizes(), ", expected it to end in normalized_shape ", normalized_shape);
    sizes = x.sizes();
    stats_sizes = x.sizes().slice(0, x.dim() - dims);
    for (const int64_t size : stats_sizes) rows *= size;
    for (const int64_t size : normalized_shape) cols *= size;
  }
};

// The contiguous parameter and its dtype; an empty tensor if there is none.
inline at::Tensor norm_parameter(const char* op, const char* name, const at::Tensor* parameter, const at::Tensor& x,
                                 const NormShape& shape) {
  if (parameter == nullptr) return {};
  check_device(op, name, *parameter, x.device());
  check_shape(op, name, *parameter, shape.normalized);
  TORCH_CHECK_TYPE(parameter->scalar_type() == x.scalar_type() || parameter->scalar_type() == acc_of(x), op, ": ",
                   name, " has dtype ", parameter->scalar_type(), ", expected ", x.scalar_type(), " or ", acc_of(x));
  return parameter->contiguous();
}

// The parameter in the type of the sums if `widen`: worth a copy where each row would convert it again.
inline at::Tensor widened(const at::Tensor& parameter, const at::Tensor& x, bool widen) {
  return parameter.defined() && widen ? parameter.to(acc_of(x)) : parameter;
}

// `run(params)` fills the outputs; it is not called when there is nothing to fill. From `widen_rows` rows on, 16-bit
// parameters are handed over in fp32.
template <class Run>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_fwd_call(
    const char* op, NormKind kind, const at::Tensor& x, const at::Tensor* residual, const at::Tensor* weight,
    const at::Tensor* bias, at::IntArrayRef normalized_shape, double eps, double weight_offset, int64_t widen_rows, Run&& run,
    const NormDropout& dropout = {}) {
  NormFwdParams p{};
  p.dtype = dtype_of(op, "x", x);
  const NormShape shape(op, x, normalized_shape);
  TORCH_CHECK_VALUE(bias == nullptr || weight != nullptr, op, ": bias without weight, expected both or none");
  const Rows x_rows = as_rows(x, shape.rows, shape.cols);
  const Rows residual_rows = rows_like(op, "residual", residual, x, shape.sizes, shape.rows, shape.cols);
  at::Tensor w = norm_parameter(op, "weight", weight, x, shape);
  at::Tensor b = norm_parameter(op, "bias", bias, x, shape);
  if (b.defined()) check_dtype(op, "bias", b, w.scalar_type());
  w = widened(w, x, shape.rows >= widen_rows);
  b = widened(b, x, shape.rows >= widen_rows);

  const at::TensorOptions options = x.options();
  at::Tensor y = empty(shape.sizes, options);
  at::Tensor new_residual = empty(residual != nullptr ? shape.sizes : at::IntArrayRef{0}, options);
  const at::TensorOptions acc = options.dtype(acc_of(x));
  at::Tensor mean = kind == NormKind::kLayerNorm ? empty(shape.stats_sizes, acc) : at::Tensor();
  at::Tensor rstd = empty(shape.stats_sizes, acc);

  p.x = x_rows.data();
  p.residual = residual_rows.data();
  p.weight = pointer(w);
  p.bias = pointer(b);
  p.y = y.data_ptr();
  p.new_residual = residual != nullptr ? new_residual.data_ptr() : nullptr;
  p.mean = pointer(mean);
  p.rstd = rstd.data_ptr();
  p.rows = shape.rows;
  p.cols = shape.cols;
  p.x_row_stride = x_rows.stride;
  p.residual_row_stride = residual_rows.stride;
  p.eps = eps;
  p.weight_offset = weight_offset;
  p.weight_dtype = w.defined() ? dtype_of(op, "weight", w) : p.dtype;
  p.kind = kind;
  dropout.describe(op, x, p);
  if (p.rows > 0) run(p);
  return {y, new_residual, mean, rstd};
}

// The gradients of a call: of s, of dropout's input, of the parameters; what is not wanted is empty.
struct NormGradients {
  at::Tensor dx, dx_dropped, dweight, dbias;
};

// `run(params, make_partial)` fills the outputs; make_partial(blocks) allocates the workspace. `wanted`: of the
// gradients of s, weight and bias.
template <class Run>
NormGradients norm_bwd_call(
    const char* op, NormKind kind, const at::Tensor& dy, const at::Tensor* dresidual, const at::Tensor& x,
    const at::Tensor* weight, const at::Tensor* mean, const at::Tensor& rstd, at::IntArrayRef normalized_shape,
    double weight_offset, std::array<bool, 3> wanted, Run&& run, const NormDropout& dropout = {},
    bool dropped_wanted = false) {
  NormBwdParams p{};
  p.dtype = dtype_of(op, "x", x);
  const NormShape shape(op, x, normalized_shape);
  const Rows x_rows = as_rows(x, shape.rows, shape.cols);
  const Rows dy_rows = rows_like(op, "dy", &dy, x, shape.sizes, shape.rows, shape.cols);
  const Rows dresidual_rows = rows_like(op, "dresidual", dresidual, x, shape.sizes, shape.rows, shape.cols);
  const at::Tensor w = norm_parameter(op, "weight", weight, x, shape);
  at::Tensor stats[2];
  const at::Tensor* given[2] = {mean, &rstd};
  for (int i = 0; i < 2; ++i) {
    if (given[i] == nullptr) continue;
    const char* name = i == 0 ? "mean" : "rstd";
    check_device(op, name, *given[i], x.device());
    check_dtype(op, name, *given[i], acc_of(x));
    check_shape(op, name, *given[i], shape.stats_sizes);
    stats[i] = given[i]->contiguous();
  }

  const at::TensorOptions options = x.options();
  const at::TensorOptions parameter = w.defined() ? w.options() : options;
  at::Tensor dx = empty(wanted[0] ? shape.sizes : at::IntArrayRef{0}, options);
  at::Tensor dx_dropped = empty(dropped_wanted ? shape.sizes : at::IntArrayRef{0}, options);
  at::Tensor dweight = wanted[1] ? empty(shape.normalized, parameter) : empty({0}, options);
  at::Tensor dbias = wanted[2] ? empty(shape.normalized, parameter) : empty({0}, options);

  p.dy = dy_rows.data();
  p.dresidual = dresidual_rows.data();
  p.x = x_rows.data();
  p.weight = pointer(w);
  p.mean = pointer(stats[0]);
  p.rstd = stats[1].data_ptr();
  p.dx = wanted[0] ? dx.data_ptr() : nullptr;
  p.dweight = wanted[1] ? dweight.data_ptr() : nullptr;
  p.dbias = wanted[2] ? dbias.data_ptr() : nullptr;
  p.rows = shape.rows;
  p.cols = shape.cols;
  p.x_row_stride = x_rows.stride;
  p.dy_row_stride = dy_rows.stride;
  p.dresidual_row_stride = dresidual_rows.stride;
  p.weight_offset = weight_offset;
  p.weight_dtype = w.defined() ? dtype_of(op, "weight", w) : p.dtype;
  p.kind = kind;
  dropout.describe(op, x, p);
  p.dx_dropped = dropped_wanted ? dx_dropped.data_ptr() : nullptr;
  at::Tensor workspace;
  const auto make_partial = [&](int64_t blocks) {
    p.partial_blocks = blocks;
    const int64_t sums = static_cast<int64_t>(wanted[1]) + static_cast<int64_t>(wanted[2]);
    workspace = empty({sums * blocks * p.cols}, options.dtype(acc_of(x)));
    p.partial = workspace.data_ptr();
  };
  if (p.cols > 0) run(p, make_partial);
  return {dx, dx_dropped, dweight, dbias};
}

}  // namespace llmkernels
