#include "common/cuda/launch.h"
#include "ops/gated/gated.cuh"
#include "ops/gated/gated_cuda.h"

namespace llmkernels::cuda {
namespace {

template <class T, Activation kActivation, int kVec>
__global__ void __launch_bounds__(kGatedThreads) gated_fwd_kernel(const GatedFwdParams p) {
  for_each_vector(p.rows, p.cols / kVec, [&](int64_t row, int64_t index) {
    const auto gate = load<T, kVec>(static_cast<const T*>(p.gate) + row * p.gate_row_stride, index);
    const auto up = load<T, kVec>(static_cast<const T*>(p.up) + row * p.up_row_stride, index);
    Vec<T, kVec> y;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      y.at[j] = narrow<T>(activated<kActivation>(widen(gate.at[j])).value * widen(up.at[j]));
    }
    store(static_cast<T*>(p.y) + row * p.cols, index, y);
  });
}

template <class T, Activation kActivation, int kVec>
struct Forward {
  static auto get() { return &gated_fwd_kernel<T, kActivation, kVec>; }
};

}  // namespace

const char* gated_fwd(const GatedFwdParams& params, const GatedPlan& plan, void* stream) {
  return launch(choose<Forward>(params.dtype, params.activation, plan.wide), params, plan.launch, stream);
}

}  // namespace llmkernels::cuda
