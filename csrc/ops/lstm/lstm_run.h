// The steps of a sequence on the CPU: memory, a team of threads, and what the gradient of the weights is a product with.
// For the bindings of every cell.
#pragma once

#include <cstring>

#include "ops/lstm/lstm_cpu.h"
#include "ops/lstm/lstm_torch.h"
#include "torch/cpu.h"
#include "torch/team.h"

namespace llmkernels {

// Multiplications of a step that are worth one more thread: some microseconds, a few times what the barrier takes.
constexpr int64_t kThreadWork = 65536;

class Memory {
 public:
  Memory(const cpu::LSTMLayout& l, const LSTMSteps& at, int64_t acc_bytes, bool cells, bool forward) {
    const bool inner = l.inner_operand_bytes > 0;
    const int64_t sizes[] = {l.packed ? l.hh_blocks * l.hh_panel_bytes : 0,
                             l.packed ? l.hr_blocks * l.hr_panel_bytes : 0,
                             l.operand_bytes,
                             l.operand_bytes,
                             inner ? l.inner_operand_bytes : 0,
                             cells ? at.batch * at.hidden * acc_bytes : 0,
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

// The kernels of one direction of the computation; lstm_cpu.h has their arguments.
template <class Params>
struct Sequence {
  void (*begin)(const Params&, const cpu::LSTMScratch&);
  void (*pack)(const Params&, const cpu::LSTMScratch&, bool, int64_t, int64_t);
  void (*step)(const Params&, const cpu::LSTMScratch&, bool, int64_t, bool, int64_t, int64_t);
  void (*end)(const Params&, const cpu::LSTMScratch&);
  bool forward;
};

// `gates`: of a unit; four is an LSTM, with a state c.
template <class Params>
void run(const Params& p, const Sequence<Params>& kernels, const cpu::LSTMLayout& l, int64_t gates, bool projection) {
  const bool forward = kernels.forward;
  const Memory memory(l, p.at, p.dtype == DType::kFloat64 ? 8 : 4, gates == 4, forward);
  kernels.begin(p, memory.scratch);
  const int64_t work = p.at.batch * p.at.hidden * (gates + (projection ? 1 : 0)) * p.at.size;
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
inline at::Tensor rows_before(const at::Tensor& y, const at::Tensor& h0, const Steps& steps) {
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

}  // namespace llmkernels
