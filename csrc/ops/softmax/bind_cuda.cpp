// The softmax family for CUDA tensors: allocate, plan, launch on torch's current stream.
#include <torch/library.h>

#include "ops/softmax/softmax_cuda.h"
#include "ops/softmax/softmax_torch.h"
#include "torch/cuda.h"

namespace llmkernels {
namespace {

at::Tensor softmax_fwd(const at::Tensor& x, const std::optional<at::Tensor>& mask, double scale, bool log) {
  const CudaCall call("softmax_fwd", x.device());
  return softmax_fwd_call("softmax_fwd", x, get(mask), scale, log, [&](const SoftmaxFwdParams& p) {
    check_cuda("softmax_fwd", cuda::softmax_fwd(p, cuda::plan_softmax_fwd(p, call.gpu), call.stream));
  });
}

std::tuple<at::Tensor, at::Tensor> softmax_bwd(const at::Tensor& dy, const at::Tensor& y, double scale, bool log,
                                               std::array<bool, 2> wanted) {
  const CudaCall call("softmax_bwd", y.device());
  return softmax_bwd_call("softmax_bwd", dy, y, scale, log, wanted, [&](const SoftmaxBwdParams& p) {
    check_cuda("softmax_bwd", cuda::softmax_bwd(p, cuda::plan_softmax_bwd(p, call.gpu), call.stream));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cuda, LLMKERNELS_CUDA_KEY, m) {
  m.impl("softmax_fwd", softmax_fwd);
  m.impl("softmax_bwd", softmax_bwd);
}

}  // namespace llmkernels
