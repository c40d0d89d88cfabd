// Host launchers of the CUDA softmax kernels: planned params in, CUDA's error sentence out (null for none).
#pragma once

#include "ops/softmax/softmax_plan.h"

namespace llmkernels::cuda {

const char* softmax_fwd(const SoftmaxFwdParams& params, const SoftmaxPlan& plan, void* stream);
const char* softmax_bwd(const SoftmaxBwdParams& params, const SoftmaxPlan& plan, void* stream);

}  // namespace llmkernels::cuda
