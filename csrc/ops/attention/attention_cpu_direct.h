// Products with keys and values where they lie, for few queries: every key is read once, so packing it would cost more
// than it saves, and the memory decides how fast this is.
#pragma once

#include "ops/attention/attention_cpu_scores.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

constexpr int kDirectTileRows = 4;

template <class C>
inline FloatVector multiply_add(FloatVector sum, UInt32Vector a, UInt32Vector b) {
#if defined(CPU_CAPABILITY_AVX512_BF16)
  if constexpr (kPerWord<C> == 2) {
    return bit_cast<FloatVector>(
        _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
  }
#endif
  return sum + bit_cast<FloatVector>(a) * bit_cast<FloatVector>(b);
}

// s[i][j] = q_i . k_j for j in [begin, end), with what fills up the last vector: values that mean nothing. `q` has
// kRows rows.
template <class T, int kRows>
__attribute__((noinline)) void direct_scores(const Word* q, int64_t q_row, const HeadRows<T>& keys, int64_t first,
                                             int64_t begin, int64_t end, int64_t dim, float* s, int64_t s_row) {
  using C = ProductOf<T>;
  constexpr int kKeys = kLanes<float> / kRows;
  const int64_t whole = dim / (kLanes<float> * kPerWord<C>) * kLanes<float>, words = div_up(dim, kPerWord<C>);
  for (int64_t j = begin; j < end; j += kKeys) {
    const T* rows[kKeys];
    for (int i = 0; i < kKeys; ++i) rows[i] = keys(first + (j + i < end ? j + i : end - 1));
    FloatVector sums[kRows * kKeys];
    for (int i = 0; i < kRows * kKeys; ++i) sums[i] = FloatVector{};
    const auto step = [&](int64_t w, auto load_key) {
      UInt32Vector k[kKeys];
      for (int i = 0; i < kKeys; ++i) k[i] = load_key(rows[i] + w * kPerWord<C>);
      for (int r = 0; r < kRows; ++r) {
        UInt32Vector row;
        __builtin_memcpy(&row, q + r * q_row + w, sizeof(row));
        for (int i = 0; i < kKeys; ++i) sums[r * kKeys + i] = multiply_add<C>(sums[r * kKeys + i], row, k[i]);
      }
    };
    for (int64_t w = 0; w < whole; w += kLanes<float>) {
      step(w, [](const T* from) { return load_words<C>(from, 2 * kLanes<float>); });
    }
    if (whole < words) {
      step(whole, [&](const T* from) { return load_words<C>(from, dim - whole * kPerWord<C>); });
    }
    const FloatVector found = combine_lanes<kLanes<float>>(sums, Sum{});
    float values[kLanes<float>];
    store(values, found);
    for (int r = 0; r < kRows; ++r) __builtin_memcpy(s + r * s_row + j, values + r * kKeys, kKeys * sizeof(float));
  }
}

// acc_i = factors[i] acc_i + sum of p[i][j] v_j over j in [begin, end).
template <class T, int kRows>
__attribute__((noinline)) void direct_values(const float* p, int64_t p_row, const HeadRows<T>& values, int64_t first,
                                             int64_t begin, int64_t end, int64_t dim, float* acc, int64_t acc_row,
                                             const float* factors) {
  const auto columns = [&](int64_t col, auto vectors, auto load_value) {
    constexpr int kVectors = decltype(vectors)::value;
    FloatVector sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kVectors; ++c) {
        sums[r][c] = load(acc + r * acc_row + col + c * kLanes<float>) * factors[r];
      }
    }
    for (int64_t j = begin; j < end; ++j) {
      const T* row = values(first + j) + col;
      FloatVector v[kVectors];
      for (int c = 0; c < kVectors; ++c) v[c] = load_value(row + c * kLanes<float>);
      for (int r = 0; r < kRows; ++r) {
        for (int c = 0; c < kVectors; ++c) sums[r][c] += v[c] * p[r * p_row + j];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kVectors; ++c) store(acc + r * acc_row + col + c * kLanes<float>, sums[r][c]);
    }
  };
  constexpr int kWide = kTileVectors * kLanes<float>;
  const auto whole = [](const T* from) { return load(from); };
  int64_t col = 0;
  for (; col + kWide <= dim; col += kWide) columns(col, Int<kTileVectors>{}, whole);
  for (; col + kLanes<float> <= dim; col += kLanes<float>) columns(col, Int<1>{}, whole);
  if (col < dim) {
    columns(col, Int<1>{}, [&](const T* from) { return load_tail(from, static_cast<int>(dim - col)); });
  }
}

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
