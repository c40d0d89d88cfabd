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

// How far ahead of what is read the memory is asked for more, and how many values are read before the next of their
// columns: close enough together for the processor to see one stream. Measured on a Zen 5 with 32 query and 8 key
// heads, 4096 keys of D = 128, out of memory, where a plain sum reads 38 GB/s: 31 to 32 GB/s in fp32 and bf16; without
// the first 21 and 15, without the second (128 values) 26.
constexpr int64_t kAheadBytes = 12288, kDirectKeys = 16;

// The rows that will be read next: of the block at hand, then of what follows it, values after keys and the next
// block's keys after values. Nothing is fetched from row `end` on, which may have no memory.
template <class T>
struct Ahead {
  const HeadRows<T>&now, &next;
  int64_t now_first, next_first, now_bytes, next_bytes, block, end;
  int64_t distance = now_bytes > 0 ? kAheadBytes / now_bytes : 0;

  // Inlined by order: gcc 12 takes a function of prefetches alone for one without effects, and drops the calls.
  __attribute__((always_inline)) void fetch(int64_t j) const {
    j += distance;
    const bool here = j < block;
    const int64_t row = here ? now_first + j : next_first + j - block;
    if (row >= end) return;
    const char* at = reinterpret_cast<const char*>(here ? now(row) : next(row));
    const int64_t bytes = here ? now_bytes : next_bytes;
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at + byte);
  }
};

// Keys of all heads: how many of one head, and of its values, before the next head's, and how far ahead of them memory
// is asked for more, in its own order. Measured where kAheadBytes was: on four caches in turn 24 GB/s in fp32 and 31 in
// bf16 against 19 and 16 head by head; after 48 MB of something else 20 and 24 against 18 and 15. With 4 or 16 keys,
// half the values, half or twice the distance it was less; a line at a time between the products was no better.
constexpr int64_t kSweptKeys = 8, kSweptAhead = 32768;
template <class T>
constexpr int64_t kSweptValues = 32 / sizeof(T);

// As Ahead, for rows of all heads: `fetch` asks for a piece as large as a head's, and the next time for the one behind
// it.
template <class T>
struct Sweep {
  const HeadRows<T>&now, &next;
  int64_t now_first, next_first, now_bytes, next_bytes;
  const AttentionStrides &now_strides, &next_strides;
  int64_t heads, block, end;
  int64_t row = 0, head = 0;

  // Before the rows from `j` on are read.
  void start(int64_t j) {
    const int64_t whole = heads * now_bytes;
    row = j + (whole > 0 ? div_up(kSweptAhead, whole) : 0);
  }

  __attribute__((always_inline)) void fetch(int64_t) {
    const bool here = row < block;
    const int64_t key = here ? now_first + row : next_first + row - block;
    if (key < end) {
      const T* first = here ? now(key) + head * now_strides.head : next(key) + head * next_strides.head;
      const char* at = reinterpret_cast<const char*>(first);
      const int64_t bytes = here ? now_bytes : next_bytes;
      for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at + byte);
    }
    if (++head == heads) head = 0, ++row;
  }
};

struct Nothing {
  void fetch(int64_t) const {}
};

// s[i][j] = q_i . k_j for j in [begin, end), with what fills up the last vector: values that mean nothing. `q` has
// kRows rows.
template <class T, int kRows, class Fetch>
__attribute__((noinline)) void direct_scores(const Word* q, int64_t q_row, const HeadRows<T>& keys, int64_t first,
                                             int64_t begin, int64_t end, int64_t dim, float* s, int64_t s_row,
                                             Fetch& ahead) {
  using C = ProductOf<T>;
  constexpr int kKeys = kLanes<float> / kRows;
  const int64_t whole = dim / (kLanes<float> * kPerWord<C>) * kLanes<float>, words = div_up(dim, kPerWord<C>);
  for (int64_t j = begin; j < end; j += kKeys) {
    const T* rows[kKeys];
    for (int i = 0; i < kKeys; ++i) rows[i] = keys(first + (j + i < end ? j + i : end - 1));
    for (int i = 0; i < kKeys; ++i) ahead.fetch(j + i);
    FloatVector sums[kRows * kKeys];
#pragma GCC unroll 16
    for (int i = 0; i < kRows * kKeys; ++i) sums[i] = FloatVector{};
    const auto step = [&](int64_t w, auto load_key) {
      UInt32Vector k[kKeys];
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) k[i] = load_key(rows[i] + w * kPerWord<C>);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        UInt32Vector row;
        __builtin_memcpy(&row, q + r * q_row + w, sizeof(row));
#pragma GCC unroll 16
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

// Columns of two neighbouring values as words, kVectors of them; a row outside [begin, end) counts as zeros.
template <int kVectors>
inline void load_pairs(const BFloat16* a, const BFloat16* b, int64_t left, UInt32Vector (&words)[kVectors]) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (kVectors % 2 == 0) {
    UInt16Vector low, high;
    for (int i = 0; i < 2 * kLanes<float>; ++i) {
      low[i] = static_cast<uint16_t>(i / 2 + i % 2 * 2 * kLanes<float>);
      high[i] = static_cast<uint16_t>(low[i] + kLanes<float>);
    }
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; c += 2) {
      UInt16Vector rows[2]{};
      if (a != nullptr) __builtin_memcpy(&rows[0], a + c * kLanes<float>, sizeof(rows[0]));
      if (b != nullptr) __builtin_memcpy(&rows[1], b + c * kLanes<float>, sizeof(rows[1]));
      words[c] = bit_cast<UInt32Vector>(__builtin_shuffle(rows[0], rows[1], low));
      words[c + 1] = bit_cast<UInt32Vector>(__builtin_shuffle(rows[0], rows[1], high));
    }
  } else {
    const __mmask16 some = left >= kLanes<float> ? 0xffff : static_cast<__mmask16>((1u << left) - 1u);
    const auto half = [&](const BFloat16* row) {
      return zero_extend(row == nullptr ? UInt16Half{} : bit_cast<UInt16Half>(_mm256_maskz_loadu_epi16(some, row)));
    };
    words[0] = half(a) | half(b) << 16;
  }
#endif
}

// acc_i = factors[i] acc_i + sum of p[i][j] v_j over j in [begin, end), `dim` columns of them, at most kVectors.
template <class T, int kRows, int kVectors, class Fetch>
inline void direct_columns(const ProductOf<T>* p, int64_t p_row, const HeadRows<T>& values, int64_t first,
                           int64_t begin, int64_t end, int64_t col, int64_t dim, float* acc, int64_t acc_row,
                           const float* factors, Fetch& ahead) {
  FloatVector sums[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) sums[r][c] = load(acc + r * acc_row + col + c * kLanes<float>) * factors[r];
  }
  if constexpr (kPerWord<ProductOf<T>> == 2) {
    for (int64_t j = begin / 2 * 2; j < end; j += 2) {
      if (col == 0) ahead.fetch(j), ahead.fetch(j + 1);
      const T* a = j >= begin ? values(first + j) + col : nullptr;
      const T* b = j + 1 < end ? values(first + j + 1) + col : nullptr;
      UInt32Vector words[kVectors];
      load_pairs<kVectors>(a, b, dim - col, words);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        Word pair;
        __builtin_memcpy(&pair, p + r * p_row + j, sizeof(pair));
#pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c) sums[r][c] = multiply_add<ProductOf<T>>(sums[r][c], pair, words[c]);
      }
    }
  } else {
    for (int64_t j = begin; j < end; ++j) {
      const T* row = values(first + j) + col;
      if (col == 0) ahead.fetch(j);
      FloatVector v[kVectors];
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) {
        const T* at = row + c * kLanes<float>;
        v[c] = kVectors > 1 || dim - col >= kLanes<float> ? load(at) : load_tail(at, static_cast<int>(dim - col));
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c) sums[r][c] += v[c] * p[r * p_row + j];
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) store(acc + r * acc_row + col + c * kLanes<float>, sums[r][c]);
  }
}

template <class T, int kRows, class Fetch>
__attribute__((noinline)) void direct_values(const ProductOf<T>* p, int64_t p_row, const HeadRows<T>& values,
                                             int64_t first, int64_t begin, int64_t end, int64_t dim, float* acc,
                                             int64_t acc_row, const float* factors, Fetch& ahead) {
  constexpr int kWide = kTileVectors * kLanes<float>;
  float ones[kRows];
  for (int r = 0; r < kRows; ++r) ones[r] = 1.0f;
  for (int64_t j = begin; j < end; factors = ones) {
    const int64_t next = round_up(j + 1, kDirectKeys), stop = next < end ? next : end;
    int64_t col = 0;
    for (; col + kWide <= dim; col += kWide) {
      direct_columns<T, kRows, kTileVectors>(p, p_row, values, first, j, stop, col, dim, acc, acc_row, factors, ahead);
    }
    for (; col < dim; col += kLanes<float>) {
      direct_columns<T, kRows, 1>(p, p_row, values, first, j, stop, col, dim, acc, acc_row, factors, ahead);
    }
    j = stop;
  }
}

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
