// Host launchers of the CUDA norm kernels: planned params in, CUDA's error sentence out (null for none).
// Those with `dropout` in their name are parts of the others.
#pragma once

#include "ops/norm/norm_plan.h"

namespace llmkernels::cuda {

const char* norm_fwd(const NormFwdParams& params, const RowPlan& plan, void* stream);
const char* norm_fwd_dropout(const NormFwdParams& params, const RowPlan& plan, void* stream);
const char* norm_bwd(const NormBwdParams& params, const NormBwdPlan& plan, void* stream);
const char* norm_bwd_rows_dropout(const NormBwdParams& params, const RowPlan& plan, void* stream);

}  // namespace llmkernels::cuda
