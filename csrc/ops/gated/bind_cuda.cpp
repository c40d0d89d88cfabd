// The gated family for CUDA tensors: allocate, plan, launch on torch's current stream.
#include <torch/library.h>

#include "ops/gated/gated_cuda.h"
#include "ops/gated/gated_torch.h"
#include "torch/cuda.h"

namespace llmkernels {
namespace {

at::Tensor gated_fwd(const at::Tensor& gate, const std::optional<at::Tensor>& up, std::string_view activation) {
  const CudaCall call("gated_fwd", gate.device());
  return gated_fwd_call("gated_fwd", gate, get(up), activation, [&](const GatedFwdParams& p) {
    check_cuda("gated_fwd", cuda::gated_fwd(p, cuda::plan_gated_fwd(p, call.gpu), call.stream));
  });
}

std::tuple<at::Tensor, at::Tensor> gated_bwd(const at::Tensor& dy, const at::Tensor& gate,
                                             const std::optional<at::Tensor>& up, std::string_view activation,
                                             std::array<bool, 2> wanted) {
  const CudaCall call("gated_bwd", gate.device());
  return gated_bwd_call("gated_bwd", dy, gate, get(up), activation, wanted, [&](const GatedBwdParams& p) {
    check_cuda("gated_bwd", cuda::gated_bwd(p, cuda::plan_gated_bwd(p, call.gpu), call.stream));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cuda, LLMKERNELS_CUDA_KEY, m) {
  m.impl("gated_fwd", gated_fwd);
  m.impl("gated_bwd", gated_bwd);
}

}  // namespace llmkernels
