// The norm family for CUDA tensors: allocate, plan, launch on torch's current stream.
#include <torch/library.h>

#include "ops/norm/norm_cuda.h"
#include "ops/norm/norm_torch.h"
#include "torch/cuda.h"

namespace llmkernels {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Converting 16-bit parameters in the kernel is free there, so they are never widened beforehand.
constexpr int64_t kNeverWiden = std::numeric_limits<int64_t>::max();

struct Fwd {
  const char* op;
  const CudaCall& call;
  void operator()(const NormFwdParams& p) const {
    check_cuda(op, cuda::norm_fwd(p, cuda::plan_norm_fwd(p, call.gpu), call.stream));
  }
};

struct Bwd {
  const char* op;
  const CudaCall& call;
  template <class MakePartial>
  void operator()(NormBwdParams& p, MakePartial&& make_partial) const {
    const cuda::NormBwdPlan plan = cuda::plan_norm_bwd(p, call.gpu);
    make_partial(plan.partial_blocks);
    check_cuda(op, cuda::norm_bwd(p, plan, call.stream));
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> layer_norm_fwd(
    const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
    at::IntArrayRef normalized_shape, double eps) {
  const CudaCall call("layer_norm_fwd", x.device());
  return norm_fwd_call("layer_norm_fwd", NormKind::kLayerNorm, x, get(residual), get(weight), get(bias),
                       normalized_shape, eps, 0.0, kNeverWiden, Fwd{"layer_norm_fwd", call});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_bwd(
    const at::Tensor& dy, const OptionalTensor& dresidual, const at::Tensor& x, const OptionalTensor& weight,
    const at::Tensor& mean, const at::Tensor& rstd, at::IntArrayRef normalized_shape, std::array<bool, 3> wanted) {
  const CudaCall call("layer_norm_bwd", x.device());
  return norm_bwd_call("layer_norm_bwd", NormKind::kLayerNorm, dy, get(dresidual), x, get(weight), &mean, rstd,
                       normalized_shape, 0.0, wanted, Bwd{"layer_norm_bwd", call});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> rms_norm_fwd(const at::Tensor& x, const OptionalTensor& residual,
                                                            const OptionalTensor& weight,
                                                            at::IntArrayRef normalized_shape, double eps,
                                                            double weight_offset) {
  const CudaCall call("rms_norm_fwd", x.device());
  auto [y, new_residual, mean, rstd] =
      norm_fwd_call("rms_norm_fwd", NormKind::kRmsNorm, x, get(residual), get(weight), nullptr, normalized_shape, eps,
                    weight_offset, kNeverWiden, Fwd{"rms_norm_fwd", call});
  return {y, new_residual, rstd};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_bwd(const at::Tensor& dy, const OptionalTensor& dresidual,
                                                const at::Tensor& x, const OptionalTensor& weight,
                                                const at::Tensor& rstd, at::IntArrayRef normalized_shape,
                                                double weight_offset, std::array<bool, 2> wanted) {
  const CudaCall call("rms_norm_bwd", x.device());
  auto [dx, dweight, dbias] =
      norm_bwd_call("rms_norm_bwd", NormKind::kRmsNorm, dy, get(dresidual), x, get(weight), nullptr, rstd,
                    normalized_shape, weight_offset, {wanted[0], wanted[1], false}, Bwd{"rms_norm_bwd", call});
  return {dx, dweight};
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cuda, LLMKERNELS_CUDA_KEY, m) {
  m.impl("layer_norm_fwd", layer_norm_fwd);
  m.impl("layer_norm_bwd", layer_norm_bwd);
  m.impl("rms_norm_fwd", rms_norm_fwd);
  m.impl("rms_norm_bwd", rms_norm_bwd);
}

}  // namespace llmkernels
