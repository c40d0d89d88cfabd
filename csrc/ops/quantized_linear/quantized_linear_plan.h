// Which quantized_linear kernel runs and on which grid: pure functions of the params and the GPU.
#pragma once

#include <algorithm>

#include "common/cuda/plan.h"
#include "ops/quantized_linear/quantized_linear.h"

namespace llmkernels::cuda {

// Of x with weights alone quantized, and of fp32 x, which tensor cores would round; op.py refuses more. With more rows,
// those who read a weight again for each tile of x are no longer limited by its bytes.
constexpr int64_t kQuantizedMostRows = 64, kQuantizedMostFloatRows = 8;
constexpr int64_t kQuantizedMostSize = int64_t{1} << 30;  // rows and columns are 32-bit numbers in the kernels
constexpr int64_t kQuantizedMostColumns = INT32_MAX / (127 * 127);  // of int8 with int8: their sum has 32 bits

inline bool four_bits(WeightFormat format) { return format == WeightFormat::kInt4 || format == WeightFormat::kNf4; }

// Bytes of a packed row.
inline int64_t packed_bytes(const QuantizedWeight& w) { return four_bits(w.format) ? ceil_div(w.K, 2) : w.K; }

// Column k has scale k >> group_shift of its row.
inline int group_shift(const QuantizedWeight& w) {
  return w.group_size == 32 ? 5 : w.group_size == 64 ? 6 : w.group_size == 128 ? 7 : 31;
}

// Bytes that can be loaded at once wherever rows of `row_bytes` bytes begin at `pointer`.
inline int load_unit(const void* pointer, int64_t row_bytes, int64_t rows) {
  for (const int unit : {16, 4}) {
    if (aligned(pointer, unit) && (rows <= 1 || row_bytes % unit == 0)) return unit;
  }
  return 1;
}

constexpr int kLevelBytes = 64;  // of nf4, behind the tiles in shared memory

// How sums over K are cut among blocks. With more than one part each writes its own sums to a workspace
// [splits, M, N] of 4 bytes each, which another kernel adds in their order.
struct QuantizedSplits {
  int splits = 1;
  int64_t bytes(int64_t M, int64_t N) const { return splits > 1 ? splits * M * N * 4 : 0; }
};

// As many parts as fill the GPU, of `least` steps or more.
inline QuantizedSplits plan_splits(int64_t blocks, int64_t steps, int64_t least, int blocks_of_sm, const Gpu& gpu) {
  const int64_t resident = int64_t{gpu.multiprocessors} * blocks_of_sm;
  const int64_t wanted = std::min(resident / std::max<int64_t>(blocks, 1), steps / least);
  return {static_cast<int>(std::clamp<int64_t>(wanted, 1, 64))};
}

// ---- up to 8 rows of fp32 x: a warp adds the products of a few rows of the weight ----

constexpr int kMatvecThreads = 256;
constexpr int kMatvecBlocksOfSm = 4;  // by registers

// Columns of x that lie in shared memory at once: 16 KB for one row, 32 KB for more.
constexpr int matvec_columns(int tokens) { return tokens == 1 ? 4096 : tokens <= 4 ? 2048 : 1024; }
// Rows of the weight of a warp: as many 16-byte loads are in flight in each lane.
constexpr int matvec_rows(int tokens) { return tokens == 1 ? 4 : 2; }

// ---- up to 64 rows of 16-bit x: a warp multiplies 16 rows of the weight by all of x on tensor cores ----

constexpr int kTokensThreads = 256;
constexpr int kTokensColumns = 128;  // of a stage: whole groups, and 64 bytes of four-bit weights
constexpr int kTokensBlocksOfSm = 2;
constexpr int64_t kTokensLeastStages = 4;  // of a part: fewer are not worth writing and reading the sums

constexpr int kTokensRows = kTokensThreads / 32 * 16;  // of the weight, in a block
constexpr int tokens_stage_bytes(bool four_bits, int tokens) {
  return kTokensRows * kTokensColumns / (four_bits ? 2 : 1) + tokens * kTokensColumns * 2;
}
// As many as fit into 96 of the 99 KB of sm_86 and sm_89.
constexpr int tokens_stages(bool four_bits, int tokens) {
  const int most = (98304 - kLevelBytes) / tokens_stage_bytes(four_bits, tokens);
  return most < 4 ? most : 4;
}

// ---- activations rounded to int8: their rows, then a product of integers ----

constexpr int kRoundThreads = 256;  // of a row
constexpr int kInt8Threads = 256;
constexpr int kInt8Columns = 64;  // bytes of a row in a stage
constexpr int kInt8Stages = 4;
constexpr int kInt8Rows = 128;  // of the weight, in a tile
constexpr int kInt8BlocksOfSm = 2;
constexpr int64_t kInt8LeastStages = 8;
constexpr int int8_shared(int tokens, bool four_bits) {
  return kInt8Stages * (tokens + kInt8Rows / (four_bits ? 2 : 1)) * kInt8Columns;
}
// Rows of rounded activations are whole blocks of 32 columns. For int4 weights the even columns of a block come before
// the odd ones: a word of the weight has both, and each half of its bytes is a register of one product.
constexpr int kRoundedBlock = 32;
inline int64_t rounded_pitch(int64_t K) { return ceil_div(K, kRoundedBlock) * kRoundedBlock; }

enum class QuantizedWay : int { kMatvec, kTokens, kInt8 };

struct QuantizedLinearPlan {
  QuantizedWay way;
  int tokens;       // rows of x of a block, at most
  bool wide;        // rows of x and of the weight are whole vectors of 16 bytes
  int weight_unit;  // bytes that can be loaded at once
  int x_unit;
  QuantizedSplits parts;
  Launch launch;
};

inline QuantizedLinearPlan plan_quantized_linear_fwd(const QuantizedLinearFwdParams& p, const Gpu& gpu) {
  QuantizedLinearPlan plan{};
  const QuantizedWeight& w = p.weight;
  const int64_t bytes = element_bytes(p.dtype);
  plan.weight_unit = load_unit(w.data, packed_bytes(w), w.N);
  plan.x_unit = load_unit(p.x, p.x_row_stride * bytes, p.M);
  plan.wide = plan.weight_unit == 16 && plan.x_unit == 16 && packed_bytes(w) % 16 == 0 && w.K * bytes % 16 == 0;
  int64_t blocks = 0;
  if (p.activations == Activations::kInt8) {
    plan.way = QuantizedWay::kInt8;
    // Sums of the groups of int4 are floats beside those of integers: 128 rows of them are too many registers.
    const bool halves = w.format == WeightFormat::kInt4;
    plan.tokens = p.M <= 16 ? 16 : p.M <= 64 || halves ? 64 : 128;
    blocks = ceil_div(w.N, kInt8Rows) * ceil_div(p.M, plan.tokens);
    plan.parts = plan_splits(blocks, ceil_div(w.K, kInt8Columns), kInt8LeastStages, kInt8BlocksOfSm, gpu);
    plan.launch.block[0] = kInt8Threads;
    plan.launch.shared = static_cast<unsigned>(int8_shared(plan.tokens, halves));
  } else if (p.dtype == DType::kFloat32) {
    plan.way = QuantizedWay::kMatvec;
    plan.tokens = p.M == 1 ? 1 : p.M <= 4 ? 4 : 8;
    blocks = ceil_div(w.N, kMatvecThreads / 32 * matvec_rows(plan.tokens));
    plan.parts = plan_splits(blocks, ceil_div(w.K, matvec_columns(plan.tokens)), 1, kMatvecBlocksOfSm, gpu);
    plan.launch.block[0] = kMatvecThreads;
  } else {
    plan.way = QuantizedWay::kTokens;
    plan.tokens = p.M <= 8 ? 8 : p.M <= 16 && plan.wide ? 16 : p.M <= 32 && plan.wide ? 32 : 64;
    blocks = ceil_div(w.N, kTokensRows);
    plan.parts = plan_splits(blocks, ceil_div(w.K, kTokensColumns), kTokensLeastStages, kTokensBlocksOfSm, gpu);
    plan.launch.block[0] = kTokensThreads;
    const bool halves = four_bits(w.format);
    const int stages = tokens_stages(halves, plan.tokens) * tokens_stage_bytes(halves, plan.tokens);
    plan.launch.shared = static_cast<unsigned>(stages + kLevelBytes);
  }
  plan.launch.grid[0] = static_cast<unsigned>(blocks);
  plan.launch.grid[1] = static_cast<unsigned>(plan.parts.splits);
  return plan;
}

// One block to a row.
inline Launch plan_round_rows(int64_t M) {
  Launch launch{};
  launch.grid[0] = static_cast<unsigned>(M);
  launch.block[0] = kRoundThreads;
  return launch;
}

constexpr int kSplitsThreads = 256;

inline Launch plan_splits_sum(int64_t M, int64_t N) {
  Launch launch{};
  launch.grid[0] = static_cast<unsigned>(ceil_div(M * N, kSplitsThreads));
  launch.block[0] = kSplitsThreads;
  return launch;
}

// ---- backward: tiles of the weight are written out in shared memory and multiplied ----

constexpr int kDxThreads = 128;
constexpr int kDxColumns = 128;  // of dx, in a block
constexpr int kDxRows = 32;      // of the weight, in a step
// The tiles of two steps, and the levels of nf4.
constexpr int dx_shared(int64_t bytes, int tokens) {
  return 2 * kDxRows * (kDxColumns + tokens) * static_cast<int>(bytes) + kLevelBytes;
}

struct QuantizedLinearBwdPlan {
  int tokens;  // rows of dy of a block
  int column_blocks;
  int weight_unit, dy_unit;
  Launch launch;
};

inline QuantizedLinearBwdPlan plan_quantized_linear_bwd(const QuantizedLinearBwdParams& p) {
  QuantizedLinearBwdPlan plan{};
  plan.tokens = p.M <= 16 ? 16 : 64;
  plan.column_blocks = static_cast<int>(ceil_div(p.weight.K, kDxColumns));
  plan.weight_unit = load_unit(p.weight.data, packed_bytes(p.weight), p.weight.N);
  plan.dy_unit = load_unit(p.dy, p.dy_row_stride * element_bytes(p.dtype), p.M);
  plan.launch.grid[0] = static_cast<unsigned>(plan.column_blocks * ceil_div(p.M, plan.tokens));
  plan.launch.block[0] = kDxThreads;
  plan.launch.shared = static_cast<unsigned>(dx_shared(element_bytes(p.dtype), plan.tokens));
  return plan;
}

}  // namespace llmkernels::cuda
