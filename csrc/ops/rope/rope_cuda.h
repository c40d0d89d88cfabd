// Host launcher of the CUDA rope kernel: planned params in, CUDA's error sentence out (null for none).
#pragma once

#include "ops/rope/rope_plan.h"

namespace llmkernels::cuda {

const char* rope(const RopeParams& params, const RopePlan& plan, void* stream);

}  // namespace llmkernels::cuda
