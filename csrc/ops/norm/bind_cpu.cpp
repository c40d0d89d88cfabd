// The norm family for CPU tensors: at::parallel_for over rows, the kernels compiled for this CPU's instruction set.
#include "common/cpu/isa.h"
#include "ops/norm/norm_cpu.h"
#include "ops/norm/norm_ops.h"
#include "torch/cpu.h"

namespace llmkernels {
namespace {

int64_t grain_rows(int64_t cols) { return cols > 0 ? std::max<int64_t>(1, kGrainElements / cols) : kGrainElements; }

void run_fwd(const NormFwdParams& p) {
  const auto kernel = LLMKERNELS_CPU_DISPATCH(norm_fwd);
  at::parallel_for(0, p.rows, grain_rows(p.cols), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

template <class MakePartial>
void run_bwd(NormBwdParams& p, MakePartial&& make_partial) {
  const auto kernel = LLMKERNELS_CPU_DISPATCH(norm_bwd);
  const int64_t blocks = cpu::norm_bwd_blocks(p.rows, p.cols);
  make_partial(blocks);
  const int64_t rows_per_block = (p.rows + blocks - 1) / blocks;
  const int64_t grain = std::max<int64_t>(1, grain_rows(p.cols) / std::max<int64_t>(1, rows_per_block));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      kernel(p, block, p.rows * block / blocks, p.rows * (block + 1) / blocks);
    }
  });
  if (p.dweight == nullptr && p.dbias == nullptr) return;
  const auto reduce = LLMKERNELS_CPU_DISPATCH(norm_bwd_reduce);
  // Whole vectors to each thread: a column is summed in the same order whoever does it.
  constexpr int64_t kColumns = 64;
  const int64_t pieces = (p.cols + kColumns - 1) / kColumns;
  at::parallel_for(0, pieces, std::max<int64_t>(1, kGrainElements / (kColumns * blocks)), [&](int64_t begin, int64_t end) {
    reduce(p, begin * kColumns, std::min(end * kColumns, p.cols));
  });
}

struct OnCpu {
  static constexpr int64_t kWidenRows = 64;  // converting the parameters once costs about as much as 64 rows do

  OnCpu(const char*, const at::Tensor&) {}
  void fwd(const NormFwdParams& p) const { run_fwd(p); }
  template <class MakePartial>
  void bwd(NormBwdParams& p, MakePartial&& make_partial) const {
    run_bwd(p, make_partial);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cpu, CPU, m) { NormOps<OnCpu>::define(m); }

}  // namespace llmkernels
