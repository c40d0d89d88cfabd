// The softmax family for CPU tensors: at::parallel_for over rows, kernels compiled for this CPU's instruction set.
#include <torch/library.h>

#include <algorithm>

#include "common/cpu/isa.h"
#include "ops/softmax/softmax_cpu.h"
#include "ops/softmax/softmax_torch.h"
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

at::Tensor softmax_fwd(const at::Tensor& x, const std::optional<at::Tensor>& mask, double scale, bool log) {
  return softmax_fwd_call("softmax_fwd", x, get(mask), scale, log, over_rows(LLMKERNELS_CPU_DISPATCH(softmax_fwd)));
}

std::tuple<at::Tensor, at::Tensor> softmax_bwd(const at::Tensor& dy, const at::Tensor& y, double scale, bool log,
                                               std::array<bool, 2> wanted) {
  return softmax_bwd_call("softmax_bwd", dy, y, scale, log, wanted, over_rows(LLMKERNELS_CPU_DISPATCH(softmax_bwd)));
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cpu, CPU, m) {
  m.impl("softmax_fwd", softmax_fwd);
  m.impl("softmax_bwd", softmax_bwd);
}

}  // namespace llmkernels
