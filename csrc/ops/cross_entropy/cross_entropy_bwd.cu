#include "common/cuda/launch.h"
#include "ops/cross_entropy/cross_entropy.cuh"
#include "ops/cross_entropy/cross_entropy_cuda.h"

namespace llmkernels::cuda {
namespace {

// Blocks of one row, if there are several (blockIdx.y), take its vectors in turns.
template <class T, int kVec, bool kBlock>
__global__ void __launch_bounds__(cross_entropy_threads(kBlock), kBlock ? 1 : 4)
    cross_entropy_bwd_kernel(const CrossEntropyBwdParams p) {
  using A = Acc<T>;
  const RowGroup<kBlock, A> group;
  const A* stats = static_cast<const A*>(p.stats);
  const int64_t first = int64_t{blockIdx.y} * group.size() + group.rank(), step = int64_t{gridDim.y} * group.size();
  for (int64_t number = group.first_row(); number < p.rows; number += group.row_step()) {
    const Row<T, kVec> row(p, number);
    row.store_gradient(stats[kStatMax * p.rows + number], stats[kStatLogSum * p.rows + number],
                       stats[kStatMass * p.rows + number], first, step);
  }
}

template <class T, int kVec, bool kBlock>
struct Backward {
  static auto get() { return &cross_entropy_bwd_kernel<T, kVec, kBlock>; }
};

}  // namespace

const char* cross_entropy_bwd(const CrossEntropyBwdParams& params, const CrossEntropyPlan& plan, void* stream) {
  return launch(choose<Backward>(params.dtype, plan), params, plan.launch, stream);
}

}  // namespace llmkernels::cuda
