// Cross entropy for CUDA tensors: allocate, plan, launch on torch's current stream.
#include <torch/library.h>

#include "ops/cross_entropy/cross_entropy_cuda.h"
#include "ops/cross_entropy/cross_entropy_torch.h"
#include "torch/cuda.h"

namespace llmkernels {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_fwd(
    const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& dloss, int64_t ignore_index, double label_smoothing, double z_loss,
    double softcap) {
  const char* op = "cross_entropy_fwd";
  const CudaCall call(op, input.device());
  return cross_entropy_fwd_call(op, input, target, get(weight), get(dloss),
                                {ignore_index, label_smoothing, z_loss, softcap}, [&](const CrossEntropyFwdParams& p) {
                                  const auto plan = cuda::plan_cross_entropy_fwd(p, call.gpu);
                                  check_cuda(op, cuda::cross_entropy_fwd(p, plan, call.stream));
                                });
}

at::Tensor cross_entropy_bwd(const at::Tensor& dloss, const at::Tensor& input, const at::Tensor& target,
                             const std::optional<at::Tensor>& weight, const at::Tensor& stats, int64_t ignore_index,
                             double label_smoothing, double z_loss, double softcap) {
  const char* op = "cross_entropy_bwd";
  const CudaCall call(op, input.device());
  return cross_entropy_bwd_call(op, dloss, input, target, get(weight), stats,
                                {ignore_index, label_smoothing, z_loss, softcap}, [&](const CrossEntropyBwdParams& p) {
                                  const auto plan = cuda::plan_cross_entropy_bwd(p, call.gpu);
                                  check_cuda(op, cuda::cross_entropy_bwd(p, plan, call.stream));
                                });
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cuda, LLMKERNELS_CUDA_KEY, m) {
  m.impl("cross_entropy_fwd", cross_entropy_fwd);
  m.impl("cross_entropy_bwd", cross_entropy_bwd);
}

}  // namespace llmkernels
