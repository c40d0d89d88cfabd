// Hopper's instructions on data and descriptors that the caller makes up: all swizzles and majors go through the same
// few kernels.
#include "common/cuda/wgmma.cuh"
#include "conformance.cuh"

using namespace llmkernels::cuda;

namespace {

extern __shared__ __align__(1024) unsigned char dynamic[];

__device__ void copy(unsigned* to, const unsigned* from, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}

// in: words of the box, the coordinates (innermost first). out: the box as it lies in shared memory.
template <int kRank>
__device__ void load_box(const CUtensorMap* map, const unsigned* in, unsigned* out) {
  __shared__ uint64_t barrier;
  const uint32_t full = ptx::shared_address(&barrier);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
    int at[kRank];
    for (int i = 0; i < kRank; ++i) at[i] = static_cast<int>(in[1 + i]);
    ptx::mbarrier_arrive_expect_tx(full, static_cast<int>(in[0]) * 4);
    ptx::tma_load<kRank>(ptx::shared_address(dynamic), map, full, at);
  }
  __syncthreads();
  ptx::mbarrier_wait(full, 0);
  copy(out, reinterpret_cast<const unsigned*>(dynamic), static_cast<int>(in[0]));
}

// in: words of the box, the coordinates, then (from word 8 on) the box as it shall lie in shared memory. The tensor of
// the map is what is written; out[0] = 1.
template <int kRank>
__device__ void store_box(const CUtensorMap* map, const unsigned* in, unsigned* out) {
  copy(reinterpret_cast<unsigned*>(dynamic), in + 8, static_cast<int>(in[0]));
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    int at[kRank];
    for (int i = 0; i < kRank; ++i) at[i] = static_cast<int>(in[1 + i]);
    ptx::tma_store<kRank>(map, ptx::shared_address(dynamic), at);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
    out[0] = 1;
  }
}

// in: LBO, SBO in bytes and swizzle mode of a, then of b; the words of a and of b (from word 8 on), as they shall lie in
// shared memory from multiples of 1024 on; then d [64, kN] floats, to which a * b is added. out: d. One warpgroup.
template <class T, int kN, int kTransA, int kTransB, bool kRegisters>
__device__ void multiply(const unsigned* in, unsigned* out) {
  const int a_words = static_cast<int>(in[6]), b_words = static_cast<int>(in[7]);
  unsigned* a = reinterpret_cast<unsigned*>(dynamic);
  unsigned* b = a + (a_words + 255) / 256 * 256;
  copy(a, in + 8, a_words);
  copy(b, in + 8 + a_words, b_words);
  ptx::fence_proxy_async();
  __syncthreads();
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  const auto at = [&](int e) { return (row + e / 2 % 2 * 8) * kN + e / 4 * 8 + lane % 4 * 2 + e % 2; };
  const float* c = reinterpret_cast<const float*>(in + 8 + a_words + b_words);
  float d[kN / 2];
#pragma unroll
  for (int e = 0; e < kN / 2; ++e) d[e] = c[at(e)];
  const auto descriptor = [&](const unsigned* tile, const unsigned* fields) {
    return ptx::wgmma_descriptor(ptx::shared_address(tile), static_cast<int>(fields[0]), static_cast<int>(fields[1]),
                                 static_cast<ptx::Swizzle>(fields[2]));
  };
  const uint64_t b_descriptor = descriptor(b, in + 3);
  uint32_t registers[4];
  if (kRegisters) {  // a is [64, 16] in plain rows
    for (int r = 0; r < 4; ++r) registers[r] = a[(row + r % 2 * 8) * 8 + lane % 4 + r / 2 * 4];
  }
  ptx::wgmma_fence();
  if constexpr (kRegisters) {
    ptx::wgmma_m64k16<T, kN, kTransB>(d, registers, b_descriptor, 1);
  } else {
    ptx::wgmma_m64k16<T, kN, kTransA, kTransB>(d, descriptor(a, in), b_descriptor, 1);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait_all(d);
#pragma unroll
  for (int e = 0; e < kN / 2; ++e) out[at(e)] = __float_as_uint(d[e]);
}

}  // namespace

#define TMA_CONFORMANCE(load, store, kRank)                                                                       \
  extern "C" __global__ void load(const __grid_constant__ CUtensorMap map, const unsigned* in, unsigned* out) {   \
    load_box<kRank>(&map, in, out);                                                                               \
  }                                                                                                               \
  extern "C" __global__ void store(const __grid_constant__ CUtensorMap map, const unsigned* in, unsigned* out) {  \
    store_box<kRank>(&map, in, out);                                                                              \
  }
TMA_CONFORMANCE(tma_load_1d, tma_store_1d, 1)
TMA_CONFORMANCE(tma_load_2d, tma_store_2d, 2)
TMA_CONFORMANCE(tma_load_3d, tma_store_3d, 3)
TMA_CONFORMANCE(tma_load_4d, tma_store_4d, 4)
TMA_CONFORMANCE(tma_load_5d, tma_store_5d, 5)

#define WGMMA_CONFORMANCE(name, T, kN, kTransA, kTransB, kRegisters) \
  extern "C" __global__ void __launch_bounds__(128) name(const unsigned* in, unsigned* out) { \
    multiply<T, kN, kTransA, kTransB, kRegisters>(in, out);                                   \
  }
WGMMA_CONFORMANCE(wgmma_bf16_n8, __nv_bfloat16, 8, 0, 0, false)
WGMMA_CONFORMANCE(wgmma_bf16_n64, __nv_bfloat16, 64, 0, 0, false)
WGMMA_CONFORMANCE(wgmma_bf16_n64_ta, __nv_bfloat16, 64, 1, 0, false)
WGMMA_CONFORMANCE(wgmma_bf16_n64_tb, __nv_bfloat16, 64, 0, 1, false)
WGMMA_CONFORMANCE(wgmma_bf16_n64_ta_tb, __nv_bfloat16, 64, 1, 1, false)
WGMMA_CONFORMANCE(wgmma_bf16_n128_tb, __nv_bfloat16, 128, 0, 1, false)
WGMMA_CONFORMANCE(wgmma_bf16_n64_registers, __nv_bfloat16, 64, 0, 0, true)
WGMMA_CONFORMANCE(wgmma_f16_n96, __half, 96, 0, 0, false)
WGMMA_CONFORMANCE(wgmma_f16_n256, __half, 256, 0, 0, false)
WGMMA_CONFORMANCE(wgmma_f16_n64_registers_tb, __half, 64, 0, 1, true)

// 32 x 4 words, the rows named in another order, also transposed: the tile as it lies in shared memory.
CONFORMANCE(stmatrix) {
  __shared__ __align__(16) unsigned tile[32 * 4];
  Words words(in, out);
  const int lane = threadIdx.x;
  const uint32_t row = ptx::shared_address(tile) + (lane * 5 + 3) % 32 * 16;
  const uint32_t values[4] = {words[0], words[1], words[2], words[3]};
  ptx::stmatrix_x4(row, values);
  __syncwarp();
  for (int i = 0; i < 4; ++i) words.put(tile[lane * 4 + i]);
  __syncwarp();
  ptx::stmatrix_x4_trans(row, values);
  __syncwarp();
  for (int i = 0; i < 4; ++i) words.put(tile[lane * 4 + i]);
}

CONFORMANCE(fp8_conversions) {
  Words words(in, out);
  const unsigned x = words[0], y = words[1];
  uint16_t pair;
#define NARROW(type)                                                                                       \
  asm volatile("cvt.rn.satfinite." type "x2.f32 %0, %1, %2;" : "=h"(pair) : "r"(x), "r"(y));               \
  words.put(pair);                                                                                         \
  asm volatile("cvt.rn.satfinite.relu." type "x2.f32 %0, %1, %2;" : "=h"(pair) : "r"(x), "r"(y));          \
  words.put(pair);                                                                                         \
  asm volatile("cvt.rn.satfinite." type "x2.f16x2 %0, %1;" : "=h"(pair) : "r"(x));                         \
  words.put(pair);                                                                                         \
  PUT_FROM_HALF("cvt.rn.f16x2." type "x2", x);
  NARROW("e4m3")
  NARROW("e5m2")
#undef NARROW
  PUT1("tanh.approx.bf16x2", x);
  PUT2("add.rn.bf16x2", x, y);
  PUT2("mul.rn.bf16x2", x, y);
  PUT2("max.xorsign.abs.f32", x, y);
}

// One warp at a barrier of two phases: who waits for what.
CONFORMANCE(mbarrier_phases) {
  __shared__ uint64_t object;
  Words words(in, out);
  const uint32_t barrier = ptx::shared_address(&object);
  const auto test = [&](uint32_t parity) {
    unsigned done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    words.put(done);
  };
  if (threadIdx.x == 0) ptx::mbarrier_init(barrier, 32);
  __syncwarp();
  test(0);
  test(1);
  for (int phase = 0; phase < 3; ++phase) {
    if (threadIdx.x < 31) ptx::mbarrier_arrive(barrier);
    __syncwarp();
    test(phase % 2);
    __syncwarp();
    if (threadIdx.x == 31) ptx::mbarrier_arrive(barrier);
    __syncwarp();
    test(phase % 2);
    test(phase % 2 ^ 1);
    ptx::mbarrier_wait(barrier, phase % 2);
    words.put(words[0]);
  }
}

// A cluster of blocks of a warp: every block hands its words to the next and reads those of the one before.
CONFORMANCE(cluster_ring) {
  __shared__ unsigned mine[32], received[32];
  Words words(in, out);
  unsigned blocks, cluster;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(cluster));
  const unsigned rank = ptx::cluster_rank();
  const int i = threadIdx.x;
  mine[i] = words[0];
  ptx::cluster_arrive();
  ptx::cluster_wait();
  words.put(ptx::load_cluster(ptx::mapa(ptx::shared_address(mine + i), (rank + blocks - 1) % blocks)));
  ptx::store_cluster(ptx::mapa(ptx::shared_address(received + i), (rank + 1) % blocks), words[1]);
  ptx::cluster_arrive();
  ptx::cluster_wait();
  words.put(received[i]);
  words.put(rank + 100 * blocks + 10000 * cluster);
}
