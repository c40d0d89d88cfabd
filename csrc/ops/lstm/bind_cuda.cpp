// The lstm family for CUDA tensors: allocate, plan, launch on torch's current stream.
#include <ATen/ops/index_select.h>
#include <torch/library.h>

#include <cstring>
#include <type_traits>

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
    const int index = device.is_cuda() ? device.index() : 0;
    check_cuda(op, cuda::ask_shared(index, gpu));
    check_cuda(op, cuda::ask_registers(index, gpu));
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

// Barriers of two directions do not share a line of the cache.
constexpr int64_t kBarrierWords = 32;

template <class Params>
constexpr bool kForward = std::is_same_v<Params, LSTMFwdParams>;

// How the steps of a call's directions go.
struct Way {
  bool uniform;  // every step has all sequences
  bool reverse;  // of a single direction; of two, the second one's are
};

template <class Params>
cuda::LSTMRecurrencePlan plan_of(const Params& p, int directions, const cuda::Gpu& gpu) {
  return cuda::plan_lstm_recurrence(p.dtype, p.at, p.w_hr != nullptr, kForward<Params>, directions, gpu);
}

// One launch of the kernel that keeps its weights, for one direction or for two.
template <class Params>
void run_resident(const char* op, const cuda::LSTMRecurrencePlan& plan, std::initializer_list<const Params*> directions,
                  const Way& way, const at::TensorOptions& options, const CudaCall& call) {
  const int64_t number = static_cast<int64_t>(directions.size()), steps = (*directions.begin())->at.steps;
  const at::Tensor exchange = empty({number * plan.exchange_bytes}, options.dtype(at::kByte));
  const at::Tensor arrived = at::zeros({number * kBarrierWords}, options.dtype(at::kInt));
  at::Tensor table;
  if (!way.uniform) {
    std::vector<int64_t> values;
    for (const Params* p : directions) {
      values.insert(values.end(), p->at.first, p->at.first + steps);
      values.insert(values.end(), p->at.count, p->at.count + steps);
    }
    table = on_device(values, options);
  }
  cuda::LSTMResident<Params> r{{}, plan.blocks, plan.groups, plan.depth, plan.kept, plan.stride, plan.padded_batch};
  int64_t index = 0;
  for (const Params* p : directions) {
    cuda::LSTMDirection<Params>& of = r.of[index];
    of.p = *p;
    of.p.at.first = way.uniform ? nullptr : table.data_ptr<int64_t>() + 2 * index * steps;
    of.p.at.count = way.uniform ? nullptr : of.p.at.first + steps;
    of.reverse = number == 1 ? way.reverse : index == 1;
    of.exchange = static_cast<char*>(pointer(exchange)) + index * plan.exchange_bytes;
    of.arrived = static_cast<unsigned*>(pointer(arrived)) + index * kBarrierWords;
    ++index;
  }
  if constexpr (kForward<Params>) {
    check_cuda(op, cuda::lstm_recurrence_fwd(r, plan, call.stream));
  } else {
    check_cuda(op, cuda::lstm_recurrence_bwd(r, plan, call.stream));
  }
}

template <class Params>
void run_one(const char* op, const Params& p, const Way& way, const at::TensorOptions& options, const CudaCall& call) {
  const auto plan = plan_of(p, 1, call.gpu);
  if (plan.resident) return run_resident<Params>(op, plan, {&p}, way, options, call);
  if constexpr (kForward<Params>) {
    lstm_fwd_by_steps(p, options, call);
  } else {
    lstm_bwd_by_steps(p, options, call);
  }
}

// Both directions in one launch where they fit side by side, else one after the other.
template <class Params>
void run_both(const char* op, const Params& p, const Params& reverse, bool uniform, const at::TensorOptions& options,
              const CudaCall& call) {
  const auto plan = plan_of(p, 2, call.gpu);
  if (plan.resident) return run_resident<Params>(op, plan, {&p, &reverse}, {uniform, false}, options, call);
  run_one(op, p, {uniform, false}, options, call);
  run_one(op, reverse, {uniform, true}, options, call);
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

// y, h_n, c_n, gates, cells of a direction.
using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
// dgates, dh0, dc0, dw_hh, dw_hr.
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Forward recurrence_fwd(const at::Tensor& gates_x, const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_hh,
                       const OptionalTensor& w_hr, const OptionalTensor& batch_sizes, bool reverse, bool save) {
  const char* op = "lstm_recurrence_fwd";
  const RecurrenceCall call(op, gates_x.device());
  const at::Tensor* sizes = get(batch_sizes);
  return lstm_fwd_call(gates_x, h0, c0, w_hh, get(w_hr), sizes, reverse, save, [&](const LSTMFwdParams& p) {
    run_one(op, p, {sizes == nullptr, reverse}, gates_x.options(), call);
  });
}

// What the backward of a direction is given.
struct BackwardOf {
  const OptionalTensor &dy, &dh_n, &dc_n, &dcells;
  const at::Tensor &h0, &c0, &w_hh;
  const at::Tensor* w_hr;
  const at::Tensor &y, &gates, &cells;
  bool reverse;
};

// run(params) computes the gradients of the gates; the weights' are products behind it.
template <class Run>
Backward backward_call(const char* op, const BackwardOf& b, const at::Tensor* sizes, std::array<bool, 5> wanted,
                       Run&& run) {
  const auto [batch, hidden, size] = sizes_of(op, b.h0, b.c0);
  TORCH_CHECK_VALUE(b.gates.dim() == 2, op, ": gates has shape ", b.gates.sizes(), ", expected [N, 4 * H]");
  const int64_t rows = b.gates.size(0);
  const Steps steps(op, sizes, rows, batch, hidden, size, b.reverse);
  const LSTMBwdTensors out = lstm_bwd_call(op, get(b.dy), get(b.dh_n), get(b.dc_n), get(b.dcells), b.c0, b.w_hh, b.w_hr,
                                           steps, b.gates, b.cells, wanted[4], run);
  const at::Tensor nothing = empty({0}, b.gates.options());
  at::Tensor dw_hh = nothing, dw_hr = nothing.clone();
  if (wanted[3]) {
    const at::Tensor h = contiguous_like(op, "y", &b.y, b.gates, b.gates.scalar_type(), {rows, size});
    const at::Tensor start = contiguous_like(op, "h0", &b.h0, b.gates, b.gates.scalar_type(), {batch, size});
    dw_hh = at::mm(out.dgates.t(), rows_before(h, start, steps, sizes == nullptr, b.reverse));
  }
  if (wanted[4] && b.w_hr != nullptr) dw_hr = at::mm(out.dh.t(), out.m);
  const auto only = [&](const at::Tensor& tensor, bool want) { return want ? tensor : empty({0}, b.gates.options()); };
  return {only(out.dgates, wanted[0]), only(out.dh0, wanted[1]), only(out.dc0, wanted[2]), dw_hh, dw_hr};
}

Backward recurrence_bwd(const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                        const OptionalTensor& dcells, const at::Tensor& h0, const at::Tensor& c0,
                        const at::Tensor& w_hh, const OptionalTensor& w_hr, const OptionalTensor& batch_sizes,
                        bool reverse, const at::Tensor& y, const at::Tensor& gates, const at::Tensor& cells,
                        std::array<bool, 5> wanted) {
  const char* op = "lstm_recurrence_bwd";
  const RecurrenceCall call(op, gates.device());
  const at::Tensor* sizes = get(batch_sizes);
  const BackwardOf given{dy, dh_n, dc_n, dcells, h0, c0, w_hh, get(w_hr), y, gates, cells, reverse};
  return backward_call(op, given, sizes, wanted, [&](const LSTMBwdParams& p) {
    run_one(op, p, {sizes == nullptr, reverse}, gates.options(), call);
  });
}

// --- both directions of a layer -------------------------------------------------------------------------------------

void check_like(const char* op, const char* name, const at::Tensor& reverse, const at::Tensor& forward) {
  check_device(op, name, reverse, forward.device());
  check_dtype(op, name, reverse, forward.scalar_type());
  check_shape(op, name, reverse, forward.sizes());
}

// The calls of two directions, each call(run), as one: joined(params, params of the reverse). What a call allocates
// lives until its run returns, so the second one is made within the first.
template <class Params, class First, class Second, class Joined>
auto both_calls(First&& first, Second&& second, Joined&& joined) {
  using Result = decltype(second([](const Params&) {}));
  std::optional<Result> reverse;
  Result forward = first([&](const Params& p) {
    reverse = second([&](const Params& q) { joined(p, q); });
  });
  if (!reverse) reverse = second([](const Params&) {});  // nothing to compute
  return std::tuple_cat(std::move(forward), std::move(*reverse));
}

auto both_fwd(const at::Tensor& gates_x, const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_hh,
              const at::Tensor& gates_x_reverse, const at::Tensor& h0_reverse, const at::Tensor& c0_reverse,
              const at::Tensor& w_hh_reverse, const OptionalTensor& batch_sizes, bool save) {
  const char* op = "lstm_both_fwd";
  const RecurrenceCall call(op, gates_x.device());
  check_like(op, "gates_x_reverse", gates_x_reverse, gates_x);
  check_like(op, "h0_reverse", h0_reverse, h0);
  check_like(op, "c0_reverse", c0_reverse, c0);
  const at::Tensor* sizes = get(batch_sizes);
  return both_calls<LSTMFwdParams>(
      [&](auto&& run) { return lstm_fwd_call(gates_x, h0, c0, w_hh, nullptr, sizes, false, save, run); },
      [&](auto&& run) {
        return lstm_fwd_call(gates_x_reverse, h0_reverse, c0_reverse, w_hh_reverse, nullptr, sizes, true, save, run);
      },
      [&](const LSTMFwdParams& p, const LSTMFwdParams& q) {
        run_both(op, p, q, sizes == nullptr, gates_x.options(), call);
      });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> both_bwd(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const OptionalTensor& dcells,
    const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_hh, const at::Tensor& y, const at::Tensor& gates,
    const at::Tensor& cells, const OptionalTensor& dy_reverse, const OptionalTensor& dh_n_reverse,
    const OptionalTensor& dc_n_reverse, const OptionalTensor& dcells_reverse, const at::Tensor& h0_reverse,
    const at::Tensor& c0_reverse, const at::Tensor& w_hh_reverse, const at::Tensor& y_reverse,
    const at::Tensor& gates_reverse, const at::Tensor& cells_reverse, const OptionalTensor& batch_sizes,
    std::array<bool, 8> wanted) {
  const char* op = "lstm_both_bwd";
  const RecurrenceCall call(op, gates.device());
  check_like(op, "gates_reverse", gates_reverse, gates);
  check_like(op, "h0_reverse", h0_reverse, h0);
  check_like(op, "c0_reverse", c0_reverse, c0);
  const at::Tensor* sizes = get(batch_sizes);
  const BackwardOf forward{dy, dh_n, dc_n, dcells, h0, c0, w_hh, nullptr, y, gates, cells, false};
  const BackwardOf reverse{dy_reverse, dh_n_reverse, dc_n_reverse, dcells_reverse, h0_reverse, c0_reverse, w_hh_reverse,
                           nullptr, y_reverse, gates_reverse, cells_reverse, true};
  auto [dgates, dh0, dc0, dw_hh, none, dgates_reverse, dh0_reverse, dc0_reverse, dw_hh_reverse, none_reverse] =
      both_calls<LSTMBwdParams>(
          [&](auto&& run) {
            return backward_call(op, forward, sizes, {wanted[0], wanted[1], wanted[2], wanted[3], false}, run);
          },
          [&](auto&& run) {
            return backward_call(op, reverse, sizes, {wanted[4], wanted[5], wanted[6], wanted[7], false}, run);
          },
          [&](const LSTMBwdParams& p, const LSTMBwdParams& q) {
            run_both(op, p, q, sizes == nullptr, gates.options(), call);
          });
  return {dgates, dh0, dc0, dw_hh, dgates_reverse, dh0_reverse, dc0_reverse, dw_hh_reverse};
}

// --- explain --------------------------------------------------------------------------------------------------------

std::string sentence(const cuda::LSTMRecurrencePlan& plan) {
  if (!plan.resident) return "a product and a small kernel at each step";
  const char* places[] = {"shared memory", "registers and shared memory", "registers"};
  const char* where = places[(plan.kept > 0) + (plan.kept == plan.depth)];
  return std::string("weights stay in ") + where + ", " + std::to_string(plan.launch.grid[0]) + " blocks";
}

// How forward and backward of such a call would run, as a sentence.
std::string recurrence_way(const at::Tensor& gates_x, const at::Tensor& h0, const at::Tensor& c0, const at::Tensor&,
                           const OptionalTensor& w_hr, bool both) {
  const char* op = "lstm_recurrence_way";
  const RecurrenceCall call(op, gates_x.device());
  const auto [batch, hidden, size] = sizes_of(op, h0, c0);
  const LSTMSteps at{nullptr, nullptr, 0, batch, hidden, size};
  const auto way = [&](bool forward) -> std::string {
    const DType dtype = dtype_of(op, "gates_x", gates_x);
    const auto planned = [&](int directions) {
      return cuda::plan_lstm_recurrence(dtype, at, get(w_hr) != nullptr, forward, directions, call.gpu);
    };
    if (!both) return sentence(planned(1));
    const auto plan = planned(2);
    if (plan.resident) return "both directions at once, " + sentence(plan);
    return "one direction after the other, " + sentence(planned(1));
  };
  return "forward: " + way(true) + "; backward: " + way(false);
}

}  // namespace

TORCH_LIBRARY_IMPL(llmkernels_cuda, LLMKERNELS_CUDA_KEY, m) {
  m.impl("lstm_cell_fwd", lstm_cell_fwd);
  m.impl("lstm_cell_bwd", lstm_cell_bwd);
  m.impl("lstm_recurrence_fwd", recurrence_fwd);
  m.impl("lstm_recurrence_bwd", recurrence_bwd);
  m.impl("lstm_both_fwd", both_fwd);
  m.impl("lstm_both_bwd", both_bwd);
  m.impl("lstm_recurrence_way", recurrence_way);
}

}  // namespace llmkernels
