// The backward of lstm_step_fwd.cu: lstm_cell's with c and its gradient in Acc.
#include "common/cuda/launch.h"
#include "ops/lstm/lstm_cell.cuh"
#include "ops/lstm/lstm_cuda.h"

namespace llmkernels::cuda {
namespace {

template <class T, int kVec>
__global__ void __launch_bounds__(kLSTMThreads) lstm_step_bwd_kernel(const LSTMStepBwdParams p) {
  const int64_t vectors = p.hidden / kVec;
  for_each_unit(p.rows, vectors, [&](int64_t row, int64_t index) {
    const int64_t at = row * vectors + index;
    Vec<T, kVec> gates[4], dy{}, m;
    Vec<Acc<T>, kVec> before, dcells{};
#pragma unroll
    for (int q = 0; q < 4; ++q) gates[q] = load<T, kVec>(p.gates, (row * 4 + q) * vectors + index);
    const auto dm = load<T, kVec>(p.dm, at);
    const auto cells = load<Acc<T>, kVec>(p.cells, at);
    auto dc = load<Acc<T>, kVec>(p.dc, at);
    if (p.dy != nullptr) dy = load<T, kVec>(p.dy, at);
    if (p.dcells != nullptr) dcells = load<Acc<T>, kVec>(p.dcells, at);
    load_widened<T, kVec>(row < p.known ? p.before : p.c0, row < p.known, at, before.at);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const Acc<T> one{1};
      const Acc<T> i = widen(gates[0].at[j]), f = widen(gates[1].at[j]), g = widen(gates[2].at[j]),
                   o = widen(gates[3].at[j]);
      const Acc<T> dh = p.dy != nullptr ? widen(dm.at[j]) + widen(dy.at[j]) : widen(dm.at[j]);
      const Acc<T> arrives_c = p.dcells != nullptr ? dc.at[j] + dcells.at[j] : dc.at[j];
      const Acc<T> t = tanh(cells.at[j]), d = arrives_c + dh * o * (one - t * t);
      gates[0].at[j] = narrow<T>(d * g * (i * (one - i)));
      gates[1].at[j] = narrow<T>(d * before.at[j] * (f * (one - f)));
      gates[2].at[j] = narrow<T>(d * i * (one - g * g));
      gates[3].at[j] = narrow<T>(dh * t * (o * (one - o)));
      dc.at[j] = d * f;
      m.at[j] = narrow<T>(o * t);
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) store(p.dgates, (row * 4 + q) * vectors + index, gates[q]);
    store(p.dc, at, dc);
    if (p.m != nullptr) store(p.m, at, m);
  });
}

template <class T, int kVec>
struct Backward {
  static auto get() { return &lstm_step_bwd_kernel<T, kVec>; }
};

}  // namespace

const char* lstm_step_bwd(const LSTMStepBwdParams& params, const LSTMCellPlan& plan, void* stream) {
  return launch(choose<Backward>(params.dtype, plan.wide), params, plan.launch, stream);
}

}  // namespace llmkernels::cuda
