// Both directions: a thread keeps its columns, so that their bias and their sums stay in registers, and steps over rows.
#include "common/cuda/launch.h"
#include "ops/activation/activation_cuda.h"
#include "ops/gated/gated.cuh"

namespace llmkernels::cuda {
namespace {

template <class T, int kVec>
__device__ void load_bias(const void* bias, int64_t index, Acc<T> (&out)[kVec]) {
#pragma unroll
  for (int j = 0; j < kVec; ++j) out[j] = Acc<T>{0};
  if (bias == nullptr) return;
  const auto vector = load<Acc<T>, kVec>(bias, index);
#pragma unroll
  for (int j = 0; j < kVec; ++j) out[j] = vector.at[j];
}

// Calls f(vector of columns) for those of this thread.
template <class F>
__device__ void for_each_column(int64_t vectors, F&& f) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
#pragma unroll 1
  for (int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; index < vectors; index += step) f(index);
}

template <class T, Activation kActivation, int kVec>
__global__ void __launch_bounds__(kGatedThreads) activation_fwd_kernel(const ActivationFwdParams p) {
  const int64_t first = int64_t{blockIdx.y} * blockDim.y + threadIdx.y, step = int64_t{gridDim.y} * blockDim.y;
  for_each_column(p.cols / kVec, [&](int64_t index) {
    Acc<T> bias[kVec];
    load_bias<T, kVec>(p.bias, index, bias);
#pragma unroll 1
    for (int64_t row = first; row < p.rows; row += step) {
      const auto input = load<T, kVec>(static_cast<const T*>(p.input) + row * p.input_row_stride, index);
      Vec<T, kVec> y;
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        y.at[j] = narrow<T>(activated<kActivation>(widen(input.at[j]) + bias[j]).value);
      }
      store(static_cast<T*>(p.y) + row * p.cols, index, y);
    }
  });
}

// Four blocks of a multiprocessor: ptxas otherwise squeezes one of these kernels into 32 registers, and spills.
template <class T, Activation kActivation, int kVec>
__global__ void __launch_bounds__(kGatedThreads, 4) activation_bwd_kernel(const ActivationBwdParams p) {
  const int64_t first = int64_t{blockIdx.y} * blockDim.y + threadIdx.y, step = int64_t{gridDim.y} * blockDim.y;
  for_each_column(p.cols / kVec, [&](int64_t index) {
    Acc<T> bias[kVec];
    Vec<Acc<T>, kVec> sums;
    load_bias<T, kVec>(p.bias, index, bias);
#pragma unroll
    for (int j = 0; j < kVec; ++j) sums.at[j] = Acc<T>{0};
#pragma unroll 1
    for (int64_t row = first; row < p.rows; row += step) {
      const auto dy = load<T, kVec>(static_cast<const T*>(p.dy) + row * p.dy_row_stride, index);
      const auto input = load<T, kVec>(static_cast<const T*>(p.input) + row * p.input_row_stride, index);
      Vec<T, kVec> dinput;
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const Acc<T> at = widen(input.at[j]) + bias[j], d = widen(dy.at[j]);
        Acc<T> gradient;
        if constexpr (kActivation == Activation::kRelu) {
          gradient = at <= Acc<T>{0} ? Acc<T>{0} : d;
        } else {
          gradient = d * activated<kActivation>(at).slope;
        }
        dinput.at[j] = narrow<T>(gradient);
        sums.at[j] += gradient;
      }
      if (p.dinput != nullptr) store(static_cast<T*>(p.dinput) + row * p.cols, index, dinput);
    }
    if (p.partial != nullptr) store(static_cast<Acc<T>*>(p.partial) + first * p.cols, index, sums);
  });
}

template <class T, Activation kActivation, int kVec>
struct Forward {
  static auto get() { return &activation_fwd_kernel<T, kActivation, kVec>; }
};

template <class T, Activation kActivation, int kVec>
struct Backward {
  static auto get() { return &activation_bwd_kernel<T, kActivation, kVec>; }
};

}  // namespace

const char* activation_fwd(const ActivationFwdParams& params, const GatedPlan& plan, void* stream) {
  return launch(choose<Forward>(params.dtype, params.activation, plan.wide), params, plan.launch, stream);
}

const char* activation_bwd(const ActivationBwdParams& params, const GatedPlan& plan, void* stream) {
  return launch(choose<Backward>(params.dtype, params.activation, plan.wide), params, plan.launch, stream);
}

}  // namespace llmkernels::cuda
