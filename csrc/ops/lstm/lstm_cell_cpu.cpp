// lstm_cell on the CPU, compiled once per instruction set: all of a step but its products.
#include "ops/lstm/lstm_cpu.h"
#include "common/cpu/map.h"
#include "ops/lstm/lstm_step.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

template <class T>
void fwd_units(const LSTMCellFwdParams& p, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  const int64_t H = p.hidden;
  for_each_part(H, begin, end, [&](int64_t row, int64_t first, int64_t stop) {
    const T* gates_x = static_cast<const T*>(p.gates_x) + row * 4 * H;
    const T* gates_h = static_cast<const T*>(p.gates_h) + row * 4 * H;
    T* gates = p.gates != nullptr ? static_cast<T*>(p.gates) + row * 4 * H : nullptr;
    const T* c = static_cast<const T*>(p.c) + row * H;
    T* next_h = static_cast<T*>(p.next_h) + row * H;
    T* next_c = static_cast<T*>(p.next_c) + row * H;
    for_each_vector<Acc>(first, stop, [&](int64_t j, auto part) {
      Vec<Acc> sums[4];
      for (int q = 0; q < 4; ++q) sums[q] = part.load(gates_x + q * H + j) + part.load(gates_h + q * H + j);
      const StepState<Acc> s = step_forward<T>(sums, part.load(c + j));
      part.store(next_h + j, s.m);
      part.store(next_c + j, s.c);
      for (int q = 0; q < 4 && gates != nullptr; ++q) part.store(gates + q * H + j, s.gates[q]);
    });
  });
}

template <class T>
void bwd_units(const LSTMCellBwdParams& p, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  const int64_t H = p.hidden;
  for_each_part(H, begin, end, [&](int64_t row, int64_t first, int64_t stop) {
    const T* dh = p.dh != nullptr ? static_cast<const T*>(p.dh) + row * H : nullptr;
    const T* dc = p.dc != nullptr ? static_cast<const T*>(p.dc) + row * H : nullptr;
    const T* gates = static_cast<const T*>(p.gates) + row * 4 * H;
    const T* c = static_cast<const T*>(p.c) + row * H;
    const T* next_c = static_cast<const T*>(p.next_c) + row * H;
    T* dgates = static_cast<T*>(p.dgates) + row * 4 * H;
    T* dlast_c = static_cast<T*>(p.dlast_c) + row * H;
    for_each_vector<Acc>(first, stop, [&](int64_t j, auto part) {
      Vec<Acc> active[4];
      for (int q = 0; q < 4; ++q) active[q] = part.load(gates + q * H + j);
      const StepGradient<Acc> s =
          step_backward<T>(active, part.load(c + j), part.load(next_c + j), dh != nullptr ? part.load(dh + j) : Vec<Acc>{},
                           dc != nullptr ? part.load(dc + j) : Vec<Acc>{});
      for (int q = 0; q < 4; ++q) part.store(dgates + q * H + j, s.dgates[q]);
      part.store(dlast_c + j, s.dc);
    });
  });
}

}  // namespace

void lstm_cell_fwd(const LSTMCellFwdParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto t) { fwd_units<decltype(t)>(p, begin, end); });
}

void lstm_cell_bwd(const LSTMCellBwdParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto t) { bwd_units<decltype(t)>(p, begin, end); });
}

}  // namespace llmkernels::cpu::CPU_CAPABILITY
