// Elementwise maps over rows. As vec.h: raw vectors in the anonymous namespace of the instruction set.
#pragma once

#include "common/cpu/vec.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

// Two vectors of elements side by side, in an order that store_pair undoes: bf16 splits into its even and its odd
// elements, which takes half the instructions of widening one half after the other.
template <class T>
inline void load_pair(const T* from, Vec<AccOf<T>>& a, Vec<AccOf<T>>& b) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, BFloat16>) {
    UInt32Vector bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    a = bit_cast<FloatVector>(bits << 16);
    b = bit_cast<FloatVector>(bits & 0xffff0000u);
    return;
  }
#endif
  a = load(from);
  b = load(from + kLanes<AccOf<T>>);
}

template <class T>
inline void store_pair(T* to, Vec<AccOf<T>> a, Vec<AccOf<T>> b) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, BFloat16>) {
#if defined(CPU_CAPABILITY_AVX512_BF16)
    // As `narrow`: denormals are not for the instruction.
    const __mmask16 denormal_a = _mm512_fpclass_ps_mask(bit_cast<__m512>(a), 0x20);
    const __mmask16 denormal_b = _mm512_fpclass_ps_mask(bit_cast<__m512>(b), 0x20);
    if (__builtin_expect(_kortestz_mask16_u8(denormal_a, denormal_b), 1)) {
      const __m512i both = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(b), bit_cast<__m512>(a)));
      UInt16Vector order;
      for (int i = 0; i < 2 * kLanes<float>; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * kLanes<float>);
      const __m512i bits = _mm512_permutexvar_epi16(bit_cast<__m512i>(order), both);
      __builtin_memcpy(to, &bits, sizeof(bits));
      return;
    }
#endif
    const UInt32Vector bits = rounded_to_bf16(a) >> 16 | (rounded_to_bf16(b) & 0xffff0000u);
    __builtin_memcpy(to, &bits, sizeof(bits));
    return;
  }
#endif
  store(to, a);
  store(to + kLanes<AccOf<T>>, b);
}

// Calls f(row, first column, end) for the parts of rows that make up the elements [begin, end).
template <class F>
inline void for_each_part(int64_t cols, int64_t begin, int64_t end, F&& f) {
  int64_t row = begin / cols, column = begin % cols;
  while (begin < end) {
    const int64_t stop = cols - column < end - begin ? cols : column + (end - begin);
    f(row, column, stop);
    begin += stop - column;
    column = 0;
    ++row;
  }
}

// out[i][j] = y[i] after f(x, y) with x[i] = in[i][j], for j in [begin, end); a null output is left out.
template <class T, int kIn, int kOut, class F>
inline void map(int64_t begin, int64_t end, const T* const (&in)[kIn], T* const (&out)[kOut], F&& f) {
  using Acc = AccOf<T>;
  int64_t j = begin;
  for (; j + 2 * kLanes<Acc> <= end; j += 2 * kLanes<Acc>) {
    Vec<Acc> xa[kIn], xb[kIn], ya[kOut], yb[kOut];
    for (int i = 0; i < kIn; ++i) load_pair(in[i] + j, xa[i], xb[i]);
    f(xa, ya);
    f(xb, yb);
    for (int i = 0; i < kOut; ++i) {
      if (out[i] != nullptr) store_pair(out[i] + j, ya[i], yb[i]);
    }
  }
  for_each_vector<Acc>(j, end, [&](int64_t k, auto part) {
    Vec<Acc> x[kIn], y[kOut];
    for (int i = 0; i < kIn; ++i) x[i] = part.load(in[i] + k);
    f(x, y);
    for (int i = 0; i < kOut; ++i) {
      if (out[i] != nullptr) part.store(out[i] + k, y[i]);
    }
  });
}

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
