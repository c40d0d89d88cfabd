// What the forward and the backward of the norms on the CPU share: sums over a row, and the types and flags of a call.
// Included by sources that are compiled once per instruction set.
#pragma once

#include "ops/norm/norm_cpu.h"

#include "common/cpu/vec.h"
#include "common/random.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

// Sums run in vectors over a chunk and from there in double: an fp32 sum over 262,144 columns would lose digits.
constexpr int64_t kChunk = 2048;

// Whether a row takes so little work that the next one is begun before it is done, by the code or by the processor.
template <class T>
inline bool is_short(int64_t cols) {
  return cols * static_cast<int64_t>(sizeof(T)) <= 4096;
}

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

typedef int32_t Int32Vector __attribute__((vector_size(kVectorBytes)));
typedef int64_t Int64Vector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UInt32Half __attribute__((vector_size(kVectorBytes / 2)));  // as many lanes as DoubleVector

// Dropout of the elements of one row.
template <class Acc>
class Dropout {
 public:
  template <class Params>
  Dropout(const Params& p, int64_t row)
      : keys_(p.seed != nullptr ? row_keys(*p.seed, row) : RowKeys{}), threshold_(p.dropout_threshold),
        scale_(splat(static_cast<Acc>(p.dropout_scale))) {
    for (int i = 0; i < kLanes<Acc>; ++i) lanes_[i] = static_cast<uint32_t>(i);
  }

  // The elements from `column` on, scaled and rounded to T, or zero. The bits of a product are masked, so that no
  // compiler can join it with an addition and round both at once.
  template <class T>
  Vec<Acc> rounded(Vec<Acc> value, int64_t column) const {
    value *= scale_;
    if constexpr (sizeof(T) == 2) value = widen(narrow(value, T{}), T{});
    return kept(value, column);
  }
  Vec<Acc> operator()(Vec<Acc> value, int64_t column) const { return kept(value * scale_, column); }

 private:
  using Words = std::conditional_t<sizeof(Acc) == 8, Int64Vector, Int32Vector>;
  using Bits = std::conditional_t<sizeof(Acc) == 8, UInt32Half, UInt32Vector>;

  Vec<Acc> kept(Vec<Acc> value, int64_t column) const {
    const Bits bits = random_bits(keys_, lanes_ + static_cast<uint32_t>(column));
    const Words mask = __builtin_convertvector((bits >> 8) >= threshold_, Words);
    return bit_cast<Vec<Acc>>(bit_cast<Words>(value) & mask);
  }

  RowKeys keys_;
  uint32_t threshold_;
  Vec<Acc> scale_;
  Bits lanes_;
};

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
