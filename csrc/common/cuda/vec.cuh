// Vectors of elements moved as one load or store, and conversions written out so that they mean the same under every
// set of compiler flags.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace llmkernels::cuda {

constexpr int kVectorBytes = 16;  // the widest load of one thread

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
// The type of statistics and sums over T.
template <class T>
using Acc = typename AccOf<T>::type;

__device__ inline double widen(double value) { return value; }
__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(__half value) { return __half2float(value); }

template <class T>
__device__ T narrow(Acc<T> value);  // rounded to nearest, ties to even
template <>
__device__ inline double narrow<double>(double value) {
  return value;
}
template <>
__device__ inline float narrow<float>(float value) {
  return value;
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline __half narrow<__half>(float value) {
  return __float2half_rn(value);
}

// f(T{}) for an element type: how a host chooses among the kernels of each.
template <class F>
auto with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(__nv_bfloat16{});
    case DType::kFloat16:
      return f(__half{});
    case DType::kFloat32:
      break;
  }
  return f(float{});
}

// kSize elements of T; 16 bytes of them are one instruction.
template <class T, int kSize>
struct alignas(sizeof(T) * kSize < kVectorBytes ? sizeof(T) * kSize : kVectorBytes) Vec {
  T at[kSize];
};

// Vector number `index` of an array that is aligned to the vector.
template <class T, int kSize>
__device__ Vec<T, kSize> load(const void* base, int64_t index) {
  return static_cast<const Vec<T, kSize>*>(base)[index];
}

template <class T, int kSize>
__device__ void store(void* base, int64_t index, const Vec<T, kSize>& value) {
  static_cast<Vec<T, kSize>*>(base)[index] = value;
}

// Makes the compiler forget what it knows of a vector: without this it keeps the widened copy of one pass for the next,
// in twice the registers, and spills.
template <class T, int kSize>
__device__ void forget(Vec<T, kSize>& vector) {
  struct Words {
    unsigned at[sizeof(Vec<T, kSize>) / 4];
  };
  static_assert(sizeof(Words) == sizeof(vector));
  Words words;
  memcpy(&words, &vector, sizeof(words));
#pragma unroll
  for (unsigned& word : words.at) asm volatile("" : "+r"(word));
  memcpy(&vector, &words, sizeof(words));
}

// The same, widened, from an array that is of type T or, if `wide`, of type Acc<T>: an uniform branch is cheaper than
// twice as many kernels.
template <class T, int kSize>
__device__ void load_widened(const void* base, bool wide, int64_t index, Acc<T> (&out)[kSize]) {
  if (wide) {
    const auto vector = load<Acc<T>, kSize>(base, index);
#pragma unroll
    for (int j = 0; j < kSize; ++j) out[j] = vector.at[j];
  } else {
    const auto vector = load<T, kSize>(base, index);
#pragma unroll
    for (int j = 0; j < kSize; ++j) out[j] = widen(vector.at[j]);
  }
}

}  // namespace llmkernels::cuda
