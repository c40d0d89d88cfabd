// The lstm family for CPU tensors: a team of threads for the steps of a sequence, kernels compiled for this CPU's
// instruction set.
#include <torch/library.h>

#include "common/cpu/isa.h"
#include "ops/lstm/lstm_cpu.h"
#include "ops/lstm/lstm_run.h"
#include "ops/lstm/lstm_torch.h"
#include "torch/cpu.h"
#include "torch/product.h"

namespace llmkernels {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

template <class Params>
void run_lstm(const Params& p, const Sequence<Params>& kernels) {
  const bool projection = p.w_hr != nullptr;
  run(p, kernels, LLMKERNELS_CPU_DISPATCH(lstm_layout)(p.dtype, p.at, projection, kernels.forward), 4, projection);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> recurrence_fwd(
    const at::Tensor& gates_x, const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_hh,
    const OptionalTensor& w_hr, const OptionalTensor& batch_sizes, bool reverse, bool save) {
  return lstm_fwd_call(gates_x, h0, c0, w_hh, get(w_hr), get(batch_sizes), reverse, save, [](const LSTMFwdParams& p) {
    run_lstm(p, Sequence<LSTMFwdParams>{LLMKERNELS_CPU_DISPATCH(lstm_fwd_begin),
                                        LLMKERNELS_CPU_DISPATCH(lstm_fwd_pack), LLMKERNELS_CPU_DISPATCH(lstm_fwd_step),
                                        LLMKERNELS_CPU_DISPATCH(lstm_fwd_end), true});
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> recurrence_bwd(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const OptionalTensor& dcells,
    const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_hh, const OptionalTensor& w_hr,
    const OptionalTensor& batch_sizes, bool reverse, const at::Tensor& y, const at::Tensor& gates,
    const at::Tensor& cells, std::array<bool, 5> wanted) {
  const char* op = "lstm_recurrence_bwd";
  const auto [batch, hidden, size] = sizes_of(op, h0, c0);
  TORCH_CHECK_VALUE(gates.dim() == 2, op, ": gates has shape ", gates.sizes(), ", expected [N, 4 * H]");
  const int64_t rows = gates.size(0);
  const at::Tensor* projection = get(w_hr);
  const Steps steps(op, get(batch_sizes), rows, batch, hidden, size, reverse);
  const LSTMBwdTensors out = lstm_bwd_call(
      op, get(dy), get(dh_n), get(dc_n), get(dcells), c0, w_hh, projection, steps, gates, cells, wanted[4],
      [](const LSTMBwdParams& p) {
        run_lstm(p, Sequence<LSTMBwdParams>{
                        LLMKERNELS_CPU_DISPATCH(lstm_bwd_begin), LLMKERNELS_CPU_DISPATCH(lstm_bwd_pack),
                        LLMKERNELS_CPU_DISPATCH(lstm_bwd_step), LLMKERNELS_CPU_DISPATCH(lstm_bwd_end), false});
      });
  const at::Tensor nothing = empty({0}, gates.options());
  at::Tensor dw_hh = nothing, dw_hr = nothing.clone();
  if (wanted[3]) {
    const at::Tensor h = contiguous_like(op, "y", &y, gates, gates.scalar_type(), {rows, size});
    const at::Tensor start = contiguous_like(op, "h0", &h0, gates, gates.scalar_type(), {batch, size});
    dw_hh = transposed_product(out.dgates, rows_before(h, start, steps));
  }
  if (wanted[4] && projection != nullptr) dw_hr = transposed_product(out.dh, out.m);
  const auto only = [&](const at::Tensor& tensor, bool want) { return want ? tensor : empty({0}, gates.options()); };
  return {only(out.dgates, wanted[0]), only(out.dh0, wanted[1]), only(out.dc0, wanted[2]), dw_hh, dw_hr};
}

// x @ weights^T + bias, or x @ weights if `columns`.
at::Tensor rows_product(const at::Tensor& x, const at::Tensor& weights, const OptionalTensor& bias, bool columns) {
  const char* op = "rows_product";
  RowsProductParams p{};
  p.dtype = dtype_of(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() == 2 && weights.dim() == 2, op, ": x and weights have shapes ", x.sizes(), " and ",
                    weights.sizes(), ", expected two dimensions each");
  p.rows = x.size(0);
  p.common = x.size(1);
  p.cols = weights.size(columns ? 1 : 0);
  p.columns = columns;
  const std::array<int64_t, 2> shape = {columns ? p.common : p.cols, columns ? p.cols : p.common};
  const at::Tensor w = contiguous_like(op, "weights", &weights, x, x.scalar_type(), shape);
  const at::Tensor b = contiguous_like(op, "bias", get(bias), x, x.scalar_type(), {p.cols});
  const at::Tensor rows = x.contiguous();
  at::Tensor out = on_huge_pages(empty({p.rows, p.cols}, x.options()));
  p.x = pointer(rows);
  p.weights = pointer(w);
  p.bias = pointer(b);
  p.out = pointer(out);
  if (out.numel() == 0) return out;
  const cpu::RowsProductLayout l = LLMKERNELS_CPU_DISPATCH(rows_product_layout)(p);
  const auto memory = [](int64_t bytes) { return empty({bytes}, at::TensorOptions().dtype(at::kByte)); };
  const at::Tensor panels = memory(l.blocks * l.panel_bytes);
  at::parallel_for(0, l.blocks, 1, [&](int64_t begin, int64_t end) {
    LLMKERNELS_CPU_DISPATCH(rows_product_pack)(p, pointer(panels), begin, end);
  });
  at::parallel_for(0, (p.rows + l.group - 1) / l.group, 1, [&](int64_t begin, int64_t end) {
    const at::Tensor operand = memory(l.operand_bytes);
    LLMKERNELS_CPU_DISPATCH(rows_product)(p, pointer(panels), pointer(operand), begin, end);
  });
  return out;
}

template <class Params>
auto over_units(void (*kernel)(const Params&, int64_t, int64_t)) {
  return [kernel](const Params& p) {
    at::parallel_for(0, p.batch * p.hidden, kGrainElements / 8,  // each has five exponentials
                     [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  };
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cell_fwd(const at::Tensor& gates_x, const at::Tensor& gates_h,
                                                        const at::Tensor& c, bool save) {
  return lstm_cell_fwd_call(gates_x, gates_h, c, save, over_units(LLMKERNELS_CPU_DISPATCH(lstm_cell_fwd)));
}

std::tuple<at::Tensor, at::Tensor> cell_bwd(const OptionalTensor& dh, const OptionalTensor& dc, const at::Tensor& gates,
                                            const at::Tensor& c, const at::Tensor& next_c) {
  return lstm_cell_bwd_call(get(dh), get(dc), gates, c, next_c, over_units(LLMKERNELS_CPU_DISPATCH(lstm_cell_bwd)));
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cpu, CPU, m) {
  m.impl("lstm_cell_fwd", cell_fwd);
  m.impl("lstm_cell_bwd", cell_bwd);
  m.impl("rows_product", rows_product);
  m.impl("lstm_recurrence_fwd", recurrence_fwd);
  m.impl("lstm_recurrence_bwd", recurrence_bwd);
}

}  // namespace llmkernels
