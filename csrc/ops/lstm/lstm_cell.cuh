// What the forward and the backward kernel of lstm_cell share. The maths is in lstm.h.
#pragma once

#include "common/cuda/vec.cuh"
#include "ops/lstm/lstm_plan.h"

namespace llmkernels::cuda {

template <class Acc>
__device__ Acc sigmoid(Acc x) {
  return Acc{1} / (Acc{1} + exp(-x));
}

// Calls f(row, vector) for every vector of this thread, of those that make up rows of `vectors` vectors.
template <class F>
__device__ void for_each_unit(int64_t rows, int64_t vectors, F&& f) {
  const int64_t total = rows * vectors, step = int64_t{gridDim.x} * blockDim.x;
#pragma unroll 1
  for (int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; index < total; index += step) {
    f(index / vectors, index % vectors);
  }
}

// The kernel `Kernel<T, units of a vector>::get()` for a call.
template <template <class, int> class Kernel, class T>
auto choose(bool wide) {
  return wide ? Kernel<T, static_cast<int>(lstm_units(sizeof(T)))>::get() : Kernel<T, 1>::get();
}

template <template <class, int> class Kernel>
auto choose(DType dtype, bool wide) {
  return with_type(dtype, [&](auto t) { return choose<Kernel, decltype(t)>(wide); });
}

}  // namespace llmkernels::cuda
