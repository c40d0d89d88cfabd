// Attention backward: the gradients of k and v. A warp owns 16 keys of a key head and its block walks over the queries
// of every head that reads it: the scores are transposed, so that they are the left factors of both sums, and no two
// blocks add to the same number.
#include "common/cuda/launch.h"
#include "ops/attention/attention_choose.cuh"
#include "ops/attention/attention_cuda.h"
#include "ops/attention/attention_scores.cuh"
#include "ops/attention/attention_tiles.cuh"

namespace llmkernels::cuda {
namespace {

struct BwdArgs {
  AttentionBwdParams p;
  int tiles;  // of keys
  bool wide, wide_out;
};

template <class T, int kDim, bool kGeneral>
__global__ void __launch_bounds__(BwdShape<T, kDim>::kThreads, kDim == 64 && !kGeneral ? 3 : 1)
    attention_bwd_dkv_kernel(const __grid_constant__ BwdArgs args) {
  using Shape = BwdShape<T, kDim>;
  constexpr int kOwn = Shape::kOwn, kStream = Shape::kStream, kThreads = Shape::kThreads, kTiles = kStream / 8;
  constexpr int kColumns = Shape::kColumns, kParts = kDim / kColumns;
  extern __shared__ __align__(1024) unsigned char shared[];
  const AttentionBwdParams& p = args.p;
  const AttentionInputs& in = p.in;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;

  const int column = static_cast<int>(blockIdx.x) % kParts * kColumns;  // the first that this block sums
  const int block = static_cast<int>(blockIdx.x) / kParts;
  const int index = block / args.tiles, first = block % args.tiles * kOwn;  // where causal, the first keys take longest
  const int Hk = static_cast<int>(in.Hk), group = static_cast<int>(in.H) / Hk, b = index / Hk, hk = index % Hk;
  const int D = static_cast<int>(in.D), Dv = static_cast<int>(in.Dv);
  const AttentionSpan span(in, b);
  if (first >= span.keys) return;
  const Range range = ScoreRules<T, kGeneral>(in, span, b, hk * group).queries_of(first, first + kOwn - 1);
  const int steps_of_head = (range.end - range.begin + kStream - 1) / kStream, steps = steps_of_head * group;

  const HeadRows<T> k{span.keys_of(static_cast<const T*>(in.k), in.k_strides, b, hk), in.k_strides.row};
  const HeadRows<T> v{span.keys_of(static_cast<const T*>(in.v), in.v_strides, b, hk), in.v_strides.row};
  unsigned char* const k_tile = shared;
  unsigned char* const v_tile = shared + kOwn * Shape::kRowBytes;
  const auto tile_of = [&](int step, int which) {
    return shared + (2 * kOwn + (step % 2 * 2 + which) * kStream) * Shape::kRowBytes;
  };
  // row_max, log_sum and delta of the queries of a step.
  float* const all_stats = reinterpret_cast<float*>(shared + (2 * kOwn + 4 * kStream) * Shape::kRowBytes);
  const auto stats_of = [&](int step, int which) { return all_stats + (step % 2 * 3 + which) * kStream; };
  const auto fetch_step = [&](int step) {
    const int h = hk * group + step / steps_of_head, query = range.begin + step % steps_of_head * kStream;
    const HeadRows<T> q{span.queries(static_cast<const T*>(in.q), in.q_strides, b, h), in.q_strides.row};
    const HeadRows<T> dout{span.queries(static_cast<const T*>(p.dout), p.dout_strides, b, h), p.dout_strides.row};
    fetch<T, kDim, kStream, kThreads, kGeneral>(tile_of(step, 0), q, query, span.rows, D, args.wide);
    fetch<T, kDim, kStream, kThreads, kGeneral>(tile_of(step, 1), dout, query, span.rows, Dv, args.wide);
    if (threadIdx.x < kStream) {
      const int at = query + static_cast<int>(threadIdx.x);
      const int64_t stat = span.first_stat(in, b, h) + min(at, span.rows - 1);
      const int bytes = at < span.rows ? 4 : 0;
      ptx::cp_async<4>(ptx::shared_address(stats_of(step, 0) + threadIdx.x), p.row_max + stat, bytes);
      ptx::cp_async<4>(ptx::shared_address(stats_of(step, 1) + threadIdx.x), p.log_sum + stat, bytes);
      ptx::cp_async<4>(ptx::shared_address(stats_of(step, 2) + threadIdx.x), p.delta + stat, bytes);
    }
    ptx::cp_async_commit();
  };

  if (steps > 0) {
    fetch<T, kDim, kOwn, kThreads, kGeneral>(k_tile, k, first, span.keys, D, args.wide);
    fetch<T, kDim, kOwn, kThreads, kGeneral>(v_tile, v, first, span.keys, Dv, args.wide);
    fetch_step(0);
  }
  const Dropout dropout(in);
  float dk[kColumns / 8][4] = {}, dv[kColumns / 8][4] = {};
  const int key = first + warp * 16 + lane / 4;  // of this lane, and the one 8 below
  const bool active = first + warp * 16 < span.keys;
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // the tiles of this step are there, and nobody uses those of the one before any more
    if (step + 1 < steps) fetch_step(step + 1);
    if (!active) continue;
    const int h = hk * group + step / steps_of_head, query = range.begin + step % steps_of_head * kStream;
    const ScoreRules<T, kGeneral> rules(in, span, b, h);
    float s[kTiles][4] = {}, slope[kGeneral ? kTiles : 1][4];
    Products<T>::template scores<kDim>(s, k_tile, warp * 16, tile_of(step, 0), 0);
    const int first_key = first + warp * 16;
    const bool whole = rules.sees_all(query, query + kStream - 1, first_key, first_key + 15);
    rules.template scores<true, kGeneral>(s, slope, key, query + lane % 4 * 2, whole);

    // Weights, and what dropout leaves of them.
    float kept[kGeneral ? kTiles : 1][4];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int at = n * 8 + lane % 4 * 2 + side;
        const auto base = rules.base(stats_of(step, 0)[at], stats_of(step, 1)[at]);
#pragma unroll
        for (int e = side; e < 4; e += 2) s[n][e] = rules.weight(s[n][e], base);
        if constexpr (kGeneral) {
          RowKeys keys{};
          if (dropout.drops()) keys = dropout.keys(span.first_stat(in, b, h) + query + at);
#pragma unroll
          for (int e = side; e < 4; e += 2) {
            const bool keeps = !dropout.drops() || dropout.keeps(keys, key + e / 2 * 8);
            kept[n][e] = keeps ? s[n][e] * dropout.inverse() : 0.0f;
            slope[n][e] *= s[n][e];  // what multiplies delta
          }
        }
      }
    }
    if constexpr (kGeneral) {
      Products<T>::template weighted<kDim>(dv, kept, tile_of(step, 1), 0, column);
    } else {
      Products<T>::template weighted<kDim>(dv, s, tile_of(step, 1), 0, column);
    }
    if (p.dk == nullptr) continue;

    float dp[kTiles][4] = {};
    Products<T>::template scores<kDim>(dp, v_tile, warp * 16, tile_of(step, 1), 0);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float delta = stats_of(step, 2)[n * 8 + lane % 4 * 2 + e % 2];
        if constexpr (kGeneral) {
          // The derivative of the score times dp is what was kept of the weight, times dp.
          const float factor = kept[n][e] == 0.0f ? 0.0f : dropout.inverse();
          s[n][e] = slope[n][e] * (dp[n][e] * factor - delta);
        } else {
          s[n][e] *= dp[n][e] - delta;
        }
      }
    }
    Products<T>::template weighted<kDim>(dk, s, tile_of(step, 0), 0, column);
  }
  if (!active) return;

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = key + half * 8;
    if (row >= span.keys) continue;
    if (p.dk != nullptr) {
      T* target = span.keys_of(static_cast<T*>(p.dk), p.dk_strides, b, hk) + row * p.dk_strides.row;
      store_row<T>(target, dk, half, column, D, in.scale, !kGeneral || args.wide_out);
    }
    if (p.dv != nullptr) {
      T* target = span.keys_of(static_cast<T*>(p.dv), p.dv_strides, b, hk) + row * p.dv_strides.row;
      store_row<T>(target, dv, half, column, Dv, 1.0f, !kGeneral || args.wide_out);
    }
  }
}

template <class T, int kDim, bool kGeneral>
struct Dkv {
  static auto get() { return &attention_bwd_dkv_kernel<T, kDim, kGeneral>; }
};

}  // namespace

const char* attention_bwd_dkv(const AttentionBwdParams& params, const AttentionPlan& plan, void* stream) {
  const AttentionTile tile = attention_bwd_tile(plan.row_bytes);
  const BwdArgs args{params, static_cast<int>(ceil_div(params.in.T, tile.own)), plan.wide, plan.wide_out};
  const Launch launched =
      attention_launch(attention_dkv_blocks(params.in, plan), tile.threads(), attention_dkv_shared(plan.row_bytes));
  return launch(choose_attention<Dkv>(params.in.dtype, plan), args, launched, stream);
}

}  // namespace llmkernels::cuda
