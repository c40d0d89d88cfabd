// Layer norm over rows of floats, one block a row, rows made of whole vectors of four floats; the backward adds up the
// gradients of the parameters with atomics, in whatever order the blocks come.
#include <cstdint>

#include "bug.cuh"
#include "common/cuda/reduce.cuh"

namespace {

using llmkernels::cuda::warp_sum;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / llmkernels::cuda::kWarpSize;

// The sums of two values over the block, for every thread; every sum of a kernel uses the same buffer.
__device__ void block_sum(float (&values)[2]) {
  __shared__ float of_warp[kWarps][2];
  const int warp = threadIdx.x / 32;
  warp_sum(values);
  if constexpr (!kBug<12>) __syncthreads();  // the sums before these are read
  if (threadIdx.x % 32 == 0) {
    of_warp[warp][0] = values[0];  // [11] [12]
    of_warp[warp][1] = values[1];  // [11] [12]
  }
  if constexpr (!kBug<11>) __syncthreads();
  values[0] = values[1] = 0;
  for (int i = 0; i < kWarps; ++i) {
    values[0] += of_warp[i][0];  // [11] [12]
    values[1] += of_warp[i][1];  // [11] [12]
  }
}

// One vector too many lies outside of the row; of the tensor, if it is the last row.
__device__ bool within(int vector, int vectors) { return kBug<13> ? vector <= vectors : vector < vectors; }

__device__ float4 centred(const float4& x, float mean) { return {x.x - mean, x.y - mean, x.z - mean, x.w - mean}; }

}  // namespace

// x, y [rows, 4 * vectors]; weight, bias [4 * vectors]; mean, rstd [rows]. Grid (rows).
extern "C" __global__ void __launch_bounds__(kThreads)
    layer_norm_fwd(const float4* x, const float4* weight, const float4* bias, float4* y, float* mean, float* rstd,
                   int vectors, float eps) {
  const float4* row = x + int64_t{blockIdx.x} * vectors;
  const float cols = 4.0f * vectors;
  float sums[2] = {0, 0};
  for (int i = threadIdx.x; within(i, vectors); i += kThreads) {
    const float4 v = row[i];  // [13]
    sums[0] += v.x + v.y + v.z + v.w;
  }
  block_sum(sums);
  const float centre = sums[0] / cols;
  sums[0] = sums[1] = 0;
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    const float4 v = centred(row[i], centre);
    sums[0] += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
  block_sum(sums);
  const float scale = rsqrtf(sums[0] / cols + eps);
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    const float4 v = centred(row[i], centre), w = weight[i], b = bias[i];
    y[int64_t{blockIdx.x} * vectors + i] = {v.x * scale * w.x + b.x, v.y * scale * w.y + b.y, v.z * scale * w.z + b.z,
                                            v.w * scale * w.w + b.w};
  }
  if (threadIdx.x == 0) {
    mean[blockIdx.x] = centre;
    rstd[blockIdx.x] = scale;
  }
}

namespace {

// To memory that other blocks add to as well.
__device__ void add(float* to, float value) {
  if constexpr (kBug<14>) {
    *to += value;  // [14]
  } else {
    atomicAdd(to, value);
  }
}

}  // namespace

// dx [rows, 4 * vectors]; dweight, dbias [4 * vectors], zero before. Grid (rows).
extern "C" __global__ void __launch_bounds__(kThreads)
    layer_norm_bwd(const float4* dy, const float4* x, const float4* weight, const float* mean, const float* rstd,
                   float4* dx, float* dweight, float* dbias, int vectors) {
  const int64_t first = int64_t{blockIdx.x} * vectors;
  const float centre = mean[blockIdx.x], scale = rstd[blockIdx.x], cols = 4.0f * vectors;
  float sums[2] = {0, 0};  // of g and g * xhat, g = dy * weight
  for (int i = threadIdx.x; within(i, vectors); i += kThreads) {
    const float4 v = centred(x[first + i], centre), d = dy[first + i], w = weight[i];  // [13]
    sums[0] += d.x * w.x + d.y * w.y + d.z * w.z + d.w * w.w;
    sums[1] += (d.x * w.x * v.x + d.y * w.y * v.y + d.z * w.z * v.z + d.w * w.w * v.w) * scale;
  }
  block_sum(sums);
  const float g_mean = sums[0] / cols, gx_mean = sums[1] / cols;
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    const float4 v = centred(x[first + i], centre), d = dy[first + i], w = weight[i];
    const auto gradient = [&](float d, float w, float v) { return scale * (d * w - g_mean - v * scale * gx_mean); };
    dx[first + i] = {gradient(d.x, w.x, v.x), gradient(d.y, w.y, v.y), gradient(d.z, w.z, v.z),
                     gradient(d.w, w.w, v.w)};
    add(dweight + 4 * i + 0, d.x * v.x * scale);
    add(dweight + 4 * i + 1, d.y * v.y * scale);
    add(dweight + 4 * i + 2, d.z * v.z * scale);
    add(dweight + 4 * i + 3, d.w * v.w * scale);
    add(dbias + 4 * i + 0, d.x);
    add(dbias + 4 * i + 1, d.y);
    add(dbias + 4 * i + 2, d.z);
    add(dbias + 4 * i + 3, d.w);
  }
}
