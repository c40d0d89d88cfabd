// sample for CUDA tensors: allocate, plan, launch on torch's current stream.
#include <torch/library.h>

#include "ops/sample/sample_cuda.h"
#include "ops/sample/sample_torch.h"
#include "torch/cuda.h"

namespace llmkernels {
namespace {

at::Tensor sample_tokens(const at::Tensor& logits, const at::Tensor& u, double temperature, int64_t top_k, double top_p,
                         double min_p) {
  const CudaCall call("sample", logits.device());
  return sample_call(logits, u, temperature, top_k, top_p, min_p, [&](const SampleParams& p) {
    check_cuda("sample", cuda::sample(p, cuda::plan_sample(p, call.gpu), call.stream));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cuda, LLMKERNELS_CUDA_KEY, m) { m.impl("sample_tokens", sample_tokens); }

}  // namespace llmkernels
