// Host launchers of the CUDA kernels of activations with a bias: planned params in, CUDA's error sentence out (null for
// none).
#pragma once

#include "ops/activation/activation_plan.h"

namespace llmkernels::cuda {

const char* activation_fwd(const ActivationFwdParams& params, const GatedPlan& plan, void* stream);
const char* activation_bwd(const ActivationBwdParams& params, const GatedPlan& plan, void* stream);

}  // namespace llmkernels::cuda
