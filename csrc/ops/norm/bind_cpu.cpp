// The norm family for CPU tensors: at::parallel_for over rows, the kernels compiled for this CPU's instruction set.
#include <torch/library.h>

#include "common/cpu/isa.h"
#include "ops/norm/norm_cpu.h"
#include "ops/norm/norm_torch.h"
#include "torch/cpu.h"

namespace llmkernels {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int64_t kWidenRows = 64;  // converting the parameters once costs about as much as 64 rows do

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

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> layer_norm_fwd(
    const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
    at::IntArrayRef normalized_shape, double eps) {
  return norm_fwd_call("layer_norm_fwd", NormKind::kLayerNorm, x, get(residual), get(weight), get(bias),
                       normalized_shape, eps, 0.0, kWidenRows, run_fwd);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_bwd(
    const at::Tensor& dy, const OptionalTensor& dresidual, const at::Tensor& x, const OptionalTensor& weight,
    const at::Tensor& mean, const at::Tensor& rstd, at::IntArrayRef normalized_shape, std::array<bool, 3> wanted) {
  return norm_bwd_call("layer_norm_bwd", NormKind::kLayerNorm, dy, get(dresidual), x, get(weight), &mean, rstd,
                       normalized_shape, 0.0, wanted,
                       [](NormBwdParams& p, auto&& make_partial) { run_bwd(p, make_partial); });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> rms_norm_fwd(const at::Tensor& x, const OptionalTensor& residual,
                                                            const OptionalTensor& weight,
                                                            at::IntArrayRef normalized_shape, double eps,
                                                            double weight_offset) {
  auto [y, new_residual, mean, rstd] = norm_fwd_call("rms_norm_fwd", NormKind::kRmsNorm, x, get(residual), get(weight),
                                                     nullptr, normalized_shape, eps, weight_offset, kWidenRows,
                                                     run_fwd);
  return {y, new_residual, rstd};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_bwd(const at::Tensor& dy, const OptionalTensor& dresidual,
                                                const at::Tensor& x, const OptionalTensor& weight,
                                                const at::Tensor& rstd, at::IntArrayRef normalized_shape,
                                                double weight_offset, std::array<bool, 2> wanted) {
  auto [dx, dweight, dbias] =
      norm_bwd_call("rms_norm_bwd", NormKind::kRmsNorm, dy, get(dresidual), x, get(weight), nullptr, rstd,
                    normalized_shape, weight_offset, {wanted[0], wanted[1], false},
                    [](NormBwdParams& p, auto&& make_partial) { run_bwd(p, make_partial); });
  return {dx, dweight};
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cpu, CPU, m) {
  m.impl("layer_norm_fwd", layer_norm_fwd);
  m.impl("layer_norm_bwd", layer_norm_bwd);
  m.impl("rms_norm_fwd", rms_norm_fwd);
  m.impl("rms_norm_bwd", rms_norm_bwd);
}

}  // namespace llmkernels
