// One direction of a recurrence, whatever its cell: the products of a step over blocks of columns, what they read and
// how its memory is laid out. As vec.h: for sources that are compiled once per instruction set.
#pragma once

#include "ops/lstm/lstm_product.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

// --- operands ---

// `value` of kLanes units, rounded to T: to `to`, and to the operand row `row`. Returns what an operand holds.
template <class T, class Part>
inline void store_both(T* to, Operand<T>* row, Vec<AccOf<T>> value, Part part) {
  if constexpr (std::is_same_v<Operand<T>, T>) {
    part.store(row, value);
    if (to != nullptr) part.copy(to, row);
  } else {
    if (to != nullptr) part.store(to, value);
    T rounded[kLanes<AccOf<T>>];
    store(rounded, value);
    part.store(row, load(rounded));
  }
}

// Calls f(part) for the units of a vector that begins at `unit`: Whole, Tail, or not at all.
template <class Acc, class F>
inline void with_units(int64_t unit, int64_t units, F&& f) {
  if (unit + kLanes<Acc> <= units) {
    f(Whole{});
  } else if (unit < units) {
    f(Tail{static_cast<int>(units - unit)});
  }
}

template <class T>
inline void operands_from(Operand<T>* to, int64_t stride, const T* from, int64_t rows, int64_t cols) {
  using Acc = AccOf<T>;
  for (int64_t r = 0; r < rows; ++r) {
    Operand<T>* row = to + r * stride;
    for (int64_t j = 0; j < stride; ++j) row[j] = Operand<T>{};
    for_each_vector<Acc>(0, cols, [&](int64_t j, auto part) {
      store_both<T>(static_cast<T*>(nullptr), row + j, from != nullptr ? part.load(from + r * cols + j) : Vec<Acc>{}, part);
    });
  }
}

template <class T, class Acc = AccOf<T>>
inline void sums_from(Acc* to, const T* from, int64_t count) {
  for_each_vector<Acc>(0, count, [&](int64_t j, auto part) {
    part.store(to + j, from != nullptr ? part.load(from + j) : Vec<Acc>{});
  });
}

template <class T, class Acc = AccOf<T>>
inline void sums_to(T* to, const Acc* from, int64_t count) {
  for_each_vector<Acc>(0, count, [&](int64_t j, auto part) { part.store(to + j, part.load(from + j)); });
}

// --- products of a step ---

// Blocks [begin, end) of the product with rows of weights [.., common], kVectors vectors of them to a block: row_of(block,
// v, lane) is the one for a lane of vector v, null for none. make(block) gives what becomes of the sums of a row, as
// multiply_rows calls it. Packed, panel(block) has the weights.
template <class T, int kVectors, class Panel, class RowOf, class Make>
inline void multiply_blocks(bool packed, const Operand<T>* a, int64_t stride, int64_t rows, const T* weights,
                            int64_t common, int64_t begin, int64_t end, Panel&& panel, RowOf&& row_of, Make&& make) {
  if (packed) {
    for (int64_t block = begin; block < end; ++block) {
      multiply_rows<T, kVectors>(a, stride, rows, panel(block), panel(block + 1 < end ? block + 1 : begin),
                                 depth_of<T>(common), make(block));
    }
    return;
  }
  // As many blocks at a time as make the weights of each gate a long run of memory.
  constexpr int kBlocks = 16;
  for (int64_t first = begin; first < end; first += kBlocks) {
    const int64_t blocks = end - first < kBlocks ? end - first : kBlocks;
    for (int64_t b = 0; b < rows; ++b) {
      Vec<AccOf<T>> sums[kBlocks][kVectors];
      for (int v = 0; v < kVectors; ++v) {
        for (int64_t i = 0; i < blocks; ++i) {
          sums[i][v] = dot_rows<T>(a + b * stride, common, [&](int lane) {
            const T* row = row_of(first + i, v, lane);
            return row != nullptr ? row : weights;  // its sum is not used
          });
        }
      }
      for (int64_t i = 0; i < blocks; ++i) make(first + i)(b, sums[i]);
    }
  }
}

// The same with columns of weights [common, cols]: make(first column).
template <class T, class Panel, class Make>
inline void multiply_column_blocks(bool packed, const Operand<T>* a, int64_t stride, int64_t rows, const T* weights,
                                   int64_t common, int64_t cols, int64_t begin, int64_t end, Panel&& panel,
                                   Make&& make) {
  if (packed) {
    for (int64_t block = begin; block < end; ++block) {
      multiply_rows<T, kBlockVectors>(a, stride, rows, panel(block), panel(block + 1 < end ? block + 1 : begin),
                                      depth_of<T>(common), make(block * kBlockColumns<T>));
    }
    return;
  }
  constexpr int kBlocks = 16;  // at a time, for long runs of memory; their sums are 4096 bytes
  for (int64_t block = begin; block < end; block += kBlocks) {
    const int64_t blocks = end - block < kBlocks ? end - block : kBlocks;
    for (int64_t b = 0; b < rows; ++b) {
      Vec<AccOf<T>> sums[kBlocks][kBlockVectors];
      dot_columns<T>(a + b * stride, weights, common, cols, block * kBlockColumns<T>, blocks * kBlockVectors, sums[0]);
      for (int64_t i = 0; i < blocks; ++i) make((block + i) * kBlockColumns<T>)(b, sums[i]);
    }
  }
}

// --- the last states ---

// h_n [batch, size] of y [N, size]: from the last step back, a sequence is first seen at its own last one. That of a
// sequence without steps is of h0.
template <class T>
inline void last_rows(const LSTMSteps& at, const T* y, const T* h0, T* h_n) {
  int64_t seen = 0;
  for (int64_t step = at.steps - 1; step >= 0 && seen < at.batch; --step) {
    for (; seen < at.count[step]; ++seen) {
      __builtin_memcpy(h_n + seen * at.size, y + (at.first[step] + seen) * at.size, at.size * sizeof(T));
    }
  }
  __builtin_memcpy(h_n + seen * at.size, h0 + seen * at.size, (at.batch - seen) * at.size * sizeof(T));
}

// --- memory ---

// Reading weights where they are pays while packing them would cost more than reading them again for every row.
inline bool pays_to_pack(const LSTMSteps& at) {
  if (at.batch <= 1) return false;
  int64_t rows = 0;
  for (int64_t step = 0; step < at.steps; ++step) rows += at.count[step];
  return rows > 8;
}

// kGates: of a unit; as lstm_layout.
template <class T, int kGates>
LSTMLayout layout_of(const LSTMSteps& at, bool projection, bool forward) {
  using Acc = AccOf<T>;
  const auto pieces = [](int64_t whole, int64_t part) { return (whole + part - 1) / part; };
  LSTMLayout l{};
  l.packed = pays_to_pack(at);
  const int64_t row = sizeof(Operand<T>) * at.batch;
  if (forward) {
    l.hh_blocks = pieces(at.hidden, kLanes<Acc>);
    l.hr_blocks = projection ? pieces(at.size, kBlockColumns<T>) : 0;
    l.hh_panel_bytes = panel_bytes<T, kGates>(at.size);
    l.hr_panel_bytes = panel_bytes<T>(at.hidden);
    l.operand_bytes = row * operand_stride<T>(at.size);
    l.inner_operand_bytes = projection ? row * operand_stride<T>(at.hidden) : 0;
  } else {
    l.hh_blocks = pieces(at.size, kBlockColumns<T>);
    l.hr_blocks = projection ? pieces(at.hidden, kBlockColumns<T>) : 0;
    l.hh_panel_bytes = panel_bytes<T>(kGates * at.hidden);
    l.hr_panel_bytes = panel_bytes<T>(at.size);
    l.operand_bytes = row * operand_stride<T>(kGates * at.hidden);
    l.inner_operand_bytes = projection ? row * operand_stride<T>(at.size) : 0;
  }
  return l;
}

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
