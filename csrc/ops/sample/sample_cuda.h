// Host launcher of the CUDA sample kernel: planned params in, CUDA's error sentence out (null for none).
#pragma once

#include "ops/sample/sample_plan.h"

namespace llmkernels::cuda {

const char* sample(const SampleParams& params, const Launch& plan, void* stream);

}  // namespace llmkernels::cuda
