// AMX: eight tiles of up to 16 rows of 64 bytes, and the product of two of them; for sources compiled with
// CPU_CAPABILITY_AMX. A thread configures its tiles, uses them, and releases them.
//
// The instructions are written out because the intrinsics of gcc 12 do not say that they read memory, and take the
// number of a tile as text only. With CPU_CAPABILITY_AMX_EMULATED plain C++ does the same instead (amx_emulated.h).
#pragma once

#include <cstdint>

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

constexpr int kAmxTiles = 8, kAmxRows = 16, kAmxRowBytes = 64;

// The shape of each tile, as the processor reads it; what a tile has beyond its shape does not exist.
struct alignas(64) AmxShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  constexpr void set(int tile, int tile_rows, int tile_row_bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<uint16_t>(tile_row_bytes);
  }
};
static_assert(sizeof(AmxShapes) == 64);

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY

#if defined(CPU_CAPABILITY_AMX_EMULATED)
#include "common/cpu/amx_emulated.h"
#else

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

// Zeroes all tiles.
inline void amx_configure(const AmxShapes& shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(shapes) : "memory"); }

inline void amx_release() { __asm__ volatile("tilerelease" ::: "memory"); }

template <int kTile>
inline void amx_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// Row i is at `from` + i * `stride` bytes.
template <int kTile>
inline void amx_load(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
inline void amx_store(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}

// sum[m][n] += a[m][2k] b[k][2n] + a[m][2k + 1] b[k][2n + 1]: a and b in bf16, sum in fp32.
template <int kSum, int kA, int kB>
inline void amx_dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

// sum[m][n] += the four products of the bytes of a[m][k] and b[k][n], for all k: a signed, b unsigned, sum in 32 bits.
template <int kSum, int kA, int kB>
inline void amx_dot_bytes() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
#endif
