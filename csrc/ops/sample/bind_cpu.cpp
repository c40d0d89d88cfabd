// sample for CPU tensors: at::parallel_for over rows, a kernel compiled for this CPU's instruction set.
#include <torch/library.h>

#include "common/cpu/isa.h"
#include "ops/sample/sample_cpu.h"
#include "torch/checks.h"
#include "torch/cpu.h"

namespace llmkernels {
namespace {

at::Tensor sample(const at::Tensor& logits, const at::Tensor& u, double temperature, int64_t top_k, double top_p,
                  double min_p) {
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
  const auto kernel = LLMKERNELS_CPU_DISPATCH(sample);
  at::parallel_for(0, p.rows, 1, [&](int64_t begin, int64_t end) {
    at::Tensor scratch = empty({2 * p.cols}, logits.options().dtype(at::kFloat));
    kernel(p, scratch.data_ptr<float>(), begin, end);
  });
  for (int64_t row = 0; row < p.rows; ++row) {
    TORCH_CHECK_VALUE(p.tokens[row] >= 0, "sample: row ", row,
                      " of logits has a NaN or +inf, or nothing but -inf, expected a distribution");
  }
  return tokens;
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cpu, CPU, m) { m.impl("sample_tokens", sample); }

}  // namespace llmkernels
