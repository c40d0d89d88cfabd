// Products of many rows of x with rows of a weight that were expanded into the cache.
#pragma once

#include "ops/quantized_linear/quantized_linear_cpu_direct.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

// With four rows of the weight: 24 of 32 registers are sums, or 12 of 16 with a vector of x that is read where it is.
constexpr int kProductRows = kVectorBytes == 64 ? 6 : 3;

// Rows of a weight as operands, in natural order or in planes.
template <class Operand>
struct Expanded {
  const typename Operand::Element* rows;
  int64_t stride;        // elements
  const WeightRow* row;  // scales and zero points, if sums are of groups
};

// sums[r * stride + i] (+)= for kRows rows of x and four of the weight, over the blocks [first, end) of x. `kGrouped`:
// of integers, each block times the scales of its groups; these sums are floats.
template <class Operand, bool kGrouped, int kRows>
__attribute__((noinline)) void expanded_tile(const PreparedRows& rows, int64_t m, const Expanded<Operand>& w, int64_t n,
                                            int count, const GroupLanes& lanes, int64_t first, int64_t end, bool add,
                                            float* sums, int64_t stride) {
  using Sum = typename Operand::Sum;
  using Total = std::conditional_t<kGrouped, FloatVector, Sum>;
  using Element = typename Operand::Element;
  constexpr int kPlanes = Operand::kPlanes, kElements = kPlaneElements<Operand>;
  const Element* x[kRows];
  const Element* from[kTileWeights];
  for (int r = 0; r < kRows; ++r) x[r] = rows.row<Operand>(m + r) + first * kBlockColumns;
  for (int i = 0; i < kTileWeights; ++i) from[i] = w.rows + (n + (i < count ? i : 0)) * w.stride;
  Total totals[kRows][kTileWeights];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kTileWeights; ++i) totals[r][i] = Total{};
  }
  if constexpr (kGrouped) {
    const float* scales[kTileWeights];
    for (int i = 0; i < kTileWeights; ++i) scales[i] = w.row[n + (i < count ? i : 0)].scales;
    for (int64_t block = first; block < end; ++block) {
      const int64_t at = (block - first) * kBlockColumns;
#pragma GCC unroll 4
      for (int i = 0; i < kTileWeights; ++i) {
        const FloatVector scale = lanes.of(scales[i], block);
        Bits b[kPlanes];
#pragma GCC unroll 4
        for (int j = 0; j < kPlanes; ++j) b[j] = load_bits(from[i] + at + j * kElements);
        Sum start{};
#if defined(CPU_CAPABILITY_AVX512_VNNI)
        if constexpr (std::is_same_v<Operand, SignedByteOperand>) {
          start = -Operand::surplus(Operand::surplus(start, b[0]), b[1]);
        }
#endif
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          Sum sum = start;
#pragma GCC unroll 4
          for (int j = 0; j < kPlanes; ++j) sum = Operand::dot(sum, b[j], load_bits(x[r] + at + j * kElements));
          totals[r][i] += as_float(sum) * scale;
        }
      }
    }
  } else {
    for (int64_t k = 0; k < (end - first) * kBlockColumns; k += kElements) {
      Bits b[kTileWeights];
#pragma GCC unroll 4
      for (int i = 0; i < kTileWeights; ++i) b[i] = load_bits(from[i] + k);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Bits a = load_bits(x[r] + k);
#pragma GCC unroll 4
        for (int i = 0; i < kTileWeights; ++i) totals[r][i] = Operand::dot(totals[r][i], b[i], a);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    Total result = sum_four(totals[r]);
    float* to = sums + r * stride + n;
    if (add) {
      Total before{};
      __builtin_memcpy(&before, to, 4 * sizeof(float));
      result += before;
    }
    __builtin_memcpy(to, &result, 4 * sizeof(float));
  }
}

// The words of kWords rows of a weight, of which `count` are there and the others zero, with those of a column behind
// each other: as product.h multiplies them.
template <class Operand>
inline void turn_rows(const typename Operand::Element* rows, int64_t row_stride, int64_t count, int64_t words, Word* to,
                      int64_t stride) {
  for (int64_t k = 0; k < words; k += kWords) {
    UInt32Vector square[kWords];
    for (int64_t i = 0; i < kWords; ++i) {
      square[i] = i < count ? load_bits(rows + i * row_stride + kPerWord<ProductElement<Operand>> * k) : Bits{};
    }
    transpose(square);
    for (int64_t i = 0; i < kWords; ++i) store_bits(to + (k + i) * stride, square[i]);
  }
}

// sums[r * stride + i] (+)= for the rows [m, m + m_count) of x, from column `first` on, and `columns` turned rows.
template <class Operand>
inline void turned_rows(const PreparedRows& rows, int64_t m, int64_t m_count, int64_t first, int64_t words,
                        const Word* turned, int64_t columns, bool add, float* sums, int64_t stride) {
  using C = ProductElement<Operand>;
  float ones[kTileRows<C>];
  for (float& one : ones) one = 1.0f;
  const ProductScope<C> scope;
  for (int64_t r = 0; r < m_count; r += kTileRows<C>) {
    const int count = static_cast<int>(m_count - r < kTileRows<C> ? m_count - r : kTileRows<C>);
    const Word* const x = reinterpret_cast<const Word*>(rows.row<Operand>(m + r) + first);
    product_rows<C>({x, rows.stride / static_cast<int64_t>(sizeof(Word)), 1, turned, stride, words, sums + r * stride,
                     stride, add ? ones : nullptr},
                    count, columns);
  }
}

// Rows [m, m + m_count) of x with n_count of the weight, in tiles of x that are as equal as can be.
template <class Operand, bool kGrouped>
inline void expanded_rows(const PreparedRows& rows, int64_t m, int64_t m_count, const Expanded<Operand>& w,
                         int64_t n_count, const GroupLanes& lanes, int64_t first, int64_t end, bool add, float* sums,
                         int64_t stride) {
  const int64_t tiles = div_up(m_count, kProductRows);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t begin = m_count * tile / tiles;
    const int64_t count = m_count * (tile + 1) / tiles - begin;
    for (int64_t n = 0; n < n_count; n += kTileWeights) {
      const int left = static_cast<int>(n_count - n < kTileWeights ? n_count - n : kTileWeights);
      with_count<kProductRows>(static_cast<int>(count), [&](auto r) {
        expanded_tile<Operand, kGrouped, decltype(r)::value>(rows, m + begin, w, n, left, lanes, first, end, add,
                                                            sums + begin * stride, stride);
      });
    }
  }
}

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
