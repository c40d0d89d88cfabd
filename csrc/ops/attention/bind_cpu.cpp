// Attention for CPU tensors: at::parallel_for over the tasks of each step, kernels compiled for this CPU's instruction
// set, and the checks of values that a GPU leaves to its kernels.
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "common/cpu/isa.h"
#include "ops/attention/attention_cpu.h"
#include "ops/attention/attention_torch.h"
#include "torch/cpu.h"

namespace llmkernels {
namespace {

constexpr int64_t kGrainFlops = 1 << 20;  // less work than this is not worth a second thread

// f(begin, end, scratch) over `tasks`; every range has memory of its own.
template <class F>
void over(int64_t tasks, int64_t task_flops, int64_t scratch_bytes, F&& f) {
  const int64_t grain = std::max<int64_t>(1, kGrainFlops / std::max<int64_t>(1, task_flops));
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    const at::DataPtr scratch = c10::GetCPUAllocator()->allocate(scratch_bytes);
    f(begin, end, static_cast<char*>(scratch.get()));
  });
}

// The ends of packed sequences in order and within the tensor; the longest of them.
int64_t check_ends(const char* op, const char* name, const int32_t* ends, int64_t sequences, int64_t rows) {
  int64_t longest = 0;
  for (int64_t b = 0; b <= sequences; ++b) {
    TORCH_CHECK_VALUE(ends[b] >= (b == 0 ? 0 : ends[b - 1]) && ends[b] <= rows, op, ": ", name, "[", b, "] is ",
                      ends[b], ", expected a number that does not fall, from 0 to ", rows);
    if (b > 0) longest = std::max<int64_t>(longest, ends[b] - ends[b - 1]);
  }
  return longest;
}

void check_cache(const char* op, const AttentionInputs& in) {
  for (int64_t b = 0; b < in.B && in.seqlens_k != nullptr; ++b) {
    const int64_t length = in.seqlens_k[b];
    TORCH_CHECK_VALUE(length >= 0 && length <= in.T, op, ": seqlens_k[", b, "] is ", length, ", expected 0 to ", in.T);
    for (int64_t i = 0; in.block_table != nullptr && i * in.page_size < length; ++i) {
      const int32_t page = in.block_table[b * in.block_table_stride + i];
      TORCH_CHECK_VALUE(page >= 0 && page < in.pages, op, ": block_table[", b, ", ", i, "] is ", page,
                        ", expected 0 to ", in.pages - 1);
    }
  }
}

// Sequences are as long as they are, not as long as the caller says they might be.
void check_values(const char* op, AttentionInputs& in) {
  if (in.cu_seqlens_q != nullptr) {
    in.S = check_ends(op, "cu_seqlens_q", in.cu_seqlens_q, in.B, in.q_rows);
    in.T = check_ends(op, "cu_seqlens_k", in.cu_seqlens_k, in.B, in.k_rows);
  }
  check_cache(op, in);
}

void run_fwd(const char* op, AttentionFwdParams p) {
  check_values(op, p.in);
  const auto kernel = LLMKERNELS_CPU_DISPATCH(attention_fwd);
  const cpu::AttentionFwdWork work = LLMKERNELS_CPU_DISPATCH(attention_fwd_work)(p);
  const at::DataPtr partial = c10::GetCPUAllocator()->allocate(work.partial_floats * sizeof(float));
  float* const parts = static_cast<float*>(partial.get());
  over(work.tasks, work.task_flops, work.scratch_bytes,
       [&](int64_t begin, int64_t end, char* scratch) { kernel(p, begin, end, scratch, parts); });
  const auto merge = LLMKERNELS_CPU_DISPATCH(attention_merge);
  over(work.merge_rows, kGrainElements, 0, [&](int64_t begin, int64_t end, char*) { merge(p, begin, end, parts); });
}

void run_bwd(const char* op, AttentionBwdParams p) {
  check_values(op, p.in);
  const auto kernel = LLMKERNELS_CPU_DISPATCH(attention_bwd);
  const cpu::AttentionBwdWork work = LLMKERNELS_CPU_DISPATCH(attention_bwd_work)(p, at::get_num_threads());
  const int64_t mask_bytes = p.in.mask_kind == MaskKind::kFloat32 ? 4 : element_bytes(p.in.dtype);
  const bool own_sums = work.mask_floats > 0 && mask_bytes != sizeof(float);
  const at::DataPtr sums = c10::GetCPUAllocator()->allocate(own_sums ? work.mask_floats * sizeof(float) : 0);
  float* mask_sums = nullptr;
  if (work.mask_floats > 0) {
    mask_sums = static_cast<float*>(own_sums ? sums.get() : p.dmask);
    std::memset(mask_sums, 0, work.mask_floats * sizeof(float));
  } else if (p.dmask != nullptr && (p.in.window_left >= 0 || p.in.window_right >= 0)) {
    // Tiles that nobody sees are skipped.
    std::memset(p.dmask, 0, mask_bytes * p.dmask_sizes[0] * p.dmask_sizes[1] * p.dmask_sizes[2] * p.dmask_sizes[3]);
  }
  for (int step = 0; step < cpu::kAttentionBwdSteps; ++step) {
    over(work.tasks[step], work.task_flops[step], work.scratch_bytes[step],
         [&](int64_t begin, int64_t end, char* scratch) {
           kernel(p, static_cast<cpu::AttentionBwdStep>(step), begin, end, scratch, mask_sums);
         });
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_fwd(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& alibi_slopes, const std::optional<at::Tensor>& sinks,
    const std::optional<at::Tensor>& seed, const std::optional<at::Tensor>& cu_seqlens_q,
    const std::optional<at::Tensor>& cu_seqlens_k, int64_t max_seqlen_q, double scale, int64_t window_left,
    int64_t window_right, bool top_left, double softcap, double dropout_p) {
  AttentionTensors tensors{q, k, v, get(mask), get(alibi_slopes), get(sinks), get(seed), get(cu_seqlens_q),
                           get(cu_seqlens_k)};
  tensors.max_seqlen_q = max_seqlen_q;
  return attention_fwd_call("attention_fwd", tensors,
                            {scale, window_left, window_right, top_left, softcap, dropout_p},
                            [](const AttentionFwdParams& p) { run_fwd("attention_fwd", p); });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_bwd(
    const at::Tensor& dout, const std::optional<at::Tensor>& dlse, const at::Tensor& q, const at::Tensor& k,
    const at::Tensor& v, const std::optional<at::Tensor>& mask, const std::optional<at::Tensor>& alibi_slopes,
    const std::optional<at::Tensor>& sinks, const std::optional<at::Tensor>& seed,
    const std::optional<at::Tensor>& cu_seqlens_q, const std::optional<at::Tensor>& cu_seqlens_k, int64_t max_seqlen_q,
    int64_t max_seqlen_k, const at::Tensor& out, const at::Tensor& row_max, const at::Tensor& log_sum, double scale,
    int64_t window_left, int64_t window_right, bool top_left, double softcap, double dropout_p,
    std::array<bool, 5> wanted) {
  AttentionTensors tensors{q, k, v, get(mask), get(alibi_slopes), get(sinks), get(seed), get(cu_seqlens_q),
                           get(cu_seqlens_k)};
  tensors.max_seqlen_q = max_seqlen_q, tensors.max_seqlen_k = max_seqlen_k;
  return attention_bwd_call("attention_bwd", tensors, dout, get(dlse), out, row_max, log_sum,
                            {scale, window_left, window_right, top_left, softcap, dropout_p}, wanted,
                            [](const AttentionBwdParams& p) { run_bwd("attention_bwd", p); });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_kvcache_fwd(
    const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
    const std::optional<at::Tensor>& alibi_slopes, const std::optional<at::Tensor>& sinks,
    const std::optional<at::Tensor>& seqlens_k, const std::optional<at::Tensor>& block_table, double scale,
    int64_t window_left, int64_t window_right, bool top_left, double softcap) {
  AttentionTensors tensors{q, k_cache, v_cache, nullptr, get(alibi_slopes), get(sinks)};
  tensors.seqlens_k = get(seqlens_k), tensors.block_table = get(block_table);
  return attention_fwd_call("attention_kvcache_fwd", tensors,
                            {scale, window_left, window_right, top_left, softcap, 0.0},
                            [](const AttentionFwdParams& p) { run_fwd("attention_kvcache_fwd", p); });
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cpu, CPU, m) {
  m.impl("attention_fwd", attention_fwd);
  m.impl("attention_bwd", attention_bwd);
  m.impl("attention_kvcache_fwd", attention_kvcache_fwd);
}

}  // namespace llmkernels
