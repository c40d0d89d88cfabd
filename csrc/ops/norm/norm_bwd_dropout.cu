// The backward's pass over the rows with dropout, in a source of its own: the kernels compile side by side.
#include "ops/norm/norm_bwd.cuh"

namespace llmkernels::cuda {
namespace {

template <class T>
Kernel choose(const RowPlan& plan, NormKind kind) {
  return kind == NormKind::kLayerNorm ? choose_rows<T, NormKind::kLayerNorm, true>(plan)
                                      : choose_rows<T, NormKind::kRmsNorm, true>(plan);
}

Kernel choose(const NormBwdParams& params, const RowPlan& plan) {
  switch (params.dtype) {
    case DType::kFloat64: return choose<double>(plan, params.kind);
    case DType::kFloat32: return choose<float>(plan, params.kind);
    case DType::kBFloat16: return choose<__nv_bfloat16>(plan, params.kind);
    case DType::kFloat16: return choose<__half>(plan, params.kind);
  }
  return nullptr;
}

}  // namespace

const char* norm_bwd_rows_dropout(const NormBwdParams& params, const RowPlan& plan, void* stream) {
  return launch(choose(params, plan), params, plan.launch, stream);
}

}  // namespace llmkernels::cuda
