// What the forward and the backward kernel of the gated family share: the activations, the walk over the elements, and
// the choice of a kernel. The maths is in gated.h.
#pragma once

#include "common/cuda/vec.cuh"
#include "ops/gated/gated.h"

namespace llmkernels::cuda {

// act(g) and its slope.
template <class Acc>
struct Activated {
  Acc value, slope;
};

template <class Acc>
__device__ Acc sigmoid(Acc x) {
  return Acc{1} / (Acc{1} + exp(-x));
}

// relu has no slope here: its gradient is chosen, not multiplied, so that Inf times zero is zero as in torch.
template <Activation kActivation, class Acc>
__device__ Activated<Acc> activated(Acc g) {
  if constexpr (kActivation == Activation::kSilu) {
    const Acc s = sigmoid(g);
    return {g * s, s * (Acc{1} + g * (Acc{1} - s))};
  } else if constexpr (kActivation == Activation::kGelu) {
    constexpr Acc kInverseSqrt2 = static_cast<Acc>(0.7071067811865476);
    constexpr Acc kInverseSqrt2Pi = static_cast<Acc>(0.3989422804014327);
    const Acc cdf = Acc{0.5} * (Acc{1} + erf(g * kInverseSqrt2));
    return {g * cdf, cdf + g * (exp(Acc{-0.5} * g * g) * kInverseSqrt2Pi)};
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    constexpr Acc kScale = static_cast<Acc>(kGeluTanhScale);
    constexpr Acc kCubic = static_cast<Acc>(kGeluTanhScale * kGeluTanhCubic);
    const Acc s = sigmoid(g * (kScale + kCubic * (g * g)));
    return {g * s, s * (Acc{1} + g * (Acc{1} - s) * (kScale + Acc{3} * kCubic * (g * g)))};
  } else {
    return {g < Acc{0} ? Acc{0} : g, Acc{1}};  // a NaN stays
  }
}

// Calls f(row, vector) for every vector of this thread. Not unrolled: a vector is 16 bytes of each tensor already, and
// kernels of single elements would spill.
template <class F>
__device__ void for_each_vector(int64_t rows, int64_t vectors, F&& f) {
  const int64_t row_step = int64_t{gridDim.y} * blockDim.y, step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; row < rows; row += row_step) {
#pragma unroll 1
    for (int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; index < vectors; index += step) f(row, index);
  }
}

// The kernel `Kernel<T, activation, elements of a vector>::get()` for a call.
template <template <class, Activation, int> class Kernel, class T>
auto choose(Activation activation, bool wide) {
  constexpr int kWide = kVectorBytes / sizeof(T);
  switch (activation) {
    case Activation::kSilu:
      return wide ? Kernel<T, Activation::kSilu, kWide>::get() : Kernel<T, Activation::kSilu, 1>::get();
    case Activation::kGelu:
      return wide ? Kernel<T, Activation::kGelu, kWide>::get() : Kernel<T, Activation::kGelu, 1>::get();
    case Activation::kGeluTanh:
      return wide ? Kernel<T, Activation::kGeluTanh, kWide>::get() : Kernel<T, Activation::kGeluTanh, 1>::get();
    case Activation::kRelu:
      break;
  }
  return wide ? Kernel<T, Activation::kRelu, kWide>::get() : Kernel<T, Activation::kRelu, 1>::get();
}

template <template <class, Activation, int> class Kernel>
auto choose(DType dtype, Activation activation, bool wide) {
  return with_type(dtype, [&](auto t) { return choose<Kernel, decltype(t)>(activation, wide); });
}

}  // namespace llmkernels::cuda
