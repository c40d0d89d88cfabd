// Host launchers of the CUDA cross entropy kernels: planned params in, CUDA's error sentence out (null for none).
#pragma once

#include "ops/cross_entropy/cross_entropy_plan.h"

namespace llmkernels::cuda {

const char* cross_entropy_fwd(const CrossEntropyFwdParams& params, const CrossEntropyPlan& plan, void* stream);
const char* cross_entropy_bwd(const CrossEntropyBwdParams& params, const CrossEntropyPlan& plan, void* stream);

}  // namespace llmkernels::cuda
