// The recurrence of a GRU for CPU tensors, kernels compiled for this CPU's instruction set.
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include "common/cpu/isa.h"
#include "ops/gru/gru_cpu.h"
#include "ops/lstm/lstm_run.h"
#include "torch/product.h"

namespace llmkernels {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
constexpr int64_t kGates = 3;

template <class Params>
void run_gru(const Params& p, const Sequence<Params>& kernels) {
  run(p, kernels, LLMKERNELS_CPU_DISPATCH(gru_layout)(p.dtype, p.at, kernels.forward), kGates, false);
}

// One product a step: the LSTM's flag for the second one is never set.
const Sequence<GRUFwdParams> kForward = {
    [](const GRUFwdParams& p, const cpu::LSTMScratch& scratch) { LLMKERNELS_CPU_DISPATCH(gru_fwd_begin)(p, scratch); },
    [](const GRUFwdParams& p, const cpu::LSTMScratch& scratch, bool, int64_t begin, int64_t end) {
      LLMKERNELS_CPU_DISPATCH(gru_fwd_pack)(p, scratch, begin, end);
    },
    [](const GRUFwdParams& p, const cpu::LSTMScratch& scratch, bool packed, int64_t step, bool, int64_t begin,
       int64_t end) { LLMKERNELS_CPU_DISPATCH(gru_fwd_step)(p, scratch, packed, step, begin, end); },
    [](const GRUFwdParams& p, const cpu::LSTMScratch& scratch) { LLMKERNELS_CPU_DISPATCH(gru_fwd_end)(p, scratch); },
    true};
const Sequence<GRUBwdParams> kBackward = {
    [](const GRUBwdParams& p, const cpu::LSTMScratch& scratch) { LLMKERNELS_CPU_DISPATCH(gru_bwd_begin)(p, scratch); },
    [](const GRUBwdParams& p, const cpu::LSTMScratch& scratch, bool, int64_t begin, int64_t end) {
      LLMKERNELS_CPU_DISPATCH(gru_bwd_pack)(p, scratch, begin, end);
    },
    [](const GRUBwdParams& p, const cpu::LSTMScratch& scratch, bool packed, int64_t step, bool, int64_t begin,
       int64_t end) { LLMKERNELS_CPU_DISPATCH(gru_bwd_step)(p, scratch, packed, step, begin, end); },
    [](const GRUBwdParams& p, const cpu::LSTMScratch& scratch) { LLMKERNELS_CPU_DISPATCH(gru_bwd_end)(p, scratch); },
    false};

// The tensors that both directions have, checked against `like`, and the steps.
struct Call {
  Call(const char* op, const at::Tensor& like, int64_t rows, const at::Tensor& h0, const at::Tensor& w_hh,
       const OptionalTensor& batch_sizes, bool reverse)
      : op(op), like(like), rows(rows), dtype(dtype_of(op, "gates", like)) {
    TORCH_CHECK_VALUE(h0.dim() == 2, op, ": h0 has shape ", h0.sizes(), ", expected [B, H]");
    batch = h0.size(0);
    hidden = h0.size(1);
    start = get_like("h0", &h0, {batch, hidden});
    weights = get_like("w_hh", &w_hh, {kGates * hidden, hidden});
    steps.emplace(op, get(batch_sizes), rows, batch, hidden, hidden, reverse);
  }

  at::Tensor get_like(const char* name, const at::Tensor* tensor, at::IntArrayRef shape) const {
    return contiguous_like(op, name, tensor, like, like.scalar_type(), shape);
  }
  // Rows without a sequence are zero.
  at::Tensor make(bool wanted, int64_t cols) const {
    if (!wanted) return empty({0}, like.options());
    const auto options = like.options();
    return steps->gaps() ? at::zeros({rows, cols}, options) : on_huge_pages(empty({rows, cols}, options));
  }
  bool nothing() const { return batch * hidden == 0; }

  const char* op;
  const at::Tensor& like;
  int64_t rows, batch = 0, hidden = 0;
  DType dtype;
  at::Tensor start, weights;
  std::optional<Steps> steps;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> recurrence_fwd(const at::Tensor& gates_x, const at::Tensor& h0,
                                                              const at::Tensor& w_hh, const OptionalTensor& b_hh,
                                                              const OptionalTensor& batch_sizes, bool reverse,
                                                              bool save) {
  const Call call("gru_recurrence_fwd", gates_x, gates_x.dim() > 0 ? gates_x.size(0) : 0, h0, w_hh, batch_sizes,
                  reverse);
  const at::Tensor x = call.get_like("gates_x", &gates_x, {call.rows, kGates * call.hidden});
  const at::Tensor bias = call.get_like("b_hh", get(b_hh), {kGates * call.hidden});
  at::Tensor y = call.make(true, call.hidden), gates = call.make(save, 4 * call.hidden);
  at::Tensor h_n = empty(h0.sizes(), x.options());
  GRUFwdParams p{};
  p.at = call.steps->at();
  p.gates_x = pointer(x);
  p.h0 = pointer(call.start);
  p.w_hh = pointer(call.weights);
  p.b_hh = pointer(bias);
  p.y = pointer(y);
  p.h_n = pointer(h_n);
  p.gates = save ? pointer(gates) : nullptr;
  p.dtype = call.dtype;
  if (!call.nothing()) run_gru(p, kForward);
  return {y, h_n, gates};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> recurrence_bwd(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const at::Tensor& h0, const at::Tensor& w_hh,
    const OptionalTensor& batch_sizes, bool reverse, const at::Tensor& y, const at::Tensor& gates,
    std::array<bool, 4> wanted) {
  const Call call("gru_recurrence_bwd", gates, gates.dim() > 0 ? gates.size(0) : 0, h0, w_hh, batch_sizes, reverse);
  const int64_t rows = call.rows, hidden = call.hidden;
  const bool of_h = wanted[2] || wanted[3];
  const at::Tensor y_arrives = call.get_like("dy", get(dy), {rows, hidden});
  const at::Tensor h_arrives = call.get_like("dh_n", get(dh_n), {call.batch, hidden});
  const at::Tensor outputs = call.get_like("y", &y, {rows, hidden});
  const at::Tensor saved = call.get_like("gates", &gates, {rows, 4 * hidden});
  at::Tensor dgates_x = call.make(true, kGates * hidden), dgates_h = call.make(of_h, kGates * hidden);
  at::Tensor dh0 = empty(h0.sizes(), saved.options());
  GRUBwdParams p{};
  p.at = call.steps->at();
  p.dy = pointer(y_arrives);
  p.dh_n = pointer(h_arrives);
  p.h0 = pointer(call.start);
  p.w_hh = pointer(call.weights);
  p.y = pointer(outputs);
  p.gates = pointer(saved);
  p.dgates_x = pointer(dgates_x);
  p.dgates_h = of_h ? pointer(dgates_h) : nullptr;
  p.dh0 = pointer(dh0);
  p.dtype = call.dtype;
  if (!call.nothing()) run_gru(p, kBackward);
  const auto none = [&] { return empty({0}, saved.options()); };
  return {wanted[0] ? dgates_x : none(), wanted[1] ? dh0 : none(),
          wanted[2] ? transposed_product(dgates_h, rows_before(outputs, call.start, *call.steps)) : none(),
          wanted[3] ? at::sum(dgates_h, 0) : none()};
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cpu, CPU, m) {
  m.impl("gru_recurrence_fwd", recurrence_fwd);
  m.impl("gru_recurrence_bwd", recurrence_bwd);
}

}  // namespace llmkernels
