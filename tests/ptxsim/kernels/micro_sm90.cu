// As micro.cu, with Hopper's instructions.
#include "common/cuda/wgmma.cuh"

using namespace llmkernels::cuda;

#define MICRO(name) extern "C" __global__ void name(const unsigned* in, unsigned* out)
#define MICRO_TMA(name) \
  extern "C" __global__ void name(const __grid_constant__ CUtensorMap map, const unsigned* in, unsigned* out)

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

// Two warps: one fetches rows of 32 words, 4 at a time, through two stages; the other adds them up with ordinary loads.
// in [32, 32] by way of the map, out [8, 32].
__device__ void add_rows(const CUtensorMap* map, unsigned* out, bool waits) {
  constexpr int kStages = 2, kSteps = 8;
  __shared__ __align__(128) unsigned rows[kStages][4][32];
  __shared__ uint64_t full[kStages], empty[kStages];
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(ptx::shared_address(full + i), 1);
      ptx::mbarrier_init(ptx::shared_address(empty + i), 32);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int step = 0; step < kSteps; ++step) {
    const int stage = step % kStages, parity = step / kStages % 2;
    const uint32_t there = ptx::shared_address(full + stage), read = ptx::shared_address(empty + stage);
    if (threadIdx.x == 0) {
      ptx::mbarrier_wait(read, parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(there, sizeof(rows[0]));
      ptx::tma_load<2>(ptx::shared_address(rows[stage]), map, there, {0, step * 4});
    } else if (threadIdx.x >= 32) {
      if (waits) ptx::mbarrier_wait(there, parity);
      unsigned sum = 0;
      for (int i = 0; i < 4; ++i) sum += rows[stage][i][lane];  // [tma_load_without_wait]
      out[step * 32 + lane] = sum;
      ptx::mbarrier_arrive(read);
    }
  }
}

// A warp writes two boxes of a row of 32 words out of the same place. in [2, 32]; the map's tensor likewise.
__device__ void store_rows(const CUtensorMap* map, const unsigned* in, bool fenced, bool waits) {
  __shared__ __align__(128) unsigned row[32];
  for (int i = 0; i < 2; ++i) {
    row[threadIdx.x] = in[i * 32 + threadIdx.x];  // [tma_store_without_wait]
    if (fenced) ptx::fence_proxy_async();
    __syncwarp();
    if (threadIdx.x == 0) {
      ptx::tma_store<2>(map, ptx::shared_address(row), {0, i});  // [tma_store_without_fence]
      ptx::bulk_commit();
      if (waits) ptx::bulk_wait_read<0>();
    }
    __syncwarp();
  }
  if (threadIdx.x == 0) ptx::bulk_wait<0>();
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
MICRO_TMA(tma_load_without_wait) { add_rows(&map, out, false); }
MICRO_TMA(tma_store_without_fence) { store_rows(&map, in, false, true); }
MICRO_TMA(tma_store_without_wait) { store_rows(&map, in, true, false); }

// ---- Legal ----

MICRO_TMA(tma_load_ring) { add_rows(&map, out, true); }
MICRO_TMA(tma_store_twice) { store_rows(&map, in, true, true); }

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
