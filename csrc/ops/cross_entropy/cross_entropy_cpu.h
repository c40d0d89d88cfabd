// The CPU kernels of cross entropy, over a range of rows; the caller owns the threads.
#pragma once

#include "common/cpu/declare.h"
#include "ops/cross_entropy/cross_entropy.h"

namespace llmkernels::cpu {

LLMKERNELS_CPU_DECLARE(
    void cross_entropy_fwd(const CrossEntropyFwdParams& params, int64_t begin, int64_t end);
    void cross_entropy_bwd(const CrossEntropyBwdParams& params, int64_t begin, int64_t end);)

}  // namespace llmkernels::cpu
