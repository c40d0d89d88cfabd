// Formats narrower than float, written without branches so that loops over lanes vectorise. Compiled once per
// instruction set, hence the namespace.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#ifndef PTXSIM_ISA
#define PTXSIM_ISA isa_base
#endif

namespace ptxsim::PTXSIM_ISA {

inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t as_bits(float value) { return std::bit_cast<uint32_t>(value); }

inline float half_to_float(uint32_t h) {
  const uint32_t sign = (h & 0x8000u) << 16;
  const uint32_t magnitude = (h & 0x7fffu) << 13;
  const uint32_t scaled = as_bits(as_float(magnitude) * 0x1p112f);  // also right for subnormal halves
  const uint32_t wide = magnitude >= (31u << 23) ? (magnitude | (0xffu << 23)) : scaled;
  return as_float(sign | wide);
}

// To nearest, ties to even; NaN becomes 0x7fff as on the GPU.
inline uint32_t float_to_half(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t a = bits & 0x7fffffffu;
  const uint32_t normal = (a + 0xfffu + ((a >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t subnormal = as_bits(as_float(a) + 0.5f) - (126u << 23);  // the adder rounds at the right bit
  uint32_t h = a < (113u << 23) ? subnormal : normal;
  h = a >= 0x477ff000u ? 0x7c00u : h;
  h = a > 0x7f800000u ? 0x7fffu : h;
  return a > 0x7f800000u ? h : (h | sign);
}

inline float bf16_to_float(uint32_t b) { return as_float(b << 16); }

inline uint32_t float_to_bf16(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded;
}

// Rounds toward zero, up, down or to nearest with ties to even or away, keeping `mantissa` bits and exponents down to
// `min_exponent` (of the smallest normal number). The result is exact in double; overflow is left to the caller.
enum class Rounding : uint8_t { kNearest, kZero, kDown, kUp, kAway };

inline double round_to(double value, int mantissa, int min_exponent, Rounding rounding) {
  if (value == 0 || !std::isfinite(value)) return value;
  int exponent;
  std::frexp(value, &exponent);  // |value| in [2^(exponent-1), 2^exponent)
  const int unit = (exponent - 1 < min_exponent ? min_exponent : exponent - 1) - mantissa;
  const double scaled = std::ldexp(value, -unit);
  double whole;
  switch (rounding) {
    case Rounding::kNearest: whole = std::nearbyint(scaled); break;
    case Rounding::kZero: whole = std::trunc(scaled); break;
    case Rounding::kDown: whole = std::floor(scaled); break;
    case Rounding::kUp: whole = std::ceil(scaled); break;
    default: whole = std::round(scaled); break;
  }
  const double rounded = std::ldexp(whole, unit);
  return rounded == 0 ? std::copysign(0.0, value) : rounded;
}

// a * b + c with one rounding to `double` to odd, so that a later rounding to a narrower format is right.
inline double fma_odd(double a, double b, double c) {  // a * b must be exact in double
  const double p = a * b, s = p + c;
  if (!std::isfinite(s)) return s;
  const double bb = s - p, error = (p - (s - bb)) + (c - bb);
  const auto bits = std::bit_cast<uint64_t>(s);
  if (error == 0 || (bits & 1)) return s;
  return std::bit_cast<double>((error > 0) == (s > 0) ? bits + 1 : bits - 1);
}

inline uint32_t fma_to_half(float a, float b, float c) {
  const double r = fma_odd(a, b, c);
  // Double to float to half: make the first rounding odd as well.
  float f = static_cast<float>(r);
  if (static_cast<double>(f) != r && std::isfinite(f) && r == r) {
    const uint32_t bits = as_bits(f);
    if (std::fabs(static_cast<double>(f)) > std::fabs(r)) f = as_float(bits - 1);
    f = as_float(as_bits(f) | 1u);
  }
  return float_to_half(f);
}

inline uint32_t fma_to_bf16(float a, float b, float c) {
  const double r = fma_odd(a, b, c);
  float f = static_cast<float>(r);
  if (static_cast<double>(f) != r && std::isfinite(f) && r == r) {
    const uint32_t bits = as_bits(f);
    if (std::fabs(static_cast<double>(f)) > std::fabs(r)) f = as_float(bits - 1);
    f = as_float(as_bits(f) | 1u);
  }
  return float_to_bf16(f);
}

// Eight-bit floats: e4m3 has no infinity, 0x7f is NaN; e5m2 is like half.
inline float e4m3_to_float(uint32_t v) {
  const uint32_t sign = (v & 0x80u) << 24;
  const uint32_t magnitude = (v & 0x7fu) << 20;
  const uint32_t scaled = as_bits(as_float(magnitude) * 0x1p120f);
  return as_float(sign | ((v & 0x7fu) == 0x7fu ? 0x7fffffffu : scaled));
}
inline float e5m2_to_float(uint32_t v) { return half_to_float((v & 0xffu) << 8); }

// To nearest even, overflow to the largest finite value (satfinite, the only form PTX has).
inline uint32_t float_to_e4m3(float value) {
  if (value != value) return 0x7f;
  const uint32_t sign = (as_bits(value) >> 24) & 0x80u;
  const double a = round_to(std::fabs(static_cast<double>(value)), 3, -6, Rounding::kNearest);
  if (a >= 448) return sign | 0x7e;
  return sign | (as_bits(static_cast<float>(a) * 0x1p-120f) >> 20);
}
inline uint32_t float_to_e5m2(float value) {
  if (value != value) return 0x7f;
  const uint32_t sign = (as_bits(value) >> 24) & 0x80u;
  const double a = round_to(std::fabs(static_cast<double>(value)), 2, -14, Rounding::kNearest);
  if (a > 57344) return sign | 0x7b;
  return sign | (as_bits(static_cast<float>(a) * 0x1p-112f) >> 21);
}
inline float round_to_tf32(float value) {  // cvt.rna.tf32.f32: to nearest, ties away
  const uint32_t bits = as_bits(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return value != value ? as_float(0x7fffffffu) : value;
  return as_float((bits + 0x1000u) & 0xffffe000u);
}

}  // namespace ptxsim::PTXSIM_ISA
