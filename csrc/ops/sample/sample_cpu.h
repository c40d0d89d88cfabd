// The CPU kernel of sample over a range of rows; the caller owns the threads.
#pragma once

#include "common/cpu/declare.h"
#include "ops/sample/sample.h"

namespace llmkernels::cpu {

// `scratch` holds 2 * cols floats.
LLMKERNELS_CPU_DECLARE(void sample(const SampleParams& params, float* scratch, int64_t begin, int64_t end);)

}  // namespace llmkernels::cpu
