// Tiles of rows in shared memory, and the two products that attention is made of. A warp has 16 rows; an accumulator is
// laid out as that of mma.m16n8k16: with g = lane / 4 and t = lane % 4, elements 0 and 1 of tile n are row g and columns
// 8 n + 2 t + {0, 1}, elements 2 and 3 the same of row g + 8.
//
// float has the same layout, multiplied by FMAs: tensor cores would round its factors to 10 bits.
#pragma once

#include "common/cuda/ptx.cuh"
#include "common/cuda/vec.cuh"
#include "ops/attention/attention_plan.h"

namespace llmkernels::cuda {
namespace {

constexpr unsigned kWholeWarp = 0xffffffffu;

// What the planner says of a row's bytes, as constants of a kernel.
template <class T, int kDim>
struct FwdShape {
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(T));
  static constexpr int kOwn = attention_fwd_tile(kRowBytes).own, kStream = attention_fwd_tile(kRowBytes).stream;
  static constexpr int kThreads = attention_fwd_tile(kRowBytes).threads();
};
template <class T, int kDim>
struct BwdShape {
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(T));
  static constexpr int kOwn = attention_bwd_tile(kRowBytes).own, kStream = attention_bwd_tile(kRowBytes).stream;
  static constexpr int kThreads = attention_bwd_tile(kRowBytes).threads();
  static constexpr int kColumns = attention_columns(kDim);
};
template <class T, int kDim>
struct CacheShape {
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(T));
  static constexpr int kStream = attention_cache_tile(kRowBytes).stream, kWarps = attention_cache_tile(kRowBytes).warps;
  static constexpr int kThreads = 32 * kWarps, kSlice = kStream / kWarps;
};

// Byte offset of 16 bytes in a tile of rows of kChunks times 16 bytes. The products read one chunk of 8 rows at a time:
// exchanging the chunks of a row by its number puts those into 8 different groups of banks.
template <int kChunks>
__device__ int swizzled(int row, int chunk) {
  return (row * kChunks + (chunk ^ (row % 8))) * kVectorBytes;
}

// Where the rows of a head are.
template <class T>
struct HeadRows {
  const T* base;
  int64_t stride;
  __device__ const T* operator()(int row) const { return base + int64_t{row} * stride; }
};

// Rows first .. first + kRows of a matrix that ends at `rows` and `dim`, zeros beyond. Complete for everybody after
// cp_async_commit, cp_async_wait and a barrier. Without kAnyAlignment the rows are whole vectors.
template <class T, int kDim, int kRows, int kThreads, bool kAnyAlignment, class Row>
__device__ void fetch(unsigned char* tile, const Row& row_of, int first, int rows, int dim, bool wide) {
  constexpr int kPerChunk = kVectorBytes / static_cast<int>(sizeof(T)), kChunks = kDim / kPerChunk;
  static_assert(kRows * kChunks % kThreads == 0);
#pragma unroll 4
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int index = static_cast<int>(threadIdx.x) + i * kThreads, row = index / kChunks, chunk = index % kChunks;
    const int column = chunk * kPerChunk;
    const bool inside = first + row < rows && column < dim;
    const T* source = row_of(inside ? first + row : 0) + column;
    unsigned char* target = tile + swizzled<kChunks>(row, chunk);
    if (!kAnyAlignment || wide) {
      ptx::cp_async<kVectorBytes>(ptx::shared_address(target), source, inside ? kVectorBytes : 0);
    } else {
      Vec<T, kPerChunk> vector;
#pragma unroll
      for (int e = 0; e < kPerChunk; ++e) vector.at[e] = inside && column + e < dim ? source[e] : narrow<T>(0.0f);
      *reinterpret_cast<Vec<T, kPerChunk>*>(target) = vector;
    }
  }
}

template <class T>
struct Products {
  // The column of element 0 of tile n that `weighted` makes; element 1 is the next one.
  static __device__ int column(int n) { return 8 * n + static_cast<int>(threadIdx.x) % 4 * 2; }

  static __device__ uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, __half>) {
      return ptx::pack_f16x2(low, high);
    } else {
      return ptx::pack_bf16x2(low, high);
    }
  }

  // d += a b^T: 16 rows of tile a from `a_row` on, 8 kTiles rows of tile b from `b_row` on.
  template <int kDim, int kTiles>
  static __device__ void scores(float (&d)[kTiles][4], const unsigned char* a, int a_row, const unsigned char* b,
                                int b_row) {
    static_assert(kTiles % 2 == 0);
    constexpr int kChunks = kDim / 8;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const uint32_t a_tile = ptx::shared_address(a), b_tile = ptx::shared_address(b);
    constexpr int kUnroll = kChunks > 16 ? 1 : kChunks > 8 ? 2 : 4;  // more addresses at once than there are registers
#pragma unroll kUnroll
    for (int chunk = 0; chunk < kChunks; chunk += 2) {
      uint32_t left[4];
      ptx::ldmatrix_x4(left, a_tile + swizzled<kChunks>(a_row + lane % 16, chunk + lane / 16));
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        uint32_t right[4];
        ptx::ldmatrix_x4(right, b_tile + swizzled<kChunks>(b_row + n * 8 + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
        const uint32_t low[2] = {right[0], right[1]}, high[2] = {right[2], right[3]};
        ptx::mma_m16n8k16<T>(d[n], left, low);
        ptx::mma_m16n8k16<T>(d[n + 1], left, high);
      }
    }
  }

  // d += p b: 16 rows of weights in the layout of an accumulator, rounded to T, times as many rows of tile b from `b_row`
  // on, 8 kOut columns from `first_column` on.
  template <int kDim, int kTiles, int kOut>
  static __device__ void weighted(float (&d)[kOut][4], const float (&p)[kTiles][4], const unsigned char* b, int b_row,
                                  int first_column) {
    static_assert(kTiles % 2 == 0 && kOut % 2 == 0);
    constexpr int kChunks = kDim / 8;
    int lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (kOut > 16) asm volatile("" : "+r"(lane));  // or it keeps all addresses in registers, and spills
    const uint32_t b_tile = ptx::shared_address(b);
#pragma unroll
    for (int k = 0; k < kTiles; k += 2) {
      // An accumulator of 16 x 16 scores is laid out like the operand a of the next product.
      const uint32_t left[4] = {pack(p[k][0], p[k][1]), pack(p[k][2], p[k][3]), pack(p[k + 1][0], p[k + 1][1]),
                                pack(p[k + 1][2], p[k + 1][3])};
#pragma unroll
      for (int n = 0; n < kOut; n += 2) {
        uint32_t right[4];
        ptx::ldmatrix_x4_trans(
            right, b_tile + swizzled<kChunks>(b_row + k * 8 + lane % 16, first_column / 8 + n + lane / 16));
        const uint32_t low[2] = {right[0], right[1]}, high[2] = {right[2], right[3]};
        ptx::mma_m16n8k16<T>(d[n], left, low);
        ptx::mma_m16n8k16<T>(d[n + 1], left, high);
      }
    }
  }
};

template <>
struct Products<float> {
  // A lane has four neighbours, two of tile n and two of tile n + 1, so that it reads 16 bytes at a time.
  static __device__ int column(int n) { return n / 2 * 16 + static_cast<int>(threadIdx.x) % 4 * 4 + n % 2 * 2; }

  static __device__ float dot(const float4& a, const float4& b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
  }
  template <int kChunks>
  static __device__ float4 at(const unsigned char* tile, int row, int chunk) {
    return *reinterpret_cast<const float4*>(tile + swizzled<kChunks>(row, chunk));
  }

  template <int kDim, int kTiles>
  static __device__ void scores(float (&d)[kTiles][4], const unsigned char* a, int a_row, const unsigned char* b,
                                int b_row) {
    constexpr int kChunks = kDim / 4;
    const int g = static_cast<int>(threadIdx.x) % 32 / 4, t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll 2
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const float4 upper = at<kChunks>(a, a_row + g, chunk), lower = at<kChunks>(a, a_row + g + 8, chunk);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const float4 left = at<kChunks>(b, b_row + n * 8 + 2 * t, chunk);
        const float4 right = at<kChunks>(b, b_row + n * 8 + 2 * t + 1, chunk);
        d[n][0] = dot(upper, left, d[n][0]);
        d[n][1] = dot(upper, right, d[n][1]);
        d[n][2] = dot(lower, left, d[n][2]);
        d[n][3] = dot(lower, right, d[n][3]);
      }
    }
  }

  template <int kDim, int kTiles, int kOut>
  static __device__ void weighted(float (&d)[kOut][4], const float (&p)[kTiles][4], const unsigned char* b, int b_row,
                                  int first_column) {
    constexpr int kChunks = kDim / 4, kUnroll = kOut > 16 ? 1 : kOut > 8 ? 2 : 8;
    int lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (kOut > 16) asm volatile("" : "+r"(lane));
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
#pragma unroll kUnroll
      for (int e = 0; e < 8; ++e) {
        // The lane of the same rows that has column e of tile k.
        const int source = (lane & ~3) | e / 2;
        const float upper = __shfl_sync(kWholeWarp, e % 2 == 0 ? p[k][0] : p[k][1], source);
        const float lower = __shfl_sync(kWholeWarp, e % 2 == 0 ? p[k][2] : p[k][3], source);
#pragma unroll
        for (int n = 0; n < kOut; n += 2) {
          const float4 right = at<kChunks>(b, b_row + k * 8 + e, first_column / 4 + n * 2 + lane % 4);
          d[n][0] = fmaf(upper, right.x, d[n][0]);
          d[n][1] = fmaf(upper, right.y, d[n][1]);
          d[n][2] = fmaf(lower, right.x, d[n][2]);
          d[n][3] = fmaf(lower, right.y, d[n][3]);
          d[n + 1][0] = fmaf(upper, right.z, d[n + 1][0]);
          d[n + 1][1] = fmaf(upper, right.w, d[n + 1][1]);
          d[n + 1][2] = fmaf(lower, right.z, d[n + 1][2]);
          d[n + 1][3] = fmaf(lower, right.w, d[n + 1][3]);
        }
      }
    }
  }
};

// One of the two rows of a lane, times `factor`, to columns first_column .. dim of `row`.
template <class T, int kOut>
__device__ void store_row(T* row, const float (&d)[kOut][4], int half, int first_column, int dim, float factor,
                          bool wide) {
#pragma unroll
  for (int n = 0; n < kOut; ++n) {
    const int column = first_column + Products<T>::column(n);
    Vec<T, 2> pair;
#pragma unroll
    for (int e = 0; e < 2; ++e) pair.at[e] = narrow<T>(d[n][2 * half + e] * factor);
    if (wide) {
      if (column < dim) *reinterpret_cast<Vec<T, 2>*>(row + column) = pair;
    } else {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (column + e < dim) row[column + e] = pair.at[e];
      }
    }
  }
}

// Over the four lanes that share a row of an accumulator.
__device__ inline float quad_max(float value) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) value = fmaxf(value, __shfl_xor_sync(kWholeWarp, value, step));
  return value;
}
__device__ inline float quad_sum(float value) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) value += __shfl_xor_sync(kWholeWarp, value, step);
  return value;
}

}  // namespace
}  // namespace llmkernels::cuda
