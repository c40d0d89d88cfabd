// A group of threads that shares one row: a warp, or the whole block. Sums are bitwise the same for every thread of the
// group and from run to run: the order of additions depends on the size of the group only.
#pragma once

#include <cstdint>

namespace llmkernels::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarpSize = 32;
constexpr int kMostSums = 2;  // that a group forms at once

// Where word `index` of an array in shared memory lies when a gap follows every 32: threads that write vectors side by
// side and threads that read words side by side then both find 32 different banks.
__host__ __device__ constexpr int padded(int index) { return index + index / 32; }

// Each of `values` becomes its sum over the warp.
template <class Value, int kCount>
__device__ void warp_sum(Value (&values)[kCount]) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (Value& value : values) value += __shfl_xor_sync(kFullWarp, value, offset);
  }
}

template <bool kBlock, class Sum>
class RowGroup;

// One warp per row; a block holds several such groups, which never wait for each other.
template <class Sum>
class RowGroup<false, Sum> {
 public:
  __device__ int rank() const { return threadIdx.x % kWarpSize; }
  __device__ int size() const { return kWarpSize; }
  __device__ int64_t first_row() const {
    return int64_t{blockIdx.x} * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
  }
  __device__ int64_t row_step() const { return int64_t{gridDim.x} * (blockDim.x / kWarpSize); }
  template <int kCount>
  __device__ void sum(Sum (&values)[kCount]) {
    warp_sum(values);
  }
};

// One block per row. Consecutive sums alternate between two buffers, so that one barrier each is enough: whoever
// writes a buffer again has passed the barrier of the sum in between, which nobody reaches before having read it.
template <class Sum>
class RowGroup<true, Sum> {
 public:
  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return blockDim.x; }
  __device__ int64_t first_row() const { return blockIdx.x; }
  __device__ int64_t row_step() const { return gridDim.x; }
  // Each of `values` becomes its sum over the group.
  template <int kCount>
  __device__ void sum(Sum (&values)[kCount]) {
    static_assert(kCount <= kMostSums);
    __shared__ Sum of_warp[2][kMostSums][kWarpSize];
    warp_sum(values);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (threadIdx.x % kWarpSize == 0) of_warp[parity_][i][threadIdx.x / kWarpSize] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = of_warp[parity_][i][0];
      for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarpSize; ++warp) values[i] += of_warp[parity_][i][warp];
    }
    parity_ ^= 1;
  }

 private:
  int parity_ = 0;
};

}  // namespace llmkernels::cuda
