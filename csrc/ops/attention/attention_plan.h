// Which attention kernel runs and on which grid: pure functions of the params and the GPU.
#pragma once

#include <algorithm>

#include "common/cuda/plan.h"
#include "ops/attention/attention.h"

namespace llmkernels::cuda {

constexpr int kAttentionMostDim = 256;                    // of a head; op.py refuses more
constexpr int64_t kAttentionMostRows = int64_t{1} << 28;  // so that positions and windows are sums of 32 bits
constexpr int kAttentionOpen = 1 << 30;                   // a window entry that ends nothing

// Rows of a block's tiles: `own` stay in shared memory (queries, or the keys whose gradients are summed), `stream` come
// by in each step, 16 or fewer for each warp at a time. All that a block keeps fits into the 99 KB of sm_86 and sm_89.
struct AttentionTile {
  int own, stream;
  constexpr int threads() const { return own / 16 * 32; }
};

// By the bytes of a row. Forward: one own tile, and twice two of the stream.
constexpr AttentionTile attention_fwd_tile(int row_bytes) {
  return row_bytes <= 256 ? AttentionTile{64, 64} : row_bytes <= 512 ? AttentionTile{64, 32} : AttentionTile{32, 16};
}
// Backward: two own tiles, twice two of the stream.
constexpr AttentionTile attention_bwd_tile(int row_bytes) {
  return row_bytes <= 256 ? AttentionTile{64, 32} : row_bytes <= 512 ? AttentionTile{64, 16} : AttentionTile{32, 8};
}

// Decoding: 16 rows, and in each step `stream` keys, an equal slice for each warp.
constexpr int kCacheRows = 16;
struct AttentionCacheTile {
  int stream, warps;
};
constexpr AttentionCacheTile attention_cache_tile(int row_bytes) {
  return row_bytes <= 256   ? AttentionCacheTile{64, 4}
         : row_bytes <= 512 ? AttentionCacheTile{32, 2}
                            : AttentionCacheTile{16, 2};
}

// Columns of dk and dv that a block sums: more do not fit into the registers of a thread.
constexpr int attention_columns(int dim) { return dim < 128 ? dim : 128; }

constexpr int kAttentionSmallThreads = 128;  // of the kernels that walk over rows

// What every kernel of a call is told.
struct AttentionPlan {
  bool general;  // whether the variant with every option runs; the plain one has causal masks and windows only
  bool wide;     // rows of all inputs are whole vectors of 16 bytes
  bool wide_out; // rows of all outputs are
  int dim;       // columns of a tile: 64, 128 or 256
  int row_bytes;
};

inline AttentionPlan plan_attention(const AttentionInputs& in, bool wide_out) {
  AttentionPlan plan{};
  const int64_t bytes = element_bytes(in.dtype), most = std::max(in.D, in.Dv);
  const auto wide = [&](const void* pointer, const AttentionStrides& s, int64_t dim) {
    return aligned(pointer, 16) && (s.batch | s.head | s.row | dim) * bytes % 16 == 0;
  };
  plan.dim = most <= 64 ? 64 : most <= 128 ? 128 : 256;
  plan.row_bytes = plan.dim * static_cast<int>(bytes);
  plan.wide = wide(in.q, in.q_strides, in.D) && wide(in.k, in.k_strides, in.D) && wide(in.v, in.v_strides, in.Dv);
  plan.wide_out = wide_out;
  // The plain kernels exist for 16-bit types and the usual head dimensions; their maxima are those of unscaled scores.
  plan.general = bytes != 2 || plan.dim > 128 || !plan.wide || !wide_out || !(in.scale > 0.0f) || in.softcap > 0.0f ||
                 in.mask_kind != MaskKind::kNone || in.alibi_slopes != nullptr || in.sinks != nullptr ||
                 in.seed != nullptr || in.seqlens_k != nullptr || in.block_table != nullptr;
  return plan;
}

inline bool attention_rows_are_wide(const void* pointer, const AttentionStrides& s, int64_t dim, DType dtype) {
  return pointer == nullptr || (aligned(pointer, 16) && (s.batch | s.head | s.row | dim) * element_bytes(dtype) % 16 == 0);
}

inline AttentionPlan plan_attention_fwd(const AttentionFwdParams& p) {
  return plan_attention(p.in, attention_rows_are_wide(p.out, p.out_strides, p.in.Dv, p.in.dtype));
}

inline AttentionPlan plan_attention_bwd(const AttentionBwdParams& p) {
  const DType dtype = p.in.dtype;
  AttentionPlan plan = plan_attention(p.in, attention_rows_are_wide(p.dq, p.dq_strides, p.in.D, dtype) &&
                                                attention_rows_are_wide(p.dk, p.dk_strides, p.in.D, dtype) &&
                                                attention_rows_are_wide(p.dv, p.dv_strides, p.in.Dv, dtype));
  plan.wide &= attention_rows_are_wide(p.dout, p.dout_strides, p.in.Dv, dtype);
  plan.general |= !plan.wide;
  return plan;
}

inline Launch attention_launch(int64_t blocks, int threads, int shared) {
  Launch launch{};
  launch.grid[0] = static_cast<unsigned>(blocks);
  launch.block[0] = static_cast<unsigned>(threads);
  launch.shared = static_cast<unsigned>(shared);
  return launch;
}

// Blocks of each kernel; those of a head stand side by side, so that they find its keys in the L2 cache.
inline int64_t attention_fwd_blocks(const AttentionInputs& in, const AttentionPlan& plan) {
  return in.B * in.H * ceil_div(in.S, attention_fwd_tile(plan.row_bytes).own);
}
inline int64_t attention_dq_blocks(const AttentionInputs& in, const AttentionPlan& plan) {
  return in.B * in.H * ceil_div(in.S, attention_bwd_tile(plan.row_bytes).own);
}
inline int64_t attention_dkv_blocks(const AttentionInputs& in, const AttentionPlan& plan) {
  return in.B * in.Hk * ceil_div(in.T, attention_bwd_tile(plan.row_bytes).own) * (plan.dim / attention_columns(plan.dim));
}
inline int64_t attention_dmask_blocks(const AttentionBwdParams& p, const AttentionPlan& plan) {
  const AttentionTile tile = attention_bwd_tile(plan.row_bytes);
  const int64_t *sizes = p.dmask_sizes;
  return sizes[0] * sizes[1] * ceil_div(sizes[2], tile.own) * ceil_div(sizes[3], tile.stream);
}

constexpr int attention_fwd_shared(int row_bytes) {
  const AttentionTile tile = attention_fwd_tile(row_bytes);
  return (tile.own + 4 * tile.stream) * row_bytes;
}
constexpr int attention_dq_shared(int row_bytes) {
  const AttentionTile tile = attention_bwd_tile(row_bytes);
  return (2 * tile.own + 4 * tile.stream) * row_bytes;
}
// Also row_max, log_sum and delta of two steps.
constexpr int attention_dkv_shared(int row_bytes) {
  return attention_dq_shared(row_bytes) + 2 * 3 * attention_bwd_tile(row_bytes).stream * 4;
}
// One step at a time.
constexpr int attention_dmask_shared(int row_bytes) {
  const AttentionTile tile = attention_bwd_tile(row_bytes);
  return 2 * (tile.own + tile.stream) * row_bytes;
}
constexpr int attention_cache_shared(int row_bytes) {
  return (kCacheRows + 4 * attention_cache_tile(row_bytes).stream) * row_bytes;
}

// A cache: few rows walk over many keys. The heads of a group are rows of one tile, and the keys are cut into splits.
struct AttentionCachePlan {
  bool decode;  // false: the forward kernel, for many queries
  int64_t row_tiles, splits;
};

constexpr int64_t kDecodeRows = 64;      // four tiles read the cache, three of them from L2
constexpr int64_t kKeysOfSplit = 256;    // fewer are not worth the merge
constexpr int64_t kMostSplits = 128;
constexpr int kDecodeBlocksOfSm = 2;     // by shared memory

inline AttentionCachePlan plan_attention_cache(const AttentionInputs& in, const AttentionPlan& plan, const Gpu& gpu) {
  AttentionCachePlan cache{};
  const int64_t rows = in.H / in.Hk * in.S;
  cache.decode = rows <= kDecodeRows;
  cache.row_tiles = ceil_div(rows, kCacheRows);
  const int64_t blocks = in.B * in.Hk * cache.row_tiles, resident = int64_t{gpu.multiprocessors} * kDecodeBlocksOfSm;
  const int64_t most = std::min(kMostSplits, ceil_div(in.T, std::max<int64_t>(kKeysOfSplit, 1)));
  cache.splits = std::clamp<int64_t>(resident / std::max<int64_t>(blocks, 1), 1, std::max<int64_t>(most, 1));
  return cache;
}

inline int64_t attention_cache_blocks(const AttentionInputs& in, const AttentionCachePlan& cache) {
  return in.B * in.Hk * cache.row_tiles * cache.splits;
}

}  // namespace llmkernels::cuda
