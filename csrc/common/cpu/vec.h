// Vectors for CPU kernels: one register of fp32 or fp64, loaded from and stored to any element type.
//
// Built on the vector extensions of gcc and clang, so that one source serves every instruction set; only 16-bit
// conversions name instructions. Included by sources that are compiled once per instruction set, so everything lives
// in an anonymous namespace of that set: a weak symbol compiled for AVX-512 could be picked by the linker for
// everybody.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#endif

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kVectorBytes = 64;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE2 and NEON, the baselines of x86-64 and arm64
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type of statistics and sums for elements of type T.
template <class T>
using AccOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UInt32Vector __attribute__((vector_size(kVectorBytes)));
typedef uint16_t UInt16Vector __attribute__((vector_size(kVectorBytes)));
typedef uint16_t UInt16Half __attribute__((vector_size(kVectorBytes / 2)));  // as many lanes as FloatVector

template <class Acc>
using Vec = std::conditional_t<std::is_same_v<Acc, double>, DoubleVector, FloatVector>;
template <class Acc>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Acc));

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class Acc>
inline Vec<Acc> splat(Acc value) {
  return Vec<Acc>{} + value;
}

// `value` as it is, rounded. Else the product that made it may be fused with a sum that follows, in one copy of a loop
// and not in another, and a result would depend on what else is asked for.
template <class V>
inline V rounded(V value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
  return value;
}

// --- 16-bit floats ---

// gcc 12 converts vectors in halves where one instruction would do.
inline UInt32Vector zero_extend(UInt16Half bits) {
#if defined(CPU_CAPABILITY_AVX512)
  return bit_cast<UInt32Vector>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(bits)));
#elif defined(CPU_CAPABILITY_AVX2)
  return bit_cast<UInt32Vector>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)));
#else
  return __builtin_convertvector(bits, UInt32Vector);
#endif
}

inline FloatVector widen(UInt16Half bits, BFloat16) { return bit_cast<FloatVector>(zero_extend(bits) << 16); }

// The upper half of each lane, rounded to nearest even. Only a NaN is cut instead, or the carry could turn it into a
// number; its upper bits say that it is one, since every value stored here comes out of arithmetic, which makes NaNs
// quiet.
inline UInt32Vector rounded_to_bf16(FloatVector value) {
  const UInt32Vector bits = bit_cast<UInt32Vector>(value);
  return (value == value) ? bits + (((bits >> 16) & 1u) + 0x7fffu) : bits;
}

inline UInt16Half narrow(FloatVector value, BFloat16) {
#if defined(CPU_CAPABILITY_AVX512_BF16)
  // The instruction takes denormals for zero, whatever the mode of the processor is.
  const __mmask16 denormal = _mm512_fpclass_ps_mask(bit_cast<__m512>(value), 0x20);
  if (__builtin_expect(denormal == 0, 1)) return bit_cast<UInt16Half>(_mm512_cvtneps_pbh(bit_cast<__m512>(value)));
#endif
  const UInt32Vector kept = rounded_to_bf16(value) >> 16;
#if defined(CPU_CAPABILITY_AVX512)
  return bit_cast<UInt16Half>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(kept)));
#elif defined(CPU_CAPABILITY_AVX2)
  // packus works within halves of a register; the permutation puts its quarters in order.
  const __m256i packed = _mm256_packus_epi32(bit_cast<__m256i>(kept), bit_cast<__m256i>(kept));
  return bit_cast<UInt16Half>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0xd8)));
#else
  return __builtin_convertvector(kept, UInt16Half);
#endif
}

#if defined(CPU_CAPABILITY_AVX512)
inline FloatVector widen(UInt16Half bits, Float16) {
  return bit_cast<FloatVector>(_mm512_cvtph_ps(bit_cast<__m256i>(bits)));
}
inline UInt16Half narrow(FloatVector value, Float16) {
  return bit_cast<UInt16Half>(_mm512_cvtps_ph(bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(CPU_CAPABILITY_AVX2)
inline FloatVector widen(UInt16Half bits, Float16) {
  return bit_cast<FloatVector>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
}
inline UInt16Half narrow(FloatVector value, Float16) {
  return bit_cast<UInt16Half>(_mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
}
#else
inline FloatVector widen(UInt16Half half_bits, Float16) {
  const UInt32Vector bits = __builtin_convertvector(half_bits, UInt32Vector);
  const UInt32Vector sign = (bits & 0x8000u) << 16;
  const UInt32Vector rest = (bits & 0x7fffu) << 13;
  // Multiplying by 2^112 moves the exponent's bias and normalises denormals, both exactly.
  const FloatVector finite = bit_cast<FloatVector>(rest) * 0x1p112f;
  const UInt32Vector special = rest | 0x7f800000u;  // Inf and NaN keep their mantissa
  const auto is_special = (bits & 0x7c00u) == 0x7c00u;
  return bit_cast<FloatVector>((is_special ? special : bit_cast<UInt32Vector>(finite)) | sign);
}
// Round to nearest even, with overflow to Inf and with denormals.
inline UInt16Half narrow(FloatVector value, Float16) {
  const UInt32Vector bits = bit_cast<UInt32Vector>(value);
  const UInt32Vector sign = (bits >> 16) & 0x8000u;
  const UInt32Vector magnitude = bits & 0x7fffffffu;
  const UInt32Vector normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a denormal's digits, rounded by the addition, in the low bits of the mantissa.
  const FloatVector shifted = bit_cast<FloatVector>(magnitude) + 0.5f;
  const UInt32Vector denormal = bit_cast<UInt32Vector>(shifted) - 0x3f000000u;
  const UInt32Vector infinite = magnitude * 0u + 0x7c00u;
  const UInt32Vector nan = ((magnitude >> 13) & 0x3ffu) | 0x7e00u;
  UInt32Vector result = (magnitude < 0x38800000u) ? denormal : normal;
  result = (magnitude >= 0x477ff000u) ? infinite : result;
  result = (magnitude > 0x7f800000u) ? nan : result;
  return __builtin_convertvector(result | sign, UInt16Half);
}
#endif

// --- loads and stores; no alignment beyond the element's is assumed ---

template <class T>
inline Vec<AccOf<T>> load(const T* from) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    Vec<T> value;
    __builtin_memcpy(&value, from, sizeof(value));
    return value;
  } else {
    UInt16Half bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    return widen(bits, T{});
  }
}

template <class T>
inline void store(T* to, Vec<AccOf<T>> value) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    __builtin_memcpy(to, &value, sizeof(value));
  } else {
    const UInt16Half bits = narrow(value, T{});
    __builtin_memcpy(to, &bits, sizeof(bits));
  }
}

// The first `count` < kLanes elements; the other lanes are zero.
template <class T>
inline Vec<AccOf<T>> load_tail(const T* from, int count) {
#if defined(CPU_CAPABILITY_AVX512)
  const uint32_t mask = (1u << count) - 1u;
  if constexpr (std::is_same_v<T, double>) {
    return bit_cast<DoubleVector>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), from));
  } else if constexpr (std::is_same_v<T, float>) {
    return bit_cast<FloatVector>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from));
  } else {
    return widen(bit_cast<UInt16Half>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from)), T{});
  }
#else
  T buffer[kLanes<AccOf<T>>] = {};
  for (int i = 0; i < count; ++i) buffer[i] = from[i];
  return load(buffer);
#endif
}

template <class T>
inline void store_tail(T* to, Vec<AccOf<T>> value, int count) {
#if defined(CPU_CAPABILITY_AVX512)
  const uint32_t mask = (1u << count) - 1u;
  if constexpr (std::is_same_v<T, double>) {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), bit_cast<__m512d>(value));
  } else if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), bit_cast<__m512>(value));
  } else {
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), bit_cast<__m256i>(narrow(value, T{})));
  }
#else
  T buffer[kLanes<AccOf<T>>];
  store(buffer, value);
  for (int i = 0; i < count; ++i) to[i] = buffer[i];
#endif
}

// `value` in the first `count` lanes, zero in the others.
template <class Acc>
inline Vec<Acc> keep_first(Vec<Acc> value, int count) {
  Vec<Acc> lane;
  for (int i = 0; i < kLanes<Acc>; ++i) lane[i] = static_cast<Acc>(i);
  return lane < static_cast<Acc>(count) ? value : Vec<Acc>{};
}

// Calls f(j, Whole) for each whole vector of [0, cols), then f(j, Tail) for the rest: one body serves both.
struct Whole {
  template <class T>
  Vec<AccOf<T>> load(const T* from) const {
    return CPU_CAPABILITY::load(from);
  }
  template <class T>
  void store(T* to, Vec<AccOf<T>> value) const {
    CPU_CAPABILITY::store(to, value);
  }
  template <class Acc>
  Vec<Acc> keep(Vec<Acc> value) const {
    return value;
  }
};
struct Tail {
  int count;
  template <class T>
  Vec<AccOf<T>> load(const T* from) const {
    return load_tail(from, count);
  }
  template <class T>
  void store(T* to, Vec<AccOf<T>> value) const {
    store_tail(to, value, count);
  }
  template <class Acc>
  Vec<Acc> keep(Vec<Acc> value) const {
    return keep_first<Acc>(value, count);
  }
};

template <class Acc, class F>
inline void for_each_vector(int64_t begin, int64_t end, F&& f) {
  int64_t j = begin;
  for (; j + kLanes<Acc> <= end; j += kLanes<Acc>) f(j, Whole{});
  if (j < end) f(j, Tail{static_cast<int>(end - j)});
}

// --- all lanes as one, always in the same order: halves are joined by f until one lane is left ---

template <class Acc, int kWidth = kLanes<Acc>, class F>
inline Acc fold(Vec<Acc> value, F&& f) {
  if constexpr (kWidth == 1) {
    return value[0];
  } else {
    using Index = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;
    typedef Index Indices __attribute__((vector_size(kVectorBytes)));
    Indices upper{};
    for (int i = 0; i < kWidth / 2; ++i) upper[i] = i + kWidth / 2;
    return fold<Acc, kWidth / 2>(f(value, __builtin_shuffle(value, upper)), f);
  }
}

template <class Acc>
inline Acc sum(Vec<Acc> value) {
  return fold<Acc>(value, [](Vec<Acc> a, Vec<Acc> b) { return a + b; });
}

// --- calls f(T{}) for an element type ---

template <class F>
inline void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
  }
}

// For kernels that have no fp64: their callers refuse it, or convert.
template <class F>
inline void with_narrow_type(DType dtype, F&& f) {
  if (dtype == DType::kBFloat16) return f(BFloat16{});
  if (dtype == DType::kFloat16) return f(Float16{});
  f(float{});
}

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
