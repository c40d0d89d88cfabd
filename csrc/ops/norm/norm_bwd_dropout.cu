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
  return with_type(params.dtype, [&](auto t) { return choose<decltype(t)>(plan, params.kind); });
}

}  // namespace

const char* norm_bwd_rows_dropout(const NormBwdParams& params, const RowPlan& plan, void* stream) {
  return launch(choose(params, plan), params, plan.launch, stream);
}

}  // namespace llmkernels::cuda
