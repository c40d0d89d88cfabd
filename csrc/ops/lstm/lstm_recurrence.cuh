// What the kernels share that keep a recurrence's weights with their blocks: the product of a tile of rows with a
// group's slice of the weights, and where the steps' rows are.
//
// Every warp takes a part of the depth for all rows and columns of the product and writes its sums to shared memory,
// where the thread of a (row, unit) adds them in their order: with few rows it is the depth that has the work.
#pragma once

#include <type_traits>

#include "common/cuda/grid_barrier.cuh"
#include "common/cuda/vec.cuh"
#include "ops/lstm/lstm_recurrence_plan.h"

namespace llmkernels::cuda {

// kRows rows of the exchange, [kRows, depth], times kColumns columns of the weights. Those of the first `kept` elements
// of depth are in kRegisters registers of each thread, in whole rounds; the others in shared memory. They are what the
// kernel's `weight(column, k)` says.
template <class T, int kRows, int kColumns, int kRegisters>
class Product {  // by multiply-adds: a lane has a column, and the rows' elements are the same for its neighbours
 public:
  static constexpr int kParts = product_parts(sizeof(T), kColumns), kStride = part_stride(kColumns);

  // Where an element of a group's weights is in shared memory; k counts from the first one there.
  static __device__ int64_t place(int column, int64_t k, int64_t) {
    return (k / kVec * kColumns + column) * kVec + k % kVec;
  }

  template <class F>
  __device__ void keep(int kept, F&& weight) {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int k = kVec * (i * kParts + part());
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) kept_[i][own].at[j] = k < kept ? weight(column() + 32 * own, k + j) : T{};
      }
    }
  }

  __device__ void multiply(const T* rows, int depth, int kept, const T* weights, int64_t, Acc<T>* parts) const {
    Acc<T> sums[kRows][kOwn] = {};
    const int vectors = depth / kVec, here = kRounds > 0 ? kept / kVec : 0;
    const auto add = [&](int k, const Vec<T, kVec>(&w)[kOwn]) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const auto h = load<T, kVec>(rows, row * vectors + k);
#pragma unroll
        for (int own = 0; own < kOwn; ++own) {
#pragma unroll
          for (int j = 0; j < kVec; ++j) sums[row][own] += h.at[j] * w[own].at[j];
        }
      }
    };
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int k = i * kParts + part();
      if (k < here) add(k, kept_[i]);
    }
#pragma unroll 1
    for (int k = here + part(); k < vectors; k += kParts) {
      Vec<T, kVec> w[kOwn];
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        w[own] = load<T, kVec>(weights, int64_t{k - here} * kColumns + column() + 32 * own);
      }
      add(k, w);
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        parts[(part() * kRows + row) * kStride + column() + 32 * own] = sums[row][own];
      }
    }
  }

 private:
  static constexpr int kVec = kVectorBytes / sizeof(T), kLanes = kColumns < 32 ? kColumns : 32;
  static constexpr int kOwn = kColumns / kLanes;  // columns of a lane
  static constexpr int kRounds = kRegisters / round_registers(sizeof(T), kColumns);
  static __device__ int column() { return threadIdx.x % kLanes; }
  static __device__ int part() { return threadIdx.x / kLanes; }

  Vec<T, kVec> kept_[kRounds > 0 ? kRounds : 1][kOwn];
};

// By tensor cores. The order of the depth is free as long as rows and weights have the same: a lane's two fragments of
// one column are its 16 bytes of 32 elements.
template <class T, int kColumns, int kRegisters>
class Product<T, 16, kColumns, kRegisters> {
 public:
  static constexpr int kParts = product_parts(sizeof(T), kColumns), kStride = part_stride(kColumns);

  static __device__ int64_t place(int column, int64_t k, int64_t stride) { return column * stride + k; }

  template <class F>
  __device__ void keep(int kept, F&& weight) {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int k = of_depth(i);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        Vec<T, kVec> vector = {};
        if (k < kept) {
#pragma unroll
          for (int j = 0; j < kVec; ++j) vector.at[j] = weight(8 * tile + g(), k + 8 * t() + j);
        }
        kept_[i][tile] = load<uint32_t, 4>(&vector, 0);
      }
    }
  }

  __device__ void multiply(const T* rows, int depth, int kept, const T* weights, int64_t stride,
                           float* parts) const {
    const T* const low = rows + g() * depth + 8 * t();
    float sums[kTiles][4] = {};
    const auto add = [&](const Fragment& low, const Fragment& high, const Fragment& w, float(&sums)[4]) {
      const uint32_t a[2][4] = {{low.at[0], high.at[0], low.at[1], high.at[1]},
                                {low.at[2], high.at[2], low.at[3], high.at[3]}};
      const uint32_t b[2][2] = {{w.at[0], w.at[1]}, {w.at[2], w.at[3]}};
      ptx::mma_m16n8k16<T>(sums, a[0], b[0]);
      ptx::mma_m16n8k16<T>(sums, a[1], b[1]);
    };
#pragma unroll
    for (int first = 0; first < kRounds; first += kAhead) {
      // All of them on their way before one is waited for.
      Fragment of_low[kAhead], of_high[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int k = of_depth(first + i);
        if (k >= kept) continue;
        of_low[i] = load<uint32_t, 4>(low + k, 0);
        of_high[i] = load<uint32_t, 4>(low + 8 * depth + k, 0);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (of_depth(first + i) >= kept) continue;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) add(of_low[i], of_high[i], kept_[first + i][tile], sums[tile]);
      }
    }
    const T* const columns = weights + g() * stride + 8 * t();
#pragma unroll 2
    for (int k = kept + of_depth(0); k < depth; k += kRound) {
      const auto of_low = load<uint32_t, 4>(low + k, 0), of_high = load<uint32_t, 4>(low + 8 * depth + k, 0);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        add(of_low, of_high, load<uint32_t, 4>(columns + 8 * tile * stride + k - kept, 0), sums[tile]);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = (static_cast<int>(threadIdx.x) / 32 * 16 + g() + 8 * half) * kStride + 8 * tile + 2 * t();
        store(parts + at, 0, Vec<float, 2>{{sums[tile][2 * half], sums[tile][2 * half + 1]}});
      }
    }
  }

 private:
  using Fragment = Vec<uint32_t, 4>;
  static constexpr int kVec = 8, kTiles = kColumns / 8, kRound = product_round(sizeof(T), kColumns);
  static constexpr int kRounds = kRegisters / round_registers(sizeof(T), kColumns), kAhead = 3;
  static_assert(kRounds % kAhead == 0);
  static __device__ int g() { return threadIdx.x % 32 / 4; }
  static __device__ int t() { return threadIdx.x % 4; }
  // Where a warp's elements of a round begin.
  static __device__ int of_depth(int round) { return round * kRound + static_cast<int>(threadIdx.x) / 32 * kDepthUnit; }

  Fragment kept_[kRounds > 0 ? kRounds : 1][kTiles];
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
__device__ int64_t first_row(const LSTMDirection<Params>& of, int64_t step) {
  if (of.p.at.first != nullptr) return of.p.at.first[step];
  return (of.reverse ? of.p.at.steps - 1 - step : step) * of.p.at.batch;
}
template <class Params>
__device__ int64_t rows_of(const LSTMDirection<Params>& of, int64_t step) {
  if (step < 0 || step >= of.p.at.steps) return 0;
  return of.p.at.count != nullptr ? of.p.at.count[step] : of.p.at.batch;
}

// Fills a block's columns [begin, end) of both buffers of the exchange, [padded, depth] each: value(row, column).
template <class T, class F>
__device__ void fill_exchange(void* exchange, int64_t padded, int64_t depth, int64_t begin, int64_t end, F&& value) {
  T* const out = static_cast<T*>(exchange);
  const int64_t columns = end - begin;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < padded * columns; i += blockDim.x) {
    const int64_t row = i / columns, column = begin + i % columns;
    out[row * depth + column] = out[(padded + row) * depth + column] = value(row, column);
  }
}

// The kernel `Kernel<T, rows of a tile, units of a group, alone>::get()` of a plan.
template <template <class, int, int, bool> class Kernel>
auto choose_resident(DType dtype, const LSTMRecurrencePlan& plan) {
  const auto of = [&](auto t, auto rows) {
    using T = decltype(t);
    constexpr int kRows = decltype(rows)::value;
    if constexpr (sizeof(T) < 8) {
      if (plan.alone && plan.units == kMostUnits) return Kernel<T, kRows, kMostUnits, true>::get();
      if (plan.alone) return Kernel<T, kRows, kGroupUnits, true>::get();
    }
    return Kernel<T, kRows, kGroupUnits, false>::get();
  };
  switch (dtype) {
    case DType::kFloat64:
      return of(double{}, std::integral_constant<int, 8>{});
    case DType::kBFloat16:
      return of(__nv_bfloat16{}, std::integral_constant<int, 16>{});
    case DType::kFloat16:
      return of(__half{}, std::integral_constant<int, 16>{});
    case DType::kFloat32:
      break;
  }
  if (plan.rows == 1) return of(float{}, std::integral_constant<int, 1>{});
  return of(float{}, std::integral_constant<int, 8>{});
}

}  // namespace llmkernels::cuda
