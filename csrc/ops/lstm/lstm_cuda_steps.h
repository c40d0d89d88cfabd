// The recurrence on a GPU whose multiprocessors do not hold the weights, or with a projection: at each step a product
// by torch and one small kernel. In the order of the stream nothing has to wait for anything.
#pragma once

#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "ops/lstm/lstm_cuda.h"
#include "torch/checks.h"
#include "torch/cuda.h"

namespace llmkernels {

// Rows of a call's tensors, which its params name by pointers.
struct LSTMRows {
  at::TensorOptions options;  // of T
  at::ScalarType acc;
  int64_t bytes, acc_bytes;

  LSTMRows(DType dtype, const at::TensorOptions& of)
      : options(of),
        acc(dtype == DType::kFloat64 ? at::kDouble : at::kFloat),
        bytes(element_bytes(dtype)),
        acc_bytes(std::max<int64_t>(bytes, 4)) {}

  // Where row `first` is; null for null.
  template <class Pointer>
  Pointer at(Pointer base, int64_t first, int64_t cols) const {
    return step(base, first * cols * bytes);
  }
  template <class Pointer>
  Pointer acc_at(Pointer base, int64_t first, int64_t cols) const {
    return step(base, first * cols * acc_bytes);
  }
  at::Tensor view(const void* base, int64_t first, int64_t rows, int64_t cols) const {
    return at::from_blob(const_cast<void*>(at(base, first, cols)), {rows, cols}, options);
  }

 private:
  static void* step(void* base, int64_t offset) {
    return base == nullptr ? nullptr : static_cast<char*>(base) + offset;
  }
  static const void* step(const void* base, int64_t offset) {
    return base == nullptr ? nullptr : static_cast<const char*>(base) + offset;
  }
};

inline void lstm_fwd_by_steps(const LSTMFwdParams& p, const at::TensorOptions& options, const CudaCall& call) {
  const LSTMRows of(p.dtype, options);
  const auto [first, count, steps, batch, hidden, size] = p.at;
  const at::Tensor hh = of.view(p.w_hh, 0, 4 * hidden, size).t(), start = of.view(p.h0, 0, batch, size);
  const at::Tensor c = of.view(p.c0, 0, batch, hidden).to(of.acc, /*non_blocking=*/false, /*copy=*/true);
  at::Tensor m, hr;
  if (p.w_hr != nullptr) {
    m = empty({batch, hidden}, options);
    hr = of.view(p.w_hr, 0, size, hidden).t();
  }
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t rows = count[step], known = step > 0 ? std::min(count[step - 1], rows) : 0;
    if (rows == 0) continue;
    at::Tensor h = start.narrow(0, 0, rows);
    if (known > 0) {
      const at::Tensor last = of.view(p.y, first[step - 1], known, size);
      h = known == rows ? last : at::cat({last, start.narrow(0, known, rows - known)});
    }
    const at::Tensor gates_h = at::mm(h, hh);
    LSTMStepFwdParams s{};
    s.gates_x = of.at(p.gates_x, first[step], 4 * hidden);
    s.gates_h = pointer(gates_h);
    s.c = pointer(c);
    s.m = m.defined() ? pointer(m) : of.at(p.y, first[step], hidden);
    s.gates = of.at(p.gates, first[step], 4 * hidden);
    s.cells = of.acc_at(p.cells, first[step], hidden);
    s.rows = rows;
    s.hidden = hidden;
    s.dtype = p.dtype;
    check_cuda("lstm_recurrence_fwd", cuda::lstm_step_fwd(s, cuda::plan_lstm_step_fwd(s, call.gpu), call.stream));
    if (!m.defined()) continue;
    at::Tensor y = of.view(p.y, first[step], rows, size);
    at::mm_out(y, m.narrow(0, 0, rows), hr);
  }
  of.view(p.c_n, 0, batch, hidden).copy_(c);
  // From the last step back, a sequence is first seen at its own last one.
  int64_t seen = 0;
  for (int64_t step = steps - 1; step >= 0 && seen < batch; --step) {
    const int64_t more = count[step] - seen;
    if (more <= 0) continue;
    of.view(p.h_n, seen, more, size).copy_(of.view(p.y, first[step] + seen, more, size));
    seen += more;
  }
  if (seen < batch) of.view(p.h_n, seen, batch - seen, size).copy_(start.narrow(0, seen, batch - seen));
}

inline void lstm_bwd_by_steps(const LSTMBwdParams& p, const at::TensorOptions& options, const CudaCall& call) {
  const LSTMRows of(p.dtype, options);
  const auto [first, count, steps, batch, hidden, size] = p.at;
  const at::Tensor hh = of.view(p.w_hh, 0, 4 * hidden, size);
  const at::Tensor dh = p.dh_n != nullptr ? of.view(p.dh_n, 0, batch, size).clone() : at::zeros({batch, size}, options);
  const at::Tensor dc = p.dc_n != nullptr ? of.view(p.dc_n, 0, batch, hidden).to(of.acc, false, /*copy=*/true)
                                          : at::zeros({batch, hidden}, options.dtype(of.acc));
  const at::Tensor hr = p.w_hr != nullptr ? of.view(p.w_hr, 0, size, hidden) : at::Tensor();
  for (int64_t step = steps - 1; step >= 0; --step) {
    const int64_t rows = count[step];
    if (rows == 0) continue;
    at::Tensor arrives = dh.narrow(0, 0, rows), dm = arrives;
    if (hr.defined()) {
      const at::Tensor all = p.dy != nullptr ? at::add(arrives, of.view(p.dy, first[step], rows, size)) : arrives;
      if (p.dh != nullptr) of.view(p.dh, first[step], rows, size).copy_(all);
      dm = at::mm(all, hr);
    }
    LSTMStepBwdParams s{};
    s.dm = pointer(dm);
    s.dy = hr.defined() ? nullptr : of.at(p.dy, first[step], hidden);
    s.dcells = of.acc_at(p.dcells, first[step], hidden);
    s.dc = pointer(dc);
    s.gates = of.at(p.gates, first[step], 4 * hidden);
    s.cells = of.acc_at(p.cells, first[step], hidden);
    s.known = step > 0 ? std::min(count[step - 1], rows) : 0;
    s.before = s.known > 0 ? of.acc_at(p.cells, first[step - 1], hidden) : nullptr;
    s.c0 = p.c0;
    s.dgates = of.at(p.dgates, first[step], 4 * hidden);
    s.m = of.at(p.m, first[step], hidden);
    s.rows = rows;
    s.hidden = hidden;
    s.dtype = p.dtype;
    check_cuda("lstm_recurrence_bwd", cuda::lstm_step_bwd(s, cuda::plan_lstm_step_bwd(s, call.gpu), call.stream));
    at::mm_out(arrives, of.view(s.dgates, 0, rows, 4 * hidden), hh);
  }
  of.view(p.dh0, 0, batch, size).copy_(dh);
  of.view(p.dc0, 0, batch, hidden).copy_(dc);
}

}  // namespace llmkernels
