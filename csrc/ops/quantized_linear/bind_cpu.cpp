// quantized_linear for CPU tensors: at::parallel_for over the tasks, kernels compiled for this CPU's instruction set.
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>

#include "common/cpu/isa.h"
#include "ops/quantized_linear/quantized_linear_cpu.h"
#include "ops/quantized_linear/quantized_linear_torch.h"
#include "torch/cpu.h"

namespace llmkernels {
namespace {

constexpr int64_t kGrainFlops = 1 << 20;  // less work than this is not worth a second thread

// The groups that kernels know: a multiple of what a block of columns has on every instruction set.
void check_groups(const char* op, const QuantizedWeight& weight) {
  const int64_t size = weight.group_size;
  TORCH_CHECK_VALUE(size == 0 || size == 32 || size == 64 || size == 128, op, ": group_size is ", size,
                    ", expected 0 (the whole row), 32, 64 or 128");
}

template <class Params, class Prepare, class Kernel>
void run(const Params& p, int64_t columns, const cpu::QuantizedLinearWork& work, Prepare prepare, Kernel kernel) {
  const auto allocate = [](int64_t bytes) { return c10::GetCPUAllocator()->allocate(bytes); };
  const at::DataPtr memory = allocate(work.rows_bytes);
  char* const rows = static_cast<char*>(memory.get());
  const int64_t grain_rows = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, columns));
  at::parallel_for(0, p.M, grain_rows, [&](int64_t begin, int64_t end) { prepare(p, rows, begin, end); });
  const int64_t grain = std::max<int64_t>(1, kGrainFlops / std::max<int64_t>(1, work.task_flops));
  at::parallel_for(0, work.tasks, grain, [&](int64_t begin, int64_t end) {
    const at::DataPtr scratch = allocate(work.scratch_bytes);
    kernel(p, rows, begin, end, static_cast<char*>(scratch.get()));
  });
}

at::Tensor quantized_linear_fwd(const at::Tensor& x, const at::Tensor& data, const at::Tensor& scales,
                                const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& second_scales,
                                const std::optional<at::Tensor>& bias, std::string_view format, int64_t group_size,
                                std::string_view activations) {
  constexpr const char* kOp = "quantized_linear_fwd";
  return quantized_linear_fwd_call(
      kOp, x, data, scales, get(zeros), get(second_scales), get(bias), format, group_size, activations,
      [&](const QuantizedLinearFwdParams& p) {
        check_groups(kOp, p.weight);
        run(p, p.weight.K, LLMKERNELS_CPU_DISPATCH(quantized_linear_fwd_work)(p),
            LLMKERNELS_CPU_DISPATCH(quantized_linear_fwd_prepare), LLMKERNELS_CPU_DISPATCH(quantized_linear_fwd));
      });
}

at::Tensor quantized_linear_bwd(const at::Tensor& dy, const at::Tensor& data, const at::Tensor& scales,
                                const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& second_scales,
                                int64_t columns, std::string_view format, int64_t group_size) {
  constexpr const char* kOp = "quantized_linear_bwd";
  return quantized_linear_bwd_call(
      kOp, dy, data, scales, get(zeros), get(second_scales), columns, format, group_size,
      [&](const QuantizedLinearBwdParams& p) {
        check_groups(kOp, p.weight);
        run(p, p.weight.N, LLMKERNELS_CPU_DISPATCH(quantized_linear_bwd_work)(p),
            LLMKERNELS_CPU_DISPATCH(quantized_linear_bwd_prepare), LLMKERNELS_CPU_DISPATCH(quantized_linear_bwd));
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cpu, CPU, m) {
  m.impl("quantized_linear_fwd", quantized_linear_fwd);
  m.impl("quantized_linear_bwd", quantized_linear_bwd);
}

}  // namespace llmkernels
