// The kernels of the backward of the norms that take whole rows, and which of them a plan means.
#pragma once

#include "common/cuda/launch.h"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vec.cuh"
#include "ops/norm/norm_cuda.h"
#include "ops/norm/norm_dropout.cuh"

namespace llmkernels::cuda {
namespace {

// What every kernel below needs of a row.
template <class T, NormKind kKind>
struct Row {
  const T* x;
  const T* dy;
  Acc<T> mean, rstd;

  __device__ Row(const NormBwdParams& p, int64_t row)
      : x(static_cast<const T*>(p.x) + row * p.x_row_stride),
        dy(static_cast<const T*>(p.dy) + row * p.dy_row_stride),
        mean(kKind == NormKind::kLayerNorm ? static_cast<const Acc<T>*>(p.mean)[row] : Acc<T>{0}),
        rstd(static_cast<const Acc<T>*>(p.rstd)[row]) {}

  __device__ Acc<T> xhat(T value) const { return (widen(value) - mean) * rstd; }
};

// g = dy * (weight + weight_offset), for one vector.
template <class T, int kVec>
__device__ void scaled(const NormBwdParams& p, int64_t index, const Vec<T, kVec>& dy, Acc<T> (&g)[kVec]) {
  if (p.weight == nullptr) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) g[j] = widen(dy.at[j]);
    return;
  }
  load_widened<T, kVec>(p.weight, p.weight_dtype != p.dtype, index, g);
  const Acc<T> offset = static_cast<Acc<T>>(p.weight_offset);
#pragma unroll
  for (int j = 0; j < kVec; ++j) g[j] = (g[j] + offset) * widen(dy.at[j]);
}

// The two sums of each thread become their means over the row.
template <NormKind kKind, class Group, class Sum>
__device__ void row_means(Group& group, int64_t cols, Sum (&sums)[2]) {
  if constexpr (kKind == NormKind::kLayerNorm) {
    group.sum(sums);
    sums[1] /= static_cast<Sum>(cols);
  } else {
    Sum only[1] = {sums[0]};
    group.sum(only);
    sums[0] = only[0];
  }
  sums[0] /= static_cast<Sum>(cols);
}

template <class T, NormKind kKind, int kVec, class RowDropout>
__device__ void store_dx(const NormBwdParams& p, const Row<T, kKind>& r, int64_t row, int64_t index,
                         const Vec<T, kVec>& x, const Acc<T> (&g)[kVec], const Acc<T> (&means)[2],
                         const RowDropout& dropout) {
  Acc<T> out[kVec];
#pragma unroll
  for (int j = 0; j < kVec; ++j) out[j] = r.rstd * (g[j] - means[1] - r.xhat(x.at[j]) * means[0]);
  if (p.dresidual != nullptr) {
    const auto d = load<T, kVec>(static_cast<const T*>(p.dresidual) + row * p.dresidual_row_stride, index);
#pragma unroll
    for (int j = 0; j < kVec; ++j) out[j] += widen(d.at[j]);
  }
  Vec<T, kVec> dx;
#pragma unroll
  for (int j = 0; j < kVec; ++j) dx.at[j] = narrow<T>(out[j]);
  store(static_cast<T*>(p.dx) + row * p.cols, index, dx);
  if constexpr (!std::is_same_v<RowDropout, NoDropout>) {
    if (p.dx_dropped == nullptr) return;
#pragma unroll
    for (int j = 0; j < kVec; ++j) dx.at[j] = dropout(out[j], index * kVec + j);
    store(static_cast<T*>(p.dx_dropped) + row * p.cols, index, dx);
  }
}

// Partial sums of block `block`: first all of dweight (if wanted), then all of dbias.
template <class T>
__device__ Acc<T>* partial_dweight(const NormBwdParams& p, int64_t block) {
  return static_cast<Acc<T>*>(p.partial) + block * p.cols;
}
template <class T>
__device__ Acc<T>* partial_dbias(const NormBwdParams& p, int64_t block) {
  return partial_dweight<T>(p, block + (p.dweight != nullptr ? p.partial_blocks : 0));
}

// Adds the sums of the warps of a block, in their order, and writes them. In a block with one row every thread has
// columns of its own.
template <class T, int kVec, int kVectors, bool kBlock>
__device__ void store_partial(const Acc<T> (&sum)[kVectors][kVec], Acc<T>* partial, int vectors) {
  using Sums = Vec<Acc<T>, kVec>;
  if constexpr (kBlock) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int index = threadIdx.x + i * blockDim.x;
      Sums out;
#pragma unroll
      for (int j = 0; j < kVec; ++j) out.at[j] = sum[i][j];
      if (index < vectors) store(partial, index, out);
    }
  } else {
    constexpr int kWarps = kNormWarpThreads / kWarpSize, kCols = kWarpSize * kVectors * kVec;
    __shared__ Acc<T> of_warp[kWarps][padded(kCols)];
    __syncthreads();  // the sums before these are read
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const int col = (threadIdx.x % kWarpSize + i * kWarpSize) * kVec + j;
        of_warp[threadIdx.x / kWarpSize][padded(col)] = sum[i][j];
      }
    }
    __syncthreads();
    for (int col = threadIdx.x; col < vectors * kVec; col += kNormWarpThreads) {
      Acc<T> total = of_warp[0][padded(col)];
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) total += of_warp[warp][padded(col)];
      partial[col] = total;
    }
  }
}

// Rows that fit the registers of one warp or one block: dy and x are read once, dx written once. A thread sees the
// same columns in every row, so it keeps their dweight and dbias until its rows are done: no atomics, and the same
// order of additions in every run on the same kind of GPU.
template <class T, NormKind kKind, int kVec, int kVectors, bool kBlock, bool kDropout>
__global__ void __launch_bounds__(kBlock ? kNormBlockThreads : kNormWarpThreads) norm_bwd_kernel(const NormBwdParams p) {
  RowGroup<kBlock, Acc<T>> group;
  const int vectors = static_cast<int>(p.cols / kVec);
  Acc<T> dweight[kVectors][kVec] = {}, dbias[kVectors][kVec] = {};
  for (int64_t row = group.first_row(); row < p.rows; row += group.row_step()) {
    const Row<T, kKind> r(p, row);
    Vec<T, kVec> x[kVectors], dy[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int index = group.rank() + i * group.size();
      if (index >= vectors) continue;
      x[i] = load<T, kVec>(r.x, index);
      dy[i] = load<T, kVec>(r.dy, index);
    }
    Acc<T> sums[2] = {0, 0};  // of g * xhat and, for layer_norm, of g
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int index = group.rank() + i * group.size();
      if (index >= vectors) continue;
      Acc<T> g[kVec];
      scaled<T, kVec>(p, index, dy[i], g);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const Acc<T> xhat = r.xhat(x[i].at[j]);
        sums[0] += g[j] * xhat;
        if constexpr (kKind == NormKind::kLayerNorm) sums[1] += g[j];
        dweight[i][j] += widen(dy[i].at[j]) * xhat;
        if constexpr (kKind == NormKind::kLayerNorm) dbias[i][j] += widen(dy[i].at[j]);
      }
    }
    if (p.dx == nullptr) continue;  // the same for all threads
    row_means<kKind>(group, p.cols, sums);
    const DropoutIf<T, kDropout> dropout(p, row);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int index = group.rank() + i * group.size();
      if (index >= vectors) continue;
      forget(x[i]);
      forget(dy[i]);
      Acc<T> g[kVec];
      scaled<T, kVec>(p, index, dy[i], g);
      store_dx<T, kKind, kVec>(p, r, row, index, x[i], g, sums, dropout);
    }
  }
  if (p.dweight != nullptr) {
    store_partial<T, kVec, kVectors, kBlock>(dweight, partial_dweight<T>(p, blockIdx.x), vectors);
  }
  if constexpr (kKind == NormKind::kLayerNorm) {  // without the test the sums of zeros would cost registers
    if (p.dbias != nullptr) store_partial<T, kVec, kVectors, kBlock>(dbias, partial_dbias<T>(p, blockIdx.x), vectors);
  }
}

// dx of rows that do not fit, or are not made of whole aligned vectors: dy and x are read twice.
template <class T, NormKind kKind, int kVec, bool kBlock, bool kDropout>
__global__ void __launch_bounds__(kBlock ? kNormBlockThreads : kNormWarpThreads, kBlock ? 2 : 8)
    norm_bwd_long_kernel(const NormBwdParams p) {
  RowGroup<kBlock, Acc<T>> group;
  const int64_t vectors = p.cols / kVec;
  for (int64_t row = group.first_row(); row < p.rows; row += group.row_step()) {
    const Row<T, kKind> r(p, row);
    Acc<T> sums[2] = {0, 0};  // of g * xhat and, for layer_norm, of g
#pragma unroll 2
    for (int64_t index = group.rank(); index < vectors; index += group.size()) {
      const auto x = load<T, kVec>(r.x, index);
      Acc<T> g[kVec];
      scaled<T, kVec>(p, index, load<T, kVec>(r.dy, index), g);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        sums[0] += g[j] * r.xhat(x.at[j]);
        if constexpr (kKind == NormKind::kLayerNorm) sums[1] += g[j];
      }
    }
    row_means<kKind>(group, p.cols, sums);
    const DropoutIf<T, kDropout> dropout(p, row);
#pragma unroll 2
    for (int64_t index = group.rank(); index < vectors; index += group.size()) {
      Acc<T> g[kVec];
      scaled<T, kVec>(p, index, load<T, kVec>(r.dy, index), g);
      store_dx<T, kKind, kVec>(p, r, row, index, load<T, kVec>(r.x, index), g, sums, dropout);
    }
  }
}

using Kernel = void (*)(NormBwdParams);

template <class T, NormKind kKind, bool kDropout>
Kernel choose_rows(const RowPlan& plan) {
  constexpr int kWide = kVectorBytes / sizeof(T);
  if (!plan.wide) {
    return plan.block ? norm_bwd_long_kernel<T, kKind, 1, true, kDropout>
                      : norm_bwd_long_kernel<T, kKind, 1, false, kDropout>;
  }
  if (plan.vectors == 0) return norm_bwd_long_kernel<T, kKind, kWide, true, kDropout>;
  if (plan.block) return norm_bwd_kernel<T, kKind, kWide, 4, true, kDropout>;
  if (plan.vectors == 1) return norm_bwd_kernel<T, kKind, kWide, 1, false, kDropout>;
  return plan.vectors == 2 ? norm_bwd_kernel<T, kKind, kWide, 2, false, kDropout>
                           : norm_bwd_kernel<T, kKind, kWide, 4, false, kDropout>;
}

}  // namespace
}  // namespace llmkernels::cuda
