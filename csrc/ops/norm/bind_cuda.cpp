// The norm family for CUDA tensors: allocate, plan, launch on torch's current stream.
#include "ops/norm/norm_cuda.h"
#include "ops/norm/norm_ops.h"
#include "torch/cuda.h"

namespace llmkernels {
namespace {

struct OnCuda {
  // Converting 16-bit parameters in the kernel is free there, so they are never widened beforehand.
  static constexpr int64_t kWidenRows = std::numeric_limits<int64_t>::max();

  const char* op;
  CudaCall call;

  OnCuda(const char* op, const at::Tensor& x) : op(op), call(op, x.device()) {}
  void fwd(const NormFwdParams& p) const {
    check_cuda(op, cuda::norm_fwd(p, cuda::plan_norm_fwd(p, call.gpu), call.stream));
  }
  template <class MakePartial>
  void bwd(NormBwdParams& p, MakePartial&& make_partial) const {
    const cuda::NormBwdPlan plan = cuda::plan_norm_bwd(p, call.gpu);
    make_partial(plan.partial_blocks);
    check_cuda(op, cuda::norm_bwd(p, plan, call.stream));
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cuda, LLMKERNELS_CUDA_KEY, m) { NormOps<OnCuda>::define(m); }

}  // namespace llmkernels
