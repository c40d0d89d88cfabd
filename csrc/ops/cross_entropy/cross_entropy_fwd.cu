#include "common/cuda/launch.h"
#include "ops/cross_entropy/cross_entropy.cuh"
#include "ops/cross_entropy/cross_entropy_cuda.h"

namespace llmkernels::cuda {
namespace {

// What is known of a part of a row: the largest u and, relative to it, the sums of exp(u - max) and of q (u - max).
// While there was nothing but -Inf they are relative to zero, so that no NaN arises.
template <class A>
struct Moments {
  A max = -kInfinity<A>, total = 0, dot = 0, mass = 0;

  __device__ A shift() const { return max == -kInfinity<A> ? A{0} : max; }

  // The same numbers relative to a larger `to`.
  __device__ void raise(A to) {
    const A from = shift();
    if (max != -kInfinity<A>) total *= exp(max - to);
    max = to;
    dot += mass * (from - shift());
  }

  // A NaN is never the larger one; the sum of exponentials keeps it.
  __device__ void merge(Moments other) {
    if (other.max > max) raise(other.max);
    if (max > other.max) other.raise(max);
    total += other.total;
    dot += other.dot;
    mass += other.mass;
  }
};

template <class A>
__device__ Moments<A> shuffled(const Moments<A>& m, int from) {
  Moments<A> other;
  other.max = __shfl_sync(kFullWarp, m.max, from);
  other.total = __shfl_sync(kFullWarp, m.total, from);
  other.dot = __shfl_sync(kFullWarp, m.dot, from);
  other.mass = __shfl_sync(kFullWarp, m.mass, from);
  return other;
}

// Merges what the threads of a row know, in an order that depends on their number only; every thread gets the result.
// `parity` alternates between two buffers from call to call: see RowGroup.
template <bool kBlock, class A>
__device__ void merge_row(Moments<A>& m, int& parity) {
  const int lane = threadIdx.x % kWarpSize;
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const Moments<A> other = shuffled(m, lane ^ offset);
    m.merge(other);
  }
  m = shuffled(m, 0);  // the lanes merged in different orders
  if constexpr (kBlock) {
    __shared__ A of_warp[2][4][kWarpSize];
    A(&buffer)[4][kWarpSize] = of_warp[parity];
    if (lane == 0) {
      const int warp = threadIdx.x / kWarpSize;
      buffer[0][warp] = m.max;
      buffer[1][warp] = m.total;
      buffer[2][warp] = m.dot;
      buffer[3][warp] = m.mass;
    }
    __syncthreads();
    m = Moments<A>{};
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarpSize; ++warp) {
      m.merge({buffer[0][warp], buffer[1][warp], buffer[2][warp], buffer[3][warp]});
    }
    parity ^= 1;
  }
}

// The logits are read once; with a gradient, a second time out of a cache.
template <class T, int kVec, bool kBlock>
__global__ void __launch_bounds__(cross_entropy_threads(kBlock), kBlock ? 1 : 4)
    cross_entropy_fwd_kernel(const CrossEntropyFwdParams p) {
  using A = Acc<T>;
  const RowGroup<kBlock, A> group;
  int parity = 0;
  A* stats = static_cast<A*>(p.stats);
  for (int64_t number = group.first_row(); number < p.rows; number += group.row_step()) {
    const Row<T, kVec> row(p, number);
    A max = 0, log_sum = 0, mass = 0, loss = row.ignored ? A{0} : kNan<A>;
    if (row.known) {
      Moments<A> m;
      const int64_t vectors = p.cols / kVec;
#pragma unroll 1
      for (int64_t at = group.rank(); at < vectors; at += group.size()) {
        A u[kVec], slope[kVec];
        row.load_u(at, u, slope);
        A largest = u[0];
#pragma unroll
        for (int j = 1; j < kVec; ++j) largest = u[j] > largest || largest != largest ? u[j] : largest;
        if (largest > m.max) m.raise(largest);
        const A shift = m.shift();
#pragma unroll
        for (int j = 0; j < kVec; ++j) m.total += exp(u[j] - shift);
        if (row.q_is_plain()) continue;
        A q[kVec];
        row.load_q(at, q);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          m.dot += q[j] * (u[j] - shift);
          m.mass += q[j];
        }
      }
      merge_row<kBlock>(m, parity);
      max = m.max;
      mass = m.mass;
      // A row of nothing but -Inf has no softmax.
      log_sum = max == -kInfinity<A> ? kNan<A> : log(m.total);
      if (row.index >= 0) {
        m.dot += row.own * (row.u_of_index() - m.shift());
        mass += row.own;
      }
      const A lse = max + log_sum;
      loss = mass * log_sum - m.dot;
      if (p.z_loss != 0.0) loss += static_cast<A>(p.z_loss) * lse * lse;
    }
    if (group.rank() == 0) {
      static_cast<A*>(p.loss)[number] = loss;
      stats[kStatMax * p.rows + number] = max;
      stats[kStatLogSum * p.rows + number] = log_sum;
      stats[kStatMass * p.rows + number] = mass;
    }
    if (p.dloss != nullptr) row.store_gradient(max, log_sum, mass, group.rank(), group.size());
  }
}

template <class T, int kVec, bool kBlock>
struct Forward {
  static auto get() { return &cross_entropy_fwd_kernel<T, kVec, kBlock>; }
};

}  // namespace

const char* cross_entropy_fwd(const CrossEntropyFwdParams& params, const CrossEntropyPlan& plan, void* stream) {
  return launch(choose<Forward>(params.dtype, plan), params, plan.launch, stream);
}

}  // namespace llmkernels::cuda
