// Activations with a bias for CPU tensors: at::parallel_for, kernels compiled for this CPU's instruction set.
#include <torch/library.h>

#include <algorithm>

#include "common/cpu/isa.h"
#include "ops/activation/activation_cpu.h"
#include "ops/activation/activation_torch.h"
#include "torch/cpu.h"

namespace llmkernels {
namespace {

at::Tensor activation_fwd(const at::Tensor& input, const std::optional<at::Tensor>& bias, std::string_view activation) {
  const auto kernel = LLMKERNELS_CPU_DISPATCH(activation_fwd);
  return activation_fwd_call("activation_fwd", input, get(bias), activation, [&](const ActivationFwdParams& p) {
    at::parallel_for(0, p.rows * p.cols, kGrainElements, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  });
}

std::tuple<at::Tensor, at::Tensor> activation_bwd(const at::Tensor& dy, const at::Tensor& input,
                                                  const std::optional<at::Tensor>& bias, std::string_view activation,
                                                  std::array<bool, 2> wanted) {
  const auto elements = LLMKERNELS_CPU_DISPATCH(activation_bwd), slabs = LLMKERNELS_CPU_DISPATCH(activation_bwd_sums);
  const auto slab_count = [](const ActivationBwdParams& p) {
    return (p.rows + cpu::kActivationSlabRows - 1) / cpu::kActivationSlabRows;
  };
  return activation_bwd_call(
      "activation_bwd", dy, input, get(bias), activation, wanted, slab_count, [&](const ActivationBwdParams& p) {
        if (p.partial == nullptr) {
          at::parallel_for(0, p.rows * p.cols, kGrainElements, [&](int64_t b, int64_t e) { elements(p, b, e); });
        } else {
          const int64_t grain = std::max<int64_t>(1, kGrainElements / (cpu::kActivationSlabRows * p.cols));
          at::parallel_for(0, p.partial_rows, grain, [&](int64_t b, int64_t e) { slabs(p, b, e); });
        }
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cpu, CPU, m) {
  m.impl("activation_fwd", activation_fwd);
  m.impl("activation_bwd", activation_bwd);
}

}  // namespace llmkernels
