// On which grid an lstm_cell kernel, or one step of a recurrence, runs: a pure function of the params and the GPU.
#pragma once

#include <algorithm>

#include "common/cuda/plan.h"
#include "ops/lstm/lstm.h"

namespace llmkernels::cuda {

constexpr int kLSTMThreads = 256;
constexpr int kLSTMThreadsPerSm = 2048;  // every thread waits for memory: as many as fit

// Units of a vector: nine vectors of a thread are in registers, so no more than four units also where 16 bytes are eight.
constexpr int64_t lstm_units(int64_t bytes) { return std::min<int64_t>(16 / bytes, 4); }

struct LSTMCellPlan {
  bool wide;  // vectors of lstm_units; otherwise single units
  Launch launch;
};

// A vector to a thread, counted row after row. Blocks stay and step over the rest.
inline LSTMCellPlan plan_lstm_cell(int64_t batch, int64_t hidden, int64_t bytes, bool aligned_all, const Gpu& gpu) {
  LSTMCellPlan plan{};
  const int64_t units = lstm_units(bytes);
  plan.wide = aligned_all && hidden % units == 0;
  const int64_t vectors = batch * (plan.wide ? hidden / units : hidden);
  const int64_t resident = int64_t{gpu.multiprocessors} * (kLSTMThreadsPerSm / kLSTMThreads);
  plan.launch.block[0] = kLSTMThreads;
  plan.launch.grid[0] = static_cast<unsigned>(std::clamp<int64_t>(ceil_div(vectors, kLSTMThreads), 1, resident));
  return plan;
}

template <class... Pointers>
bool all_aligned(int64_t bytes, Pointers... pointers) {
  return (aligned(pointers, bytes) && ...);
}

inline LSTMCellPlan plan_lstm_cell_fwd(const LSTMCellFwdParams& p, const Gpu& gpu) {
  const int64_t bytes = element_bytes(p.dtype), vector = bytes * lstm_units(bytes);
  const bool wide = all_aligned(vector, p.gates_x, p.gates_h, p.c, p.next_h, p.next_c, p.gates);
  return plan_lstm_cell(p.batch, p.hidden, bytes, wide, gpu);
}

inline LSTMCellPlan plan_lstm_cell_bwd(const LSTMCellBwdParams& p, const Gpu& gpu) {
  const int64_t bytes = element_bytes(p.dtype), vector = bytes * lstm_units(bytes);
  const bool wide = all_aligned(vector, p.dh, p.dc, p.gates, p.c, p.next_c, p.dgates, p.dlast_c);
  return plan_lstm_cell(p.batch, p.hidden, bytes, wide, gpu);
}

// Vectors of Acc have as many elements, and up to twice the bytes, of which 16 are one load.
inline LSTMCellPlan plan_lstm_step_fwd(const LSTMStepFwdParams& p, const Gpu& gpu) {
  const int64_t bytes = element_bytes(p.dtype), vector = bytes * lstm_units(bytes);
  const bool wide = all_aligned(vector, p.gates_x, p.gates_h, p.m, p.gates) && all_aligned(16, p.c, p.cells);
  return plan_lstm_cell(p.rows, p.hidden, bytes, wide, gpu);
}

inline LSTMCellPlan plan_lstm_step_bwd(const LSTMStepBwdParams& p, const Gpu& gpu) {
  const int64_t bytes = element_bytes(p.dtype), vector = bytes * lstm_units(bytes);
  const bool wide = all_aligned(vector, p.dm, p.dy, p.gates, p.c0, p.dgates, p.m) &&
                    all_aligned(16, p.dcells, p.dc, p.cells, p.before);
  return plan_lstm_cell(p.rows, p.hidden, bytes, wide, gpu);
}

}  // namespace llmkernels::cuda
