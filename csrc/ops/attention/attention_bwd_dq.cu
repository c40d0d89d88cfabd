// Attention backward: the gradient of q. As in the forward a warp owns 16 queries and its block walks over the keys;
// the weights are made again from row_max and log_sum.
#include "common/cuda/launch.h"
#include "ops/attention/attention_choose.cuh"
#include "ops/attention/attention_cuda.h"
#include "ops/attention/attention_scores.cuh"
#include "ops/attention/attention_tiles.cuh"

namespace llmkernels::cuda {
namespace {

struct BwdArgs {
  AttentionBwdParams p;
  int tiles;  // of queries
  bool wide, wide_out;
};

template <class T, int kDim, bool kGeneral>
__global__ void __launch_bounds__(BwdShape<T, kDim>::kThreads, kDim == 64 && !kGeneral ? 3 : 1)
    attention_bwd_dq_kernel(const __grid_constant__ BwdArgs args) {
  using Shape = BwdShape<T, kDim>;
  constexpr int kOwn = Shape::kOwn, kStream = Shape::kStream, kThreads = Shape::kThreads, kTiles = kStream / 8;
  extern __shared__ __align__(1024) unsigned char shared[];
  const AttentionBwdParams& p = args.p;
  const AttentionInputs& in = p.in;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;

  const int index = static_cast<int>(blockIdx.x) / args.tiles;
  const int first = (args.tiles - 1 - static_cast<int>(blockIdx.x) % args.tiles) * kOwn;  // most to do first
  const int H = static_cast<int>(in.H), b = index / H, h = index % H, hk = h / (H / static_cast<int>(in.Hk));
  const int D = static_cast<int>(in.D), Dv = static_cast<int>(in.Dv);
  const AttentionSpan span(in, b);
  if (first >= span.rows) return;
  const ScoreRules<T, kGeneral> rules(in, span, b, h);
  const Range range = rules.keys_of(first, first + kOwn - 1);
  const int steps = (range.end - range.begin + kStream - 1) / kStream;

  const HeadRows<T> q{span.queries(static_cast<const T*>(in.q), in.q_strides, b, h), in.q_strides.row};
  const HeadRows<T> dout{span.queries(static_cast<const T*>(p.dout), p.dout_strides, b, h), p.dout_strides.row};
  const HeadRows<T> k{span.keys_of(static_cast<const T*>(in.k), in.k_strides, b, hk), in.k_strides.row};
  const HeadRows<T> v{span.keys_of(static_cast<const T*>(in.v), in.v_strides, b, hk), in.v_strides.row};
  unsigned char* const q_tile = shared;
  unsigned char* const dout_tile = shared + kOwn * Shape::kRowBytes;
  const auto tile_of = [&](int step, int which) {
    return shared + (2 * kOwn + (step % 2 * 2 + which) * kStream) * Shape::kRowBytes;
  };
  const auto fetch_step = [&](int step) {
    const int key = range.begin + step * kStream;
    fetch<T, kDim, kStream, kThreads, kGeneral>(tile_of(step, 0), k, key, span.keys, D, args.wide);
    fetch<T, kDim, kStream, kThreads, kGeneral>(tile_of(step, 1), v, key, span.keys, Dv, args.wide);
    ptx::cp_async_commit();
  };

  if (steps > 0) {
    fetch<T, kDim, kOwn, kThreads, kGeneral>(q_tile, q, first, span.rows, D, args.wide);
    fetch<T, kDim, kOwn, kThreads, kGeneral>(dout_tile, dout, first, span.rows, Dv, args.wide);
    fetch_step(0);
  }
  const int row = first + warp * 16 + lane / 4;  // of this lane, and the one 8 below
  const int64_t stat = span.first_stat(in, b, h);
  const Dropout dropout(in);
  RowKeys keys[2] = {};
  typename ScoreRules<T, kGeneral>::Base base[2];
  float delta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t query = stat + row + half * 8;
    const bool inside = row + half * 8 < span.rows;
    base[half] = rules.base(inside ? p.row_max[query] : 0.0f, inside ? p.log_sum[query] : 0.0f);
    delta[half] = inside ? p.delta[query] : 0.0f;
    if (kGeneral && dropout.drops()) keys[half] = dropout.keys(query);
  }

  float dq[kDim / 8][4] = {};
  const bool active = first + warp * 16 < span.rows;
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // the tiles of this step are there, and nobody uses those of the one before any more
    if (step + 1 < steps) fetch_step(step + 1);
    if (!active) continue;
    const int key = range.begin + step * kStream, first_row = first + warp * 16;
    float s[kTiles][4] = {}, dp[kTiles][4] = {}, slope[kGeneral ? kTiles : 1][4];
    Products<T>::template scores<kDim>(s, q_tile, warp * 16, tile_of(step, 0), 0);
    const bool whole = rules.sees_all(first_row, first_row + 15, key, key + kStream - 1);
    rules.template scores<false, kGeneral>(s, slope, row, key + lane % 4 * 2, whole);
    Products<T>::template scores<kDim>(dp, dout_tile, warp * 16, tile_of(step, 1), 0);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float dweight = dp[n][e];
        if constexpr (kGeneral) {
          if (dropout.drops()) {
            const bool kept = dropout.keeps(keys[e / 2], key + n * 8 + lane % 4 * 2 + e % 2);
            dweight = kept ? dweight * dropout.inverse() : 0.0f;
          }
        }
        s[n][e] = rules.weight(s[n][e], base[e / 2]) * (dweight - delta[e / 2]);
        if constexpr (kGeneral) s[n][e] *= slope[n][e];
      }
    }
    Products<T>::template weighted<kDim>(dq, s, tile_of(step, 0), 0, 0);
  }
  if (!active) return;

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = row + half * 8;
    if (query >= span.rows) continue;
    T* target = span.queries(static_cast<T*>(p.dq), p.dq_strides, b, h) + query * p.dq_strides.row;
    store_row<T>(target, dq, half, 0, D, in.scale, !kGeneral || args.wide_out);
  }
}

template <class T, int kDim, bool kGeneral>
struct Dq {
  static auto get() { return &attention_bwd_dq_kernel<T, kDim, kGeneral>; }
};

}  // namespace

const char* attention_bwd_dq(const AttentionBwdParams& params, const AttentionPlan& plan, void* stream) {
  const AttentionTile tile = attention_bwd_tile(plan.row_bytes);
  const BwdArgs args{params, static_cast<int>(ceil_div(params.in.S, tile.own)), plan.wide, plan.wide_out};
  const Launch launched =
      attention_launch(attention_dq_blocks(params.in, plan), tile.threads(), attention_dq_shared(plan.row_bytes));
  return launch(choose_attention<Dq>(params.in.dtype, plan), args, launched, stream);
}

}  // namespace llmkernels::cuda
