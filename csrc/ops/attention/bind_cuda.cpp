// Attention for CUDA tensors: allocate, plan, launch on torch's current stream.
#include <torch/library.h>

#include "ops/attention/attention_cuda.h"
#include "ops/attention/attention_torch.h"
#include "torch/cuda.h"

namespace llmkernels {
namespace {

using Optional = const std::optional<at::Tensor>&;

// What a grid and positions of 32 bits can hold.
void check_sizes(const char* op, const AttentionInputs& in, int64_t blocks) {
  TORCH_CHECK_VALUE(in.q_rows < cuda::kAttentionMostRows && in.k_rows < cuda::kAttentionMostRows, op, ": q has ",
                    in.q_rows, " rows and k ", in.k_rows, ", expected fewer than ", cuda::kAttentionMostRows);
  TORCH_CHECK_VALUE(in.D <= cuda::kAttentionMostDim && in.Dv <= cuda::kAttentionMostDim, op, ": head dimensions are ",
                    in.D, " and ", in.Dv, ", expected at most ", cuda::kAttentionMostDim);
  TORCH_CHECK_VALUE(blocks <= 0x7fffffff, op, ": a grid of ", blocks, " blocks is asked for, expected fewer than 2^31");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_fwd(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, Optional mask, Optional alibi_slopes, Optional sinks,
    Optional seed, Optional cu_seqlens_q, Optional cu_seqlens_k, int64_t max_seqlen_q, double scale,
    int64_t window_left, int64_t window_right, bool top_left, double softcap, double dropout_p) {
  constexpr const char* op = "attention_fwd";
  const CudaCall call(op, q.device());
  AttentionTensors tensors{q, k, v, get(mask), get(alibi_slopes), get(sinks), get(seed)};
  tensors.cu_seqlens_q = get(cu_seqlens_q), tensors.cu_seqlens_k = get(cu_seqlens_k);
  tensors.max_seqlen_q = max_seqlen_q, tensors.max_seqlen_k = k.size(2);
  const AttentionOptions options{scale, window_left, window_right, top_left, softcap, dropout_p};
  return attention_fwd_call(op, tensors, options, [&](const AttentionFwdParams& p) {
    const cuda::AttentionPlan plan = cuda::plan_attention_fwd(p);
    const int64_t blocks = cuda::attention_fwd_blocks(p.in, plan);
    check_sizes(op, p.in, blocks);
    if (blocks > 0) check_cuda(op, cuda::attention_fwd(p, plan, call.stream));
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_bwd(
    const at::Tensor& dout, Optional dlse, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, Optional mask,
    Optional alibi_slopes, Optional sinks, Optional seed, Optional cu_seqlens_q, Optional cu_seqlens_k,
    int64_t max_seqlen_q, int64_t max_seqlen_k, const at::Tensor& out, const at::Tensor& row_max,
    const at::Tensor& log_sum, double scale, int64_t window_left, int64_t window_right, bool top_left, double softcap,
    double dropout_p, std::array<bool, 5> wanted) {
  constexpr const char* op = "attention_bwd";
  const CudaCall call(op, q.device());
  AttentionTensors tensors{q, k, v, get(mask), get(alibi_slopes), get(sinks), get(seed)};
  tensors.cu_seqlens_q = get(cu_seqlens_q), tensors.cu_seqlens_k = get(cu_seqlens_k);
  tensors.max_seqlen_q = max_seqlen_q, tensors.max_seqlen_k = max_seqlen_k;
  const AttentionOptions options{scale, window_left, window_right, top_left, softcap, dropout_p};
  return attention_bwd_call(
      op, tensors, dout, get(dlse), out, row_max, log_sum, options, wanted, [&](const AttentionBwdParams& p) {
        const cuda::AttentionPlan plan = cuda::plan_attention_bwd(p);
        const int64_t dq = cuda::attention_dq_blocks(p.in, plan), dkv = cuda::attention_dkv_blocks(p.in, plan);
        const int64_t dmask = p.dmask != nullptr ? cuda::attention_dmask_blocks(p, plan) : 0;
        check_sizes(op, p.in, std::max({dq, dkv, dmask, p.in.B * p.in.H * p.in.q_rows}));
        if (!p.has_delta) check_cuda(op, cuda::attention_bwd_delta(p, plan, call.stream));
        if (p.dq != nullptr && dq > 0) check_cuda(op, cuda::attention_bwd_dq(p, plan, call.stream));
        if ((p.dk != nullptr || p.dv != nullptr) && dkv > 0) {
          check_cuda(op, cuda::attention_bwd_dkv(p, plan, call.stream));
        }
        if (dmask > 0) check_cuda(op, cuda::attention_bwd_dmask(p, plan, call.stream));
      });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_kvcache_fwd(
    const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache, Optional alibi_slopes, Optional sinks,
    Optional seqlens_k, Optional block_table, double scale, int64_t window_left, int64_t window_right, bool top_left,
    double softcap) {
  constexpr const char* op = "attention_kvcache_fwd";
  const CudaCall call(op, q.device());
  AttentionTensors tensors{q, k_cache, v_cache, nullptr, get(alibi_slopes), get(sinks)};
  tensors.seqlens_k = get(seqlens_k), tensors.block_table = get(block_table);
  const AttentionOptions options{scale, window_left, window_right, top_left, softcap, 0.0};
  return attention_fwd_call(op, tensors, options, [&](const AttentionFwdParams& p) {
    const cuda::AttentionPlan plan = cuda::plan_attention_fwd(p);
    const cuda::AttentionCachePlan cache = cuda::plan_attention_cache(p.in, plan, call.gpu);
    check_sizes(op, p.in, std::max(cuda::attention_cache_blocks(p.in, cache), cuda::attention_fwd_blocks(p.in, plan)));
    at::Tensor out, row_max, sum;  // of the splits
    cuda::AttentionCacheParts parts{};
    if (cache.decode && cache.splits > 1) {
      const int64_t rows = cache.splits * p.in.B * p.in.H * p.in.S;
      const at::TensorOptions floats = q.options().dtype(at::kFloat);
      out = empty({rows, p.in.Dv}, floats), row_max = empty({rows}, floats), sum = empty({rows}, floats);
      parts = {out.data_ptr<float>(), row_max.data_ptr<float>(), sum.data_ptr<float>()};
    }
    check_cuda(op, cuda::attention_kvcache_fwd(p, plan, cache, parts, call.stream));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cuda, LLMKERNELS_CUDA_KEY, m) {
  m.impl("attention_fwd", attention_fwd);
  m.impl("attention_bwd", attention_bwd);
  m.impl("attention_kvcache_fwd", attention_kvcache_fwd);
}

}  // namespace llmkernels
