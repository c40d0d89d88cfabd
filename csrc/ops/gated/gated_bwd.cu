#include "common/cuda/launch.h"
#include "ops/gated/gated.cuh"
#include "ops/gated/gated_cuda.h"

namespace llmkernels::cuda {
namespace {

template <class T, Activation kActivation, int kVec>
__global__ void __launch_bounds__(kGatedThreads) gated_bwd_kernel(const GatedBwdParams p) {
  for_each_vector(p.rows, p.cols / kVec, [&](int64_t row, int64_t index) {
    const auto dy = load<T, kVec>(static_cast<const T*>(p.dy) + row * p.dy_row_stride, index);
    const auto gate = load<T, kVec>(static_cast<const T*>(p.gate) + row * p.gate_row_stride, index);
    const auto up = load<T, kVec>(static_cast<const T*>(p.up) + row * p.up_row_stride, index);
    Vec<T, kVec> dgate, dup;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const Acc<T> g = widen(gate.at[j]), d = widen(dy.at[j]), d_up = d * widen(up.at[j]);
      const auto act = activated<kActivation>(g);
      dup.at[j] = narrow<T>(d * act.value);
      if constexpr (kActivation == Activation::kRelu) {
        dgate.at[j] = narrow<T>(g <= Acc<T>{0} ? Acc<T>{0} : d_up);
      } else {
        dgate.at[j] = narrow<T>(d_up * act.slope);
      }
    }
    if (p.dgate != nullptr) store(static_cast<T*>(p.dgate) + row * p.grad_row_stride, index, dgate);
    if (p.dup != nullptr) store(static_cast<T*>(p.dup) + row * p.grad_row_stride, index, dup);
  });
}

template <class T, Activation kActivation, int kVec>
struct Backward {
  static auto get() { return &gated_bwd_kernel<T, kActivation, kVec>; }
};

}  // namespace

const char* gated_bwd(const GatedBwdParams& params, const GatedPlan& plan, void* stream) {
  return launch(choose<Backward>(params.dtype, params.activation, plan.wide), params, plan.launch, stream);
}

}  // namespace llmkernels::cuda
