// Activations with a bias for CUDA tensors: allocate, plan, launch on torch's current stream.
#include <torch/library.h>

#include "ops/activation/activation_cuda.h"
#include "ops/activation/activation_torch.h"
#include "torch/cuda.h"

namespace llmkernels {
namespace {

at::Tensor activation_fwd(const at::Tensor& input, const std::optional<at::Tensor>& bias, std::string_view activation) {
  const char* op = "activation_fwd";
  const CudaCall call(op, input.device());
  return activation_fwd_call(op, input, get(bias), activation, [&](const ActivationFwdParams& p) {
    check_cuda(op, cuda::activation_fwd(p, cuda::plan_activation_fwd(p, call.gpu), call.stream));
  });
}

std::tuple<at::Tensor, at::Tensor> activation_bwd(const at::Tensor& dy, const at::Tensor& input,
                                                  const std::optional<at::Tensor>& bias, std::string_view activation,
                                                  std::array<bool, 2> wanted) {
  const char* op = "activation_bwd";
  const CudaCall call(op, input.device());
  const auto plan = [&](const ActivationBwdParams& p) { return cuda::plan_activation_bwd(p, wanted[1], call.gpu); };
  return activation_bwd_call(
      op, dy, input, get(bias), activation, wanted,
      [&](const ActivationBwdParams& p) { return cuda::activation_partial_rows(plan(p)); },
      [&](const ActivationBwdParams& p) { check_cuda(op, cuda::activation_bwd(p, plan(p), call.stream)); });
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cuda, LLMKERNELS_CUDA_KEY, m) {
  m.impl("activation_fwd", activation_fwd);
  m.impl("activation_bwd", activation_bwd);
}

}  // namespace llmkernels
