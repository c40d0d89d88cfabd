// The lstm family for CPU tensors: a team of threads for the steps of a sequence, kernels compiled for this CPU's
// instruction set.
#include <torch/library.h>

#include <cstring>

#include "common/cpu/isa.h"
#include "ops/lstm/lstm_cpu.h"
#include "ops/lstm/lstm_torch.h"
#include "torch/cpu.h"
#include "torch/product.h"
#include "torch/team.h"

namespace llmkernels {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Multiplications of a step that are worth one more thread: some microseconds, a few times what the barrier takes.
constexpr int64_t kThreadWork = 65536;

class Memory {
 public:
  Memory(const cpu::LSTMLayout& l, const LSTMSteps& at, int64_t acc_bytes, bool forward) {
    const bool inner = l.inner_operand_bytes > 0;
    const int64_t sizes[] = {l.packed ? l.hh_blocks * l.hh_panel_bytes : 0,
                             l.packed ? l.hr_blocks * l.hr_panel_bytes : 0,
                             l.operand_bytes,
                             l.operand_bytes,
                             inner ? l.inner_operand_bytes : 0,
                             at.batch * at.hidden * acc_bytes,
                             forward ? 0 : at.batch * at.size * acc_bytes};
    int64_t total = 0;
    for (const int64_t size : sizes) total += rounded(size);
    owner_ = empty({total}, at::TensorOptions().dtype(at::kByte));
    char* at_byte = static_cast<char*>(owner_.data_ptr());
    void** const places[] = {&scratch.hh_panels, &scratch.hr_panels, &scratch.operand[0], &scratch.operand[1],
                             &scratch.inner,     &scratch.c,         &scratch.dh};
    for (size_t i = 0; i < std::size(sizes); ++i) {
      *places[i] = at_byte;
      at_byte += rounded(sizes[i]);
    }
  }

  cpu::LSTMScratch scratch{};

 private:
  static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  at::Tensor owner_;
};

// The kernels of one direction of the computation.
template <class Params>
struct Sequence {
  void (*begin)(const Params&, const cpu::LSTMScratch&);
  void (*pack)(const Params&, const cpu::LSTMScratch&, bool, int64_t, int64_t);
  void (*step)(const Params&, const cpu::LSTMScratch&, bool, int64_t, bool, int64_t, int64_t);
  void (*end)(const Params&, const cpu::LSTMScratch&);
  bool forward;
};

template <class Params>
void run(const Params& p, const Sequence<Params>& kernels) {
  const bool projection = p.w_hr != nullptr, forward = kernels.forward;
  const cpu::LSTMLayout l = LLMKERNELS_CPU_DISPATCH(lstm_layout)(p.dtype, p.at, projection, forward);
  const Memory memory(l, p.at, p.dtype == DType::kFloat64 ? 8 : 4, forward);
  kernels.begin(p, memory.scratch);
  const int64_t work = p.at.batch * p.at.hidden * (4 * p.at.size + (projection ? p.at.size : 0));
  const int64_t threads = std::min((work + kThreadWork - 1) / kThreadWork, l.hh_blocks);
  with_team(threads, [&](int64_t thread, int64_t team, auto&& wait) {
    // A thread keeps its blocks for all steps: their panels stay in its cache.
    const auto share = [&](int64_t blocks, int64_t of) { return blocks * of / team; };
    const int64_t hh[] = {share(l.hh_blocks, thread), share(l.hh_blocks, thread + 1)};
    const int64_t hr[] = {share(l.hr_blocks, thread), share(l.hr_blocks, thread + 1)};
    if (l.packed) {
      kernels.pack(p, memory.scratch, false, hh[0], hh[1]);
      if (projection) kernels.pack(p, memory.scratch, true, hr[0], hr[1]);
    }
    const int64_t first = forward ? 0 : p.at.steps - 1, behind = forward ? p.at.steps : -2;
    for (int64_t step = first; step != behind; step += forward ? 1 : -1) {
      kernels.step(p, memory.scratch, l.packed, step, false, hh[0], hh[1]);
      wait();
      if (!projection || step < 0) continue;
      kernels.step(p, memory.scratch, l.packed, step, true, hr[0], hr[1]);
      wait();
    }
  });
  kernels.end(p, memory.scratch);
}

// The rows of h before every step: what the gradient of w_hh is a product with.
at::Tensor rows_before(const at::Tensor& y, const at::Tensor& h0, const Steps& steps) {
  const LSTMSteps& at = steps.at();
  at::Tensor before = steps.gaps() ? at::zeros(y.sizes(), y.options()) : empty(y.sizes(), y.options());
  const int64_t row_bytes = at.size * y.element_size();
  char* to = static_cast<char*>(before.data_ptr());
  const char* from = static_cast<const char*>(y.data_ptr());
  const char* start = static_cast<const char*>(h0.data_ptr());
  at::parallel_for(0, at.steps, std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, at.batch * at.size)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t step = begin; step < end; ++step) {
                       for (int64_t b = 0; b < at.count[step]; ++b) {
                         const int64_t row = steps.before(step, b);
                         std::memcpy(to + (at.first[step] + b) * row_bytes,
                                     row >= 0 ? from + row * row_bytes : start + b * row_bytes, row_bytes);
                       }
                     }
                   });
  return before;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> recurrence_fwd(
    const at::Tensor& gates_x, const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_hh,
    const OptionalTensor& w_hr, const OptionalTensor& batch_sizes, bool reverse, bool save) {
  return lstm_fwd_call(gates_x, h0, c0, w_hh, get(w_hr), get(batch_sizes), reverse, save, [](const LSTMFwdParams& p) {
    run(p, Sequence<LSTMFwdParams>{LLMKERNELS_CPU_DISPATCH(lstm_fwd_begin), LLMKERNELS_CPU_DISPATCH(lstm_fwd_pack),
                                   LLMKERNELS_CPU_DISPATCH(lstm_fwd_step), LLMKERNELS_CPU_DISPATCH(lstm_fwd_end),
                                   true});
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
        run(p, Sequence<LSTMBwdParams>{LLMKERNELS_CPU_DISPATCH(lstm_bwd_begin), LLMKERNELS_CPU_DISPATCH(lstm_bwd_pack),
                                       LLMKERNELS_CPU_DISPATCH(lstm_bwd_step), LLMKERNELS_CPU_DISPATCH(lstm_bwd_end),
                                       false});
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
  m.impl("lstm_recurrence_fwd", recurrence_fwd);
  m.impl("lstm_recurrence_bwd", recurrence_bwd);
}

}  // namespace llmkernels
