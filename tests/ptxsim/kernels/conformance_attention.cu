// The tile products that the attention kernels ship, for one warp: name(own, stream, out) with `own` [16, 64] and
// `stream` [32, 64] puts of each lane 16 scores, own * stream^T, and 32 sums, scores * stream.
#include "ops/attention/attention_tiles.cuh"

namespace {

using namespace llmkernels::cuda;

template <class T>
__device__ void tile_products(const T* own, const T* stream, float* out) {
  extern __shared__ __align__(1024) unsigned char shared[];
  constexpr int kDim = 64, kStream = 32;
  unsigned char* const stream_tile = shared + 16 * kDim * sizeof(T);
  fetch<T, kDim, 16, 32, false>(shared, HeadRows<T>{own, kDim}, 0, 16, kDim, true);
  fetch<T, kDim, kStream, 32, false>(stream_tile, HeadRows<T>{stream, kDim}, 0, kStream, kDim, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  float scores[kStream / 8][4] = {}, sums[kDim / 8][4] = {};
  Products<T>::template scores<kDim>(scores, shared, 0, stream_tile, 0);
  Products<T>::template weighted<kDim>(sums, scores, stream_tile, 0, 0);
  float* target = out + threadIdx.x * (4 * (kStream / 8 + kDim / 8));
#pragma unroll
  for (int n = 0; n < kStream / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) *target++ = scores[n][e];
  }
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) *target++ = sums[n][e];
  }
}

}  // namespace

#define TILE_PRODUCTS(name, T) \
  extern "C" __global__ void name(const T* own, const T* stream, float* out) { tile_products<T>(own, stream, out); }
TILE_PRODUCTS(attention_tiles_bf16, __nv_bfloat16)
TILE_PRODUCTS(attention_tiles_f16, __half)
TILE_PRODUCTS(attention_tiles_f32, float)
