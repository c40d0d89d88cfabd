// Host launchers of the CUDA norm kernels: planned params in, CUDA's error sentence out (null for none).
#pragma once

#include "ops/norm/norm_plan.h"

namespace llmkernels::cuda {

const char* norm_fwd(const NormFwdParams& params, const RowPlan& plan, void* stream);
const char* norm_bwd(const NormBwdParams& params, const NormBwdPlan& plan, void* stream);

}  // namespace llmkernels::cuda
