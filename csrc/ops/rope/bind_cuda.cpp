// rope for CUDA tensors: allocate, plan, launch on torch's current stream.
#include <torch/library.h>

#include "ops/rope/rope_cuda.h"
#include "ops/rope/rope_torch.h"
#include "torch/cuda.h"

namespace llmkernels {
namespace {

auto launcher(const CudaCall& call) {
  return [&call](const RopeParams& p) { check_cuda(kRope, cuda::rope(p, cuda::plan_rope(p, call.gpu), call.stream)); };
}

std::tuple<at::Tensor, at::Tensor> rope_fwd(const at::Tensor& q, const std::optional<at::Tensor>& k,
                                            const at::Tensor& cos, const at::Tensor& sin,
                                            const std::optional<at::Tensor>& positions, int64_t seq_dim,
                                            bool interleaved) {
  const CudaCall call(kRope, q.device());
  return rope_call(q, get(k), cos, sin, get(positions), seq_dim, interleaved, false, false, launcher(call));
}

std::tuple<at::Tensor, at::Tensor> rope_bwd(const at::Tensor& dq, const std::optional<at::Tensor>& dk,
                                            const at::Tensor& cos, const at::Tensor& sin,
                                            const std::optional<at::Tensor>& positions, int64_t seq_dim,
                                            bool interleaved) {
  const CudaCall call(kRope, dq.device());
  return rope_call(dq, get(dk), cos, sin, get(positions), seq_dim, interleaved, true, false, launcher(call));
}

void rope_fwd_(const at::Tensor& q, const std::optional<at::Tensor>& k, const at::Tensor& cos, const at::Tensor& sin,
               const std::optional<at::Tensor>& positions, int64_t seq_dim, bool interleaved) {
  const CudaCall call(kRope, q.device());
  rope_call(q, get(k), cos, sin, get(positions), seq_dim, interleaved, false, true, launcher(call));
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cuda, LLMKERNELS_CUDA_KEY, m) {
  m.impl("rope_fwd", rope_fwd);
  m.impl("rope_bwd", rope_bwd);
  m.impl("rope_fwd_", TORCH_FN(rope_fwd_));
}

}  // namespace llmkernels
