// sample for CPU tensors: at::parallel_for over rows, a kernel compiled for this CPU's instruction set.
#include <torch/library.h>

#include "common/cpu/isa.h"
#include "ops/sample/sample_cpu.h"
#include "ops/sample/sample_torch.h"
#include "torch/cpu.h"

namespace llmkernels {
namespace {

at::Tensor sample_tokens(const at::Tensor& logits, const at::Tensor& u, double temperature, int64_t top_k, double top_p,
                         double min_p) {
  return sample_call(logits, u, temperature, top_k, top_p, min_p, [&](const SampleParams& p) {
    const auto kernel = LLMKERNELS_CPU_DISPATCH(sample);
    at::parallel_for(0, p.rows, 1, [&](int64_t begin, int64_t end) {
      at::Tensor scratch = empty({2 * p.cols}, logits.options().dtype(at::kFloat));
      kernel(p, scratch.data_ptr<float>(), begin, end);
    });
    for (int64_t row = 0; row < p.rows; ++row) {
      TORCH_CHECK_VALUE(p.tokens[row] >= 0, "sample: row ", row,
                        " of logits has a NaN or +inf, or nothing but -inf, expected a distribution");
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cpu, CPU, m) { m.impl("sample_tokens", sample_tokens); }

}  // namespace llmkernels
