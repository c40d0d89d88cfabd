// The forward with dropout of x, in a source of its own: the kernels compile side by side.
#include "ops/norm/norm_fwd.cuh"

namespace llmkernels::cuda {

const char* norm_fwd_dropout(const NormFwdParams& params, const RowPlan& plan, void* stream) {
  return launch(choose<true>(params, plan), params, plan.launch, stream);
}

}  // namespace llmkernels::cuda
