// Attention backward: delta_i = dout_i . out_i - dlse_i, which every other kernel of the backward reads. One warp a row.
#include "common/cuda/launch.h"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vec.cuh"
#include "ops/attention/attention_cuda.h"

namespace llmkernels::cuda {
namespace {

struct DeltaArgs {
  AttentionBwdParams p;
  int64_t rows;  // of all heads
  bool wide;
};

template <class T, int kVec>
__device__ float partial_dot(const T* a, const T* b, int dim) {
  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x) % kWarpSize; i < dim / kVec; i += kWarpSize) {
    const auto left = load<T, kVec>(a, i), right = load<T, kVec>(b, i);
#pragma unroll
    for (int e = 0; e < kVec; ++e) sum = fmaf(widen(left.at[e]), widen(right.at[e]), sum);
  }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kAttentionSmallThreads) attention_bwd_delta_kernel(const __grid_constant__ DeltaArgs args) {
  const AttentionBwdParams& p = args.p;
  const int64_t row = int64_t{blockIdx.x} * (kAttentionSmallThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (row >= args.rows) return;
  const int64_t head = row / p.in.q_rows, i = row % p.in.q_rows, b = head / p.in.H, h = head % p.in.H;
  const auto at = [&](const void* base, const AttentionStrides& s) {
    return static_cast<const T*>(base) + b * s.batch + h * s.head + i * s.row;
  };
  const T *dout = at(p.dout, p.dout_strides), *out = at(p.out, p.out_strides);
  const int dim = static_cast<int>(p.in.Dv);
  constexpr int kVec = kVectorBytes / static_cast<int>(sizeof(T));
  float sum[1] = {args.wide ? partial_dot<T, kVec>(dout, out, dim) : partial_dot<T, 1>(dout, out, dim)};
  warp_sum(sum);
  if (threadIdx.x % kWarpSize == 0) p.delta[row] = sum[0] - (p.dlse != nullptr ? p.dlse[row] : 0.0f);
}

}  // namespace

const char* attention_bwd_delta(const AttentionBwdParams& params, const AttentionPlan&, void* stream) {
  const AttentionInputs& in = params.in;
  const int64_t rows = (in.cu_seqlens_q != nullptr ? 1 : in.B) * in.H * in.q_rows;
  const bool wide = attention_rows_are_wide(params.dout, params.dout_strides, in.Dv, in.dtype) &&
                    attention_rows_are_wide(params.out, params.out_strides, in.Dv, in.dtype);
  const Launch launched =
      attention_launch(ceil_div(rows, kAttentionSmallThreads / kWarpSize), kAttentionSmallThreads, 0);
  const auto kernel = in.dtype == DType::kFloat32   ? &attention_bwd_delta_kernel<float>
                      : in.dtype == DType::kFloat16 ? &attention_bwd_delta_kernel<__half>
                                                    : &attention_bwd_delta_kernel<__nv_bfloat16>;
  return launch(kernel, DeltaArgs{params, rows, wide}, launched, stream);
}

}  // namespace llmkernels::cuda
