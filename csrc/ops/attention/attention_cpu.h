// The CPU kernels of attention. The caller owns the threads and the memory: it asks for the work, gives every range of
// tasks a scratch of its own, and runs the steps one after the other. No result depends on how tasks are shared out.
#pragma once

#include "common/cpu/declare.h"
#include "ops/attention/attention.h"

namespace llmkernels::cpu {

// The forward: tasks; then, where the keys of a task are split, what combines the splits.
struct AttentionFwdWork {
  int64_t tasks, scratch_bytes;
  int64_t partial_floats;  // results of the splits; 0: not split
  int64_t merge_rows;      // tasks of attention_merge
  int64_t task_flops;
};

// The backward. Five products a pair of tiles where a task is all of a key head, seven where it is one block of keys
// and then one block of queries: more tasks. Both make every sum in the same order.
enum class AttentionBwdStep : int { kDelta = 0, kHeads = 1, kKeys = 2, kQueries = 3, kMask = 4 };
constexpr int kAttentionBwdSteps = 5;

struct AttentionBwdWork {
  int64_t tasks[kAttentionBwdSteps];  // 0: the step is left out
  int64_t scratch_bytes[kAttentionBwdSteps];
  int64_t task_flops[kAttentionBwdSteps];
  int64_t mask_floats;  // sums of the mask's gradient that kHeads makes, of its shape and zero at first; 0: none
};

LLMKERNELS_CPU_DECLARE_AMX(
    AttentionFwdWork attention_fwd_work(const AttentionFwdParams& params);
    void attention_fwd(const AttentionFwdParams& params, int64_t begin, int64_t end, char* scratch, float* partial);
    void attention_merge(const AttentionFwdParams& params, int64_t begin, int64_t end, const float* partial);
    AttentionBwdWork attention_bwd_work(const AttentionBwdParams& params, int64_t threads);
    void attention_bwd(const AttentionBwdParams& params, AttentionBwdStep step, int64_t begin, int64_t end,
                       char* scratch, float* mask_sums);)

}  // namespace llmkernels::cpu
