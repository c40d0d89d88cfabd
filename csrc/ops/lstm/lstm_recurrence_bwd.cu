// The backward of all steps of an LSTM layer in one launch, from the last one to the first, of one direction or of
// both. Every block keeps its units' columns of the weights, and what has arrived at their h and c; the gradients of
// the gates go through global memory, rounded to T, with one barrier of the direction's blocks a step
// (lstm_recurrence_fwd.cu says why two buffers suffice).
//
// An element of depth is 4 * unit + gate: what a thread has of a row is one vector.
#include "common/cuda/launch.h"
#include "ops/lstm/lstm_cell.cuh"
#include "ops/lstm/lstm_cuda.h"
#include "ops/lstm/lstm_recurrence.cuh"

namespace llmkernels::cuda {
namespace {

// What a step was given and gave, for one unit of one row; as loaded, so that nobody waits for it early.
template <class T>
struct StepInputs {
  T gates[4], dy, first_c;
  Acc<T> cell, last_cell, dcell;
};

template <class T, int kRows, int kUnits, bool kAlone>
__global__ void __launch_bounds__(kRecurrenceThreads, recurrence_blocks_per_sm(sizeof(T), kAlone))
    lstm_recurrence_bwd_kernel(const __grid_constant__ LSTMResident<LSTMBwdParams> r) {
  constexpr int kColumns = kBwdColumns * kUnits;
  using Use = Product<T, kRows, kColumns, kAlone ? kWeightRegisters : 0>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int direction = static_cast<int>(blockIdx.x) / r.blocks, block = static_cast<int>(blockIdx.x) % r.blocks;
  const int units = r.groups * kUnits, begin = block * units;
  const LSTMDirection<LSTMBwdParams>& of = r.of[direction];
  const LSTMBwdParams& p = of.p;
  const int64_t H = p.at.hidden, depth = r.depth, group_elements = kColumns * r.stride;
  T* const weights = reinterpret_cast<T*>(shared);
  Acc<T>* const parts = reinterpret_cast<Acc<T>*>(weights + r.groups * group_elements);
  Acc<T>* const arrived_h = parts + Use::kParts * kRows * Use::kStride;  // [batch, units]
  Acc<T>* const arrived_c = arrived_h + p.at.batch * units;              // [batch, units]

  const auto weight = [&](int unit, int k) {
    const int gate = k % 4, from = k / 4;
    return from < H && begin + unit < H ? static_cast<const T*>(p.w_hh)[(gate * H + from) * H + begin + unit]
                                        : narrow<T>(0);
  };
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < (depth - r.kept) * units; i += blockDim.x) {
    const int k = static_cast<int>(i / units), unit = static_cast<int>(i % units);
    weights[unit / kColumns * group_elements + Use::place(unit % kColumns, k, r.stride)] = weight(unit, r.kept + k);
  }
  Use product;
  product.keep(r.kept, weight);
  // Of units that do not exist all is zero, and stays so.
  fill_exchange<T>(of.exchange, r.padded, depth, 4 * begin, block == r.blocks - 1 ? depth : 4 * (begin + units),
                   [](int64_t, int64_t) { return narrow<T>(0); });
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < p.at.batch * units; i += blockDim.x) {
    const int64_t row = i / units, unit = begin + i % units;
    const auto value = [&](const void* from) {
      return from != nullptr && unit < H ? widen(static_cast<const T*>(from)[row * H + unit]) : Acc<T>{0};
    };
    arrived_h[i] = value(p.dh_n);
    arrived_c[i] = value(p.dc_n);
  }

  const int row_of_tile = threadIdx.x / kUnits, unit_of_group = threadIdx.x % kUnits;
  const auto load_inputs = [&](int64_t step, int tile, int group, StepInputs<T>& in) {
    const int row = tile * kRows + row_of_tile, unit = begin + group * kUnits + unit_of_group;
    if (row_of_tile >= kRows || row >= rows_of(of, step) || unit >= H) return;
    const int64_t at = first_row(of, step) + row;
#pragma unroll
    for (int q = 0; q < 4; ++q) in.gates[q] = static_cast<const T*>(p.gates)[(at * 4 + q) * H + unit];
    const Acc<T>* const cells = static_cast<const Acc<T>*>(p.cells);
    in.cell = cells[at * H + unit];
    if (row < rows_of(of, step - 1)) {
      in.last_cell = cells[(first_row(of, step - 1) + row) * H + unit];
    } else {
      in.first_c = static_cast<const T*>(p.c0)[row * H + unit];
    }
    if (p.dy != nullptr) in.dy = static_cast<const T*>(p.dy)[at * H + unit];
    if (p.dcells != nullptr) in.dcell = static_cast<const Acc<T>*>(p.dcells)[at * H + unit];
  };
  const auto store_dgates = [&](int64_t step, int row, int unit, const Vec<T, 4>& dgates) {
    T* const out = static_cast<T*>(p.dgates) + (first_row(of, step) + row) * 4 * H + unit;
#pragma unroll
    for (int q = 0; q < 4; ++q) out[q * H] = dgates.at[q];
  };

  GridBarrier barrier(of.arrived, r.blocks);
  StepInputs<T> in{};
  barrier.arrive();
  load_inputs(p.at.steps - 1, 0, 0, in);
  barrier.wait();
#pragma unroll 1
  for (int64_t step = p.at.steps - 1; step >= -1; --step) {
    T* const exchange = static_cast<T*>(of.exchange);
    const T* const from = exchange + (step + 1) % 2 * r.padded * depth;
    T* const to = exchange + (step & 1) * r.padded * depth;
    // Rows whose gradient arrives from the step behind, and rows that this step has.
    const int64_t behind = rows_of(of, step + 1), rows = rows_of(of, step);
    const int tiles = static_cast<int>(((behind > rows ? behind : rows) + kRows - 1) / kRows);
    Vec<T, 4> dgates{};
    int row = 0, unit = 0;
    bool live = false;
#pragma unroll 1
    for (int item = 0; item < tiles * r.groups; ++item) {
      const int tile = item / r.groups, group = item % r.groups;
      if (item > 0) {
        if (live) store_dgates(step, row, unit, dgates);
        __syncthreads();  // the parts are read
        load_inputs(step, tile, group, in);
      }
      if (tile * kRows < behind) {
        product.multiply(from + tile * kRows * depth, r.depth, r.kept, weights + group * group_elements,
                         r.stride, parts);
        __syncthreads();
      }
      row = tile * kRows + row_of_tile;
      unit = begin + group * kUnits + unit_of_group;
      live = false;
      if (row_of_tile >= kRows || row >= p.at.batch || unit >= H) continue;
      Acc<T>& arrived = arrived_h[row * units + unit - begin];
      if (row < behind) arrived = sum_of_parts<Use, kRows>(parts, row_of_tile, unit_of_group);
      if (row >= rows) continue;
      live = true;
      const Acc<T> one{1};
      const Acc<T> i = widen(in.gates[0]), f = widen(in.gates[1]), g = widen(in.gates[2]), o = widen(in.gates[3]);
      const Acc<T> dh = p.dy != nullptr ? arrived + widen(in.dy) : arrived;
      const Acc<T> last_c = row < rows_of(of, step - 1) ? in.last_cell : widen(in.first_c);
      Acc<T>& dc = arrived_c[row * units + unit - begin];
      const Acc<T> t = tanh(in.cell), d = dc + in.dcell + dh * o * (one - t * t);
      dgates.at[0] = narrow<T>(d * g * (i * (one - i)));
      dgates.at[1] = narrow<T>(d * last_c * (f * (one - f)));
      dgates.at[2] = narrow<T>(d * i * (one - g * g));
      dgates.at[3] = narrow<T>(dh * t * (o * (one - o)));
      dc = d * f;
      store(to + row * depth + 4 * unit, 0, dgates);
    }
    if (step < 0) break;
    barrier.arrive();
    if (live) store_dgates(step, row, unit, dgates);
    load_inputs(step - 1, 0, 0, in);
    barrier.wait();
  }
  __syncthreads();
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < p.at.batch * units; i += blockDim.x) {
    const int64_t row = i / units, unit = begin + i % units;
    if (unit >= H) continue;
    static_cast<T*>(p.dh0)[row * H + unit] = narrow<T>(arrived_h[i]);
    static_cast<T*>(p.dc0)[row * H + unit] = narrow<T>(arrived_c[i]);
  }
}

template <class T, int kRows, int kUnits, bool kAlone>
struct Backward {
  static auto get() { return &lstm_recurrence_bwd_kernel<T, kRows, kUnits, kAlone>; }
};

}  // namespace

const char* lstm_recurrence_bwd(const LSTMResident<LSTMBwdParams>& params, const LSTMRecurrencePlan& plan,
                                void* stream) {
  return launch_cooperative(choose_resident<Backward>(params.of[0].p.dtype, plan), params, plan.launch, stream);
}

}  // namespace llmkernels::cuda
