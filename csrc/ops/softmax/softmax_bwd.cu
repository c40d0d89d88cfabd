#include "common/cuda/launch.h"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vec.cuh"
#include "ops/softmax/softmax_cuda.h"

namespace llmkernels::cuda {
namespace {

template <class A>
__device__ bool is_nothing(A y) {
  return y == static_cast<A>(__int_as_float(0xff800000));
}

// A row is read twice, the second time from a cache: for its sum, and for its result.
template <class T, int kVec, bool kBlock>
__global__ void __launch_bounds__(kBlock ? kSoftmaxBlockThreads : kSoftmaxWarpThreads)
    softmax_bwd_kernel(const SoftmaxBwdParams p) {
  using A = Acc<T>;
  RowGroup<kBlock, A> group;
  const int64_t vectors = p.cols / kVec;
  const A scale = static_cast<A>(p.scale);
  for (int64_t row = group.first_row(); row < p.rows; row += group.row_step()) {
    const T* dy = static_cast<const T*>(p.dy) + row * p.dy_row_stride;
    const T* y = static_cast<const T*>(p.y) + row * p.y_row_stride;
    A total[1] = {0};
#pragma unroll 1
    for (int64_t index = group.rank(); index < vectors; index += group.size()) {
      const auto d = load<T, kVec>(dy, index), v = load<T, kVec>(y, index);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const A value = widen(v.at[j]), grad = widen(d.at[j]);
        total[0] += p.log ? (is_nothing(value) ? A{0} : grad) : grad * value;
      }
    }
    group.sum(total);
#pragma unroll 1
    for (int64_t index = group.rank(); index < vectors; index += group.size()) {
      const auto d = load<T, kVec>(dy, index), v = load<T, kVec>(y, index);
      Vec<A, kVec> ds;
      Vec<T, kVec> dx;
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const A value = widen(v.at[j]), grad = widen(d.at[j]);
        if (p.log) {
          ds.at[j] = is_nothing(value) ? A{0} : grad - exp(value) * total[0];
        } else {
          ds.at[j] = value * (grad - total[0]);
        }
        dx.at[j] = narrow<T>(ds.at[j] * scale);
      }
      if (p.dx != nullptr) store(static_cast<T*>(p.dx) + row * p.cols, index, dx);
      if (p.ds != nullptr) store(static_cast<A*>(p.ds) + row * p.cols, index, ds);
    }
  }
}

using Kernel = void (*)(SoftmaxBwdParams);

template <class T>
Kernel choose(const SoftmaxPlan& plan) {
  constexpr int kWide = kVectorBytes / sizeof(T);
  if (plan.wide) return plan.block ? softmax_bwd_kernel<T, kWide, true> : softmax_bwd_kernel<T, kWide, false>;
  return plan.block ? softmax_bwd_kernel<T, 1, true> : softmax_bwd_kernel<T, 1, false>;
}

}  // namespace

const char* softmax_bwd(const SoftmaxBwdParams& params, const SoftmaxPlan& plan, void* stream) {
  const Kernel kernel = with_type(params.dtype, [&](auto t) { return choose<decltype(t)>(plan); });
  return launch(kernel, params, plan.launch, stream);
}

}  // namespace llmkernels::cuda
