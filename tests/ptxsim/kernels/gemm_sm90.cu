// C = A B^T in bf16 with TMA, mbarriers and wgmma: a test kernel of the interpreter, bugs by -DBUG=n. One block: a tile
// of 64 x kN; warp 4 is the producer, warps 0-3 the consumers; kStages stages of 64 along k, swizzled by 128 bytes.
#include <cuda_bf16.h>

#include <cstdint>

#ifndef BUG
#define BUG 0
#endif
#ifndef STAGES
#define STAGES 3
#endif

constexpr int kN = 64, kK = 64, kStages = STAGES;
constexpr uint32_t kTileBytes = 64 * kK * 2, kStageBytes = kTileBytes + kN * kK * 2;

struct alignas(64) Map {
  unsigned char opaque[128];
};

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ void init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ void expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(barrier),
      "r"(parity) : "memory");
}
__device__ void load(uint32_t to, const Map* map, int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier) : "memory");
}
__device__ uint64_t descriptor(uint32_t address) {  // K-major, 128-byte swizzle
  return static_cast<uint64_t>(address >> 4 & 0x3fff) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

__device__ void multiply(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, 1, 1, 1, 0, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),
        "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]),
        "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b));
}

extern "C" __global__ void __launch_bounds__(160) gemm(const __grid_constant__ Map a_map, const __grid_constant__ Map b_map,
                                                       __nv_bfloat16* c, int rows, int cols, int depth) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ alignas(8) uint64_t barriers[2 * kStages];
  const uint32_t tiles = shared_address(shared), full = shared_address(barriers), empty = full + 8 * kStages;
  const int steps = (depth + kK - 1) / kK, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) init(full + 8 * s, 1), init(empty + 8 * s, 128);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
#if BUG != 37
  __syncthreads();
#endif
  if (warp == 4) {
    if (lane == 0) {
      for (int step = 0; step < steps; ++step) {
        const int stage = step % kStages;
#if BUG != 31
        if (step >= kStages) wait(empty + 8 * stage, (step / kStages + 1) & 1);
#endif
        const uint32_t to = tiles + stage * kStageBytes;
        expect(full + 8 * stage, BUG == 32 ? kStageBytes - 16 : kStageBytes);
        load(to, &a_map, step * kK, blockIdx.x * 64, full + 8 * stage);
        load(to + kTileBytes, &b_map, step * kK, blockIdx.y * kN, full + 8 * stage);
      }
    }
    return;
  }
  float d[32] = {};
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
#if BUG != 33
    wait(full + 8 * stage, (step / kStages) & 1);
#endif
    const uint32_t from = tiles + stage * kStageBytes;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int k = 0; k < kK / 16; ++k) {
      const uint32_t by = BUG == 34 ? 16 * k : 32 * k;
      multiply(d, descriptor(from + by), descriptor(from + kTileBytes + by));
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#if BUG == 38
    arrive(empty + 8 * stage);
#endif
#if BUG != 35
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
#if BUG != 38
    arrive(empty + 8 * stage);
#endif
  }
  for (int e = 0; e < 32; ++e) {
    const int row = blockIdx.x * 64 + warp * 16 + lane / 4 + 8 * ((e >> 1) & 1), col = blockIdx.y * kN + 8 * (e / 4) + 2 * (lane % 4) + (e & 1);
    if (row < rows && col < cols) c[static_cast<int64_t>(row) * cols + col] = __float2bfloat16_rn(d[e]);
  }
}
