// c = a * b^T of 8-bit integers with 32-bit sums: tiles of 64 x 64, steps of 64 along k, three stages of cp.async. K is
// a multiple of 16.
#include "bug.cuh"
#include "common/cuda/ptx.cuh"

namespace {

using namespace llmkernels::cuda;

constexpr int kThreads = 128;  // 2 x 2 warps of 32 x 32
constexpr int kTile = 64;      // rows of a, rows of b, and bytes of k in a stage
constexpr int kStages = 3;
constexpr int kTileBytes = kTile * kTile;

// Byte offset of 16 bytes of a row of 64: two rows fill all banks, so it takes the number of the pair of rows to put
// the eight rows that ldmatrix reads into different ones.
__device__ uint32_t swizzled(int row, int chunk) { return (row * 4 + (chunk ^ (row / 2 % 4))) * 16; }

__device__ void fetch(uint32_t tile, const int8_t* matrix, int first_row, int rows, int first_k, int k) {
#pragma unroll
  for (int i = 0; i < kTileBytes / 16 / kThreads; ++i) {
    const int row = (threadIdx.x + i * kThreads) / 4, chunk = threadIdx.x % 4;
    const bool inside = first_row + row < rows && first_k + chunk * 16 < k;
    const int8_t* source = matrix + (int64_t{first_row} + row) * k + first_k + chunk * 16;
    ptx::cp_async<16>(tile + swizzled(row, chunk), inside ? source : matrix, inside ? 16 : 0);  // [21]
  }
}

}  // namespace

// a [m, k], b [n, k], c [m, n]. Grid (n / 64, m / 64), rounded up.
extern "C" __global__ void __launch_bounds__(kThreads)
    int8_gemm(const int8_t* a, const int8_t* b, int32_t* c, int m, int n, int k) {
  __shared__ __align__(128) unsigned char tiles[kStages][2][kTileBytes];
  const int lane = threadIdx.x % 32, warp_m = threadIdx.x / 64 * 32, warp_n = threadIdx.x / 32 % 2 * 32;
  const int first_m = blockIdx.y * kTile, first_n = blockIdx.x * kTile;
  const int steps = (k + kTile - 1) / kTile;

  const auto fetch_stage = [&](int step) {
    if (step < steps) {
      fetch(ptx::shared_address(tiles[step % kStages][0]), a, first_m, m, step * kTile, k);
      fetch(ptx::shared_address(tiles[step % kStages][1]), b, first_n, n, step * kTile, k);
    }
    ptx::cp_async_commit();
  };

  for (int step = 0; step < kStages - 1; ++step) fetch_stage(step);
  int32_t sums[2][4][4] = {};
  for (int step = 0; step < steps; ++step) {
    // The stage that is fetched is the one of step - 1: only behind the barrier is nobody reading it.
    if constexpr (kBug<21>) fetch_stage(step + kStages - 1);
    ptx::cp_async_wait<kBug<21> ? kStages - 1 : kStages - 2>();
    __syncthreads();
    if constexpr (!kBug<21>) fetch_stage(step + kStages - 1);

    const uint32_t a_tile = ptx::shared_address(tiles[step % kStages][0]);
    const uint32_t b_tile = ptx::shared_address(tiles[step % kStages][1]);
#pragma unroll
    for (int chunk = 0; chunk < kTile / 16; chunk += 2) {
      uint32_t fragments_a[2][4], fragments_b[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ptx::ldmatrix_x4(fragments_a[i], a_tile + swizzled(warp_m + i * 16 + lane % 16, chunk + lane / 16));  // [21]
        ptx::ldmatrix_x4(fragments_b[i],  // [21]
                         b_tile + swizzled(warp_n + i * 16 + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));  // [21]
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t b_pair[2] = {fragments_b[j / 2][j % 2 * 2], fragments_b[j / 2][j % 2 * 2 + 1]};
          ptx::mma_m16n8k32_s8(sums[i][j], fragments_a[i], b_pair);
        }
      }
    }
  }
  ptx::cp_async_wait<0>();

#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = first_m + warp_m + i * 16 + lane / 4 + e / 2 * 8;
        const int col = first_n + warp_n + j * 8 + lane % 4 * 2 + e % 2;
        if (row < m && col < n) c[int64_t{row} * n + col] = sums[i][j][e];
      }
    }
  }
}
