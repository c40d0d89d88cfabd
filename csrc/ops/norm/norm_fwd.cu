#include "ops/norm/norm_fwd.cuh"

namespace llmkernels::cuda {

const char* norm_fwd(const NormFwdParams& params, const RowPlan& plan, void* stream) {
  if (params.seed != nullptr) return norm_fwd_dropout(params, plan, stream);
  return launch(choose<false>(params, plan), params, plan.launch, stream);
}

}  // namespace llmkernels::cuda
