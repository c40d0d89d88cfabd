// lstm_cell for CUDA tensors: allocate, plan, launch on torch's current stream.
#include <torch/library.h>

#include "ops/lstm/lstm_cuda.h"
#include "ops/lstm/lstm_torch.h"
#include "torch/cuda.h"

namespace llmkernels {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell_fwd(const at::Tensor& gates_x, const at::Tensor& gates_h,
                                                             const at::Tensor& c, bool save) {
  const CudaCall call("lstm_cell_fwd", c.device());
  return lstm_cell_fwd_call(gates_x, gates_h, c, save, [&](const LSTMCellFwdParams& p) {
    check_cuda("lstm_cell_fwd", cuda::lstm_cell_fwd(p, cuda::plan_lstm_cell_fwd(p, call.gpu), call.stream));
  });
}

std::tuple<at::Tensor, at::Tensor> lstm_cell_bwd(const std::optional<at::Tensor>& dh,
                                                 const std::optional<at::Tensor>& dc, const at::Tensor& gates,
                                                 const at::Tensor& c, const at::Tensor& next_c) {
  const CudaCall call("lstm_cell_bwd", c.device());
  return lstm_cell_bwd_call(get(dh), get(dc), gates, c, next_c, [&](const LSTMCellBwdParams& p) {
    check_cuda("lstm_cell_bwd", cuda::lstm_cell_bwd(p, cuda::plan_lstm_cell_bwd(p, call.gpu), call.stream));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cuda, LLMKERNELS_CUDA_KEY, m) {
  m.impl("lstm_cell_fwd", lstm_cell_fwd);
  m.impl("lstm_cell_bwd", lstm_cell_bwd);
}

}  // namespace llmkernels
