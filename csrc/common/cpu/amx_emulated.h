// The instructions of amx.h in plain C++, for machines without them: what Intel's manual says that they do (Software
// Developer's Manual, volume 2: LDTILECFG, TILELOADD, TILESTORED, TDPBF16PS, TDPBSUD), sums in the same order and with
// the same rounding. What the processor would refuse ends the program with a sentence.
#pragma once

#include <stdio.h>
#include <stdlib.h>

#include "common/cpu/amx.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

struct AmxState {
  AmxShapes shapes;
  bool configured;
  alignas(64) uint8_t tiles[kAmxTiles][kAmxRows][kAmxRowBytes];
};

// __thread: nothing of it is made or destroyed at run time, so no function for that becomes a weak symbol.
inline AmxState& amx_state() {
  static __thread AmxState state;
  return state;
}

inline void amx_require(bool allowed, const char* what) {
  if (allowed) return;
  fprintf(stderr, "llmkernels: illegal use of an emulated AMX tile: %s\n", what);
  abort();
}

inline void amx_require_tile(int tile) {
  amx_require(amx_state().configured, "tiles are not configured");
  amx_require(amx_state().shapes.rows[tile] > 0, "a tile has no shape");
}

inline void amx_configure(const AmxShapes& shapes) {
  amx_require(shapes.palette == 1, "the palette is not 1");
  for (int i = 0; i < 14; ++i) amx_require(shapes.reserved[i] == 0, "a reserved byte is not zero");
  for (int tile = 0; tile < 16; ++tile) {
    const int rows = shapes.rows[tile], row_bytes = shapes.row_bytes[tile];
    amx_require(rows <= kAmxRows && row_bytes <= kAmxRowBytes, "a tile is larger than 16 rows of 64 bytes");
    amx_require((rows == 0) == (row_bytes == 0), "a tile has rows without bytes, or bytes without rows");
    amx_require(tile < kAmxTiles || rows == 0, "there are eight tiles");
  }
  AmxState& state = amx_state();
  state.shapes = shapes;
  state.configured = true;
  __builtin_memset(state.tiles, 0, sizeof(state.tiles));
}

inline void amx_release() {
  amx_state().configured = false;
  __builtin_memset(amx_state().tiles, 0, sizeof(amx_state().tiles));
}

template <int kTile>
inline void amx_zero() {
  static_assert(kTile >= 0 && kTile < kAmxTiles);
  amx_require_tile(kTile);
  __builtin_memset(amx_state().tiles[kTile], 0, sizeof(amx_state().tiles[kTile]));
}

template <int kTile>
inline void amx_load(const void* from, int64_t stride) {
  amx_zero<kTile>();
  AmxState& state = amx_state();
  for (int i = 0; i < state.shapes.rows[kTile]; ++i) {
    __builtin_memcpy(state.tiles[kTile][i], static_cast<const char*>(from) + i * stride, state.shapes.row_bytes[kTile]);
  }
}

template <int kTile>
inline void amx_store(void* to, int64_t stride) {
  static_assert(kTile >= 0 && kTile < kAmxTiles);
  amx_require_tile(kTile);
  const AmxState& state = amx_state();
  for (int i = 0; i < state.shapes.rows[kTile]; ++i) {
    __builtin_memcpy(static_cast<char*>(to) + i * stride, state.tiles[kTile][i], state.shapes.row_bytes[kTile]);
  }
}

// Denormals are zero on their way in and out.
inline float amx_flushed(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  bits = (bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits;
  __builtin_memcpy(&value, &bits, sizeof(bits));
  return value;
}

// A bf16 is the upper half of a float.
inline float amx_widened(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(bits));
  return amx_flushed(value);
}

template <int kSum, int kA, int kB>
inline void amx_require_product() {
  static_assert(kSum != kA && kSum != kB && kA != kB, "the processor refuses a tile that is named twice");
  amx_require_tile(kSum);
  amx_require_tile(kA);
  amx_require_tile(kB);
  const uint8_t* rows = amx_state().shapes.rows;
  const uint16_t* row_bytes = amx_state().shapes.row_bytes;
  amx_require(row_bytes[kSum] % 4 == 0 && row_bytes[kA] % 4 == 0 && row_bytes[kB] % 4 == 0,
              "the bytes of a row are no multiple of 4");
  amx_require(rows[kSum] == rows[kA], "sum and a have not as many rows");
  amx_require(row_bytes[kSum] == row_bytes[kB], "sum and b have not as many bytes a row");
  amx_require(row_bytes[kA] == rows[kB] * 4, "a row of a has not as many words as b has rows");
}

template <int kSum, int kA, int kB>
inline void amx_dot_bf16() {
  amx_require_product<kSum, kA, kB>();
  AmxState& state = amx_state();
  const uint8_t* rows = state.shapes.rows;
  const uint16_t* row_bytes = state.shapes.row_bytes;
  constexpr int kWords = kAmxRowBytes / 4;
  for (int m = 0; m < rows[kA]; ++m) {
    uint32_t a[kWords];
    __builtin_memcpy(a, state.tiles[kA][m], sizeof(a));
    float even[kWords] = {}, odd[kWords] = {};
    for (int k = 0; k < rows[kB]; ++k) {
      const float a_even = amx_widened(a[k] << 16), a_odd = amx_widened(a[k] & 0xffff0000u);
      uint32_t b[kWords];
      __builtin_memcpy(b, state.tiles[kB][k], sizeof(b));
      for (int n = 0; n < kWords; ++n) {  // columns beyond the shape too: they stay out of `sum` below
        even[n] = amx_flushed(__builtin_fmaf(a_even, amx_widened(b[n] << 16), even[n]));
        odd[n] = amx_flushed(__builtin_fmaf(a_odd, amx_widened(b[n] & 0xffff0000u), odd[n]));
      }
    }
    float sum[kWords];
    __builtin_memcpy(sum, state.tiles[kSum][m], sizeof(sum));
    for (int n = 0; n < kWords; ++n) sum[n] = amx_flushed(amx_flushed(sum[n]) + amx_flushed(even[n] + odd[n]));
    __builtin_memcpy(state.tiles[kSum][m], sum, row_bytes[kSum]);
  }
}

template <int kSum, int kA, int kB>
inline void amx_dot_bytes() {
  amx_require_product<kSum, kA, kB>();
  AmxState& state = amx_state();
  constexpr int kWords = kAmxRowBytes / 4;
  for (int m = 0; m < state.shapes.rows[kA]; ++m) {
    uint32_t sum[kWords];  // without a sign: what is too large loses its upper bits
    __builtin_memcpy(sum, state.tiles[kSum][m], sizeof(sum));
    for (int k = 0; k < state.shapes.rows[kB]; ++k) {
      const uint8_t* const a = state.tiles[kA][m] + 4 * k;
      for (int i = 0; i < 4 * kWords; ++i) {
        sum[i / 4] += static_cast<uint32_t>(static_cast<int8_t>(a[i % 4]) * state.tiles[kB][k][i]);
      }
    }
    __builtin_memcpy(state.tiles[kSum][m], sum, state.shapes.row_bytes[kSum]);
  }
}

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
