// What the forward and the backward of the norms on the CPU share: sums over a row, and the types and flags of a call.
// Included by sources that are compiled once per instruction set.
#pragma once

#include "ops/norm/norm_cpu.h"

#include "common/cpu/vec.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

// Sums run in vectors over a chunk and from there in double: an fp32 sum over 262,144 columns would lose digits.
constexpr int64_t kChunk = 2048;

// Three sums over the values that `terms(j, part, a, b, c)` adds for each vector of a row. Four sets of
// accumulators hide the latency of an addition.
template <class Acc>
struct Sums {
  double a = 0, b = 0, c = 0;
};

template <class Acc, class Terms>
inline Sums<Acc> sum_row(int64_t cols, Terms&& terms) {
  constexpr int64_t kStep = 4 * kLanes<Acc>;
  Sums<Acc> total;
  for (int64_t begin = 0; begin < cols; begin += kChunk) {
    const int64_t end = begin + kChunk < cols ? begin + kChunk : cols;
    Vec<Acc> a0{}, a1{}, a2{}, a3{}, b0{}, b1{}, b2{}, b3{}, c0{}, c1{}, c2{}, c3{};
    int64_t j = begin;
    for (; j + kStep <= end; j += kStep) {
      terms(j, Whole{}, a0, b0, c0);
      terms(j + kLanes<Acc>, Whole{}, a1, b1, c1);
      terms(j + 2 * kLanes<Acc>, Whole{}, a2, b2, c2);
      terms(j + 3 * kLanes<Acc>, Whole{}, a3, b3, c3);
    }
    for_each_vector<Acc>(j, end, [&](int64_t i, auto part) { terms(i, part, a0, b0, c0); });
    total.a += static_cast<double>(sum<Acc>((a0 + a1) + (a2 + a3)));
    total.b += static_cast<double>(sum<Acc>((b0 + b1) + (b2 + b3)));
    total.c += static_cast<double>(sum<Acc>((c0 + c1) + (c2 + c3)));
  }
  return total;
}

// Calls f(T{}, W{}) for the element types of a call.
template <class F>
inline void with_types(DType dtype, DType weight_dtype, F&& f) {
  const bool wide = weight_dtype == DType::kFloat32;
  switch (dtype) {
    case DType::kFloat64:
      return f(double{}, double{});
    case DType::kFloat32:
      return f(float{}, float{});
    case DType::kBFloat16:
      return wide ? f(BFloat16{}, float{}) : f(BFloat16{}, BFloat16{});
    case DType::kFloat16:
      return wide ? f(Float16{}, float{}) : f(Float16{}, Float16{});
  }
}

// Calls f(rms, weight) with the two flags as compile-time constants.
template <class F>
inline void with_flags(NormKind kind, bool weight, F&& f) {
  if (kind == NormKind::kRmsNorm) {
    weight ? f(std::true_type{}, std::true_type{}) : f(std::true_type{}, std::false_type{});
  } else {
    weight ? f(std::false_type{}, std::true_type{}) : f(std::false_type{}, std::false_type{});
  }
}

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
