// rope for CPU tensors: at::parallel_for over blocks of places, kernels compiled for this CPU's instruction set.
#include <torch/library.h>

#include <algorithm>

#include "common/cpu/isa.h"
#include "ops/rope/rope_cpu.h"
#include "ops/rope/rope_torch.h"
#include "torch/cpu.h"

namespace llmkernels {
namespace {

template <class Index>
void check_positions(const RopeParams& p) {
  const int64_t batch = p.position_batch_stride == 0 ? std::min<int64_t>(p.batch, 1) : p.batch;
  for (int64_t b = 0; b < batch; ++b) {
    const Index* row = static_cast<const Index*>(p.positions) + b * p.position_batch_stride;
    for (int64_t s = 0; s < p.seq; ++s) {
      const int64_t position = row[s * p.position_seq_stride];
      TORCH_CHECK_VALUE(position >= 0, kRope, ": positions has ", position, ", expected 0 or more");
      TORCH_CHECK_VALUE(position < p.length, kRope, ": positions has ", position, ", but cos and sin have ", p.length,
                        " rows");
    }
  }
}

void run_on_cpu(const RopeParams& p) {
  if (p.positions != nullptr) p.narrow_positions ? check_positions<int32_t>(p) : check_positions<int64_t>(p);
  const auto kernel = LLMKERNELS_CPU_DISPATCH(rope);
  const cpu::RopeMemory memory = cpu::rope_memory(p);
  const int64_t elements = cpu::rope_block_rows(p) * p.cols * (p.tensors[0].heads + p.tensors[1].heads);
  at::parallel_for(0, p.batch * cpu::rope_blocks_of_sequence(p), std::max<int64_t>(1, kGrainElements / elements),
                   [&](int64_t begin, int64_t end) { kernel(p, memory, begin, end); });
}

std::tuple<at::Tensor, at::Tensor> rope_fwd(const at::Tensor& q, const std::optional<at::Tensor>& k,
                                            const at::Tensor& cos, const at::Tensor& sin,
                                            const std::optional<at::Tensor>& positions, int64_t seq_dim,
                                            bool interleaved) {
  return rope_call(q, get(k), cos, sin, get(positions), seq_dim, interleaved, false, false, run_on_cpu);
}

std::tuple<at::Tensor, at::Tensor> rope_bwd(const at::Tensor& dq, const std::optional<at::Tensor>& dk,
                                            const at::Tensor& cos, const at::Tensor& sin,
                                            const std::optional<at::Tensor>& positions, int64_t seq_dim,
                                            bool interleaved) {
  return rope_call(dq, get(dk), cos, sin, get(positions), seq_dim, interleaved, true, false, run_on_cpu);
}

void rope_fwd_(const at::Tensor& q, const std::optional<at::Tensor>& k, const at::Tensor& cos, const at::Tensor& sin,
               const std::optional<at::Tensor>& positions, int64_t seq_dim, bool interleaved) {
  rope_call(q, get(k), cos, sin, get(positions), seq_dim, interleaved, false, true, run_on_cpu);
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cpu, CPU, m) {
  m.impl("rope_fwd", rope_fwd);
  m.impl("rope_bwd", rope_bwd);
  m.impl("rope_fwd_", TORCH_FN(rope_fwd_));
}

}  // namespace llmkernels
