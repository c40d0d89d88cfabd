// What the products of rounded activations share: the tile of a block, bytes in shared memory, what becomes of the sums.
#pragma once

#include <type_traits>

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

// Rows of the matrix from `first_row` on, zeros beyond its last row and last column.
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

// Which tile of y a block has, over which part of K, and what of the tile a warp has.
template <int kTokens>
struct Int8Place {
  using Tile = Int8Tile<kTokens>;

  int lane, M, N, K, pitch;
  int first_token, first_row, token_of_warp, row_of_warp;
  int splits, first_stage, steps;

  __device__ explicit Int8Place(const QuantizedLinearFwdParams& p)
      : lane(static_cast<int>(threadIdx.x) % 32),
        M(static_cast<int>(p.M)),
        N(static_cast<int>(p.weight.N)),
        K(static_cast<int>(p.weight.K)),
        pitch((K + kRoundedBlock - 1) / kRoundedBlock * kRoundedBlock),
        splits(static_cast<int>(gridDim.y)) {
    // Blocks side by side share rows of the weight: these are read from memory once, however many rows x has.
    const int token_blocks = (M + kTokens - 1) / kTokens, warp = static_cast<int>(threadIdx.x) / 32;
    first_token = static_cast<int>(blockIdx.x) % token_blocks * kTokens;
    first_row = static_cast<int>(blockIdx.x) / token_blocks * kInt8Rows;
    token_of_warp = warp / Tile::kAcross * 16 * Tile::kRowTiles;
    row_of_warp = warp % Tile::kAcross * 8 * Tile::kTiles;
    const int stages = (K + kInt8Columns - 1) / kInt8Columns;
    first_stage = static_cast<int>(int64_t{stages} * blockIdx.y / splits);
    steps = static_cast<int>(int64_t{stages} * (blockIdx.y + 1) / splits) - first_stage;
  }

  // Stores y, or with several parts of K the sums as they are. Those of integers have not met their row's scale.
  template <class T, class Sum>
  __device__ void store_sums(const QuantizedLinearArgs& args,
                        const Sum (&sums)[Tile::kRowTiles][Tile::kTiles][4]) const {
    const QuantizedLinearFwdParams& p = args.p;
#pragma unroll
    for (int n = 0; n < Tile::kTiles; ++n) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int row = first_row + row_of_warp + n * 8 + lane % 4 * 2 + side;
        if (row >= N) continue;
        float scale = 1.0f;
        if constexpr (std::is_same_v<Sum, int32_t>) scale = static_cast<const float*>(p.weight.scales)[row];
        const float bias = p.bias == nullptr ? 0.0f : widen(static_cast<const T*>(p.bias)[row]);
#pragma unroll
        for (int m = 0; m < 2 * Tile::kRowTiles; ++m) {
          const int token = first_token + token_of_warp + m * 8 + lane / 4;
          if (token >= M) continue;
          const Sum sum = sums[m / 2][n][m % 2 * 2 + side];
          if (splits > 1) {
            static_cast<Sum*>(args.work.partial)[(int64_t{blockIdx.y} * M + token) * N + row] = sum;
          } else {
            const float y = static_cast<float>(sum) * (args.work.x_scales[token] * scale);
            static_cast<T*>(p.y)[int64_t{token} * N + row] = narrow<T>(y + bias);
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace llmkernels::cuda
