// The forward kernels of the norms, and which of them a plan means.
#pragma once

#include "common/cuda/launch.h"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vec.cuh"
#include "ops/norm/norm_cuda.h"
#include "ops/norm/norm_dropout.cuh"

namespace llmkernels::cuda {
namespace {

// Where a row is centred and how it is scaled: xhat = ((s - mean) - correction) * rstd. A mean that is far larger than
// the spread is rounded by more than the result may be off; the mean of what is left after subtracting it mends that.
template <class Acc>
struct Row {
  Acc mean = 0, correction = 0, rstd = 0;

  // From the sums over a row of s - mean and of its square.
  __device__ void finish(Acc deviations, Acc squares, int64_t cols, double eps) {
    correction = deviations / static_cast<Acc>(cols);
    const Acc variance = squares / static_cast<Acc>(cols) - correction * correction;
    // Below zero by rounding only; a NaN stays.
    rstd = Acc{1} / sqrt((variance < Acc{0} ? Acc{0} : variance) + static_cast<Acc>(eps));
  }
};

template <class T, NormKind kKind, int kVec>
__device__ void store_normed(const NormFwdParams& p, int64_t row, int64_t index, const Vec<T, kVec>& s,
                             const Row<Acc<T>>& r) {
  const bool wide_parameters = p.weight_dtype != p.dtype;
  Acc<T> out[kVec], parameter[kVec];
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    out[j] = widen(s.at[j]);
    if constexpr (kKind == NormKind::kLayerNorm) out[j] = (out[j] - r.mean) - r.correction;
    out[j] *= r.rstd;
  }
  if (p.weight != nullptr) {
    load_widened<T, kVec>(p.weight, wide_parameters, index, parameter);
    const Acc<T> offset = static_cast<Acc<T>>(p.weight_offset);
#pragma unroll
    for (int j = 0; j < kVec; ++j) out[j] *= parameter[j] + offset;
  }
  if (p.bias != nullptr) {
    load_widened<T, kVec>(p.bias, wide_parameters, index, parameter);
#pragma unroll
    for (int j = 0; j < kVec; ++j) out[j] += parameter[j];
  }
  Vec<T, kVec> y;
#pragma unroll
  for (int j = 0; j < kVec; ++j) y.at[j] = narrow<T>(out[j]);
  store(static_cast<T*>(p.y) + row * p.cols, index, y);
}

template <class T, int kVec>
__device__ Vec<T, kVec> added(const Vec<T, kVec>& a, const Vec<T, kVec>& b) {
  Vec<T, kVec> sum;
#pragma unroll
  for (int j = 0; j < kVec; ++j) sum.at[j] = narrow<T>(widen(a.at[j]) + widen(b.at[j]));
  return sum;
}

template <class T>
__device__ void store_stats(const NormFwdParams& p, int64_t row, const Row<Acc<T>>& r) {
  if (p.mean != nullptr) static_cast<Acc<T>*>(p.mean)[row] = r.mean + r.correction;
  static_cast<Acc<T>*>(p.rstd)[row] = r.rstd;
}

// Adds s - mean and its square, for one vector, to the two sums.
template <class T, NormKind kKind, int kVec>
__device__ void add_moments(const Vec<T, kVec>& s, Acc<T> mean, Acc<T> (&sums)[2]) {
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    Acc<T> value = widen(s.at[j]);
    if constexpr (kKind == NormKind::kLayerNorm) {
      value -= mean;
      sums[1] += value;
    }
    sums[0] += value * value;
  }
}

// The rest of a row's statistics: `sums` over this thread's part of the squares and, for layer_norm, the deviations.
template <class T, NormKind kKind, class Group>
__device__ void finish(Group& group, const NormFwdParams& p, Acc<T> (&sums)[2], Row<Acc<T>>& r) {
  if constexpr (kKind == NormKind::kLayerNorm) {
    group.sum(sums);
  } else {
    Acc<T> squares[1] = {sums[0]};
    group.sum(squares);
    sums[0] = squares[0];
  }
  r.finish(sums[1], sums[0], p.cols, p.eps);
}

// Rows that fit the registers of one warp or one block: x and residual are read once, y and the new residual written
// once, and the variance is taken about the mean. Threads take vectors in turns, so that a load of the group is one
// contiguous piece. Blocks stay and step over the rows.
template <class T, NormKind kKind, int kVec, int kVectors, bool kBlock, bool kDropout>
__global__ void __launch_bounds__(kBlock ? kNormBlockThreads : kNormWarpThreads, 1)
    norm_fwd_kernel(const NormFwdParams p) {
  RowGroup<kBlock, Acc<T>> group;
  const int vectors = static_cast<int>(p.cols / kVec);
  for (int64_t row = group.first_row(); row < p.rows; row += group.row_step()) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
    Vec<T, kVec> s[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int index = group.rank() + i * group.size();
      if (index < vectors) s[i] = load<T, kVec>(x, index);
    }
    if (p.residual != nullptr) {
      const T* residual = static_cast<const T*>(p.residual) + row * p.residual_row_stride;
      // All loads before the first store: it might alias them, for all the compiler knows. Of eight vectors with the bits
      // of dropout that would spill.
      constexpr int kLoads = kDropout && kVectors > 4 ? 4 : kVectors;
      const DropoutIf<T, kDropout> dropout(p, row);
#pragma unroll
      for (int first = 0; first < kVectors; first += kLoads) {
        Vec<T, kVec> r[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const int index = group.rank() + (first + i) * group.size();
          if (index < vectors) r[i] = load<T, kVec>(residual, index);
        }
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const int index = group.rank() + (first + i) * group.size();
          if (index >= vectors) continue;
          if constexpr (kDropout) s[first + i] = dropout(s[first + i], index);
          s[first + i] = added(s[first + i], r[i]);
          store(static_cast<T*>(p.new_residual) + row * p.cols, index, s[first + i]);
        }
      }
    }

    Row<Acc<T>> r;
    if constexpr (kKind == NormKind::kLayerNorm) {
      Acc<T> total[1] = {0};
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (group.rank() + i * group.size() >= vectors) continue;
#pragma unroll
        for (int j = 0; j < kVec; ++j) total[0] += widen(s[i].at[j]);
      }
      group.sum(total);
      r.mean = total[0] / static_cast<Acc<T>>(p.cols);
    }
    Acc<T> sums[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (group.rank() + i * group.size() >= vectors) continue;
      forget(s[i]);
      add_moments<T, kKind, kVec>(s[i], r.mean, sums);
    }
    finish<T, kKind>(group, p, sums, r);
    if (group.rank() == 0) store_stats<T>(p, row, r);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int index = group.rank() + i * group.size();
      if (index >= vectors) continue;
      forget(s[i]);
      store_normed<T, kKind, kVec>(p, row, index, s[i], r);
    }
  }
}

// Rows that do not fit, or are not made of whole aligned vectors: the sum, the squares about the mean and the result
// each read the row again, from a cache if it is small enough.
template <class T, NormKind kKind, int kVec, bool kBlock, bool kDropout>
__global__ void __launch_bounds__(kBlock ? kNormBlockThreads : kNormWarpThreads, kBlock ? 2 : 8)
    norm_fwd_long_kernel(const NormFwdParams p) {
  RowGroup<kBlock, Acc<T>> group;
  const int64_t vectors = p.cols / kVec;
  for (int64_t row = group.first_row(); row < p.rows; row += group.row_step()) {
    const T* s = static_cast<const T*>(p.x) + row * p.x_row_stride;
    if (p.residual != nullptr) {
      // Each thread reads back only what it wrote itself: no barrier is needed.
      const T* residual = static_cast<const T*>(p.residual) + row * p.residual_row_stride;
      T* sum = static_cast<T*>(p.new_residual) + row * p.cols;
      if constexpr (kDropout) {
        const Dropout<T> dropout(p, row);
        for (int64_t index = group.rank(); index < vectors; index += group.size()) {
          store(sum, index, added(dropout(load<T, kVec>(s, index), index), load<T, kVec>(residual, index)));
        }
      } else {
        for (int64_t index = group.rank(); index < vectors; index += group.size()) {
          store(sum, index, added(load<T, kVec>(s, index), load<T, kVec>(residual, index)));
        }
      }
      s = sum;
    }
    Row<Acc<T>> r;
    if constexpr (kKind == NormKind::kLayerNorm) {
      Acc<T> total[1] = {0};
#pragma unroll 4
      for (int64_t index = group.rank(); index < vectors; index += group.size()) {
        const auto vector = load<T, kVec>(s, index);
#pragma unroll
        for (int j = 0; j < kVec; ++j) total[0] += widen(vector.at[j]);
      }
      group.sum(total);
      r.mean = total[0] / static_cast<Acc<T>>(p.cols);
    }
    Acc<T> sums[2] = {0, 0};
#pragma unroll 4
    for (int64_t index = group.rank(); index < vectors; index += group.size()) {
      add_moments<T, kKind, kVec>(load<T, kVec>(s, index), r.mean, sums);
    }
    finish<T, kKind>(group, p, sums, r);
    if (group.rank() == 0) store_stats<T>(p, row, r);
#pragma unroll 4
    for (int64_t index = group.rank(); index < vectors; index += group.size()) {
      store_normed<T, kKind, kVec>(p, row, index, load<T, kVec>(s, index), r);
    }
  }
}

using Kernel = void (*)(NormFwdParams);

template <class T, NormKind kKind, bool kDropout>
Kernel choose(const RowPlan& plan) {
  constexpr int kWide = kVectorBytes / sizeof(T);
  if (!plan.wide) {
    return plan.block ? norm_fwd_long_kernel<T, kKind, 1, true, kDropout>
                      : norm_fwd_long_kernel<T, kKind, 1, false, kDropout>;
  }
  if (plan.vectors == 0) return norm_fwd_long_kernel<T, kKind, kWide, true, kDropout>;
  if (plan.block) {
    return plan.vectors == 4 ? norm_fwd_kernel<T, kKind, kWide, 4, true, kDropout>
                             : norm_fwd_kernel<T, kKind, kWide, 8, true, kDropout>;
  }
  if (plan.vectors == 1) return norm_fwd_kernel<T, kKind, kWide, 1, false, kDropout>;
  return plan.vectors == 2 ? norm_fwd_kernel<T, kKind, kWide, 2, false, kDropout>
                           : norm_fwd_kernel<T, kKind, kWide, 4, false, kDropout>;
}

template <class T, bool kDropout>
Kernel choose(const RowPlan& plan, NormKind kind) {
  return kind == NormKind::kLayerNorm ? choose<T, NormKind::kLayerNorm, kDropout>(plan)
                                      : choose<T, NormKind::kRmsNorm, kDropout>(plan);
}

template <bool kDropout>
Kernel choose(const NormFwdParams& params, const RowPlan& plan) {
  return with_type(params.dtype, [&](auto t) { return choose<decltype(t), kDropout>(plan, params.kind); });
}

}  // namespace
}  // namespace llmkernels::cuda
