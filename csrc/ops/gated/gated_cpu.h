// The CPU kernels of the gated family, over a range of elements, counted row after row; the caller owns the threads.
#pragma once

#include "common/cpu/declare.h"
#include "ops/gated/gated.h"

namespace llmkernels::cpu {

LLMKERNELS_CPU_DECLARE(
    void gated_fwd(const GatedFwdParams& params, int64_t begin, int64_t end);
    void gated_bwd(const GatedBwdParams& params, int64_t begin, int64_t end);)

}  // namespace llmkernels::cpu
