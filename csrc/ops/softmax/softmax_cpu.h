// The CPU kernels of the softmax family over a range of rows; the caller owns the threads.
#pragma once

#include "common/cpu/declare.h"
#include "ops/softmax/softmax.h"

namespace llmkernels::cpu {

LLMKERNELS_CPU_DECLARE(
    void softmax_fwd(const SoftmaxFwdParams& params, int64_t begin, int64_t end);
    void softmax_bwd(const SoftmaxBwdParams& params, int64_t begin, int64_t end);)

}  // namespace llmkernels::cpu
