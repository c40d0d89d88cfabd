#include "ops/norm/norm_fwd.cuh"

namespace llmkernels::cuda {

const char* norm_fwd(const NormFwdParams& params, const RowPlan& plan, void* stream) {
  Kernel kernel = nullptr;
  switch (params.dtype) {
    case DType::kFloat64: kernel = choose<double>(plan, params.kind); break;
    case DType::kFloat32: kernel = choose<float>(plan, params.kind); break;
    case DType::kBFloat16: kernel = choose<__nv_bfloat16>(plan, params.kind); break;
    case DType::kFloat16: kernel = choose<__half>(plan, params.kind); break;
  }
  return launch(kernel, params, plan.launch, stream);
}

}  // namespace llmkernels::cuda
