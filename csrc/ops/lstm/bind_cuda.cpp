// The lstm family for CUDA tensors: allocate, plan, launch on torch's current stream.
#include <ATen/ops/index_select.h>
#include <torch/library.h>

#include <cstring>

#include "ops/lstm/lstm_cuda.h"
#include "ops/lstm/lstm_cuda_steps.h"
#include "ops/lstm/lstm_torch.h"
#include "torch/cuda.h"

namespace llmkernels {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell_fwd(const at::Tensor& gates_x, const at::Tensor& gates_h,
                                                             const at::Tensor& c, bool save) {
  const CudaCall call("lstm_cell_fwd", c.device());
  return lstm_cell_fwd_call(gates_x, gates_h, c, save, [&](const LSTMCellFwdParams& p) {
    check_cuda("lstm_cell_fwd", cuda::lstm_cell_fwd(p, cuda::plan_lstm_cell_fwd(p, call.gpu), call.stream));
  });
}

std::tuple<at::Tensor, at::Tensor> lstm_cell_bwd(const OptionalTensor& dh, const OptionalTensor& dc,
                                                 const at::Tensor& gates, const at::Tensor& c,
                                                 const at::Tensor& next_c) {
  const CudaCall call("lstm_cell_bwd", c.device());
  return lstm_cell_bwd_call(get(dh), get(dc), gates, c, next_c, [&](const LSTMCellBwdParams& p) {
    check_cuda("lstm_cell_bwd", cuda::lstm_cell_bwd(p, cuda::plan_lstm_cell_bwd(p, call.gpu), call.stream));
  });
}

// --- all steps ------------------------------------------------------------------------------------------------------

// The device of a call, with what its planner asks.
struct RecurrenceCall : CudaCall {
  RecurrenceCall(const char* op, c10::Device device) : CudaCall(op, device) {
    check_cuda(op, cuda::ask_shared(device.is_cuda() ? device.index() : 0, gpu));
  }
};

// Numbers of the host on the device of `options`.
at::Tensor on_device(const std::vector<int64_t>& values, const at::TensorOptions& options) {
  const int64_t size = static_cast<int64_t>(values.size());
  const at::Tensor host = empty({size}, at::TensorOptions().dtype(at::kLong));
  std::memcpy(host.data_ptr(), values.data(), values.size() * sizeof(int64_t));
  at::Tensor found = empty({size}, options.dtype(at::kLong));
  return found.copy_(host);
}

// Calls launch(params) with what a kernel that keeps its weights needs besides `p`.
template <class Params, class Run>
void with_resident(const Params& p, const cuda::LSTMRecurrencePlan& plan, bool uniform, bool reverse,
                   const at::TensorOptions& options, Run&& run) {
  const at::Tensor exchange = empty({plan.exchange_bytes}, options.dtype(at::kByte));
  const at::Tensor arrived = at::zeros({1}, options.dtype(at::kInt));
  cuda::LSTMResident<Params> r{p, reverse, plan.groups, plan.depth, plan.stride, plan.padded_batch};
  r.exchange = pointer(exchange);
  r.arrived = static_cast<unsigned*>(pointer(arrived));
  at::Tensor table;
  if (!uniform) {
    std::vector<int64_t> values(p.at.first, p.at.first + p.at.steps);
    values.insert(values.end(), p.at.count, p.at.count + p.at.steps);
    table = on_device(values, options);
  }
  r.p.at.first = uniform ? nullptr : table.data_ptr<int64_t>();
  r.p.at.count = uniform ? nullptr : table.data_ptr<int64_t>() + p.at.steps;
  run(r);
}

// The rows of h before every step: what the gradient of w_hh is a product with.
at::Tensor rows_before(const at::Tensor& y, const at::Tensor& h0, const Steps& steps, bool uniform, bool reverse) {
  const LSTMSteps& at = steps.at();
  const int64_t rows = y.size(0);
  if (uniform) {
    if (rows == 0) return y;
    const int64_t known = rows - at.batch;
    return reverse ? at::cat({y.narrow(0, at.batch, known), h0}) : at::cat({h0, y.narrow(0, 0, known)});
  }
  std::vector<int64_t> from(rows);
  for (int64_t row = 0; row < rows; ++row) from[row] = row;  // rows without a sequence: zeros
  for (int64_t step = 0; step < at.steps; ++step) {
    for (int64_t b = 0; b < at.count[step]; ++b) {
      const int64_t before = steps.before(step, b);
      from[at.first[step] + b] = before >= 0 ? before : rows + b;
    }
  }
  return at::index_select(at::cat({y, h0}), 0, on_device(from, y.options()));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> recurrence_fwd(
    const at::Tensor& gates_x, const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_hh,
    const OptionalTensor& w_hr, const OptionalTensor& batch_sizes, bool reverse, bool save) {
  const char* op = "lstm_recurrence_fwd";
  const RecurrenceCall call(op, gates_x.device());
  const at::Tensor *projection = get(w_hr), *sizes = get(batch_sizes);
  return lstm_fwd_call(gates_x, h0, c0, w_hh, projection, sizes, reverse, save, [&](const LSTMFwdParams& p) {
    const auto plan = cuda::plan_lstm_recurrence(p.dtype, p.at, projection != nullptr, true, call.gpu);
    if (!plan.resident) return lstm_fwd_by_steps(p, gates_x.options(), call);
    with_resident(p, plan, sizes == nullptr, reverse, gates_x.options(), [&](const auto& r) {
      check_cuda(op, cuda::lstm_recurrence_fwd(r, plan, call.stream));
    });
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> recurrence_bwd(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const OptionalTensor& dcells,
    const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_hh, const OptionalTensor& w_hr,
    const OptionalTensor& batch_sizes, bool reverse, const at::Tensor& y, const at::Tensor& gates,
    const at::Tensor& cells, std::array<bool, 5> wanted) {
  const char* op = "lstm_recurrence_bwd";
  const RecurrenceCall call(op, gates.device());
  const auto [batch, hidden, size] = sizes_of(op, h0, c0);
  TORCH_CHECK_VALUE(gates.dim() == 2, op, ": gates has shape ", gates.sizes(), ", expected [N, 4 * H]");
  const int64_t rows = gates.size(0);
  const at::Tensor *projection = get(w_hr), *sizes = get(batch_sizes);
  const Steps steps(op, sizes, rows, batch, hidden, size, reverse);
  const LSTMBwdTensors out = lstm_bwd_call(
      op, get(dy), get(dh_n), get(dc_n), get(dcells), c0, w_hh, projection, steps, gates, cells, wanted[4],
      [&](const LSTMBwdParams& p) {
        const auto plan = cuda::plan_lstm_recurrence(p.dtype, p.at, projection != nullptr, false, call.gpu);
        if (!plan.resident) return lstm_bwd_by_steps(p, gates.options(), call);
        with_resident(p, plan, sizes == nullptr, reverse, gates.options(), [&](const auto& r) {
          check_cuda(op, cuda::lstm_recurrence_bwd(r, plan, call.stream));
        });
      });
  const at::Tensor nothing = empty({0}, gates.options());
  at::Tensor dw_hh = nothing, dw_hr = nothing.clone();
  if (wanted[3]) {
    const at::Tensor h = contiguous_like(op, "y", &y, gates, gates.scalar_type(), {rows, size});
    const at::Tensor start = contiguous_like(op, "h0", &h0, gates, gates.scalar_type(), {batch, size});
    dw_hh = at::mm(out.dgates.t(), rows_before(h, start, steps, sizes == nullptr, reverse));
  }
  if (wanted[4] && projection != nullptr) dw_hr = at::mm(out.dh.t(), out.m);
  const auto only = [&](const at::Tensor& tensor, bool want) { return want ? tensor : empty({0}, gates.options()); };
  return {only(out.dgates, wanted[0]), only(out.dh0, wanted[1]), only(out.dc0, wanted[2]), dw_hh, dw_hr};
}

// How forward and backward of such a call would run, as a sentence.
std::string recurrence_way(const at::Tensor& gates_x, const at::Tensor& h0, const at::Tensor& c0, const at::Tensor&,
                           const OptionalTensor& w_hr) {
  const char* op = "lstm_recurrence_way";
  const RecurrenceCall call(op, gates_x.device());
  const auto [batch, hidden, size] = sizes_of(op, h0, c0);
  const LSTMSteps at{nullptr, nullptr, 0, batch, hidden, size};
  const auto way = [&](bool forward) -> std::string {
    const DType dtype = dtype_of(op, "gates_x", gates_x);
    const auto plan = cuda::plan_lstm_recurrence(dtype, at, get(w_hr) != nullptr, forward, call.gpu);
    if (!plan.resident) return "a product and a small kernel at each step";
    return "weights stay in shared memory, " + std::to_string(plan.launch.grid[0]) + " blocks";
  };
  return "forward: " + way(true) + "; backward: " + way(false);
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cuda, LLMKERNELS_CUDA_KEY, m) {
  m.impl("lstm_cell_fwd", lstm_cell_fwd);
  m.impl("lstm_cell_bwd", lstm_cell_bwd);
  m.impl("lstm_recurrence_fwd", recurrence_fwd);
  m.impl("lstm_recurrence_bwd", recurrence_bwd);
  m.impl("lstm_recurrence_way", recurrence_way);
}

}  // namespace llmkernels
