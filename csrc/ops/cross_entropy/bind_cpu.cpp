// Cross entropy for CPU tensors: at::parallel_for over rows, kernels compiled for this CPU's instruction set.
#include <torch/library.h>

#include <algorithm>

#include "common/cpu/isa.h"
#include "ops/cross_entropy/cross_entropy_cpu.h"
#include "ops/cross_entropy/cross_entropy_torch.h"
#include "torch/cpu.h"

namespace llmkernels {
namespace {

template <class Params>
auto over_rows(void (*kernel)(const Params&, int64_t, int64_t)) {
  return [kernel](const Params& p) {
    const int64_t grain = std::max<int64_t>(1, kGrainElements / p.cols);
    at::parallel_for(0, p.rows, grain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  };
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_fwd(
    const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& dloss, int64_t ignore_index, double label_smoothing, double z_loss,
    double softcap) {
  return cross_entropy_fwd_call("cross_entropy_fwd", input, target, get(weight), get(dloss),
                                {ignore_index, label_smoothing, z_loss, softcap},
                                over_rows(LLMKERNELS_CPU_DISPATCH(cross_entropy_fwd)));
}

at::Tensor cross_entropy_bwd(const at::Tensor& dloss, const at::Tensor& input, const at::Tensor& target,
                             const std::optional<at::Tensor>& weight, const at::Tensor& stats, int64_t ignore_index,
                             double label_smoothing, double z_loss, double softcap) {
  return cross_entropy_bwd_call("cross_entropy_bwd", dloss, input, target, get(weight), stats,
                                {ignore_index, label_smoothing, z_loss, softcap},
                                over_rows(LLMKERNELS_CPU_DISPATCH(cross_entropy_bwd)));
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cpu, CPU, m) {
  m.impl("cross_entropy_fwd", cross_entropy_fwd);
  m.impl("cross_entropy_bwd", cross_entropy_bwd);
}

}  // namespace llmkernels
