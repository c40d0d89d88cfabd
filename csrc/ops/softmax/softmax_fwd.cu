#include "common/cuda/launch.h"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vec.cuh"
#include "ops/softmax/softmax_cuda.h"

namespace llmkernels::cuda {
namespace {

template <class A>
__device__ A infinity() {
  return static_cast<A>(__int_as_float(0x7f800000));
}

// The largest of some elements and the sum of exp(s - top). A NaN becomes the top and stays.
template <class A>
struct Part {
  A top, total;
};

template <class A>
__device__ A larger(A a, A b) {
  return a > b || a != a ? a : b;
}

template <class A>
__device__ Part<A> joined(Part<A> a, Part<A> b) {
  const A top = larger(a.top, b.top);
  if (top == -infinity<A>()) return {top, A{0}};
  return {top, a.total * exp(a.top - top) + b.total * exp(b.top - top)};
}

template <class A>
__device__ Part<A> joined_in_warp(Part<A> part) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    // Both lanes of a pair join the two in the same order, so that all end with the same bits.
    const Part<A> other{__shfl_xor_sync(kFullWarp, part.top, offset), __shfl_xor_sync(kFullWarp, part.total, offset)};
    part = (threadIdx.x & offset) == 0 ? joined(part, other) : joined(other, part);
  }
  return part;
}

// Over the warp, or over the block, whose warps leave their parts in shared memory.
template <bool kBlock, class A>
__device__ Part<A> joined_in_group(Part<A> part) {
  part = joined_in_warp(part);
  if constexpr (kBlock) {
    __shared__ A tops[kWarpSize], totals[kWarpSize];
    const int warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
    __syncthreads();  // whoever still reads the parts of the row before
    if (threadIdx.x % kWarpSize == 0) {
      tops[warp] = part.top;
      totals[warp] = part.total;
    }
    __syncthreads();
    part = {tops[0], totals[0]};
    for (int i = 1; i < warps; ++i) part = joined(part, Part<A>{tops[i], totals[i]});
  }
  return part;
}

// Elements of the mask at vector `index` of a row, applied to s.
template <class M, int kVec>
__device__ Vec<M, kVec> mask_vector(const void* row, int64_t index, bool wide) {
  if (wide) return load<M, kVec>(row, index);
  Vec<M, kVec> mask;
#pragma unroll
  for (int j = 0; j < kVec; ++j) mask.at[j] = static_cast<const M*>(row)[index * kVec + j];
  return mask;
}

template <class T, int kVec>
__device__ void apply_mask(MaskKind kind, const void* row, int64_t index, bool wide, Acc<T> (&s)[kVec]) {
  if (kind == MaskKind::kBool) {
    const auto keep = mask_vector<uint8_t, kVec>(row, index, wide);
#pragma unroll
    for (int j = 0; j < kVec; ++j) s[j] = keep.at[j] != 0 ? s[j] : -infinity<Acc<T>>();
  } else if (kind == MaskKind::kOwn) {
    const auto mask = mask_vector<T, kVec>(row, index, wide);
#pragma unroll
    for (int j = 0; j < kVec; ++j) s[j] += widen(mask.at[j]);
  } else if (kind == MaskKind::kAcc) {
    const auto mask = mask_vector<Acc<T>, kVec>(row, index, wide);
#pragma unroll
    for (int j = 0; j < kVec; ++j) s[j] += mask.at[j];
  }
}

struct Call {
  SoftmaxFwdParams p;
  bool wide_mask;
};

// A row is read twice, the second time from a cache: for its top and sum, and for its result.
template <class T, int kVec, bool kBlock>
__global__ void __launch_bounds__(kBlock ? kSoftmaxBlockThreads : kSoftmaxWarpThreads) softmax_fwd_kernel(const Call call) {
  using A = Acc<T>;
  const SoftmaxFwdParams& p = call.p;
  RowGroup<kBlock, A> group;
  const int64_t vectors = p.cols / kVec;
  const int64_t mask_bytes = p.mask.kind == MaskKind::kBool ? 1 : p.mask.kind == MaskKind::kOwn ? sizeof(T) : sizeof(A);
  const A scale = static_cast<A>(p.scale);
  for (int64_t row = group.first_row(); row < p.rows; row += group.row_step()) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
    const void* mask = p.mask.kind == MaskKind::kNone
                           ? nullptr
                           : static_cast<const char*>(p.mask.data) + mask_offset(p.mask, row) * mask_bytes;
    const auto scores = [&](int64_t index, A(&s)[kVec]) {
      const auto vector = load<T, kVec>(x, index);
#pragma unroll
      for (int j = 0; j < kVec; ++j) s[j] = widen(vector.at[j]) * scale;
      apply_mask<T, kVec>(p.mask.kind, mask, index, call.wide_mask, s);
    };
    Part<A> part{-infinity<A>(), A{0}};
#pragma unroll 1
    for (int64_t index = group.rank(); index < vectors; index += group.size()) {
      A s[kVec];
      scores(index, s);
      Part<A> here{s[0], A{0}};
#pragma unroll
      for (int j = 1; j < kVec; ++j) here.top = larger(here.top, s[j]);
      if (here.top == -infinity<A>()) continue;
      const A top = larger(part.top, here.top);
#pragma unroll
      for (int j = 0; j < kVec; ++j) here.total += exp(s[j] - top);
      part = {top, part.total * exp(part.top - top) + here.total};
    }
    part = joined_in_group<kBlock>(part);
    const bool dead = part.top == -infinity<A>();
    const A top = dead ? A{0} : part.top;
    // log_softmax subtracts the top and the logarithm one after the other: their sum would lose digits.
    const A rest = dead ? A{0} : p.log ? log(part.total) : A{1} / part.total;
#pragma unroll 1
    for (int64_t index = group.rank(); index < vectors; index += group.size()) {
      A s[kVec];
      scores(index, s);
      Vec<T, kVec> y;
#pragma unroll
      for (int j = 0; j < kVec; ++j) y.at[j] = narrow<T>(p.log ? (s[j] - top) - rest : exp(s[j] - top) * rest);
      store(static_cast<T*>(p.y) + row * p.cols, index, y);
    }
  }
}

using Kernel = void (*)(Call);

template <class T>
Kernel choose(const SoftmaxPlan& plan) {
  constexpr int kWide = kVectorBytes / sizeof(T);
  if (plan.wide) return plan.block ? softmax_fwd_kernel<T, kWide, true> : softmax_fwd_kernel<T, kWide, false>;
  return plan.block ? softmax_fwd_kernel<T, 1, true> : softmax_fwd_kernel<T, 1, false>;
}

}  // namespace

const char* softmax_fwd(const SoftmaxFwdParams& params, const SoftmaxPlan& plan, void* stream) {
  const Kernel kernel = with_type(params.dtype, [&](auto t) { return choose<decltype(t)>(plan); });
  return launch(kernel, Call{params, plan.wide_mask}, plan.launch, stream);
}

}  // namespace llmkernels::cuda
