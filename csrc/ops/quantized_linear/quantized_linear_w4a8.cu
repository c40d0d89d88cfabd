// Activations rounded to int8 times int4 weights on tensor cores. A group's sum is of integers, exact, and meets its
// scale in fp32. Weights stay packed in shared memory; in the registers of a warp, the low halves of a word's bytes are
// the weights of one register of mma.m16n8k32 and the high halves those of the other.
#include "common/cuda/launch.h"
#include "ops/quantized_linear/quantized_linear_int8.cuh"

namespace llmkernels::cuda {
namespace {

constexpr int kInt4RowBytes = kInt8Columns / 2;
constexpr int kInt4Blocks = kInt8Columns / 32;  // of 32 columns, in a stage

// Byte offset of 16 bytes of a row of 32: four rows fill all banks, of eight that are read at once.
__device__ int int4_chunk(int row, int chunk) { return row * kInt4RowBytes + (chunk ^ (row / 4 % 2)) * kVectorBytes; }

// Four codes less their zero point, which four bytes of `zeros` are: no byte borrows from the next, for its highest bit
// is set first.
__device__ uint32_t int4_bytes(uint32_t codes, uint32_t zeros) {
  return (((codes & 0x0f0f0f0fu) | 0x80808080u) - zeros) ^ 0x80808080u;
}

template <class T, int kTokens>
__global__ void __launch_bounds__(kInt8Threads, 1)
    quantized_w4a8_kernel(const __grid_constant__ QuantizedLinearArgs args) {
  using Tile = Int8Tile<kTokens>;
  constexpr WeightFormat kFormat = WeightFormat::kInt4;
  constexpr int kStage = Tile::kXBytes + kInt8Rows * kInt4RowBytes;
  static_assert(kInt8Rows * kInt4RowBytes / kVectorBytes == kInt8Threads);
  extern __shared__ __align__(1024) unsigned char shared[];
  const QuantizedWeight& w = args.p.weight;
  const Int8Place<kTokens> place(args.p);
  const int lane = place.lane, token_of_warp = place.token_of_warp, row_of_warp = place.row_of_warp;
  const int first_row = place.first_row, row_bytes = (place.K + 1) / 2;
  const auto fetch_step = [&](int step) {
    if (step < place.steps) {
      unsigned char* const stage = shared + step % kInt8Stages * kStage;
      const int column = (place.first_stage + step) * kInt8Columns;
      fetch_rows<kTokens>(stage, args.work.rounded, place.first_token, place.M, column, place.pitch, place.pitch,
                          kVectorBytes);
      const int row = static_cast<int>(threadIdx.x) / 2, chunk = static_cast<int>(threadIdx.x) % 2;
      const int at = column / 2 + chunk * kVectorBytes;
      const int inside = first_row + row < place.N ? min(max(row_bytes - at, 0), kVectorBytes) : 0;
      const auto* const base = static_cast<const unsigned char*>(w.data);
      fetch_packed(stage + Tile::kXBytes + int4_chunk(row, chunk),
                   inside > 0 ? base + (int64_t{first_row} + row) * row_bytes + at : base, inside, args.weight_unit);
    }
    ptx::cp_async_commit();
  };

  float sums[Tile::kRowTiles][Tile::kTiles][4] = {};
  const bool small_groups = args.group_shift == 5;  // of one block; larger ones fill the stage
  for (int step = 0; step < kInt8Stages - 1; ++step) fetch_step(step);
  for (int step = 0; step < place.steps; ++step) {
    const int column = (place.first_stage + step) * kInt8Columns;
    // Zero points of the row whose weights this lane has, scales of the two rows whose sums it has.
    uint32_t zeros[kInt4Blocks][Tile::kTiles];
    float scales[kInt4Blocks][Tile::kTiles][2];
#pragma unroll
    for (int block = 0; block < kInt4Blocks; ++block) {
#pragma unroll
      for (int n = 0; n < Tile::kTiles; ++n) {
        const auto group_of = [&](int row) {
          return group_index<kFormat>(w, args.group_shift, min(first_row + row_of_warp + n * 8 + row, place.N - 1),
                                      column + 32 * block);
        };
        const int zero = w.zeros == nullptr ? kInt4Middle : w.zeros[group_of(lane / 4)];
        zeros[block][n] = static_cast<uint32_t>(zero) * 0x01010101u;
        if (block < kInt4Blocks - 1 && !small_groups) continue;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          scales[block][n][side] = scale_at<kFormat>(w, group_of(lane % 4 * 2 + side));
        }
      }
    }
    ptx::cp_async_wait<kInt8Stages - 2>();
    __syncthreads();  // this stage is there for everybody, and nobody reads the one before any more
    fetch_step(step + kInt8Stages - 1);
    const unsigned char* const stage = shared + step % kInt8Stages * kStage;
    const uint32_t x_tile = ptx::shared_address(stage);
    int32_t parts[Tile::kRowTiles][Tile::kTiles][4] = {};
#pragma unroll
    for (int block = 0; block < kInt4Blocks; ++block) {
      uint32_t left[Tile::kRowTiles][4];
#pragma unroll
      for (int m = 0; m < Tile::kRowTiles; ++m) {
        ptx::ldmatrix_x4(left[m], x_tile + int8_chunk(token_of_warp + m * 16 + lane % 16, 2 * block + lane / 16));
      }
#pragma unroll
      for (int n = 0; n < Tile::kTiles; ++n) {
        const int row = row_of_warp + n * 8 + lane / 4;
        const uint32_t word =
            *reinterpret_cast<const uint32_t*>(stage + Tile::kXBytes + int4_chunk(row, block) + lane % 4 * 4);
        const uint32_t right[2] = {int4_bytes(word, zeros[block][n]), int4_bytes(word >> 4, zeros[block][n])};
#pragma unroll
        for (int m = 0; m < Tile::kRowTiles; ++m) ptx::mma_m16n8k32_s8(parts[m][n], left[m], right);
      }
      if (block < kInt4Blocks - 1 && !small_groups) continue;
#pragma unroll
      for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < Tile::kTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            sums[m][n][e] = fmaf(static_cast<float>(parts[m][n][e]), scales[block][n][e % 2], sums[m][n][e]);
            parts[m][n][e] = 0;
          }
        }
      }
    }
  }
  ptx::cp_async_wait<0>();
  place.template store_sums<T>(args, sums);
}

template <class T>
auto choose(int tokens) {
  return tokens == 16 ? &quantized_w4a8_kernel<T, 16> : &quantized_w4a8_kernel<T, 64>;
}

}  // namespace

const char* quantized_w4a8(const QuantizedLinearArgs& args, const QuantizedLinearPlan& plan, void* stream) {
  const auto kernel = args.p.dtype == DType::kFloat32   ? choose<float>(plan.tokens)
                      : args.p.dtype == DType::kFloat16 ? choose<__half>(plan.tokens)
                                                        : choose<__nv_bfloat16>(plan.tokens);
  return launch(kernel, args, plan.launch, stream);
}

}  // namespace llmkernels::cuda
