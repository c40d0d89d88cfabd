// From tensors to the parameters of the lstm kernels, for every binding: shapes, contiguous tensors, the allocation of
// outputs.
#pragma once

#include <ATen/ops/zeros.h>

#include <array>
#include <tuple>
#include <vector>

#include "ops/lstm/lstm.h"
#include "torch/checks.h"

namespace llmkernels {

// A tensor of the dtype and device of `like` and of this shape, contiguous; undefined for a null.
inline at::Tensor contiguous_like(const char* op, const char* name, const at::Tensor* tensor, const at::Tensor& like,
                                  at::ScalarType dtype, at::IntArrayRef shape) {
  if (tensor == nullptr) return {};
  check_device(op, name, *tensor, like.device());
  check_dtype(op, name, *tensor, dtype);
  check_shape(op, name, *tensor, shape);
  return tensor->contiguous();
}

// --- one step -------------------------------------------------------------------------------------------------------

template <class Run>
std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell_fwd_call(const at::Tensor& gates_x, const at::Tensor& gates_h,
                                                                  const at::Tensor& c, bool save, Run&& run) {
  const char* op = "lstm_cell_fwd";
  LSTMCellFwdParams p{};
  p.dtype = dtype_of(op, "c", c);
  TORCH_CHECK_VALUE(c.dim() == 2, op, ": c has shape ", c.sizes(), ", expected [B, H]");
  p.batch = c.size(0);
  p.hidden = c.size(1);
  const std::array<int64_t, 2> quarters = {p.batch, 4 * p.hidden};
  const at::Tensor x = contiguous_like(op, "gates_x", &gates_x, c, c.scalar_type(), quarters);
  const at::Tensor h = contiguous_like(op, "gates_h", &gates_h, c, c.scalar_type(), quarters);
  const at::Tensor last = c.contiguous();
  at::Tensor next_h = empty(c.sizes(), c.options()), next_c = empty(c.sizes(), c.options());
  at::Tensor gates = empty(save ? at::IntArrayRef(quarters) : at::IntArrayRef{0}, c.options());
  p.gates_x = pointer(x);
  p.gates_h = pointer(h);
  p.c = pointer(last);
  p.next_h = pointer(next_h);
  p.next_c = pointer(next_c);
  p.gates = save ? pointer(gates) : nullptr;
  if (c.numel() > 0) run(p);
  return {next_h, next_c, gates};
}

template <class Run>
std::tuple<at::Tensor, at::Tensor> lstm_cell_bwd_call(const at::Tensor* dh, const at::Tensor* dc,
                                                      const at::Tensor& gates, const at::Tensor& c,
                                                      const at::Tensor& next_c, Run&& run) {
  const char* op = "lstm_cell_bwd";
  LSTMCellBwdParams p{};
  p.dtype = dtype_of(op, "c", c);
  TORCH_CHECK_VALUE(c.dim() == 2, op, ": c has shape ", c.sizes(), ", expected [B, H]");
  p.batch = c.size(0);
  p.hidden = c.size(1);
  const auto like = [&](const char* name, const at::Tensor* tensor, int64_t cols) {
    return contiguous_like(op, name, tensor, c, c.scalar_type(), {p.batch, cols});
  };
  const at::Tensor arriving_h = like("dh", dh, p.hidden), arriving_c = like("dc", dc, p.hidden);
  const at::Tensor active = like("gates", &gates, 4 * p.hidden), next = like("next_c", &next_c, p.hidden);
  const at::Tensor last = c.contiguous();
  at::Tensor dgates = empty(active.sizes(), c.options()), dlast_c = empty(c.sizes(), c.options());
  p.dh = pointer(arriving_h);
  p.dc = pointer(arriving_c);
  p.gates = pointer(active);
  p.c = pointer(last);
  p.next_c = pointer(next);
  p.dgates = pointer(dgates);
  p.dlast_c = pointer(dlast_c);
  if (c.numel() > 0) run(p);
  return {dgates, dlast_c};
}

// --- all steps ------------------------------------------------------------------------------------------------------

// Where the rows of each step are, in the order of the computation.
class Steps {
 public:
  // `batch_sizes` may be null: every step has all sequences.
  Steps(const char* op, const at::Tensor* batch_sizes, int64_t rows, int64_t batch, int64_t hidden, int64_t size,
        bool reverse) {
    if (batch_sizes == nullptr) {
      TORCH_CHECK_VALUE(batch > 0 ? rows % batch == 0 : rows == 0, op, ": gates_x has ", rows,
                        " rows, expected a multiple of ", batch, ", the rows of h0");
      for (int64_t row = 0; row < rows; row += batch) add(row, batch);
    } else {
      read(op, *batch_sizes, rows, batch);
    }
    if (reverse) {
      std::reverse(first_.begin(), first_.end());
      std::reverse(count_.begin(), count_.end());
    }
    at_ = {first_.data(), count_.data(), static_cast<int64_t>(first_.size()), batch, hidden, size};
  }
  Steps(const Steps&) = delete;
  Steps& operator=(const Steps&) = delete;

  const LSTMSteps& at() const { return at_; }
  bool gaps() const { return gaps_; }  // whether there are rows without a sequence

  // The row of y that holds h before row `first(step) + b`; -1: that of h0.
  int64_t before(int64_t step, int64_t b) const {
    return step > 0 && b < count_[step - 1] ? first_[step - 1] + b : -1;
  }

 private:
  void add(int64_t first, int64_t count) {
    first_.push_back(first);
    count_.push_back(count);
  }

  void read(const char* op, const at::Tensor& batch_sizes, int64_t rows, int64_t batch) {
    TORCH_CHECK_VALUE(batch_sizes.device().is_cpu() && batch_sizes.scalar_type() == at::kLong && batch_sizes.dim() == 1,
                      op, ": batch_sizes has shape ", batch_sizes.sizes(), " and dtype ", batch_sizes.scalar_type(),
                      " on ", batch_sizes.device(), ", expected int64 [T] on cpu");
    const at::Tensor values = batch_sizes.contiguous();
    const int64_t* counts = values.data_ptr<int64_t>();
    const int64_t steps = values.numel();
    int64_t total = 0, last = batch;
    for (int64_t step = 0; step < steps; ++step) {
      TORCH_CHECK_VALUE(counts[step] >= 0 && counts[step] <= last, op, ": batch_sizes[", step, "] is ", counts[step],
                        ", expected 0 to ", last, ", the one before or the rows of h0");
      total += last = counts[step];
    }
    gaps_ = rows == steps * batch && total < rows;
    TORCH_CHECK_VALUE(gaps_ || rows == total, op, ": gates_x has ", rows, " rows, expected ", total,
                      ", the sum of batch_sizes, or ", steps * batch);
    int64_t row = 0;
    for (int64_t step = 0; step < steps; ++step) {
      add(row, counts[step]);
      row += gaps_ ? batch : counts[step];
    }
  }

  std::vector<int64_t> first_, count_;
  LSTMSteps at_{};
  bool gaps_ = false;
};

// The sizes that h0, c0 and w_hr decide.
struct Sizes {
  int64_t batch, hidden, size;
};
inline Sizes sizes_of(const char* op, const at::Tensor& h0, const at::Tensor& c0) {
  TORCH_CHECK_VALUE(h0.dim() == 2 && c0.dim() == 2, op, ": h0 and c0 have shapes ", h0.sizes(), " and ", c0.sizes(),
                    ", expected [B, R] and [B, H]");
  return {h0.size(0), c0.size(1), h0.size(1)};
}

// Returns (y, h_n, c_n, gates, cells); the last two are empty unless `save`.
template <class Run>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> lstm_fwd_call(
    const at::Tensor& gates_x, const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_hh,
    const at::Tensor* w_hr, const at::Tensor* batch_sizes, bool reverse, bool save, Run&& run) {
  const char* op = "lstm_recurrence_fwd";
  LSTMFwdParams p{};
  p.dtype = dtype_of(op, "gates_x", gates_x);
  const auto [batch, hidden, size] = sizes_of(op, h0, c0);
  const int64_t rows = gates_x.dim() > 0 ? gates_x.size(0) : 0;
  const auto like = [&](const char* name, const at::Tensor* tensor, at::IntArrayRef shape) {
    return contiguous_like(op, name, tensor, gates_x, gates_x.scalar_type(), shape);
  };
  const at::Tensor x = like("gates_x", &gates_x, {rows, 4 * hidden});
  const at::Tensor h = like("h0", &h0, {batch, size}), c = like("c0", &c0, {batch, hidden});
  const at::Tensor hh = like("w_hh", &w_hh, {4 * hidden, w_hr != nullptr ? size : hidden});
  const at::Tensor hr = like("w_hr", w_hr, {size, hidden});
  TORCH_CHECK_VALUE(w_hr != nullptr || size == hidden, op, ": h0 has ", size, " columns, expected ", hidden,
                    ", those of c0, without w_hr");
  const Steps steps(op, batch_sizes, rows, batch, hidden, size, reverse);
  const auto options = x.options();
  const auto make = [&](bool wanted, int64_t cols, const at::TensorOptions& of) {
    if (!wanted) return empty({0}, of);
    return steps.gaps() ? at::zeros({rows, cols}, of) : on_huge_pages(empty({rows, cols}, of));
  };
  at::Tensor y = make(true, size, options);
  at::Tensor h_n = empty(h0.sizes(), options), c_n = empty(c0.sizes(), options);
  at::Tensor gates = make(save, 4 * hidden, options), cells = make(save, hidden, options.dtype(acc_of(x)));
  p.at = steps.at();
  p.gates_x = pointer(x);
  p.h0 = pointer(h);
  p.c0 = pointer(c);
  p.w_hh = pointer(hh);
  p.w_hr = pointer(hr);
  p.y = pointer(y);
  p.h_n = pointer(h_n);
  p.c_n = pointer(c_n);
  p.gates = save ? pointer(gates) : nullptr;
  p.cells = save ? pointer(cells) : nullptr;
  if (batch * hidden * size > 0) run(p);
  return {y, h_n, c_n, gates, cells};
}

// What a backward needs behind its kernels: the products of all steps at once.
struct LSTMBwdTensors {
  at::Tensor dgates, dh0, dc0, dh, m;
};

// Returns the tensors, all of them defined; dh and m are empty without a projection or unless its gradient is `wanted`.
template <class Run>
LSTMBwdTensors lstm_bwd_call(const char* op, const at::Tensor* dy, const at::Tensor* dh_n, const at::Tensor* dc_n,
                             const at::Tensor* dcells, const at::Tensor& c0, const at::Tensor& w_hh,
                             const at::Tensor* w_hr, const Steps& steps, const at::Tensor& gates,
                             const at::Tensor& cells, bool want_w_hr, Run&& run) {
  LSTMBwdParams p{};
  p.dtype = dtype_of(op, "gates", gates);
  p.at = steps.at();
  const auto [first, count, number, batch, hidden, size] = p.at;
  const int64_t rows = gates.size(0);
  const auto like = [&](const char* name, const at::Tensor* tensor, at::IntArrayRef shape) {
    return contiguous_like(op, name, tensor, gates, gates.scalar_type(), shape);
  };
  const at::ScalarType acc = acc_of(gates);
  const at::Tensor y_arrives = like("dy", dy, {rows, size}), h_arrives = like("dh_n", dh_n, {batch, size});
  const at::Tensor c_arrives = like("dc_n", dc_n, {batch, hidden});
  const at::Tensor cells_arrive = contiguous_like(op, "dcells", dcells, gates, acc, {rows, hidden});
  const at::Tensor c = like("c0", &c0, {batch, hidden}), hh = like("w_hh", &w_hh, {4 * hidden, size});
  const at::Tensor hr = like("w_hr", w_hr, {size, hidden}), active = like("gates", &gates, {rows, 4 * hidden});
  const at::Tensor every_c = contiguous_like(op, "cells", &cells, gates, acc, {rows, hidden});
  const auto options = active.options();
  const auto make = [&](bool wanted, int64_t cols) {
    if (!wanted) return empty({0}, options);
    return steps.gaps() ? at::zeros({rows, cols}, options) : on_huge_pages(empty({rows, cols}, options));
  };
  LSTMBwdTensors out{make(true, 4 * hidden), empty({batch, size}, options), empty({batch, hidden}, options),
                     make(want_w_hr && w_hr != nullptr, size), make(want_w_hr && w_hr != nullptr, hidden)};
  p.dy = pointer(y_arrives);
  p.dh_n = pointer(h_arrives);
  p.dc_n = pointer(c_arrives);
  p.dcells = pointer(cells_arrive);
  p.c0 = pointer(c);
  p.w_hh = pointer(hh);
  p.w_hr = pointer(hr);
  p.gates = pointer(active);
  p.cells = pointer(every_c);
  p.dgates = pointer(out.dgates);
  p.dh0 = pointer(out.dh0);
  p.dc0 = pointer(out.dc0);
  if (want_w_hr && w_hr != nullptr) {
    p.dh = pointer(out.dh);
    p.m = pointer(out.m);
  }
  if (batch * hidden * size > 0) run(p);
  return out;
}

}  // namespace llmkernels
