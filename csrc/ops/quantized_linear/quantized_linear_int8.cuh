// What the products of rounded activations share: tiles of bytes in shared memory.
#pragma once

#include "ops/quantized_linear/quantized_linear_decode.cuh"

namespace llmkernels::cuda {
namespace {

// kTokens rows of x and 128 of the weight, to eight warps: side by side along the weight's rows, and with many rows of
// x in two rows of four.
template <int kTokens>
struct Int8Tile {
  static constexpr int kDown = kTokens == 16 ? 1 : 2, kAcross = kInt8Threads / 32 / kDown;
  static constexpr int kRowTiles = kTokens / kDown / 16, kTiles = kInt8Rows / kAcross / 8;
  static constexpr int kXBytes = kTokens * kInt8Columns;
  static_assert(kTiles % 2 == 0);
};

// Byte offset of 16 bytes of a row of 64: two rows fill all banks, so the number of the pair of rows puts the eight
// rows that ldmatrix reads into different ones.
__device__ inline uint32_t int8_chunk(int row, int chunk) { return (row * 4 + (chunk ^ (row / 2 % 4))) * 16; }

template <int kRows>
__device__ void fetch_rows(unsigned char* tile, const void* matrix, int first_row, int rows, int column, int columns,
                           int64_t pitch, int unit) {
  constexpr int kChunks = kRows * kInt8Columns / kVectorBytes;
#pragma unroll 4
  for (int index = static_cast<int>(threadIdx.x); index < kChunks; index += kInt8Threads) {
    const int row = index / 4, chunk = index % 4, at = column + chunk * kVectorBytes;
    const int inside = first_row + row < rows ? min(max(columns - at, 0), kVectorBytes) : 0;
    const auto* source = static_cast<const unsigned char*>(matrix);
    if (inside > 0) source += (first_row + row) * pitch + at;
    fetch_packed(tile + int8_chunk(row, chunk), source, inside, unit);
  }
}

}  // namespace
}  // namespace llmkernels::cuda
