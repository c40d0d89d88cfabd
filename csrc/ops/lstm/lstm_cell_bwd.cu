#include "common/cuda/launch.h"
#include "ops/lstm/lstm_cell.cuh"
#include "ops/lstm/lstm_cuda.h"

namespace llmkernels::cuda {
namespace {

template <class T, int kVec>
__global__ void __launch_bounds__(kLSTMThreads) lstm_cell_bwd_kernel(const LSTMCellBwdParams p) {
  const int64_t vectors = p.hidden / kVec;
  for_each_unit(p.batch, vectors, [&](int64_t row, int64_t index) {
    const int64_t at = row * vectors + index;
    Vec<T, kVec> gates[4], dh{}, dc{};
#pragma unroll
    for (int q = 0; q < 4; ++q) gates[q] = load<T, kVec>(p.gates, (row * 4 + q) * vectors + index);
    const auto c = load<T, kVec>(p.c, at), next_c = load<T, kVec>(p.next_c, at);
    if (p.dh != nullptr) dh = load<T, kVec>(p.dh, at);
    if (p.dc != nullptr) dc = load<T, kVec>(p.dc, at);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const Acc<T> one{1};
      const Acc<T> i = widen(gates[0].at[j]), f = widen(gates[1].at[j]), g = widen(gates[2].at[j]),
                   o = widen(gates[3].at[j]);
      const Acc<T> arrives_h = p.dh != nullptr ? widen(dh.at[j]) : Acc<T>{0};
      const Acc<T> arrives_c = p.dc != nullptr ? widen(dc.at[j]) : Acc<T>{0};
      const Acc<T> t = tanh(widen(next_c.at[j]));
      const Acc<T> d = arrives_c + arrives_h * o * (one - t * t);
      gates[0].at[j] = narrow<T>(d * g * (i * (one - i)));
      gates[1].at[j] = narrow<T>(d * widen(c.at[j]) * (f * (one - f)));
      gates[2].at[j] = narrow<T>(d * i * (one - g * g));
      gates[3].at[j] = narrow<T>(arrives_h * t * (o * (one - o)));
      dc.at[j] = narrow<T>(d * f);
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) store(p.dgates, (row * 4 + q) * vectors + index, gates[q]);
    store(p.dlast_c, at, dc);
  });
}

template <class T, int kVec>
struct Backward {
  static auto get() { return &lstm_cell_bwd_kernel<T, kVec>; }
};

}  // namespace

const char* lstm_cell_bwd(const LSTMCellBwdParams& params, const LSTMCellPlan& plan, void* stream) {
  return launch(choose<Backward>(params.dtype, plan.wide), params, plan.launch, stream);
}

}  // namespace llmkernels::cuda
