// The gated family for CPU tensors: at::parallel_for over elements, kernels compiled for this CPU's instruction set.
#include <torch/library.h>

#include "common/cpu/isa.h"
#include "ops/gated/gated_cpu.h"
#include "ops/gated/gated_torch.h"
#include "torch/cpu.h"

namespace llmkernels {
namespace {

template <class Params>
auto over_elements(void (*kernel)(const Params&, int64_t, int64_t)) {
  return [kernel](const Params& p) {
    at::parallel_for(0, p.rows * p.cols, kGrainElements, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  };
}

at::Tensor gated_fwd(const at::Tensor& gate, const std::optional<at::Tensor>& up, std::string_view activation) {
  return gated_fwd_call("gated_fwd", gate, get(up), activation, over_elements(LLMKERNELS_CPU_DISPATCH(gated_fwd)));
}

std::tuple<at::Tensor, at::Tensor> gated_bwd(const at::Tensor& dy, const at::Tensor& gate,
                                             const std::optional<at::Tensor>& up, std::string_view activation,
                                             std::array<bool, 2> wanted) {
  return gated_bwd_call("gated_bwd", dy, gate, get(up), activation, wanted,
                        over_elements(LLMKERNELS_CPU_DISPATCH(gated_bwd)));
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cpu, CPU, m) {
  m.impl("gated_fwd", gated_fwd);
  m.impl("gated_bwd", gated_bwd);
}

}  // namespace llmkernels
