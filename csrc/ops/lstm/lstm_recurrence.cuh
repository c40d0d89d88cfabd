// What the kernels share that keep a recurrence's weights in shared memory: the product of a tile of rows with a group's
// slice of the weights, and where the steps' rows are.
//
// Every warp takes a part of the depth for all rows and columns of the product and writes its sums to shared memory,
// where the thread of a (row, unit) adds them in their order: with few rows it is the depth that has the work.
#pragma once

#include "common/cuda/grid_barrier.cuh"
#include "common/cuda/vec.cuh"
#include "ops/lstm/lstm_recurrence_plan.h"

namespace llmkernels::cuda {

// kRows rows of the exchange, [kRows, depth], times kColumns columns of the weights.
template <class T, int kRows, int kColumns>
struct Product {  // by multiply-adds: a lane has one column, and the rows' elements are the same for its neighbours
  static constexpr int kVec = kVectorBytes / sizeof(T), kShares = 32 / kColumns;
  static constexpr int kParts = product_parts(sizeof(T), kColumns), kStride = part_stride(kColumns);

  // Where an element of a group's weights is.
  static __device__ int64_t place(int column, int64_t k, int64_t) {
    return (k / kVec * kColumns + column) * kVec + k % kVec;
  }

  static __device__ void multiply(const T* rows, int64_t depth, const T* weights, int64_t, Acc<T>* parts) {
    const int lane = threadIdx.x % 32, column = lane % kColumns, part = threadIdx.x / 32 * kShares + lane / kColumns;
    const int vectors = static_cast<int>(depth / kVec);
    Acc<T> sums[kRows] = {};
#pragma unroll 1
    for (int k = part; k < vectors; k += kParts) {
      const auto w = load<T, kVec>(weights, int64_t{k} * kColumns + column);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const auto h = load<T, kVec>(rows + row * depth, k);
#pragma unroll
        for (int j = 0; j < kVec; ++j) sums[row] += h.at[j] * w.at[j];
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) parts[(part * kRows + row) * kStride + column] = sums[row];
  }
};

// By tensor cores. The order of the depth is free as long as rows and weights have the same: a lane's two fragments of
// one column are its 16 bytes of 32 elements.
template <class T, int kColumns>
struct Product<T, 16, kColumns> {
  static constexpr int kParts = product_parts(sizeof(T), kColumns), kStride = part_stride(kColumns);

  static __device__ int64_t place(int column, int64_t k, int64_t stride) { return column * stride + k; }

  static __device__ void multiply(const T* rows, int64_t depth, const T* weights, int64_t stride, float* parts) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float sums[kColumns / 8][4] = {};
#pragma unroll 2
    for (int k = warp * kDepthUnit; k < static_cast<int>(depth); k += kRecurrenceWarps * kDepthUnit) {
      const auto low = load<uint32_t, 4>(rows + g * depth + k + 8 * t, 0);
      const auto high = load<uint32_t, 4>(rows + (g + 8) * depth + k + 8 * t, 0);
      const uint32_t a[2][4] = {{low.at[0], high.at[0], low.at[1], high.at[1]},
                                {low.at[2], high.at[2], low.at[3], high.at[3]}};
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        const auto w = load<uint32_t, 4>(weights + (8 * j + g) * stride + k + 8 * t, 0);
        const uint32_t b[2][2] = {{w.at[0], w.at[1]}, {w.at[2], w.at[3]}};
        ptx::mma_m16n8k16<T>(sums[j], a[0], b[0]);
        ptx::mma_m16n8k16<T>(sums[j], a[1], b[1]);
      }
    }
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = (warp * 16 + g + 8 * half) * kStride + 8 * j + 2 * t;
        store(parts + at, 0, Vec<float, 2>{{sums[j][2 * half], sums[j][2 * half + 1]}});
      }
    }
  }
};

// The sum of a product's parts for a row and column.
template <class Use, int kRows, class Value>
__device__ Value sum_of_parts(const Value* parts, int row, int column) {
  Value sum = 0;
#pragma unroll
  for (int part = 0; part < Use::kParts; ++part) sum += parts[(part * kRows + row) * Use::kStride + column];
  return sum;
}

// A step's rows; the steps are in the order of the computation.
template <class Params>
__device__ int64_t first_row(const LSTMResident<Params>& r, int64_t step) {
  if (r.p.at.first != nullptr) return r.p.at.first[step];
  return (r.reverse ? r.p.at.steps - 1 - step : step) * r.p.at.batch;
}
template <class Params>
__device__ int64_t rows_of(const LSTMResident<Params>& r, int64_t step) {
  if (step < 0 || step >= r.p.at.steps) return 0;
  return r.p.at.count != nullptr ? r.p.at.count[step] : r.p.at.batch;
}

// Fills a block's columns [begin, end) of both buffers of the exchange: value(row, column).
template <class T, class Params, class F>
__device__ void fill_exchange(const LSTMResident<Params>& r, int64_t begin, int64_t end, F&& value) {
  T* const exchange = static_cast<T*>(r.exchange);
  const int64_t columns = end - begin;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < r.padded * columns; i += blockDim.x) {
    const int64_t row = i / columns, column = begin + i % columns;
    exchange[row * r.depth + column] = exchange[(r.padded + row) * r.depth + column] = value(row, column);
  }
}

// The kernel `Kernel<T, rows of a tile>::get()` for a call.
template <template <class, int> class Kernel>
auto choose_resident(DType dtype, int rows) {
  switch (dtype) {
    case DType::kFloat64:
      return Kernel<double, 8>::get();
    case DType::kBFloat16:
      return Kernel<__nv_bfloat16, 16>::get();
    case DType::kFloat16:
      return Kernel<__half, 16>::get();
    case DType::kFloat32:
      break;
  }
  return rows == 1 ? Kernel<float, 1>::get() : Kernel<float, 8>::get();
}

}  // namespace llmkernels::cuda
