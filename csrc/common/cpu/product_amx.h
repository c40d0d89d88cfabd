// Products of bf16 and of bytes on the tiles of AMX, for product.h: two tiles of A by two of B make four of C, as many
// as there are.
//
// All tiles have their whole shape all the time: giving them another one zeroes them and takes as long as several
// products. So A, B and C are padded instead, which packing does nearly for nothing.
#pragma once

#include "common/cpu/amx.h"
#include "common/cpu/product.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

constexpr int kAmxWords = kAmxRowBytes / static_cast<int>(sizeof(Word));  // of a row of a tile; also floats
static_assert(kAmxWords == kLanes<float> && kAmxWords == kWordStep<BFloat16> && kAmxRows * 2 == kTileRows<BFloat16>);

constexpr AmxShapes amx_whole() {
  AmxShapes shapes;
  for (int tile = 0; tile < kAmxTiles; ++tile) shapes.set(tile, kAmxRows, kAmxRowBytes);
  return shapes;
}
constexpr AmxShapes kAmxWhole = amx_whole();

// Tiles 2i + j are of C, 4 + i of A, 6 + j of B.
template <class C, int kA, int kB>
inline void amx_product_tiles(const Product& p) {
  constexpr int64_t kBytes = sizeof(Word);
  const auto each_c = [&](auto&& f) {
    f(Int<0>{}, Int<0>{});
    if constexpr (kB > 1) f(Int<0>{}, Int<1>{});
    if constexpr (kA > 1) f(Int<1>{}, Int<0>{});
    if constexpr (kA > 1 && kB > 1) f(Int<1>{}, Int<1>{});
  };
  const auto c_at = [&](int i, int j) { return p.c + i * kAmxRows * p.c_row + j * kAmxWords; };
  each_c([&](auto i, auto j) {
    constexpr int kTile = 2 * decltype(i)::value + decltype(j)::value;
    if (p.factors == nullptr) {
      amx_zero<kTile>();
    } else {
      amx_load<kTile>(c_at(i.value, j.value), p.c_row * kBytes);
    }
  });
  const Word *a = p.a, *b = p.b;
  for (int64_t k = 0; k < p.count; k += kAmxWords) {
    amx_load<4>(a, p.a_row * kBytes);
    if constexpr (kA > 1) amx_load<5>(a + kAmxRows * p.a_row, p.a_row * kBytes);
    amx_load<6>(b, p.b_k * kBytes);
    if constexpr (kB > 1) amx_load<7>(b + kAmxWords, p.b_k * kBytes);
    each_c([&](auto i, auto j) {
      constexpr int kI = decltype(i)::value, kJ = decltype(j)::value;
      if constexpr (kPerWord<C> == 2) {
        amx_dot_bf16<2 * kI + kJ, 4 + kI, 6 + kJ>();
      } else {
        amx_dot_bytes<2 * kI + kJ, 4 + kI, 6 + kJ>();
      }
    });
    a += kAmxWords;
    b += kAmxWords * p.b_k;
  }
  each_c([&](auto i, auto j) {
    amx_store<2 * decltype(i)::value + decltype(j)::value>(c_at(i.value, j.value), p.c_row * kBytes);
  });
}

// A with the words of a row behind each other, as tiles are loaded, from one that has those of a column so.
inline void amx_transpose(const Word* a, int64_t a_k, int rows, int64_t count, Word* to) {
  for (int i = 0; i < rows; i += kAmxRows) {
    for (int64_t k = 0; k < count; k += kAmxWords) {
      UInt32Vector square[kAmxWords];
      for (int w = 0; w < kAmxWords; ++w) __builtin_memcpy(&square[w], a + (k + w) * a_k + i, sizeof(UInt32Vector));
      transpose(square);
      for (int r = 0; r < kAmxRows; ++r) __builtin_memcpy(to + (i + r) * count + k, &square[r], sizeof(UInt32Vector));
    }
  }
}

template <class C>
__attribute__((noinline)) void amx_product_rows(Product p, int rows, int64_t cols) {
  Word turned[kTileRows<BFloat16> * kMostTransposed];
  if (p.a_k != 1) {
    amx_transpose(p.a, p.a_k, rows, p.count, turned);
    p.a = turned, p.a_row = p.count, p.a_k = 1;
  }
  for (int i = 0; i < rows && p.factors != nullptr; ++i) {
    if (p.factors[i] == 1.0f) continue;  // most: a maximum seldom changes, and gradients are only added to
    float* c = p.c + i * p.c_row;
    for (int64_t j = 0; j < cols; j += kLanes<float>) store(c + j, load(c + j) * p.factors[i]);
  }
  constexpr int kWide = 2 * kAmxWords;
  for (int64_t j = 0; j < cols; j += kWide) {
    const bool wide = cols - j >= kWide;
    if (rows > kAmxRows) {
      wide ? amx_product_tiles<C, 2, 2>(p) : amx_product_tiles<C, 2, 1>(p);
    } else {
      wide ? amx_product_tiles<C, 1, 2>(p) : amx_product_tiles<C, 1, 1>(p);
    }
    p.b += kWide, p.c += kWide;
  }
}

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
