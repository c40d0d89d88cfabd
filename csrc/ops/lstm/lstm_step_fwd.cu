// One step of a recurrence whose weights do not stay with the blocks, behind its product: lstm_cell with c in Acc.
#include "common/cuda/launch.h"
#include "ops/lstm/lstm_cell.cuh"
#include "ops/lstm/lstm_cuda.h"

namespace llmkernels::cuda {
namespace {

template <class T, int kVec>
__global__ void __launch_bounds__(kLSTMThreads) lstm_step_fwd_kernel(const LSTMStepFwdParams p) {
  const int64_t vectors = p.hidden / kVec;
  for_each_unit(p.rows, vectors, [&](int64_t row, int64_t index) {
    const int64_t at = row * vectors + index;
    Vec<T, kVec> x[4], h[4], m;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      x[q] = load<T, kVec>(p.gates_x, (row * 4 + q) * vectors + index);
      h[q] = load<T, kVec>(p.gates_h, (row * 4 + q) * vectors + index);
    }
    auto c = load<Acc<T>, kVec>(p.c, at);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const auto sum = [&](int q) { return widen(x[q].at[j]) + widen(h[q].at[j]); };
      const Acc<T> i = sigmoid(sum(0)), f = sigmoid(sum(1)), g = tanh(sum(2)), o = sigmoid(sum(3));
      c.at[j] = f * c.at[j] + i * g;
      m.at[j] = narrow<T>(o * tanh(c.at[j]));
      x[0].at[j] = narrow<T>(i);
      x[1].at[j] = narrow<T>(f);
      x[2].at[j] = narrow<T>(g);
      x[3].at[j] = narrow<T>(o);
    }
    store(p.c, at, c);
    store(p.m, at, m);
    if (p.cells != nullptr) store(p.cells, at, c);
    if (p.gates == nullptr) return;
#pragma unroll
    for (int q = 0; q < 4; ++q) store(p.gates, (row * 4 + q) * vectors + index, x[q]);
  });
}

template <class T, int kVec>
struct Forward {
  static auto get() { return &lstm_step_fwd_kernel<T, kVec>; }
};

}  // namespace

const char* lstm_step_fwd(const LSTMStepFwdParams& params, const LSTMCellPlan& plan, void* stream) {
  return launch(choose<Forward>(params.dtype, plan.wide), params, plan.launch, stream);
}

}  // namespace llmkernels::cuda
