// The CPU kernels of activations with a bias; the caller owns the threads.
#pragma once

#include "common/cpu/declare.h"
#include "ops/activation/activation.h"

namespace llmkernels::cpu {

// Rows that one row of `partial` is the sum of: a small part of the data, and the same for any number of threads.
constexpr int64_t kActivationSlabRows = 64;

// `activation_fwd` and `activation_bwd` take a range of elements, counted row after row, and write no sums;
// `activation_bwd_sums` takes a range of rows of `partial`.
LLMKERNELS_CPU_DECLARE(
    void activation_fwd(const ActivationFwdParams& params, int64_t begin, int64_t end);
    void activation_bwd(const ActivationBwdParams& params, int64_t begin, int64_t end);
    void activation_bwd_sums(const ActivationBwdParams& params, int64_t begin, int64_t end);)

}  // namespace llmkernels::cpu
