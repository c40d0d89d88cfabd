// Host launchers of the CUDA attention kernels: planned params in, CUDA's error sentence out (null for none).
#pragma once

#include "ops/attention/attention_plan.h"

namespace llmkernels::cuda {

const char* attention_fwd(const AttentionFwdParams& params, const AttentionPlan& plan, void* stream);

// In this order: delta first, which the others read.
const char* attention_bwd_delta(const AttentionBwdParams& params, const AttentionPlan& plan, void* stream);
const char* attention_bwd_dq(const AttentionBwdParams& params, const AttentionPlan& plan, void* stream);
const char* attention_bwd_dkv(const AttentionBwdParams& params, const AttentionPlan& plan, void* stream);
const char* attention_bwd_dmask(const AttentionBwdParams& params, const AttentionPlan& plan, void* stream);

// What the splits of a cache leave for the merge; null where there is one split.
struct AttentionCacheParts {
  float* out;      // [splits, B, H, S, Dv]  sums that are not divided yet
  float* row_max;  // [splits, B, H, S]
  float* sum;      // [splits, B, H, S]
};
const char* attention_kvcache_fwd(const AttentionFwdParams& params, const AttentionPlan& plan,
                                  const AttentionCachePlan& cache, const AttentionCacheParts& parts, void* stream);

}  // namespace llmkernels::cuda
