// Products of a few rows with weights, for the sequence kernels. As vec.h: for sources that are compiled once per
// instruction set.
//
// A product's columns are cut into blocks of up to kBlockVectors vectors. The left operand's rows and the panels hold
// Operand<T>: T's sums' type, or bf16 itself where an instruction multiplies pairs of it.
#pragma once

#include "ops/lstm/lstm_cpu.h"
#include "ops/lstm/lstm_step.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

#if defined(CPU_CAPABILITY_AVX512_BF16)
template <class T>
constexpr bool kPairs = std::is_same_v<T, BFloat16>;
#else
template <class T>
constexpr bool kPairs = false;
#endif

template <class T>
using Operand = std::conditional_t<kPairs<T>, BFloat16, AccOf<T>>;
template <class T>
constexpr int kDeep = kPairs<T> ? 2 : 1;  // how much of the common dimension one multiplication takes

constexpr int kBlockVectors = 4;  // at most: the gates of a vector of units, or four vectors of columns
template <class T>
constexpr int64_t kBlockColumns = kBlockVectors * kLanes<AccOf<T>>;
// Rows of a register tile: with AVX-512 24 of the 32 registers are sums, otherwise 8 of 16.
constexpr int kTileRows = kVectorBytes == 64 ? 6 : 2;

template <class T>
inline int64_t depth_of(int64_t common) {
  return (common + kDeep<T> - 1) / kDeep<T>;
}

// Elements from one row of an operand to the next: whole vectors, and one more, so that the rows of a tile are not a
// multiple of 4096 bytes apart, which would put them into the same lines of the cache.
template <class T>
inline int64_t operand_stride(int64_t cols) {
  constexpr int64_t kLine = 64 / sizeof(Operand<T>);
  return (cols + kLine - 1) / kLine * kLine + kLine;
}

template <class T, int kVectors = kBlockVectors>
inline int64_t panel_bytes(int64_t common) {
  return depth_of<T>(common) * kVectors * kVectorBytes;
}

// --- sum += a * w ---

template <class T>
inline Vec<AccOf<T>> load_weights(const Operand<T>* from) {
  Vec<AccOf<T>> bits;  // with pairs: bits of as many bytes
  __builtin_memcpy(&bits, from, sizeof(bits));
  return bits;
}

template <class T>
inline Vec<AccOf<T>> splat_operand(const Operand<T>* from) {
  if constexpr (kPairs<T>) {
    float pair;
    __builtin_memcpy(&pair, from, sizeof(pair));
    return splat(pair);
  } else {
    return splat(*from);
  }
}

template <class T>
inline void multiply_add(Vec<AccOf<T>>& sum, Vec<AccOf<T>> a, Vec<AccOf<T>> w) {
#if defined(CPU_CAPABILITY_AVX512_BF16)
  if constexpr (kPairs<T>) {
    sum = bit_cast<FloatVector>(
        _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(w)));
    return;
  }
#endif
  sum += a * w;
}

// Into which cache: rows of a step are often a multiple of 4096 bytes apart, so that the first cache has room for a few
// of them only.
struct Near {
  static constexpr int kLocality = 3;
};
struct Far {
  static constexpr int kLocality = 2;
};
constexpr int kRowsAhead = 4;  // that are near while a row is finished

// The lines of `count` elements at `from`, soon to be read or written.
template <class Where, class T>
inline void fetch(const T* from, int64_t count) {
  for (int64_t byte = 0; byte < count * static_cast<int64_t>(sizeof(T)); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + byte, 0, Where::kLocality);
  }
}

// The sums of kRows rows with one panel, added to `totals` if `add`. Few rows get several sums each, by turns: otherwise
// each addition waits for the last one. `ahead` is fetched into the cache on the way, a line at a time.
template <class T, int kVectors, int kRows>
inline void multiply_tile(const Operand<T>* a, int64_t stride, const Operand<T>* panel, int64_t depth,
                          const char* ahead, bool add, Vec<AccOf<T>> (*totals)[kVectors]) {
  using Acc = AccOf<T>;
  constexpr int kTurns = kRows >= 3 || kVectorBytes != 64 ? 1 : kRows == 2 ? 2 : 4;
  constexpr int64_t kStep = kVectors * kLanes<Acc> * kDeep<T>;
  Vec<Acc> sums[kTurns][kRows][kVectors] = {};
  int64_t k = 0;
  for (; k + kTurns <= depth; k += kTurns) {
    __builtin_prefetch(ahead + k * 64, 0, 2);
#pragma GCC unroll 4
    for (int turn = 0; turn < kTurns; ++turn) {
      Vec<Acc> w[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        w[v] = load_weights<T>(panel + (k + turn) * kStep + v * kLanes<Acc> * kDeep<T>);
      }
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const Vec<Acc> x = splat_operand<T>(a + r * stride + (k + turn) * kDeep<T>);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) multiply_add<T>(sums[turn][r][v], x, w[v]);
      }
    }
  }
  for (; k < depth; ++k) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Vec<Acc> x = splat_operand<T>(a + r * stride + k * kDeep<T>);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        multiply_add<T>(sums[0][r][v], x, load_weights<T>(panel + k * kStep + v * kLanes<Acc> * kDeep<T>));
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vec<Acc> total = sums[0][r][v];
#pragma GCC unroll 4
      for (int turn = 1; turn < kTurns; ++turn) total += sums[turn][r][v];
      totals[r][v] = add ? totals[r][v] + total : total;
    }
  }
}

template <class T, int kVectors>
inline void multiply_tile(int64_t rows, const Operand<T>* a, int64_t stride, const Operand<T>* panel, int64_t depth,
                          const char* ahead, bool add, Vec<AccOf<T>> (*totals)[kVectors]) {
  if (rows == 1) multiply_tile<T, kVectors, 1>(a, stride, panel, depth, ahead, add, totals);
  if (rows == 2) multiply_tile<T, kVectors, 2>(a, stride, panel, depth, ahead, add, totals);
  if constexpr (kTileRows > 2) {
    if (rows == 3) multiply_tile<T, kVectors, 3>(a, stride, panel, depth, ahead, add, totals);
    if (rows == 4) multiply_tile<T, kVectors, 4>(a, stride, panel, depth, ahead, add, totals);
    if (rows == 5) multiply_tile<T, kVectors, 5>(a, stride, panel, depth, ahead, add, totals);
    if (rows == 6) multiply_tile<T, kVectors, 6>(a, stride, panel, depth, ahead, add, totals);
  }
}

constexpr int kHeldTiles = 12;
// Of a panel: up to 64 KiB, with rows and the next piece beside it in the second cache. A sum of such sums is also
// closer to the truth than one sum of all.
constexpr int64_t kPieceDepth = 256;

// Calls f(row, sums), and before f.fetch(row, Far{}) and f.fetch(row, Near{}), for the products of rows [0, rows) with a panel, in tiles as
// equal as can be. `next` is the panel of the product that follows: the weights of all panels are more than the nearer
// caches hold, and so is what a step reads and writes.
//
// The sums of several tiles wait in memory. So a long panel is taken in pieces, each for all of them; and rows are
// finished one after the other: each is a long chain of operations, of which the processor takes up several at once.
template <class T, int kVectors, class F>
inline void multiply_rows(const Operand<T>* a, int64_t stride, int64_t rows, const Operand<T>* panel,
                          const Operand<T>* next, int64_t depth, F&& f) {
  constexpr int64_t kStep = kVectors * kLanes<AccOf<T>> * kDeep<T>;
  Vec<AccOf<T>> sums[kHeldTiles * kTileRows][kVectors];
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t first_tile = 0; first_tile < tiles; first_tile += kHeldTiles) {
    const int64_t last_tile = tiles - first_tile < kHeldTiles ? tiles : first_tile + kHeldTiles;
    const int64_t first = rows * first_tile / tiles, last = rows * last_tile / tiles;
    for (int64_t k = 0; k < depth; k += kPieceDepth) {
      const int64_t count = depth - k < kPieceDepth ? depth - k : kPieceDepth;
      const Operand<T>* piece = panel + k * kStep;
      const char* following = reinterpret_cast<const char*>(k + count < depth ? piece + count * kStep : next);
      for (int64_t tile = first_tile; tile < last_tile; ++tile) {
        const int64_t begin = rows * tile / tiles, end = rows * (tile + 1) / tiles, at = tile - first_tile;
        // What follows once, a line of each vector's weights a tile; then lines that are here already.
        const char* ahead = at < kVectors ? following + at * count * 64 : reinterpret_cast<const char*>(piece);
        if (k + count == depth) {
          for (int64_t row = begin; row < end; ++row) f.fetch(row, Far{});
        }
        multiply_tile<T, kVectors>(end - begin, a + begin * stride + k * kDeep<T>, stride, piece, count, ahead, k > 0,
                         sums + (begin - first));
      }
    }
    for (int64_t row = first; row < last; ++row) {
      if (row + kRowsAhead < last) f.fetch(row + kRowsAhead, Near{});
      f(row, sums[row - first]);
    }
  }
}

// --- panels ---

// The first `count` <= kLanes<AccOf<T>> operands of `kDeep` elements each at `from`, of which `left` elements exist.
template <class T>
inline Vec<AccOf<T>> load_operands(const T* from, int64_t left) {
  constexpr int kWhole = kLanes<AccOf<T>>;
  if constexpr (kPairs<T>) {
    FloatVector bits{};
    const int64_t bytes = left * 2 < kVectorBytes ? left * 2 : kVectorBytes;
    if (bytes == kVectorBytes) {
      __builtin_memcpy(&bits, from, kVectorBytes);
    } else if (bytes > 0) {
      __builtin_memcpy(&bits, from, bytes);
    }
    return bits;
  } else {
    return left >= kWhole ? load(from) : left > 0 ? load_tail(from, static_cast<int>(left)) : Vec<AccOf<T>>{};
  }
}

// out[j][i] = in[i][j]: log2 rounds that put the elements of the two halves beside each other.
template <class Acc>
inline void transpose(Vec<Acc> (&rows)[kLanes<Acc>]) {
  constexpr int kWidth = kLanes<Acc>;
  using Index = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;
  typedef Index Indices __attribute__((vector_size(kVectorBytes)));
  Indices low, high;
  for (int i = 0; i < kWidth; ++i) {
    low[i] = i / 2 + i % 2 * kWidth;
    high[i] = kWidth / 2 + i / 2 + i % 2 * kWidth;
  }
  for (int round = 1; round < kWidth; round *= 2) {
    Vec<Acc> next[kWidth];
    for (int i = 0; i < kWidth / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + kWidth / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kWidth / 2], high);
    }
    for (int i = 0; i < kWidth; ++i) rows[i] = next[i];
  }
}

// A panel of rows of weights [.., common]: row_of(v, lane) is the one for a lane of vector v, null for none.
template <class T, int kVectors, class F>
inline void pack_rows(Operand<T>* panel, int64_t common, F&& row_of) {
  using Acc = AccOf<T>;
  const int64_t depth = depth_of<T>(common);
  for (int v = 0; v < kVectors; ++v) {
    for (int64_t k = 0; k < depth; k += kLanes<Acc>) {
      Vec<Acc> tile[kLanes<Acc>];
      for (int lane = 0; lane < kLanes<Acc>; ++lane) {
        const T* row = row_of(v, lane);
        tile[lane] = row != nullptr ? load_operands<T>(row + k * kDeep<T>, common - k * kDeep<T>) : Vec<Acc>{};
      }
      transpose<Acc>(tile);
      for (int i = 0; i < kLanes<Acc> && k + i < depth; ++i) {
        __builtin_memcpy(panel + ((k + i) * kVectors + v) * kLanes<Acc> * kDeep<T>, &tile[i], kVectorBytes);
      }
    }
  }
}

// kLanes columns of `weights` [common, cols] from `column` on, those beyond the last one zero.
template <class T>
inline Vec<AccOf<T>> load_columns(const T* row, int64_t cols, int64_t column) {
  using Acc = AccOf<T>;
  const int64_t left = cols - column;
  if (left >= kLanes<Acc>) return load(row + column);
  return left > 0 ? load_tail(row + column, static_cast<int>(left)) : Vec<Acc>{};
}

// A panel of the columns of weights [common, cols] from `first` on.
template <class T>
inline void pack_columns(Operand<T>* panel, const T* weights, int64_t common, int64_t cols, int64_t first) {
  using Acc = AccOf<T>;
  for (int64_t k = 0; k < depth_of<T>(common); ++k) {
    for (int v = 0; v < kBlockVectors; ++v) {
      const int64_t column = first + v * kLanes<Acc>;
      const T* row = weights + k * kDeep<T> * cols;
      Vec<Acc> w = load_columns<T>(row, cols, column);
      if constexpr (kPairs<T>) {
        // Widened bf16 has its bits in the upper half.
        const Vec<Acc> upper = 2 * k + 1 < common ? load_columns<T>(row + cols, cols, column) : Vec<Acc>{};
        w = bit_cast<FloatVector>(bit_cast<UInt32Vector>(w) >> 16 | bit_cast<UInt32Vector>(upper));
      }
      __builtin_memcpy(panel + (k * kBlockVectors + v) * kLanes<Acc> * kDeep<T>, &w, kVectorBytes);
    }
  }
}

// --- the same products with weights where they are, for a row at a time ---

// Sums within vectors: lane i of the result is that of in[i].
template <class Acc>
inline Vec<Acc> sum_each(Vec<Acc> (&in)[kLanes<Acc>]) {
  constexpr int kWidth = kLanes<Acc>;
  using Index = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;
  typedef Index Indices __attribute__((vector_size(kVectorBytes)));
  Indices even, odd;
  for (int i = 0; i < kWidth; ++i) {
    even[i] = 2 * i;
    odd[i] = 2 * i + 1;
  }
#pragma GCC unroll 4
  for (int left = kWidth; left > 1; left /= 2) {
    for (int i = 0; i < left / 2; ++i) {
      in[i] = __builtin_shuffle(in[2 * i], in[2 * i + 1], even) + __builtin_shuffle(in[2 * i], in[2 * i + 1], odd);
    }
  }
  return in[0];
}

// Products of one operand row with rows of weights [.., common], four at a time; row_of as in pack_rows.
template <class T, class F>
inline Vec<AccOf<T>> dot_rows(const Operand<T>* a, int64_t common, F&& row_of) {
  using Acc = AccOf<T>;
  constexpr int kRows = kLanes<Acc> < 4 ? kLanes<Acc> : 4;
  constexpr int64_t kStep = kLanes<Acc> * kDeep<T>;
  Vec<Acc> sums[kLanes<Acc>];
  for (int lane = 0; lane < kLanes<Acc>; lane += kRows) {
    const T* rows[kRows];
    Vec<Acc> part[2][kRows] = {};
    for (int r = 0; r < kRows; ++r) rows[r] = row_of(lane + r);
    int64_t k = 0;
    for (; k + 2 * kStep <= common; k += 2 * kStep) {
#pragma GCC unroll 2
      for (int turn = 0; turn < 2; ++turn) {
        const Vec<Acc> x = load_weights<T>(a + k + turn * kStep);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          multiply_add<T>(part[turn][r], x, load_operands<T>(rows[r] + k + turn * kStep, kStep));
        }
      }
    }
    for (; k < common; k += kStep) {
      const Vec<Acc> x = load_weights<T>(a + k);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) multiply_add<T>(part[0][r], x, load_operands<T>(rows[r] + k, common - k));
    }
    for (int r = 0; r < kRows; ++r) sums[lane + r] = part[0][r] + part[1][r];
  }
  return sum_each<Acc>(sums);
}

// One element of an operand row.
template <class T>
inline AccOf<T> operand_at(const Operand<T>* a, int64_t k) {
  if constexpr (kPairs<T>) {
    const uint32_t bits = static_cast<uint32_t>(a[k].bits) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
  } else {
    return a[k];
  }
}

// sums[v] += products of kRows elements of an operand row with as many rows of weights, `vectors` whole vectors of
// columns from `column` on and, if `tail`, what is left of a row behind them.
template <class T, int kRows>
inline void add_rows(const Operand<T>* a, const T* weights, int64_t cols, int64_t k, int64_t column, int64_t vectors,
                     bool tail, Vec<AccOf<T>>* sums) {
  using Acc = AccOf<T>;
  Vec<Acc> x[kRows];
  const T* row[kRows];
  for (int r = 0; r < kRows; ++r) {
    x[r] = splat(operand_at<T>(a, k + r));
    row[r] = weights + (k + r) * cols;
  }
  for (int64_t v = 0; v < vectors; ++v) {
    Vec<Acc> sum = sums[v];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum += x[r] * load(row[r] + column + v * kLanes<Acc>);
    sums[v] = sum;
  }
  if (!tail) return;
  for (int r = 0; r < kRows; ++r) sums[vectors] += x[r] * load_columns<T>(row[r], cols, column + vectors * kLanes<Acc>);
}

// Products of one operand row with the columns [first, first + kLanes * count) of weights [common, cols], read in long
// runs of eight rows side by side.
template <class T>
inline void dot_columns(const Operand<T>* a, const T* weights, int64_t common, int64_t cols, int64_t first,
                        int64_t count, Vec<AccOf<T>>* sums) {
  using Acc = AccOf<T>;
  for (int64_t v = 0; v < count; ++v) sums[v] = Vec<Acc>{};
  const int64_t whole = (cols - first) / kLanes<Acc>;
  const int64_t vectors = whole < count ? whole : count;
  const bool tail = vectors < count && first + vectors * kLanes<Acc> < cols;
  int64_t k = 0;
  for (; k + 8 <= common; k += 8) add_rows<T, 8>(a, weights, cols, k, first, vectors, tail, sums);
  for (; k < common; ++k) add_rows<T, 1>(a, weights, cols, k, first, vectors, tail, sums);
}

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
