// Products of small matrices on the CPU, in registers: C = A B, where A is read element by element and B vector by
// vector. As vec.h: raw vectors in the anonymous namespace of the instruction set.
//
// Elements are words of 32 bits along the summed axis: a float, or with C = BFloat16 two bf16 of neighbouring indices,
// which one instruction multiplies and adds; on AMX also, with C = int8_t, four bytes, of A with a sign, of B without,
// whose sums are whole numbers, as bits of floats.
#pragma once

#include "common/cpu/vec.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

using Word = uint32_t;

// How many elements of the summed axis a word has.
template <class C>
constexpr int kPerWord = static_cast<int>(sizeof(Word) / sizeof(C));

// The type that products are made of: bf16 where the processor multiplies it, else float.
#if defined(CPU_CAPABILITY_AVX512_BF16)
template <class T>
using ProductOf = std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16, float>;
#else
template <class T>
using ProductOf = float;
#endif

// A tile of C in registers, with what it takes to read A and B: 24 + 4 + 1 of 32, or 12 + 2 + 1 of 16.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kVectorRows = 6, kTileVectors = 4;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kVectorRows = 6, kTileVectors = 2;
#else
constexpr int kVectorRows = 4, kTileVectors = 2;
#endif

#if defined(CPU_CAPABILITY_AMX)
template <class C>
constexpr bool kOnAmx = kPerWord<C> > 1;
#else
template <class C>
constexpr bool kOnAmx = false;
#endif

// Rows of one call of product_rows. On AMX two tiles of them: A and C have memory for rows up to a multiple of 16,
// whose values there do not matter.
template <class C>
constexpr int kTileRows = kOnAmx<C> ? 32 : kVectorRows;

// The words of the summed axis are a multiple of this, padded with zeros in A and B. On AMX they are at most
// kMostTransposed where the words of a column of A are behind each other.
template <class C>
constexpr int kWordStep = kOnAmx<C> ? 16 : 1;
constexpr int kMostTransposed = 48;

template <int kValue>
struct Int {
  static constexpr int value = kValue;
};

// f(Int<n>) for n in [1, kMost].
template <int kMost, class F>
inline void with_count(int n, F&& f) {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_count<kMost - 1>(n, f);
  }
  f(Int<kMost>{});
}

constexpr int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }
constexpr int64_t div_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

template <class C>
constexpr int64_t words_of(int64_t summed) {
  return round_up(div_up(summed, kPerWord<C>), kWordStep<C>);
}

// One step of log2(lanes) for each bit of an index.
template <int kStep>
inline void transpose_step(UInt32Vector (&rows)[kLanes<float>]) {
  constexpr int n = kLanes<float>;
  UInt32Vector low, high;
  for (int i = 0; i < n; ++i) {
    low[i] = static_cast<uint32_t>(i & kStep ? n + i - kStep : i);
    high[i] = static_cast<uint32_t>(i & kStep ? n + i : i + kStep);
  }
  UInt32Vector next[n];
  for (int i = 0; i < n; ++i) {
    if (i & kStep) continue;
    next[i] = __builtin_shuffle(rows[i], rows[i + kStep], low);
    next[i + kStep] = __builtin_shuffle(rows[i], rows[i + kStep], high);
  }
  for (int i = 0; i < n; ++i) rows[i] = next[i];
}

inline void transpose(UInt32Vector (&square)[kLanes<float>]) {
  transpose_step<1>(square);
  transpose_step<2>(square);
  if constexpr (kLanes<float> > 4) transpose_step<4>(square);
  if constexpr (kLanes<float> > 8) transpose_step<8>(square);
}

template <class C>
inline FloatVector multiply_add(FloatVector sum, Word a, UInt32Vector b) {
#if defined(CPU_CAPABILITY_AVX512_BF16)
  if constexpr (kPerWord<C> == 2) {
    const __m512i pair = _mm512_set1_epi32(static_cast<int>(a));
    return bit_cast<FloatVector>(
        _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(pair), bit_cast<__m512bh>(b)));
  }
#endif
  return sum + bit_cast<FloatVector>(b) * bit_cast<float>(a);
}

struct Product {
  const Word* a;  // element (i, k) at i * a_row + k * a_k
  int64_t a_row, a_k;
  const Word* b;  // element (k, j) at k * b_k + j
  int64_t b_k;
  int64_t count;  // words of the summed axis
  float* c;       // element (i, j) at i * c_row + j
  int64_t c_row;
  const float* factors;  // C = diag(factors) C + A B; null: C = A B
};

// Every element is a sum in the order of k, however C is cut into tiles.
template <class C, int kRows, int kVectors>
__attribute__((noinline)) void product_tile(const Product& p) {
  FloatVector sums[kRows][kVectors];
  // Unrolled by order: left to itself gcc 12 keeps `sums` in memory before and after the loop.
  if (p.factors != nullptr) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sums[i][j] = load(p.c + i * p.c_row + j * kLanes<float>) * p.factors[i];
    }
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sums[i][j] = FloatVector{};
    }
  }
  const Word* a = p.a;
  const Word* b = p.b;
  const int64_t a_row = p.a_row, a_k = p.a_k, b_k = p.b_k;
  for (int64_t k = p.count; k > 0; --k) {
    UInt32Vector vectors[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) __builtin_memcpy(&vectors[j], b + j * kLanes<float>, sizeof(UInt32Vector));
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sums[i][j] = multiply_add<C>(sums[i][j], a[i * a_row], vectors[j]);
    }
    a += a_k;
    b += b_k;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(p.c + i * p.c_row + j * kLanes<float>, sums[i][j]);
  }
}

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY

#if defined(CPU_CAPABILITY_AMX)
#include "common/cpu/product_amx.h"
#endif

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

// `rows` at most kTileRows, `cols` a multiple of the lanes.
template <class C>
inline void product_rows(Product p, int rows, int64_t cols) {
#if defined(CPU_CAPABILITY_AMX)
  if constexpr (kOnAmx<C>) return amx_product_rows<C>(p, rows, cols);
#endif
  static_assert(kPerWord<C> <= 2 || kOnAmx<C>, "bytes are multiplied on AMX only");
  constexpr int kWide = kTileVectors * kLanes<float>;
  with_count<kVectorRows>(rows, [&](auto r) {
    for (int64_t j = 0; j < cols; j += kWide) {
      const int vectors = static_cast<int>((cols - j < kWide ? cols - j : kWide) / kLanes<float>);
      with_count<kTileVectors>(vectors, [&](auto v) { product_tile<C, decltype(r)::value, decltype(v)::value>(p); });
      p.b += kWide;
      p.c += kWide;
    }
  });
}

// One of these is in scope where product_rows is called: it keeps the tiles of the thread.
template <class C>
struct ProductScope {
  ProductScope() {
#if defined(CPU_CAPABILITY_AMX)
    if constexpr (kOnAmx<C>) amx_configure(kAmxWhole);
#endif
  }
  ~ProductScope() {
#if defined(CPU_CAPABILITY_AMX)
    if constexpr (kOnAmx<C>) amx_release();
#endif
  }
  ProductScope(const ProductScope&) = delete;
  ProductScope& operator=(const ProductScope&) = delete;
};

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
