// What the lanes of a warp do together, and memory: one block of a warp or more.
#include "common/cuda/ptx.cuh"
#include "conformance.cuh"

using namespace llmkernels::cuda;

CONFORMANCE(shuffles) {
  Words words(in, out);
  const unsigned x = words[0], y = words[1];
  unsigned d, valid;
  // Value and whether the source lane is in the segment; `limits` is segment mask << 8 | clamp.
#define SHUFFLE(mode, lane, limits)                                                                             \
  asm volatile("{\n.reg .pred p;\nshfl.sync." mode ".b32 %0|p, %2, %3, %4, 0xffffffff;\nselp.u32 %1, 1, 0, p;\n}" \
               : "=r"(d), "=r"(valid)                                                                           \
               : "r"(x), "r"(lane), "r"(limits));                                                               \
  words.put(d);                                                                                                 \
  words.put(valid);
  SHUFFLE("idx", y % 32, 0x1f)
  SHUFFLE("idx", y % 32, 0x1807)
  SHUFFLE("idx", 9, 0x1c03)
  SHUFFLE("up", 1, 0)
  SHUFFLE("up", 5, 0x1800)
  SHUFFLE("down", 1, 0x1f)
  SHUFFLE("down", 3, 0x1807)
  SHUFFLE("bfly", 16, 0x1f)
  SHUFFLE("bfly", 7, 0x1f)
  SHUFFLE("bfly", 1, 0x1c03)
#undef SHUFFLE
}

CONFORMANCE(votes) {
  Words words(in, out);
  const unsigned x = words[0], y = words[1];
  const bool odd = x % 2 != 0;
  words.put(__all_sync(0xffffffffu, odd));
  words.put(__any_sync(0xffffffffu, odd));
  words.put(__ballot_sync(0xffffffffu, odd));
  int same;
  words.put(__match_any_sync(0xffffffffu, x % 5));
  words.put(__match_all_sync(0xffffffffu, y % 1, &same));
  words.put(same);
  words.put(__match_all_sync(0xffffffffu, y, &same));
  words.put(same);
  words.put(__reduce_add_sync(0xffffffffu, x));
  words.put(__reduce_min_sync(0xffffffffu, static_cast<int>(x)));
  words.put(__reduce_max_sync(0xffffffffu, x));
  words.put(__reduce_and_sync(0xffffffffu, x | 0xff));
  words.put(__reduce_or_sync(0xffffffffu, x & 0xff));
  words.put(__reduce_xor_sync(0xffffffffu, x));
  if (odd) {
    words.put(__activemask() & __ballot_sync(__activemask(), true));
  } else {
    words.put(__ballot_sync(__activemask(), y % 2 == 0));
  }
}

namespace {

// Old values are of places of their own, sums of a place that all threads share: neither depends on the order.
__device__ void run_atomics(Words& words, unsigned* place, unsigned long long* wide_place) {
  const unsigned x = words[0], y = words[1];
  const unsigned long long wide = words.wide(0);
  words.put(atomicAdd(place, y));
  words.put(atomicSub(place, x));
  words.put(atomicMin(place, y));
  words.put(atomicMax(place, x));
  words.put(atomicMin(reinterpret_cast<int*>(place), static_cast<int>(y)));
  words.put(atomicMax(reinterpret_cast<int*>(place), static_cast<int>(x)));
  words.put(atomicAnd(place, y | 3));
  words.put(atomicOr(place, x & 0x1010));
  words.put(atomicXor(place, y));
  words.put(atomicInc(place, x));
  words.put(atomicDec(place, y));
  words.put(atomicExch(place, x));
  words.put(atomicCAS(place, x, y));
  words.put(atomicCAS(place, x, y));
  words.put(__float_as_uint(atomicAdd(reinterpret_cast<float*>(place), 1.5f)));
  words.put(atomicExch(place, 0x3c003800u));
  const __half2 halves = atomicAdd(reinterpret_cast<__half2*>(place), __floats2half2_rn(0.25f, 1024.0f));
  words.put(reinterpret_cast<const unsigned&>(halves));
  words.put(atomicExch(place, 0x3f803f00u));
  const __nv_bfloat162 pair = atomicAdd(reinterpret_cast<__nv_bfloat162*>(place), __floats2bfloat162_rn(0.25f, 8.0f));
  words.put(reinterpret_cast<const unsigned&>(pair));
  words.put(*place);
  words.put_wide(atomicAdd(wide_place, wide));
  words.put_wide(atomicMax(wide_place, wide ^ 0x123456789abcdefull));
  words.put_wide(atomicExch(wide_place, 0x3ff8000000000000ull));
  words.put_wide(__double_as_longlong(atomicAdd(reinterpret_cast<double*>(wide_place), 0.5)));
  words.put_wide(atomicCAS(wide_place, 0x4000000000000000ull, wide));
  words.put_wide(*wide_place);
}

}  // namespace

CONFORMANCE(shared_atomics) {  // one warp
  __shared__ unsigned places[32], sums[3];
  __shared__ unsigned long long wide_places[32];
  Words words(in, out);
  const int i = threadIdx.x;
  places[i] = words[2];
  wide_places[i] = words.wide(1);
  if (i < 3) sums[i] = 0;
  __syncwarp();
  run_atomics(words, places + i, wide_places + i);
  atomicAdd(sums, words[0]);
  atomicXor(sums + 1, words[1]);
  atomicMax(sums + 2, words[2]);
  __syncwarp();
  words.put(sums[i % 3]);
}

// The last 3 T + 2 words of out, zero before, are the places.
CONFORMANCE(global_atomics) {
  Words words(in, out);
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  constexpr int kPut = 32;
  unsigned* places = out + kPut * words.threads;
  run_atomics(words, places + 2 + i, reinterpret_cast<unsigned long long*>(places + 2 + words.threads) + i);
  atomicAdd(places, words[0]);
  atomicXor(places + 1, words[1]);
}

// Row i of 32 x 4 words, tile i / 8, comes from 16 bytes that lane i names; also transposed.
CONFORMANCE(ldmatrix) {
  __shared__ __align__(16) unsigned tile[32 * 4];
  Words words(in, out);
  const int lane = threadIdx.x;
  for (int i = 0; i < 4; ++i) tile[lane * 4 + i] = words[i];
  __syncwarp();
  const uint32_t row = ptx::shared_address(tile) + (lane * 5 + 3) % 32 * 16;  // every row once, in another order
  uint32_t one[1], two[2], four[4];
  ptx::ldmatrix_x1(one, row);
  words.put(one[0]);
  ptx::ldmatrix_x1_trans(one, row);
  words.put(one[0]);
  ptx::ldmatrix_x2(two, row);
  for (uint32_t value : two) words.put(value);
  ptx::ldmatrix_x2_trans(two, row);
  for (uint32_t value : two) words.put(value);
  ptx::ldmatrix_x4(four, row);
  for (uint32_t value : four) words.put(value);
  ptx::ldmatrix_x4_trans(four, row);
  for (uint32_t value : four) words.put(value);
}

namespace {

// in: a, b and c, as the registers hold them; out: d.
template <class Value, class Mma>
__device__ void run_mma(const unsigned* in, unsigned* out, const Mma& mma) {
  Words words(in, out);
  const uint32_t a[4] = {words[0], words[1], words[2], words[3]}, b[2] = {words[4], words[5]};
  Value d[4];
  for (int i = 0; i < 4; ++i) {
    const unsigned bits = words[6 + i];
    memcpy(&d[i], &bits, 4);
  }
  mma(d, a, b);
  for (const Value& value : d) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    words.put(bits);
  }
}

}  // namespace

#define MMA_CONFORMANCE(name, Value, mma)                                                                         \
  CONFORMANCE(name) {                                                                                             \
    run_mma<Value>(in, out, [](Value(&d)[4], const uint32_t(&a)[4], const uint32_t(&b)[2]) { mma(d, a, b); });    \
  }
MMA_CONFORMANCE(mma_bf16, float, ptx::mma_m16n8k16<__nv_bfloat16>)
MMA_CONFORMANCE(mma_f16, float, ptx::mma_m16n8k16<__half>)
MMA_CONFORMANCE(mma_tf32, float, ptx::mma_m16n8k8_tf32)
MMA_CONFORMANCE(mma_s8, int32_t, ptx::mma_m16n8k32_s8)
#if __CUDA_ARCH__ >= 890
MMA_CONFORMANCE(mma_e4m3, float, ptx::mma_m16n8k32_e4m3)
#endif

// Every size, whole and in part; word 0 of a thread says how much of it comes.
CONFORMANCE(cp_async) {
  __shared__ __align__(16) unsigned tile[6][32 * 4];
  Words words(in, out);
  const int lane = threadIdx.x;
  const uint32_t base = ptx::shared_address(tile);
  constexpr int kStep = sizeof(tile[0]);
  ptx::cp_async<4>(base + lane * 4, in + lane);
  ptx::cp_async<4>(base + kStep + lane * 4, in + lane, words[0] % 5);
  ptx::cp_async_commit();
  ptx::cp_async<8>(base + 2 * kStep + lane * 8, in + lane * 2);
  ptx::cp_async<8>(base + 3 * kStep + lane * 8, in + lane * 2, words[0] % 9);
  ptx::cp_async_commit();
  ptx::cp_async<16>(base + 4 * kStep + lane * 16, in + lane * 4);
  ptx::cp_async<16>(base + 5 * kStep + lane * 16, in + lane * 4, words[0] % 17);
  ptx::cp_async_commit();
  ptx::cp_async_wait<2>();
  __syncwarp();
  for (int i = 0; i < 2; ++i) words.put(tile[i][lane ^ 1]);
  ptx::cp_async_wait<1>();
  __syncwarp();
  for (int i = 2; i < 4; ++i) {
    for (int j = 0; j < 2; ++j) words.put(tile[i][(lane ^ 1) * 2 + j]);
  }
  ptx::cp_async_wait<0>();
  __syncwarp();
  for (int i = 4; i < 6; ++i) {
    for (int j = 0; j < 4; ++j) words.put(tile[i][(lane ^ 1) * 4 + j]);
  }
}
