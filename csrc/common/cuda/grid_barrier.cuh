// A barrier of the blocks of a cooperative launch, all of them or a part, for kernels that go through many steps.
#pragma once

#include "common/cuda/ptx.cuh"

namespace llmkernels::cuda {

// Between `arrive` and `wait` a block does what the others need not see. `arrived` is a word of global memory that is
// zero when the kernel starts and that only ever grows: no block can overtake another by more than one round. Parts of
// a grid have a word of their own each.
class GridBarrier {
 public:
  // `blocks` is how many arrive in a round.
  __device__ GridBarrier(unsigned* arrived, unsigned blocks) : arrived_(arrived), blocks_(blocks) {}

  // What any thread of this block did before is visible to every block behind the same round's `wait`.
  __device__ void arrive() {
    target_ += blocks_;
    __syncthreads();
    if (threadIdx.x == 0) ptx::red_add_release_gpu(arrived_, 1);
  }
  __device__ void wait() const {
    // The difference has the right sign also where the count wraps around.
    if (threadIdx.x == 0) {
      while (static_cast<int>(ptx::ld_acquire_gpu(arrived_) - target_) < 0) {
      }
    }
    __syncthreads();
  }

 private:
  unsigned* arrived_;
  unsigned blocks_;
  unsigned target_ = 0;
};

}  // namespace llmkernels::cuda
