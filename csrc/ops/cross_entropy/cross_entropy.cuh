// What the forward and the backward kernel of cross entropy share: a row and its target, and the gradient. The maths
// is in cross_entropy.h. Options are branches of the whole grid: the kernels wait for memory, and as template arguments
// they would be twelve times as many.
#pragma once

#include "common/cuda/reduce.cuh"
#include "common/cuda/vec.cuh"
#include "ops/cross_entropy/cross_entropy_plan.h"

namespace llmkernels::cuda {

template <class A>
constexpr A kInfinity = static_cast<A>(__builtin_huge_valf());
template <class A>
constexpr A kNan = static_cast<A>(__builtin_nanf(""));

// softcap * tanh(x / softcap), and its slope.
template <class Acc>
struct Capped {
  Acc value, slope;
};

template <class Acc>
__device__ Capped<Acc> capped(Acc x, Acc cap) {
  const Acc t = tanh(x / cap);
  return {cap * t, (Acc{1} - t) * (Acc{1} + t)};
}

// One row: what is read of it, and what the whole row has in common.
template <class T, int kVec>
struct Row {
  using A = Acc<T>;

  const CrossEntropyInputs& p;
  int64_t row, index = -1;
  A confidence, spread, cap, own = 0;  // `own`: what an index itself adds to q
  bool ignored = false, known = true;

  __device__ Row(const CrossEntropyInputs& params, int64_t number)
      : p(params),
        row(number),
        confidence(static_cast<A>(1.0 - params.label_smoothing)),
        spread(static_cast<A>(params.label_smoothing / static_cast<double>(params.cols))),
        cap(static_cast<A>(params.softcap)) {
    if (p.kind == TargetKind::kProbabilities) return;
    index = static_cast<const int64_t*>(p.target)[row];
    ignored = index == p.ignore_index;
    known = !ignored && index >= 0 && index < p.cols;
    if (known) own = p.weight != nullptr ? confidence * static_cast<const A*>(p.weight)[index] : confidence;
  }

  __device__ const T* input() const { return static_cast<const T*>(p.input) + row * p.input_row_stride; }

  // u of vector number `at`, and its slope.
  __device__ void load_u(int64_t at, A (&u)[kVec], A (&slope)[kVec]) const {
    const auto vector = load<T, kVec>(input(), at);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      u[j] = widen(vector.at[j]);
      slope[j] = A{1};
    }
    if (cap == A{0}) return;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const Capped<A> both = capped(u[j], cap);
      u[j] = both.value;
      slope[j] = both.slope;
    }
  }

  __device__ A u_of_index() const {
    const A x = widen(input()[index]);
    return cap == A{0} ? x : capped(x, cap).value;
  }

  // Whether q is zero but for what an index itself adds.
  __device__ bool q_is_plain() const { return p.kind == TargetKind::kIndex; }

  // q of vector number `at`, but for what an index itself adds.
  __device__ void load_q(int64_t at, A (&q)[kVec]) const {
#pragma unroll
    for (int j = 0; j < kVec; ++j) q[j] = spread;
    if (p.kind == TargetKind::kProbabilities) {
      const int64_t bytes = p.wide_target ? sizeof(A) : sizeof(T);
      A probability[kVec];
      load_widened<T, kVec>(static_cast<const char*>(p.target) + row * p.target_row_stride * bytes, p.wide_target, at,
                            probability);
#pragma unroll
      for (int j = 0; j < kVec; ++j) q[j] += confidence * probability[j];
    }
    if (p.weight != nullptr) {
      const auto weight = load<A, kVec>(p.weight, at);
#pragma unroll
      for (int j = 0; j < kVec; ++j) q[j] *= weight.at[j];
    }
  }

  // Writes the gradient of the vectors `first`, `first + step`, ...
  __device__ void store_gradient(A max, A log_sum, A mass, int64_t first, int64_t step) const {
    T* dinput = static_cast<T*>(p.dinput) + row * p.cols;
    const int64_t vectors = p.cols / kVec;
    if (!known) {
      Vec<T, kVec> nothing;
#pragma unroll
      for (int j = 0; j < kVec; ++j) nothing.at[j] = narrow<T>(ignored ? A{0} : kNan<A>);
      for (int64_t at = first; at < vectors; at += step) store(dinput, at, nothing);
      return;
    }
    const A dloss = static_cast<const A*>(p.dloss)[row * p.dloss_stride];
    const A of_p = dloss * (mass + static_cast<A>(2.0 * p.z_loss) * (max + log_sum));
#pragma unroll 1
    for (int64_t at = first; at < vectors; at += step) {
      A u[kVec], slope[kVec], q[kVec];
      load_u(at, u, slope);
      if (q_is_plain()) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) q[j] = A{0};
      } else {
        load_q(at, q);
      }
      Vec<T, kVec> out;
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        if (at * kVec + j == index) q[j] += own;
        out.at[j] = narrow<T>((of_p * exp((u[j] - max) - log_sum) - dloss * q[j]) * slope[j]);
      }
      store(dinput, at, out);
    }
  }
};

// The kernel `Kernel<T, elements of a vector, one block per row>::get()` for a call.
template <template <class, int, bool> class Kernel, class T>
auto choose(const CrossEntropyPlan& plan) {
  constexpr int kWide = kVectorBytes / sizeof(T);
  if (plan.block) return plan.wide ? Kernel<T, kWide, true>::get() : Kernel<T, 1, true>::get();
  return plan.wide ? Kernel<T, kWide, false>::get() : Kernel<T, 1, false>::get();
}

template <template <class, int, bool> class Kernel>
auto choose(DType dtype, const CrossEntropyPlan& plan) {
  return with_type(dtype, [&](auto t) { return choose<Kernel, decltype(t)>(plan); });
}

constexpr int cross_entropy_threads(bool block) {
  return block ? kCrossEntropyBlockThreads : kCrossEntropyWarpThreads;
}

}  // namespace llmkernels::cuda
