// Elementary functions of vectors, written from the maths so that every instruction set has the same ones. As vec.h:
// raw vectors in the anonymous namespace of the instruction set, nothing of the standard library.
#pragma once

#include "common/cpu/vec.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

typedef uint64_t UInt64Vector __attribute__((vector_size(kVectorBytes)));

// What exp needs to know of a format. Below kLowest its result rounds to zero, above kHighest it is infinite.
template <class Acc>
struct ExpOf;
template <>
struct ExpOf<float> {
  using Bits = UInt32Vector;
  static constexpr uint32_t kBias = 127, kMantissaBits = 23;
  static constexpr float kLowest = -104.0f, kHighest = 89.0f;
  static constexpr float kShift = 0x1.8p23f;
  static constexpr uint32_t kShiftBits = 0x4b400000u;
  // ln 2 in two parts: a whole number up to 2^8 times the first one is exact.
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 1.42860682e-6f;
  static constexpr int kTerms = 7;
};
template <>
struct ExpOf<double> {
  using Bits = UInt64Vector;
  static constexpr uint64_t kBias = 1023, kMantissaBits = 52;
  static constexpr double kLowest = -746.0, kHighest = 710.0;
  static constexpr double kShift = 0x1.8p52;
  static constexpr uint64_t kShiftBits = 0x4338000000000000u;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 1.9082149292705877e-10;  // up to 2^11
  static constexpr int kTerms = 13;
};

constexpr double kInverseFactorial[] = {1.0,         1.0,          1.0 / 2,        1.0 / 6,        1.0 / 24,
                                        1.0 / 120,   1.0 / 720,    1.0 / 5040,     1.0 / 40320,    1.0 / 362880,
                                        1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};

// `value` between two bounds; a NaN stays.
template <class Acc>
inline Vec<Acc> clamped(Vec<Acc> value, Acc lowest, Acc highest) {
#if defined(CPU_CAPABILITY_AVX512)
  // One instruction each, which gives the second operand if either is a NaN; gcc 12 makes two of a comparison.
  if constexpr (sizeof(Acc) == 4) {
    const __m512 raised = _mm512_maskz_max_ps(0xffff, bit_cast<__m512>(splat(lowest)), bit_cast<__m512>(value));
    return bit_cast<FloatVector>(_mm512_maskz_min_ps(0xffff, bit_cast<__m512>(splat(highest)), raised));
  } else {
    const __m512d raised = _mm512_maskz_max_pd(0xff, bit_cast<__m512d>(splat(lowest)), bit_cast<__m512d>(value));
    return bit_cast<DoubleVector>(_mm512_maskz_min_pd(0xff, bit_cast<__m512d>(splat(highest)), raised));
  }
#else
  value = value < lowest ? splat(lowest) : value;
  return value > highest ? splat(highest) : value;
#endif
}

// The sum of kInverseFactorial[first + i] r^i over i < kCount, by halves: with less latency than Horner's scheme,
// which is what holds these kernels up.
template <class Acc, int kFirst, int kCount>
inline Vec<Acc> taylor(Vec<Acc> r, Vec<Acc> r2, Vec<Acc> r4, Vec<Acc> r8) {
  if constexpr (kCount == 1) {
    return splat(static_cast<Acc>(kInverseFactorial[kFirst]));
  } else {
    constexpr int kLow = kCount > 8 ? 8 : kCount > 4 ? 4 : kCount > 2 ? 2 : 1;
    const Vec<Acc> power = kLow == 8 ? r8 : kLow == 4 ? r4 : kLow == 2 ? r2 : r;
    return taylor<Acc, kFirst + kLow, kCount - kLow>(r, r2, r4, r8) * power +
           taylor<Acc, kFirst, kLow>(r, r2, r4, r8);
  }
}

// exp(x) = 2^n exp(r) with r = x - n ln 2, at most ln(2) / 2 in size, where Taylor's series is off by 0.1 ulp after as
// many powers as ExpOf says. NaN, Inf, overflow and denormal results as they should be. Coarse: within 5e-6, which is
// all that a result of 16 bits can show.
template <class Acc, bool kCoarse = false>
inline Vec<Acc> exp(Vec<Acc> x) {
  using Of = ExpOf<Acc>;
  x = clamped<Acc>(x, Of::kLowest, Of::kHighest);
  // Adding kShift leaves the nearest whole number in the low bits of the mantissa.
  const Vec<Acc> shifted = x * static_cast<Acc>(1.4426950408889634) + Of::kShift;
  const Vec<Acc> n = shifted - Of::kShift;
  constexpr Acc kLn2 = static_cast<Acc>(0.6931471805599453);
  const Vec<Acc> r = kCoarse ? x - n * kLn2 : (x - n * Of::kLn2High) - n * Of::kLn2Low;
  const Vec<Acc> r2 = r * r, r4 = r2 * r2, r8 = r4 * r4;
  // 1 and r are added last, where their digits are safe.
  const Vec<Acc> p = Acc{1} + (r + r2 * taylor<Acc, 2, (kCoarse ? 5 : Of::kTerms) - 1>(r, r2, r4, r8));
#if defined(CPU_CAPABILITY_AVX512)
  // p 2^n, rounded once. With a mask of all lanes: gcc 12 warns of the plain intrinsics.
  if constexpr (sizeof(Acc) == 4) {
    return bit_cast<FloatVector>(_mm512_maskz_scalef_ps(0xffff, bit_cast<__m512>(p), bit_cast<__m512>(n)));
  } else {
    return bit_cast<DoubleVector>(_mm512_maskz_scalef_pd(0xff, bit_cast<__m512d>(p), bit_cast<__m512d>(n)));
  }
#else
  // 2^n as two factors, both normal: a denormal result is rounded once, by the last product.
  using Bits = typename Of::Bits;
  const Bits biased = bit_cast<Bits>(shifted) - (Of::kShiftBits - 2 * Of::kBias);
  const Bits half = biased >> 1;
  return p * bit_cast<Vec<Acc>>(half << Of::kMantissaBits) * bit_cast<Vec<Acc>>((biased - half) << Of::kMantissaBits);
#endif
}

template <class Acc, bool kCoarse = false>
inline Vec<Acc> sigmoid(Vec<Acc> x) {
  return Acc{1} / (Acc{1} + exp<Acc, kCoarse>(-x));
}

// tanh(x) = e / (e + 2) with e = exp(2 x) - 1 = 2^n (exp(r) - 1) + (2^n - 1), in which nothing cancels: for small x
// n is zero, and the rest is r and its higher powers.
template <class Acc, bool kCoarse = false>
inline Vec<Acc> tanh(Vec<Acc> x) {
  using Of = ExpOf<Acc>;
  const Vec<Acc> twice = clamped<Acc>(x + x, Acc{-44}, Acc{44});  // beyond, the result is 1 in every digit
  const Vec<Acc> shifted = twice * static_cast<Acc>(1.4426950408889634) + Of::kShift;
  const Vec<Acc> n = shifted - Of::kShift;
  constexpr Acc kLn2 = static_cast<Acc>(0.6931471805599453);
  const Vec<Acc> r = kCoarse ? twice - n * kLn2 : (twice - n * Of::kLn2High) - n * Of::kLn2Low;
  const Vec<Acc> r2 = r * r, r4 = r2 * r2, r8 = r4 * r4;
  const Vec<Acc> p = r + r2 * taylor<Acc, 2, (kCoarse ? 5 : Of::kTerms) - 1>(r, r2, r4, r8);
  using Bits = typename Of::Bits;
  const Vec<Acc> power = bit_cast<Vec<Acc>>((bit_cast<Bits>(shifted) - (Of::kShiftBits - Of::kBias))
                                            << Of::kMantissaBits);
  const Vec<Acc> e = power * p + (power - Acc{1});
  return e / (e + Acc{2});
}

// The standard normal distribution at x: cumulative, and its density.
template <class Acc>
struct Normal {
  Vec<Acc> cdf, density;
};

constexpr double kInverseSqrt2 = 0.7071067811865476, kInverseSqrt2Pi = 0.3989422804014327;

// What lies beyond |x| is exp(-x^2 / 2) t P(t) with t = 1 / (1 + 0.35 |x|): the exponential is the density's too, and
// unlike 1 + erf nothing cancels where x is far below zero. P is our own fit, by least squares reweighted towards the
// largest relative error at 400 Chebyshev points of t over 0 <= |x| <= 14.3: off by 3.2e-8. All in all within 4 ulp
// for |x| < 1; further out the rounding of x^2 / 2 adds x^2 / 4 ulp to a result that is small.
template <bool kCoarse>
inline Normal<float> normal(FloatVector x) {
  const FloatVector size = bit_cast<FloatVector>(bit_cast<UInt32Vector>(x) & 0x7fffffffu);
  const FloatVector e = exp<float, kCoarse>(x * x * -0.5f);
  const FloatVector t = 1.0f / (1.0f + 0.35f * size);
  FloatVector p = splat(-2.91540846e-2f);
  p = p * t + 1.44012064e-1f;
  p = p * t - 2.55799234e-1f;
  p = p * t + 1.59273237e-1f;
  p = p * t - 2.31795851e-2f;
  p = p * t + 1.05538256e-1f;
  p = p * t + 1.19824998e-1f;
  p = p * t + 1.39862984e-1f;
  p = p * t + 1.39621332e-1f;
  const FloatVector tail = e * (t * p);
  return {x < 0.0f ? tail : 1.0f - tail, e * static_cast<float>(kInverseSqrt2Pi)};
}

// Through the C library, lane by lane: as many digits as double has would take a far longer polynomial.
template <bool>
inline Normal<double> normal(DoubleVector x) {
  Normal<double> result;
  for (int i = 0; i < kLanes<double>; ++i) result.cdf[i] = 0.5 * __builtin_erfc(-kInverseSqrt2 * x[i]);
  result.density = exp<double>(x * x * -0.5) * kInverseSqrt2Pi;
  return result;
}

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
