// All steps of an LSTM layer in one launch, forward. Every block keeps its units' weights and c; h goes through global
// memory, with one barrier of the grid a step.
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

template <class T, int kRows>
__global__ void __launch_bounds__(kRecurrenceThreads, kRecurrenceBlocksPerSm)
    lstm_recurrence_fwd_kernel(const LSTMResident<LSTMFwdParams> r) {
  constexpr int kColumns = kFwdColumns;
  using Use = Product<T, kRows, kColumns>;
  extern __shared__ __align__(16) unsigned char shared[];
  const LSTMFwdParams& p = r.p;
  const int64_t H = p.at.hidden, depth = r.depth, units = int64_t{r.groups} * kGroupUnits;
  const int64_t begin = blockIdx.x * units, group_elements = kColumns * r.stride;
  T* const weights = reinterpret_cast<T*>(shared);
  Acc<T>* const parts = reinterpret_cast<Acc<T>*>(weights + r.groups * group_elements);
  Acc<T>* const cells = parts + Use::kParts * kRows * Use::kStride;  // [batch, units]

#pragma unroll 1
  for (int column = threadIdx.x / 32; column < r.groups * kColumns; column += kRecurrenceWarps) {
    const int64_t group = column / kColumns, gate = column % kColumns / kGroupUnits, unit = column % kGroupUnits;
    const int64_t own = begin + group * kGroupUnits + unit;
    const T* row = static_cast<const T*>(p.w_hh) + (gate * H + own) * H;
#pragma unroll 4
    for (int64_t k = threadIdx.x % 32; k < depth; k += 32) {
      weights[group * group_elements + Use::place(column % kColumns, k, r.stride)] =
          own < H && k < H ? row[k] : narrow<T>(0);
    }
  }
  const T* const h0 = static_cast<const T*>(p.h0);
  const bool last_block = blockIdx.x == gridDim.x - 1;
  fill_exchange<T>(r, begin, last_block ? depth : begin + units, [&](int64_t row, int64_t column) {
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

  const int row_of_tile = threadIdx.x / kGroupUnits, unit_of_group = threadIdx.x % kGroupUnits;
  const auto load_gates = [&](int64_t step, int64_t tile, int group, T(&x)[4]) {
    const int64_t row = tile * kRows + row_of_tile, unit = begin + group * kGroupUnits + unit_of_group;
    if (row_of_tile >= kRows || row >= rows_of(r, step) || unit >= H) return;
    const T* from = static_cast<const T*>(p.gates_x) + (first_row(r, step) + row) * 4 * H + unit;
#pragma unroll
    for (int q = 0; q < 4; ++q) x[q] = from[q * H];
  };
  const auto store_outputs = [&](int64_t step, int64_t row, int64_t unit, const StepOutputs<T>& out) {
    const int64_t at = first_row(r, step) + row;
    static_cast<T*>(p.y)[at * H + unit] = out.h;
    if (row >= rows_of(r, step + 1)) {  // its last step
      static_cast<T*>(p.h_n)[row * H + unit] = out.h;
      static_cast<T*>(p.c_n)[row * H + unit] = narrow<T>(out.c);
    }
    if (p.gates == nullptr) return;
    T* const gates = static_cast<T*>(p.gates) + at * 4 * H + unit;
#pragma unroll
    for (int q = 0; q < 4; ++q) gates[q * H] = narrow<T>(out.gates[q]);
    static_cast<Acc<T>*>(p.cells)[at * H + unit] = out.c;
  };

  GridBarrier barrier(r.arrived);
  T x[4] = {};
  barrier.arrive();
  load_gates(0, 0, 0, x);
  barrier.wait();
#pragma unroll 1
  for (int64_t step = 0; step < p.at.steps; ++step) {
    T* const exchange = static_cast<T*>(r.exchange);
    const T* const h = exchange + step % 2 * r.padded * depth;
    T* const next_h = exchange + (step + 1) % 2 * r.padded * depth;
    const int64_t tiles = (rows_of(r, step) + kRows - 1) / kRows;
    StepOutputs<T> out{};
    int64_t row = 0, unit = 0;
    bool live = false;
#pragma unroll 1
    for (int64_t item = 0; item < tiles * r.groups; ++item) {
      const int64_t tile = item / r.groups;
      const int group = static_cast<int>(item % r.groups);
      if (item > 0) {
        if (live) store_outputs(step, row, unit, out);
        __syncthreads();  // the parts are read
        load_gates(step, tile, group, x);
      }
      Use::multiply(h + tile * kRows * depth, depth, weights + group * group_elements, r.stride, parts);
      __syncthreads();
      row = tile * kRows + row_of_tile;
      unit = begin + group * kGroupUnits + unit_of_group;
      live = row_of_tile < kRows && row < rows_of(r, step) && unit < H;
      if (!live) continue;
      Acc<T> sums[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        sums[q] = widen(x[q]) + sum_of_parts<Use, kRows>(parts, row_of_tile, q * kGroupUnits + unit_of_group);
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

template <class T, int kRows>
struct Forward {
  static auto get() { return &lstm_recurrence_fwd_kernel<T, kRows>; }
};

}  // namespace

const char* lstm_recurrence_fwd(const LSTMResident<LSTMFwdParams>& params, const LSTMRecurrencePlan& plan,
                                void* stream) {
  return launch_cooperative(choose_resident<Forward>(params.p.dtype, plan.rows), params, plan.launch, stream);
}

}  // namespace llmkernels::cuda
