// Nothing is sorted: a threshold is found bit by bit, each with a sum over the row, which stays in the second-level
// cache. Sums have an order of their own, so that a seed gives the same tokens in every run.
#include "common/cuda/launch.h"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vec.cuh"
#include "ops/sample/sample_cuda.h"

namespace llmkernels::cuda {
namespace {

constexpr int kWarps = kSampleThreads / kWarpSize;

__device__ inline float infinity() { return __int_as_float(0x7f800000); }

// Unsigned numbers in the order of the floats.
__device__ inline uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

template <class T>
struct Row {
  const T* logits;
  int64_t cols;
  float top, factor;

  __device__ float x(int64_t column) const { return widen(logits[column]); }
  __device__ float e(float x) const { return exp((x - top) * factor); }
};

// The largest logit and its first column; the logit is a NaN if there is one.
struct Largest {
  float x;
  int64_t column;
};

// Chosen without a branch: lanes that went different ways here would not meet again at the next shuffle.
__device__ inline Largest larger(Largest a, Largest b) {
  const bool b_is_larger = (b.x > a.x) | ((b.x == a.x) & (b.column < a.column));
  const bool take_b = (a.x == a.x) & (b_is_larger | (b.x != b.x));
  return {take_b ? b.x : a.x, take_b ? b.column : a.column};
}

template <class T>
__device__ Largest largest(const T* logits, int64_t cols) {
  __shared__ float xs[kWarps];
  __shared__ int64_t columns[kWarps];
  Largest most{-infinity(), cols};
  for (int64_t j = threadIdx.x; j < cols; j += kSampleThreads) most = larger(most, Largest{widen(logits[j]), j});
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const Largest other{__shfl_xor_sync(kFullWarp, most.x, offset), __shfl_xor_sync(kFullWarp, most.column, offset)};
    most = larger(most, other);
  }
  if (threadIdx.x % kWarpSize == 0) {
    xs[threadIdx.x / kWarpSize] = most.x;
    columns[threadIdx.x / kWarpSize] = most.column;
  }
  __syncthreads();
  most = {xs[0], columns[0]};
  for (int i = 1; i < kWarps; ++i) most = larger(most, Largest{xs[i], columns[i]});
  return most;
}

// Over the row: how many keys are at least `least`, and the sum of their e if it is asked for.
template <bool kMass, class T>
__device__ double at_least(RowGroup<true, double>& group, const Row<T>& row, uint32_t least) {
  double total[1] = {0.0};
  for (int64_t j = threadIdx.x; j < row.cols; j += kSampleThreads) {
    const float x = row.x(j);
    if (key_of(x) >= least) total[0] += kMass ? static_cast<double>(row.e(x)) : 1.0;
  }
  group.sum(total);
  return total[0];
}

// The largest key from which on there is `enough`: of logits, or of e.
template <bool kMass, class T>
__device__ uint32_t threshold(RowGroup<true, double>& group, const Row<T>& row, double enough) {
  uint32_t key = 0;
#pragma unroll 1
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t candidate = key | 1u << bit;
    if (at_least<kMass>(group, row, candidate) >= enough) key = candidate;
  }
  return key;
}

// Every thread sums what is taken of a piece of the row; the first one finds the piece, and in it the token.
template <class T>
__device__ int64_t draw(const Row<T>& row, uint32_t least, float least_e, double u) {
  __shared__ double pieces[kSampleThreads];
  const int64_t length = (row.cols + kSampleThreads - 1) / kSampleThreads;
  const auto taken = [&](int64_t column) {
    const float x = row.x(column), e = row.e(x);
    return key_of(x) >= least && e >= least_e ? e : 0.0f;
  };
  const auto end_of = [&](int64_t piece) { return (piece + 1) * length < row.cols ? (piece + 1) * length : row.cols; };
  double sum = 0.0;
  for (int64_t j = threadIdx.x * length; j < end_of(threadIdx.x); ++j) sum += static_cast<double>(taken(j));
  pieces[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return 0;
  double total = 0.0;
  int last_piece = 0;
  for (int i = 0; i < kSampleThreads; ++i) {
    total += pieces[i];
    if (pieces[i] > 0.0) last_piece = i;
  }
  const double target = u * total;
  sum = 0.0;
  int piece = 0;
  while (piece < last_piece && !(sum + pieces[piece] > target)) sum += pieces[piece++];
  int64_t token = piece * length;  // by rounding no sum may exceed the target: then the last one that is taken
  for (int64_t j = piece * length; j < end_of(piece); ++j) {
    const float e = taken(j);
    if (e == 0.0f) continue;
    token = j;
    sum += static_cast<double>(e);
    if (sum > target) break;
  }
  return token;
}

template <class T>
__global__ void __launch_bounds__(kSampleThreads) sample_kernel(const SampleParams p) {
  RowGroup<true, double> group;
  constexpr double kLargestFactor = 3.4e38;  // an infinite one would make a NaN of the largest logit
  const double inverse = 1.0 / p.temperature;
  for (int64_t r = blockIdx.x; r < p.rows; r += gridDim.x) {
    const T* logits = static_cast<const T*>(p.logits) + r * p.row_stride;
    const Largest top = largest(logits, p.cols);
    const bool possible = top.x > -infinity() && top.x < infinity();
    int64_t token = possible ? top.column : -1;
    if (possible && p.temperature != 0.0) {
      const Row<T> row{logits, p.cols, top.x, static_cast<float>(inverse < kLargestFactor ? inverse : kLargestFactor)};
      uint32_t least = 0;
      if (p.top_k > 0 && p.top_k < p.cols) least = threshold<false>(group, row, static_cast<double>(p.top_k));
      if (p.top_p < 1.0) {
        const uint32_t of_top_p = threshold<true>(group, row, p.top_p * at_least<true>(group, row, least));
        least = of_top_p > least ? of_top_p : least;
      }
      token = draw(row, least, static_cast<float>(p.min_p), p.u[r]);
    }
    if (threadIdx.x == 0) p.tokens[r] = token;
    __syncthreads();  // the first thread was alone, and what is shared is written again for the next row
  }
}

}  // namespace

const char* sample(const SampleParams& params, const Launch& plan, void* stream) {
  switch (params.dtype) {
    case DType::kFloat64:  // converted by the caller
    case DType::kFloat32:
      return launch(sample_kernel<float>, params, plan, stream);
    case DType::kBFloat16:
      return launch(sample_kernel<__nv_bfloat16>, params, plan, stream);
    case DType::kFloat16:
      break;
  }
  return launch(sample_kernel<__half>, params, plan, stream);
}

}  // namespace llmkernels::cuda
