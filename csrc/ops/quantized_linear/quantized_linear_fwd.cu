// The launches of a forward, and the kernel that adds the sums of parts of K.
#include "common/cuda/launch.h"
#include "common/cuda/vec.cuh"
#include "ops/quantized_linear/quantized_linear_cuda.h"

namespace llmkernels::cuda {
namespace {

struct SplitsArgs {
  QuantizedLinearFwdParams p;
  QuantizedWorkspace work;
  int splits;
};

// One thread to an element of y; the parts in their order. Sum is float, or int32_t of int8 with rounded
// activations.
template <class T, class Sum>
__global__ void __launch_bounds__(kSplitsThreads) quantized_splits_kernel(const __grid_constant__ SplitsArgs args) {
  const QuantizedLinearFwdParams& p = args.p;
  const int64_t N = p.weight.N, size = p.M * N, index = int64_t{blockIdx.x} * kSplitsThreads + threadIdx.x;
  if (index >= size) return;
  const Sum* const partial = static_cast<const Sum*>(args.work.partial) + index;
  Sum total = 0;
  for (int split = 0; split < args.splits; ++split) total += partial[split * size];
  float y = static_cast<float>(total);
  if constexpr (std::is_same_v<Sum, int32_t>) {
    y *= args.work.x_scales[index / N] * static_cast<const float*>(p.weight.scales)[index % N];
  } else if (args.work.x_scales != nullptr) {
    y *= args.work.x_scales[index / N];
  }
  if (p.bias != nullptr) y += widen(static_cast<const T*>(p.bias)[index % N]);
  static_cast<T*>(p.y)[index] = narrow<T>(y);
}

template <class Sum>
auto choose_splits(DType dtype) {
  return dtype == DType::kFloat32   ? &quantized_splits_kernel<float, Sum>
         : dtype == DType::kFloat16 ? &quantized_splits_kernel<__half, Sum>
                                    : &quantized_splits_kernel<__nv_bfloat16, Sum>;
}

}  // namespace

const char* quantized_linear_fwd(const QuantizedLinearFwdParams& params, const QuantizedLinearPlan& plan,
                                 const QuantizedWorkspace& work, const QuantizedNorm& norm, void* stream) {
  const QuantizedLinearArgs args{params, work, norm, plan.weight_unit, plan.x_unit, group_shift(params.weight)};
  const bool rounded = plan.way == QuantizedWay::kInt8;
  const bool integers = rounded && params.weight.format == WeightFormat::kInt8;
  const char* error = rounded ? quantized_round_rows(args, stream) : nullptr;
  if (error != nullptr) return error;
  error = integers                            ? quantized_int8(args, plan, stream)
          : rounded                           ? quantized_w4a8(args, plan, stream)
          : plan.way == QuantizedWay::kMatvec ? quantized_matvec(args, plan, stream)
                                              : quantized_tokens(args, plan, stream);
  if (error != nullptr || plan.parts.splits == 1) return error;
  const auto kernel = integers ? choose_splits<int32_t>(params.dtype) : choose_splits<float>(params.dtype);
  return launch(kernel, SplitsArgs{params, work, plan.parts.splits}, plan_splits_sum(params.M, params.weight.N),
                stream);
}

}  // namespace llmkernels::cuda
