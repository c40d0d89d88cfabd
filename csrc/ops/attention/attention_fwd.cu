// Attention forward in the style of FlashAttention-2 (Dao 2023, arXiv:2307.08691): a warp owns 16 queries of one head,
// and its block walks over the keys, whose next tiles come in while these are used. Scores and output stay in registers.
#include "common/cuda/launch.h"
#include "ops/attention/attention_choose.cuh"
#include "ops/attention/attention_cuda.h"
#include "ops/attention/attention_scores.cuh"
#include "ops/attention/attention_softmax.cuh"
#include "ops/attention/attention_tiles.cuh"

namespace llmkernels::cuda {
namespace {

struct FwdArgs {
  AttentionFwdParams p;
  int tiles;  // of queries
  bool wide, wide_out;
};

template <class T, int kDim, bool kGeneral>
__global__ void __launch_bounds__(FwdShape<T, kDim>::kThreads, 1)
    attention_fwd_kernel(const __grid_constant__ FwdArgs args) {
  using Shape = FwdShape<T, kDim>;
  constexpr int kOwn = Shape::kOwn, kStream = Shape::kStream, kThreads = Shape::kThreads;
  extern __shared__ __align__(1024) unsigned char shared[];
  const AttentionFwdParams& p = args.p;
  const AttentionInputs& in = p.in;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;

  // Where causal, the last queries have most to do: they start first.
  const int index = static_cast<int>(blockIdx.x) / args.tiles;
  const int first = (args.tiles - 1 - static_cast<int>(blockIdx.x) % args.tiles) * kOwn;
  const int H = static_cast<int>(in.H), b = index / H, h = index % H, hk = h / (H / static_cast<int>(in.Hk));
  const int D = static_cast<int>(in.D), Dv = static_cast<int>(in.Dv);
  const AttentionSpan span(in, b);
  if (first >= span.rows) return;
  const ScoreRules<T, kGeneral> rules(in, span, b, h);
  const Range range = rules.keys_of(first, first + kOwn - 1);
  const int steps = (range.end - range.begin + kStream - 1) / kStream;

  const HeadRows<T> q{span.queries(static_cast<const T*>(in.q), in.q_strides, b, h), in.q_strides.row};
  const CacheRows<T, kGeneral> k(in, in.k, in.k_strides, span, b, hk), v(in, in.v, in.v_strides, span, b, hk);
  const auto tile_of = [&](int step, int which) {
    return shared + (kOwn + (step % 2 * 2 + which) * kStream) * Shape::kRowBytes;
  };
  const auto fetch_step = [&](int step) {
    const int key = range.begin + step * kStream;
    fetch<T, kDim, kStream, kThreads, kGeneral>(tile_of(step, 0), k, key, span.keys, D, args.wide);
    fetch<T, kDim, kStream, kThreads, kGeneral>(tile_of(step, 1), v, key, span.keys, Dv, args.wide);
    ptx::cp_async_commit();
  };

  Softmax<kDim / 8> state;
  const int row = first + warp * 16 + lane / 4;  // of this lane, and the one 8 below
  const int64_t stat = span.first_stat(in, b, h);
  const Dropout dropout(in);
  RowKeys keys[2] = {};
  if constexpr (kGeneral) {
    if (in.sinks != nullptr) state.start(in.sinks[h], in.sinks[h]);
    if (dropout.drops()) {
#pragma unroll
      for (int half = 0; half < 2; ++half) keys[half] = dropout.keys(stat + row + half * 8);
    }
  }

  if (steps > 0) {
    fetch<T, kDim, kOwn, kThreads, kGeneral>(shared, q, first, span.rows, D, args.wide);
    fetch_step(0);
  }
  const bool active = first + warp * 16 < span.rows;
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // the tiles of this step are there, and nobody uses those of the one before any more
    if (step + 1 < steps) fetch_step(step + 1);
    if (!active) continue;
    const int key = range.begin + step * kStream, first_row = first + warp * 16;
    float s[kStream / 8][4] = {}, unused[1][4];
    Products<T>::template scores<kDim>(s, shared, warp * 16, tile_of(step, 0), 0);
    const bool whole = rules.sees_all(first_row, first_row + 15, key, key + kStream - 1);
    rules.template scores<false, false>(s, unused, row, key + lane % 4 * 2, whole);
    state.update(s, rules);
    if constexpr (kGeneral) {
      if (dropout.drops()) {
#pragma unroll
        for (int n = 0; n < kStream / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (!dropout.keeps(keys[e / 2], key + n * 8 + lane % 4 * 2 + e % 2)) s[n][e] = 0.0f;
          }
        }
      }
    }
    Products<T>::template weighted<kDim>(state.out, s, tile_of(step, 1), 0, 0);
  }
  if (!active) return;

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = row + half * 8;
    const float sum = quad_sum(state.total[half]);
    if (query >= span.rows) continue;
    const float factor = sum == 0.0f ? 0.0f : dropout.inverse() / sum;
    T* out = span.queries(static_cast<T*>(p.out), p.out_strides, b, h) + query * p.out_strides.row;
    store_row<T>(out, state.out, half, 0, Dv, factor, !kGeneral || args.wide_out);
    if (lane % 4 == 0) {
      p.row_max[stat + query] = rules.natural(state.most[half]);
      p.log_sum[stat + query] = sum == 0.0f ? 0.0f : logf(sum);
    }
  }
}

template <class T, int kDim, bool kGeneral>
struct Forward {
  static auto get() { return &attention_fwd_kernel<T, kDim, kGeneral>; }
};

}  // namespace

const char* attention_fwd(const AttentionFwdParams& params, const AttentionPlan& plan, void* stream) {
  const AttentionTile tile = attention_fwd_tile(plan.row_bytes);
  const FwdArgs args{params, static_cast<int>(ceil_div(params.in.S, tile.own)), plan.wide, plan.wide_out};
  const Launch launched =
      attention_launch(attention_fwd_blocks(params.in, plan), tile.threads(), attention_fwd_shared(plan.row_bytes));
  return launch(choose_attention<Forward>(params.in.dtype, plan), args, launched, stream);
}

}  // namespace llmkernels::cuda
