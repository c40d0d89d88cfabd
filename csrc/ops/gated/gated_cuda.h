// Host launchers of the CUDA gated kernels: planned params in, CUDA's error sentence out (null for none).
#pragma once

#include "ops/gated/gated_plan.h"

namespace llmkernels::cuda {

const char* gated_fwd(const GatedFwdParams& params, const GatedPlan& plan, void* stream);
const char* gated_bwd(const GatedBwdParams& params, const GatedPlan& plan, void* stream);

}  // namespace llmkernels::cuda
