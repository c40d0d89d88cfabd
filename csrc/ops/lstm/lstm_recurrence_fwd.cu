// All steps of an LSTM layer in one launch, forward, of one direction or of both. Every block keeps its units' weights
// and c; h goes through global memory, with one barrier of the direction's blocks a step.
//
// Two buffers of h suffice: whoever writes the one that others read in the last step has passed the barrier at its end.
// Only h is written before a block says that it is there; the results follow while the others arrive.
#include "common/cuda/launch.h"
#include "ops/lstm/lstm_cell.cuh"
#include "ops/lstm/lstm_cuda.h"
#include "ops/lstm/lstm_recurrence.cuh"

namespace llmkernels::cuda {
namespace {

template <class T>
struct StepOutputs {
  Acc<T> gates[4], c;
  T h;
};

template <class T, int kRows, int kUnits, bool kAlone>
__global__ void __launch_bounds__(kRecurrenceThreads, recurrence_blocks_per_sm(sizeof(T), kAlone))
    lstm_recurrence_fwd_kernel(const __grid_constant__ LSTMResident<LSTMFwdParams> r) {
  constexpr int kColumns = kFwdColumns * kUnits;
  using Use = Product<T, kRows, kColumns, kAlone ? kWeightRegisters : 0>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int direction = static_cast<int>(blockIdx.x) / r.blocks, block = static_cast<int>(blockIdx.x) % r.blocks;
  const int units = r.groups * kUnits, begin = block * units;
  const LSTMDirection<LSTMFwdParams>& of = r.of[direction];
  const LSTMFwdParams& p = of.p;
  const int64_t H = p.at.hidden, depth = r.depth, group_elements = kColumns * r.stride;
  T* const weights = reinterpret_cast<T*>(shared);
  Acc<T>* const parts = reinterpret_cast<Acc<T>*>(weights + r.groups * group_elements);
  Acc<T>* const cells = parts + Use::kParts * kRows * Use::kStride;  // [batch, units]

  const auto weight = [&](int group, int column, int k) {
    const int gate = column / kUnits, own = begin + group * kUnits + column % kUnits;
    return own < H && k < H ? static_cast<const T*>(p.w_hh)[(gate * H + own) * H + k] : narrow<T>(0);
  };
#pragma unroll 1
  for (int column = threadIdx.x / 32; column < r.groups * kColumns; column += kRecurrenceWarps) {
    const int group = column / kColumns;
#pragma unroll 4
    for (int k = r.kept + threadIdx.x % 32; k < r.depth; k += 32) {
      weights[group * group_elements + Use::place(column % kColumns, k - r.kept, r.stride)] =
          weight(group, column % kColumns, k);
    }
  }
  Use product;
  product.keep(r.kept, [&](int column, int k) { return weight(0, column, k); });
  const T* const h0 = static_cast<const T*>(p.h0);
  const int64_t end = block == r.blocks - 1 ? depth : begin + units;
  fill_exchange<T>(of.exchange, r.padded, depth, begin, end, [&](int64_t row, int64_t column) {
    return row < p.at.batch && column < H ? h0[row * H + column] : narrow<T>(0);
  });
  // A sequence without a step keeps what it starts with.
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < p.at.batch * units; i += blockDim.x) {
    const int64_t row = i / units, unit = begin + i % units;
    if (unit >= H) continue;
    const T c = static_cast<const T*>(p.c0)[row * H + unit];
    cells[i] = widen(c);
    static_cast<T*>(p.c_n)[row * H + unit] = c;
    static_cast<T*>(p.h_n)[row * H + unit] = h0[row * H + unit];
  }

  const int row_of_tile = threadIdx.x / kUnits, unit_of_group = threadIdx.x % kUnits;
  const auto load_gates = [&](int64_t step, int tile, int group, T(&x)[4]) {
    const int row = tile * kRows + row_of_tile, unit = begin + group * kUnits + unit_of_group;
    if (row_of_tile >= kRows || row >= rows_of(of, step) || unit >= H) return;
    const T* from = static_cast<const T*>(p.gates_x) + (first_row(of, step) + row) * 4 * H + unit;
#pragma unroll
    for (int q = 0; q < 4; ++q) x[q] = from[q * H];
  };
  const auto store_outputs = [&](int64_t step, int row, int unit, const StepOutputs<T>& out) {
    const int64_t at = first_row(of, step) + row;
    static_cast<T*>(p.y)[at * H + unit] = out.h;
    if (row >= rows_of(of, step + 1)) {  // its last step
      static_cast<T*>(p.h_n)[row * H + unit] = out.h;
      static_cast<T*>(p.c_n)[row * H + unit] = narrow<T>(out.c);
    }
    if (p.gates == nullptr) return;
    T* const gates = static_cast<T*>(p.gates) + at * 4 * H + unit;
#pragma unroll
    for (int q = 0; q < 4; ++q) gates[q * H] = narrow<T>(out.gates[q]);
    static_cast<Acc<T>*>(p.cells)[at * H + unit] = out.c;
  };

  GridBarrier barrier(of.arrived, r.blocks);
  T x[4] = {};
  barrier.arrive();
  load_gates(0, 0, 0, x);
  barrier.wait();
#pragma unroll 1
  for (int64_t step = 0; step < p.at.steps; ++step) {
    T* const exchange = static_cast<T*>(of.exchange);
    const T* const h = exchange + step % 2 * r.padded * depth;
    T* const next_h = exchange + (step + 1) % 2 * r.padded * depth;
    const int tiles = static_cast<int>((rows_of(of, step) + kRows - 1) / kRows);
    StepOutputs<T> out{};
    int row = 0, unit = 0;
    bool live = false;
#pragma unroll 1
    for (int item = 0; item < tiles * r.groups; ++item) {
      const int tile = item / r.groups, group = item % r.groups;
      if (item > 0) {
        if (live) store_outputs(step, row, unit, out);
        __syncthreads();  // the parts are read
        load_gates(step, tile, group, x);
      }
      product.multiply(h + tile * kRows * depth, r.depth, r.kept, weights + group * group_elements, r.stride, parts);
      __syncthreads();
      row = tile * kRows + row_of_tile;
      unit = begin + group * kUnits + unit_of_group;
      live = row_of_tile < kRows && row < rows_of(of, step) && unit < H;
      if (!live) continue;
      Acc<T> sums[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        sums[q] = widen(x[q]) + sum_of_parts<Use, kRows>(parts, row_of_tile, q * kUnits + unit_of_group);
      }
      out.gates[0] = sigmoid(sums[0]);
      out.gates[1] = sigmoid(sums[1]);
      out.gates[2] = tanh(sums[2]);
      out.gates[3] = sigmoid(sums[3]);
      Acc<T>& c = cells[row * units + unit - begin];
      c = out.c = out.gates[1] * c + out.gates[0] * out.gates[2];
      out.h = narrow<T>(out.gates[3] * tanh(c));
      next_h[row * depth + unit] = out.h;
    }
    barrier.arrive();
    if (live) store_outputs(step, row, unit, out);
    load_gates(step + 1, 0, 0, x);
    barrier.wait();
  }
}

template <class T, int kRows, int kUnits, bool kAlone>
struct Forward {
  static auto get() { return &lstm_recurrence_fwd_kernel<T, kRows, kUnits, kAlone>; }
};

}  // namespace

const char* lstm_recurrence_fwd(const LSTMResident<LSTMFwdParams>& params, const LSTMRecurrencePlan& plan,
                                void* stream) {
  return launch_cooperative(choose_resident<Forward>(params.of[0].p.dtype, plan), params, plan.launch, stream);
}

}  // namespace llmkernels::cuda
