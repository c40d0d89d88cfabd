// As micro.cu, with Hopper's instructions.
#include "common/cuda/wgmma.cuh"

using namespace llmkernels::cuda;

#define MICRO(name) extern "C" __global__ void name(const unsigned* in, unsigned* out)

namespace {

// 64 x 16 by 16 x 8 out of shared memory that ordinary stores filled: in [64, 8] and [8, 8] words, pairs of bfloat16;
// out [64, 8] floats. One warpgroup.
__device__ void product(const unsigned* in, unsigned* out, bool fenced) {
  __shared__ __align__(128) unsigned a[64 * 8], b[8 * 8];
  // Without a swizzle an operand is made of blocks of 8 rows x 16 bytes; here the two of a row are neighbours.
  const auto place = [](int row, int word) { return row / 8 * 64 + word / 4 * 32 + row % 8 * 4 + word % 4; };
  for (int i = threadIdx.x; i < 64 * 8; i += 128) a[place(i / 8, i % 8)] = in[i];
  for (int i = threadIdx.x; i < 8 * 8; i += 128) b[place(i / 8, i % 8)] = in[64 * 8 + i];
  if (fenced) ptx::fence_proxy_async();
  __syncthreads();
  float sums[4] = {};
  const auto descriptor = [](const unsigned* tile) {
    return ptx::wgmma_descriptor(ptx::shared_address(tile), 128, 256, ptx::Swizzle::kNone);
  };
  ptx::wgmma_fence();
  ptx::wgmma_m64k16<__nv_bfloat16, 8>(sums, descriptor(a), descriptor(b), 0);  // [wgmma_without_fence]
  ptx::wgmma_commit();
  ptx::wgmma_wait_all(sums);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  for (int e = 0; e < 4; ++e) out[(row + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = __float_as_uint(sums[e]);
}

// Two blocks of a warp in a cluster: each reads what the other wrote into its own shared memory.
__device__ void exchange(const unsigned* in, unsigned* out, bool synchronised) {
  __shared__ unsigned values[32];
  const int i = threadIdx.x;
  values[i] = in[blockIdx.x * 32 + i];
  ptx::cluster_arrive();
  if (synchronised) ptx::cluster_wait();
  const uint32_t remote = ptx::mapa(ptx::shared_address(values + (i ^ 1)), ptx::cluster_rank() ^ 1);
  out[blockIdx.x * 32 + i] = ptx::load_cluster(remote);  // [cluster_without_wait]
  if (!synchronised) ptx::cluster_wait();
  ptx::cluster_arrive();  // nobody's shared memory goes before it was read
  ptx::cluster_wait();
}

}  // namespace

// ---- To be reported ----

MICRO(wgmma_without_fence) { product(in, out, false); }
MICRO(cluster_without_wait) { exchange(in, out, false); }
MICRO(mbarrier_over_arrival) {  // a warp at a barrier for 16
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(ptx::shared_address(&barrier), 16);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(ptx::shared_address(&barrier), 16);  // bytes that never come: the phase stays open
  }
  __syncwarp();
  if (threadIdx.x > 0) ptx::mbarrier_arrive(ptx::shared_address(&barrier));  // [mbarrier_over_arrival]
  out[threadIdx.x] = in[threadIdx.x];
}
MICRO(mbarrier_uninitialised) {
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) ptx::mbarrier_arrive(ptx::shared_address(&barrier));  // [mbarrier_uninitialised]
  out[threadIdx.x] = in[threadIdx.x];
}

// ---- Legal ----

MICRO(wgmma_with_fence) { product(in, out, true); }
MICRO(cluster_exchange) { exchange(in, out, true); }
MICRO(cluster_push) {  // the same, but each writes into the other's and tells it by an mbarrier there
  __shared__ unsigned values[32];
  __shared__ uint64_t barrier;
  const int i = threadIdx.x;
  const uint32_t mine = ptx::shared_address(&barrier), other = ptx::cluster_rank() ^ 1;
  if (i == 0) {
    ptx::mbarrier_init(mine, 32);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  ptx::store_cluster(ptx::mapa(ptx::shared_address(values + (i ^ 1)), other), in[blockIdx.x * 32 + i]);
  ptx::mbarrier_arrive_cluster(ptx::mapa(mine, other));
  ptx::mbarrier_wait_cluster(mine, 0);
  out[blockIdx.x * 32 + i] = values[i];
}
