// From the facts of a plan to the instance of a kernel.
#pragma once

#include "ops/attention/attention_plan.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace llmkernels::cuda {
namespace {

// Kernel<T, kDim, kGeneral>::get() for the types and sizes that plan_attention may ask for.
template <template <class, int, bool> class Kernel, class T>
auto choose_dim(const AttentionPlan& plan) {
  constexpr bool kGeneralOnly = sizeof(T) == 4;
  if (plan.dim == 64) return plan.general ? Kernel<T, 64, true>::get() : Kernel<T, 64, kGeneralOnly>::get();
  if (plan.dim == 128) return plan.general ? Kernel<T, 128, true>::get() : Kernel<T, 128, kGeneralOnly>::get();
  return Kernel<T, 256, true>::get();
}

template <template <class, int, bool> class Kernel>
auto choose_attention(DType dtype, const AttentionPlan& plan) {
  return dtype == DType::kFloat32   ? choose_dim<Kernel, float>(plan)
         : dtype == DType::kFloat16 ? choose_dim<Kernel, __half>(plan)
                                    : choose_dim<Kernel, __nv_bfloat16>(plan);
}

// The same for a kernel that has every option always.
template <template <class, int> class Kernel, class T>
auto choose_general_dim(const AttentionPlan& plan) {
  return plan.dim == 64 ? Kernel<T, 64>::get() : plan.dim == 128 ? Kernel<T, 128>::get() : Kernel<T, 256>::get();
}
template <template <class, int> class Kernel>
auto choose_general(DType dtype, const AttentionPlan& plan) {
  return dtype == DType::kFloat32   ? choose_general_dim<Kernel, float>(plan)
         : dtype == DType::kFloat16 ? choose_general_dim<Kernel, __half>(plan)
                                    : choose_general_dim<Kernel, __nv_bfloat16>(plan);
}

}  // namespace
}  // namespace llmkernels::cuda
