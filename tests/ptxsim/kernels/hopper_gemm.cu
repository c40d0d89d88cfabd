// c = a * b^T in bfloat16 the way Hopper wants it: one thread of a producer warpgroup keeps a ring of stages filled by
// TMA, consumer warpgroups of 64 rows each multiply out of it with wgmma, one product behind the newest; the result
// goes back through shared memory and TMA, which clips it.
#include "bug.cuh"
#include "common/cuda/wgmma.cuh"

namespace {

using namespace llmkernels::cuda;
using bf16 = __nv_bfloat16;

constexpr int kWarpgroup = 128;
constexpr int kStepK = 64;       // of a stage: rows of 128 bytes, the span of the swizzle
constexpr int kRowBytes = 128;
constexpr int kBoxBytes = 64 * kRowBytes;

template <int kStages, int kConsumers, int kCols>
struct Tile {
  static constexpr int kRows = 64 * kConsumers;
  alignas(1024) unsigned char a[kStages][kRows * kRowBytes];
  alignas(1024) unsigned char b[kStages][kCols * kRowBytes];
  alignas(1024) unsigned char c[kConsumers][kCols / 64][kBoxBytes];
  uint64_t full[kStages];   // a stage has landed: one arrival, and its bytes
  uint64_t empty[kStages];  // a stage has been read: one arrival of each consumer warp
};

// Whether this step is the first, second .. use of its stage, as the parity of the barriers' phases.
template <int kStages>
__device__ uint32_t parity(int step) {
  return step / kStages % 2;
}

template <class Shared, int kStages>
__device__ void produce(Shared& shared, const CUtensorMap* a, const CUtensorMap* b, int first_row, int first_col,
                        int steps) {
  constexpr int kBytes = sizeof(shared.a[0]) + sizeof(shared.b[0]);
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    const uint32_t full = ptx::shared_address(&shared.full[stage]);
    // Of a new barrier the phase before the first counts as over: the first round does not wait.
    if (!kBug<31>) ptx::mbarrier_wait(ptx::shared_address(&shared.empty[stage]), parity<kStages>(step) ^ 1);
    ptx::mbarrier_arrive_expect_tx(full, kBug<32> ? kBytes + 16 : kBytes);  // [31]
    ptx::tma_load<2>(ptx::shared_address(shared.a[stage]), a, full, {step * kStepK, first_row});  // [31]
    ptx::tma_load<2>(ptx::shared_address(shared.b[stage]), b, full, {step * kStepK, first_col});  // [31]
  }
}

template <class Shared, int kStages, int kCols>
__device__ void consume(Shared& shared, int consumer, int steps, float (&sums)[kCols / 2]) {
  const auto descriptor = [](const unsigned char* rows) {
    return ptx::wgmma_descriptor(ptx::shared_address(rows), 0, 8 * kRowBytes, ptx::Swizzle::k128B);
  };
  const auto release = [&](int step) {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(ptx::shared_address(&shared.empty[step % kStages]));  // [31]
  };
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    if (!kBug<33>) ptx::mbarrier_wait(ptx::shared_address(&shared.full[stage]), parity<kStages>(step));  // [31] [32]
    const uint64_t a = descriptor(shared.a[stage] + consumer * kBoxBytes), b = descriptor(shared.b[stage]);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kStepK / 16; ++k) {
      const int units = k * (kBug<34> ? 1 : 2);  // of 16 bytes, to the next 16 elements of k
      ptx::wgmma_m64k16<bf16, kCols>(sums, a + units, b + units, step > 0 || k > 0);  // [31] [33]
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (step > 0) release(step - 1);
  }
  if constexpr (!kBug<35>) ptx::wgmma_wait_all(sums);
}

template <int kStages, int kConsumers, int kCols>
__device__ void gemm(const CUtensorMap* a, const CUtensorMap* b, const CUtensorMap* c, int k) {
  using Shared = Tile<kStages, kConsumers, kCols>;
  extern __shared__ __align__(1024) unsigned char bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(bytes);
  const int first_row = blockIdx.y * Shared::kRows, first_col = blockIdx.x * kCols;
  const int steps = (k + kStepK - 1) / kStepK;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(ptx::shared_address(&shared.full[stage]), 1);
      ptx::mbarrier_init(ptx::shared_address(&shared.empty[stage]), 4 * kConsumers);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  // Two consumers: (24 + 240 + 240) * 128 registers are what a multiprocessor has. The producer needs next to none.
  if (threadIdx.x < kWarpgroup) {
    ptx::set_registers_down<24>();
    if (threadIdx.x == 0) produce<Shared, kStages>(shared, a, b, first_row, first_col, steps);
    return;
  }
  ptx::set_registers_up<240>();
  const int consumer = threadIdx.x / kWarpgroup - 1, lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x % kWarpgroup / 32 * 16;
  float sums[kCols / 2] = {};
  consume<Shared, kStages, kCols>(shared, consumer, steps, sums);

#pragma unroll
  for (int col = 0; col < kCols; col += 16) {
    uint32_t tiles[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) tiles[i] = ptx::pack_bf16x2(sums[col / 2 + 2 * i], sums[col / 2 + 2 * i + 1]);
    const int row = warp_row + lane % 16, chunk = col % 64 / 8 + lane / 16;
    const uint32_t box = ptx::shared_address(shared.c[consumer][col / 64]);
    ptx::stmatrix_x4(box + row * kRowBytes + (chunk ^ (row % 8)) * 16, tiles);
  }
  ptx::fence_proxy_async();  // by every writer, before the barrier
  ptx::named_barrier_sync(1 + consumer, kWarpgroup);
  if (threadIdx.x % kWarpgroup == 0) {
    for (int col = 0; col < kCols; col += 64) {
      const uint32_t box = ptx::shared_address(shared.c[consumer][col / 64]);
      ptx::tma_store<2>(c, box, {first_col + col, first_row + consumer * 64});
    }
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();  // shared memory goes when the block goes
  }
}

}  // namespace

// a [m, k] in boxes of 64 * kConsumers rows, b [n, k] of kCols rows, c [m, n] of 64 rows; all boxes are 64 columns wide
// and swizzled by 128 bytes. Grid (n / kCols, m / (64 * kConsumers)), rounded up; dynamic shared memory sizeof(Tile).
#define HOPPER_GEMM(name, kStages, kConsumers, kCols)                                    \
  extern "C" __global__ void __launch_bounds__(128 * (1 + kConsumers), 1)                \
      name(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, \
           const __grid_constant__ CUtensorMap c, int k) {                               \
    gemm<kStages, kConsumers, kCols>(&a, &b, &c, k);                                     \
  }
HOPPER_GEMM(hopper_gemm_stages4, 4, 1, 64)
HOPPER_GEMM(hopper_gemm_stages2, 2, 2, 128)
