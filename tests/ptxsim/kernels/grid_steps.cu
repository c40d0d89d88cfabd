// Steps of a grid whose blocks exchange words through two buffers, one GridBarrier a step: what the recurrences of lstm
// do, without their arithmetic. Bugs by -DBUG=n; cooperative.
#include "bug.cuh"
#include "common/cuda/grid_barrier.cuh"

namespace {

namespace ptx = llmkernels::cuda::ptx;

// llmkernels::cuda::GridBarrier, line by line, to plant bugs in.
class Barrier {
 public:
  __device__ Barrier(unsigned* arrived, unsigned blocks) : arrived_(arrived), blocks_(blocks) {}
  __device__ void arrive() {
    if (!kBug<43> || target_ == 0) target_ += blocks_;
    if (!kBug<41>) __syncthreads();
    if (threadIdx.x != 0) return;
    if (kBug<40>) {
      atomicAdd(arrived_, 1u);  // releases nothing
    } else {
      ptx::red_add_release_gpu(arrived_, 1);
    }
  }
  __device__ void wait() const {
    if (threadIdx.x == 0) {
      while (static_cast<int>(load() - target_) < 0) {
      }
    }
    if (!kBug<42>) __syncthreads();
  }

 private:
  __device__ unsigned load() const {
    return kBug<44> ? *static_cast<volatile unsigned*>(arrived_) : ptx::ld_acquire_gpu(arrived_);
  }

  unsigned* arrived_;
  unsigned blocks_;
  unsigned target_ = 0;
};

template <class Grid>
__device__ void run(unsigned* exchange, unsigned* arrived, unsigned* out, int steps) {
  const unsigned words = gridDim.x * blockDim.x, own = blockIdx.x * blockDim.x + threadIdx.x;
  Grid grid(arrived, gridDim.x);
  exchange[own] = own;
  grid.arrive();
  grid.wait();
  for (int step = 0; step < steps; ++step) {
    const unsigned* from = exchange + (kBug<46> ? 0 : step % 2) * words;
    unsigned* to = exchange + (kBug<46> ? 0 : (step + 1) % 2) * words;
    unsigned sum = step;
    for (unsigned i = 0; i < words; ++i) sum = 3 * sum + from[i];  // [40] [41] [42] [43] [44] [45] [46]
    to[own] = sum ^ own;                                           // [41] [42] [43] [45] [46]
    if (kBug<45>) continue;
    grid.arrive();
    grid.wait();
  }
  out[own] = exchange[steps % 2 * words + own];
}

}  // namespace

extern "C" __global__ void grid_steps(unsigned* exchange, unsigned* arrived, unsigned* out, int steps) {
#if BUG == 0
  run<llmkernels::cuda::GridBarrier>(exchange, arrived, out, steps);
#else
  run<Barrier>(exchange, arrived, out, steps);
#endif
}
