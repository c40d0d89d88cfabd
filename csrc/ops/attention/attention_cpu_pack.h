// Rows of q, k, v and dout brought into the layouts that product.h multiplies, in words.
#pragma once

#include "ops/attention/attention.h"
#include "common/cpu/product.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

// The rows of one head of one sequence; with a table the pages they lie on.
template <class T>
struct HeadRows {
  const T* base;
  int64_t stride;
  const int32_t* pages = nullptr;
  int64_t page_size = 0, page_stride = 0;

  const T* operator()(int64_t row) const {
    if (pages == nullptr) return base + row * stride;
    return base + pages[row / page_size] * page_stride + row % page_size * stride;
  }
};

// `count` elements of a row from `from` on as a vector of words, zeros behind them; count may be 0 or less.
template <class C, class T>
inline UInt32Vector load_words(const T* from, int64_t count) {
  if constexpr (kPerWord<C> == 2) {
    UInt32Vector words{};
    if (count >= 2 * kLanes<float>) {
      __builtin_memcpy(&words, from, sizeof(words));
    } else if (count > 0) {
#if defined(CPU_CAPABILITY_AVX512)
      words = bit_cast<UInt32Vector>(_mm512_maskz_loadu_epi16((1u << count) - 1u, from));
#endif
    }
    return words;
  } else {
    if (count >= kLanes<float>) return bit_cast<UInt32Vector>(load(from));
    return count > 0 ? bit_cast<UInt32Vector>(load_tail(from, static_cast<int>(count))) : UInt32Vector{};
  }
}

inline void store_words(Word* to, UInt32Vector words) { __builtin_memcpy(to, &words, sizeof(words)); }

// A of a product whose summed axis is `dim`: rows behind each other, `to_row` words apart, a multiple of the lanes.
template <class C, class T, class Rows>
inline void pack_rows(const Rows& rows, int64_t count, int64_t dim, Word* to, int64_t to_row) {
  for (int64_t i = 0; i < count; ++i) {
    const T* row = rows(i);
    for (int64_t w = 0; w < to_row; w += kLanes<float>) {
      store_words(to + i * to_row + w, load_words<C>(row + w * kPerWord<C>, dim - w * kPerWord<C>));
    }
  }
}

// B of a product whose summed axis are the rows: `width` columns, a multiple of the lanes; zeros behind `count` rows
// until `padded`.
template <class C, class T, class Rows>
inline void pack_summed(const Rows& rows, int64_t count, int64_t padded, int64_t dim, Word* to, int64_t width) {
  if constexpr (kPerWord<C> == 1) {
    pack_rows<C, T>(rows, count, dim, to, width);
    for (int64_t w = count * width; w < padded * width; w += kLanes<float>) store_words(to + w, UInt32Vector{});
  } else {
    const auto half = [&](int64_t i, int64_t col) {
      UInt16Half bits{};
      if (i >= count) return zero_extend(bits);
#if defined(CPU_CAPABILITY_AVX512)
      const T* from = rows(i) + col;
      const int64_t left = dim - col > 0 ? dim - col : 0;
      const __mmask16 some = left >= kLanes<float> ? 0xffff : static_cast<__mmask16>((1u << left) - 1u);
      bits = bit_cast<UInt16Half>(_mm256_maskz_loadu_epi16(some, from));
#endif
      return zero_extend(bits);
    };
    for (int64_t i = 0; i < padded; i += 2, to += width) {
      for (int64_t col = 0; col < width; col += kLanes<float>) {
        store_words(to + col, half(i, col) | half(i + 1, col) << 16);
      }
    }
  }
}

// B of a product whose columns are the rows, and whose summed axis is `dim`: [words of dim, width]; zeros behind
// `count` rows and behind `dim`.
template <class C, class T, class Rows>
inline void pack_transposed(const Rows& rows, int64_t count, int64_t dim, Word* to, int64_t width) {
  constexpr int n = kLanes<float>;
  const int64_t words = words_of<C>(dim);
  for (int64_t first = 0; first < width; first += n) {
    if (first >= count) {
      for (int64_t w = 0; w < words; ++w) store_words(to + w * width + first, UInt32Vector{});
      continue;
    }
    for (int64_t w = 0; w < words; w += n) {
      UInt32Vector square[n];
      for (int i = 0; i < n; ++i) {
        square[i] = UInt32Vector{};
        if (first + i < count) {
          square[i] = load_words<C>(rows(first + i) + w * kPerWord<C>, dim - w * kPerWord<C>);
        }
      }
      transpose(square);
      for (int i = 0; i < n && w + i < words; ++i) store_words(to + (w + i) * width + first, square[i]);
    }
  }
}

// Memory handed out piece by piece; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class Item>
  Item* take(int64_t count) {
    char* at = base == nullptr ? nullptr : base + used;
    used += round_up(count * static_cast<int64_t>(sizeof(Item)), 64);
    return reinterpret_cast<Item*>(at);
  }
};

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
