#include "common/cuda/launch.h"
#include "ops/lstm/lstm_cell.cuh"
#include "ops/lstm/lstm_cuda.h"

namespace llmkernels::cuda {
namespace {

template <class T, int kVec>
__global__ void __launch_bounds__(kLSTMThreads) lstm_cell_fwd_kernel(const LSTMCellFwdParams p) {
  const int64_t vectors = p.hidden / kVec;
  for_each_unit(p.batch, vectors, [&](int64_t row, int64_t index) {
    Vec<T, kVec> x[4], h[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      x[q] = load<T, kVec>(p.gates_x, (row * 4 + q) * vectors + index);
      h[q] = load<T, kVec>(p.gates_h, (row * 4 + q) * vectors + index);
    }
    auto c = load<T, kVec>(p.c, row * vectors + index);
    Vec<T, kVec> next_h;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const auto sum = [&](int q) { return widen(x[q].at[j]) + widen(h[q].at[j]); };
      const Acc<T> i = sigmoid(sum(0)), f = sigmoid(sum(1)), g = tanh(sum(2)), o = sigmoid(sum(3));
      const Acc<T> next_c = f * widen(c.at[j]) + i * g;
      next_h.at[j] = narrow<T>(o * tanh(next_c));
      c.at[j] = narrow<T>(next_c);
      x[0].at[j] = narrow<T>(i);
      x[1].at[j] = narrow<T>(f);
      x[2].at[j] = narrow<T>(g);
      x[3].at[j] = narrow<T>(o);
    }
    store(p.next_h, row * vectors + index, next_h);
    store(p.next_c, row * vectors + index, c);
    if (p.gates == nullptr) return;
#pragma unroll
    for (int q = 0; q < 4; ++q) store(p.gates, (row * 4 + q) * vectors + index, x[q]);
  });
}

template <class T, int kVec>
struct Forward {
  static auto get() { return &lstm_cell_fwd_kernel<T, kVec>; }
};

}  // namespace

const char* lstm_cell_fwd(const LSTMCellFwdParams& params, const LSTMCellPlan& plan, void* stream) {
  return launch(choose<Forward>(params.dtype, plan.wide), params, plan.launch, stream);
}

}  // namespace llmkernels::cuda
