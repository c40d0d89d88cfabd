// What the CPU and the CUDA binding of sample share: tensors -> params, with every check that protects memory.
#pragma once

#include "ops/sample/sample.h"
#include "torch/checks.h"

namespace llmkernels {

// `run(params)` fills the tokens; it is not called when there are none.
template <class Run>
at::Tensor sample_call(const at::Tensor& logits, const at::Tensor& u, double temperature, int64_t top_k, double top_p,
                       double min_p, Run&& run) {
  SampleParams p{};
  p.dtype = dtype_of("sample", "logits", logits);
  TORCH_CHECK_TYPE(p.dtype != DType::kFloat64, "sample: logits has dtype Double, expected float32, bfloat16 or float16");
  TORCH_CHECK_VALUE(logits.dim() >= 1 && logits.size(-1) >= 1, "sample: logits has shape ", logits.sizes(),
                    ", expected one column or more");
  p.cols = logits.size(-1);
  p.rows = logits.numel() / p.cols;
  const Rows rows = as_rows(logits, p.rows, p.cols);
  check_device("sample", "u", u, logits.device());
  check_dtype("sample", "u", u, at::kDouble);
  check_shape("sample", "u", u, logits.sizes().slice(0, logits.dim() - 1));
  const at::Tensor contiguous_u = u.contiguous();
  at::Tensor tokens = empty(u.sizes(), logits.options().dtype(at::kLong));
  p.logits = rows.data();
  p.u = contiguous_u.data_ptr<double>();
  p.tokens = tokens.data_ptr<int64_t>();
  p.row_stride = rows.stride;
  p.top_k = top_k;
  p.temperature = temperature;
  p.top_p = top_p;
  p.min_p = min_p;
  if (p.rows > 0) run(p);
  return tokens;
}

}  // namespace llmkernels
