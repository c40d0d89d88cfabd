// Dropout of a row's elements, on the device.
#pragma once

#include <type_traits>

#include "common/cuda/vec.cuh"
#include "common/random.h"

namespace llmkernels::cuda {
namespace {

// Rounded on its own: never joined with an addition.
__device__ inline float product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double product(double a, double b) { return __dmul_rn(a, b); }

// Of NormFwdParams or NormBwdParams with a seed.
template <class T>
class Dropout {
 public:
  template <class Params>
  __device__ Dropout(const Params& p, int64_t row)
      : keys_(row_keys(*p.seed, row)), threshold_(p.dropout_threshold), scale_(static_cast<Acc<T>>(p.dropout_scale)) {}

  // What becomes of `value`, element `column` of the row.
  __device__ T operator()(Acc<T> value, int64_t column) const {
    const bool keeps = random_bits(keys_, static_cast<uint32_t>(column)) >> 8 >= threshold_;
    return narrow<T>(keeps ? product(value, scale_) : Acc<T>{0});
  }

  // Vector number `index` of the row.
  template <int kVec>
  __device__ Vec<T, kVec> operator()(const Vec<T, kVec>& x, int64_t index) const {
    Vec<T, kVec> out;
#pragma unroll
    for (int j = 0; j < kVec; ++j) out.at[j] = (*this)(widen(x.at[j]), index * kVec + j);
    return out;
  }

 private:
  RowKeys keys_;
  uint32_t threshold_;
  Acc<T> scale_;
};

struct NoDropout {
  template <class Params>
  __device__ NoDropout(const Params&, int64_t) {}
};
template <class T, bool kDropout>
using DropoutIf = std::conditional_t<kDropout, Dropout<T>, NoDropout>;

}  // namespace
}  // namespace llmkernels::cuda
