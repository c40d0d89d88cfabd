// Attention of few queries against a cache: bounded by the reading of the cache, so the query heads that share a key
// head are rows of one tile, each warp of a block takes a slice of the keys of every step, and several blocks split the
// keys of a sequence (split-KV decoding: Dao et al. 2023, "Flash-Decoding"). What they found is merged in a fixed order.
#include "common/cuda/launch.h"
#include "ops/attention/attention_choose.cuh"
#include "ops/attention/attention_cuda.h"
#include "ops/attention/attention_scores.cuh"
#include "ops/attention/attention_softmax.cuh"
#include "ops/attention/attention_tiles.cuh"

namespace llmkernels::cuda {
namespace {

struct CacheArgs {
  AttentionFwdParams p;
  AttentionCacheParts parts;
  int row_tiles, splits;
  bool wide;
};

// The rows of a group: row r is query r / group of head hk * group + r % group.
template <class T>
struct GroupRows {
  const T* base;
  int64_t head, row;
  int group;
  __device__ const T* operator()(int r) const { return base + r % group * head + r / group * row; }
};

template <class T, int kDim>
__global__ void __launch_bounds__(CacheShape<T, kDim>::kThreads, 1)
    attention_kvcache_kernel(const __grid_constant__ CacheArgs args) {
  using Shape = CacheShape<T, kDim>;
  constexpr int kStream = Shape::kStream, kThreads = Shape::kThreads, kWarps = Shape::kWarps;
  constexpr int kSlice = Shape::kSlice, kTiles = kSlice / 8;
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ float most_of[kWarps][kCacheRows], total_of[kWarps][kCacheRows];
  const AttentionFwdParams& p = args.p;
  const AttentionInputs& in = p.in;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;

  const int split = static_cast<int>(blockIdx.x) % args.splits, rest = static_cast<int>(blockIdx.x) / args.splits;
  const int first = rest % args.row_tiles * kCacheRows, index = rest / args.row_tiles;
  const int Hk = static_cast<int>(in.Hk), group = static_cast<int>(in.H) / Hk, b = index / Hk, hk = index % Hk;
  const int D = static_cast<int>(in.D), Dv = static_cast<int>(in.Dv), rows = group * static_cast<int>(in.S);
  const AttentionSpan span(in, b);
  const ScoreRules<T, true> rules(in, span, b, hk * group);
  const Range all = rules.keys_of(first / group, (min(rows, first + kCacheRows) - 1) / group);
  const int steps_in_all = (all.end - all.begin + kStream - 1) / kStream;
  const int steps_of_split = (steps_in_all + args.splits - 1) / args.splits;
  const int first_step = min(split * steps_of_split, steps_in_all);
  const int steps = min(first_step + steps_of_split, steps_in_all) - first_step;

  const GroupRows<T> q{static_cast<const T*>(in.q) + b * in.q_strides.batch + hk * group * in.q_strides.head,
                       in.q_strides.head, in.q_strides.row, group};
  const CacheRows<T, true> k(in, in.k, in.k_strides, span, b, hk), v(in, in.v, in.v_strides, span, b, hk);
  const auto tile_of = [&](int step, int which) {
    return shared + (kCacheRows + (step % 2 * 2 + which) * kStream) * Shape::kRowBytes;
  };
  const auto fetch_step = [&](int step) {
    const int key = all.begin + (first_step + step) * kStream;
    fetch<T, kDim, kStream, kThreads, true>(tile_of(step, 0), k, key, span.keys, D, args.wide);
    fetch<T, kDim, kStream, kThreads, true>(tile_of(step, 1), v, key, span.keys, Dv, args.wide);
    ptx::cp_async_commit();
  };

  Softmax<kDim / 8> state;
  int query[2];
  float slopes[2] = {}, sinks[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + lane / 4 + half * 8, h = hk * group + row % group;
    query[half] = row / group;
    if (row >= rows) continue;
    if (in.alibi_slopes != nullptr) slopes[half] = in.alibi_slopes[b * in.slope_batch_stride + h];
    if (in.sinks != nullptr) sinks[half] = in.sinks[h];
  }
  if (split == 0 && warp == 0) state.start(sinks[0], sinks[1]);

  if (steps > 0) {
    fetch<T, kDim, kCacheRows, kThreads, true>(shared, q, first, rows, D, args.wide);
    fetch_step(0);
  }
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // the tiles of this step are there, and nobody uses those of the one before any more
    if (step + 1 < steps) fetch_step(step + 1);
    const int key = all.begin + (first_step + step) * kStream + warp * kSlice + lane % 4 * 2;
    float s[kTiles][4] = {};
    Products<T>::template scores<kDim>(s, shared, 0, tile_of(step, 0), warp * kSlice);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float unused;
        s[n][e] = rules.score(s[n][e], query[e / 2], key + n * 8 + e % 2, slopes[e / 2], unused);
      }
    }
    state.update(s, rules);
    Products<T>::template weighted<kDim>(state.out, s, tile_of(step, 1), warp * kSlice, 0);
  }

  // The warps' parts, one after the other, where the tiles were.
  __syncthreads();
  float* const out_of = reinterpret_cast<float*>(shared);  // [kWarps][kCacheRows][kDim]
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + half * 8;
    const float sum = quad_sum(state.total[half]);
    if (lane % 4 == 0) most_of[warp][row] = state.most[half], total_of[warp][row] = sum;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      float* const target = out_of + (warp * kCacheRows + row) * kDim + Products<T>::column(n);
      *reinterpret_cast<float2*>(target) = make_float2(state.out[n][2 * half], state.out[n][2 * half + 1]);
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kCacheRows * kDim; i += kThreads) {
    const int r = i / kDim, column = i % kDim, row = first + r;
    if (row >= rows || (column >= Dv && column > 0)) continue;
    float most = -INFINITY, sum = 0.0f, total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, most_of[w][r]);
    const float base = finite_max(most);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float shrink = exp_of<T>(most_of[w][r] - base);
      sum = fmaf(out_of[(w * kCacheRows + r) * kDim + column], shrink, sum);
      total = fmaf(total_of[w][r], shrink, total);
    }
    const int h = hk * group + row % group, i_query = row / group;
    const int64_t stat = (b * in.H + h) * in.S + i_query;
    if (args.splits > 1) {
      const int64_t part = split * (in.B * in.H * in.S) + stat;
      if (column < Dv) args.parts.out[part * Dv + column] = sum;
      if (column == 0) args.parts.row_max[part] = most, args.parts.sum[part] = total;
    } else {
      const AttentionStrides& s = p.out_strides;
      T* const out = static_cast<T*>(p.out) + b * s.batch + h * s.head + i_query * s.row;
      if (column < Dv) out[column] = narrow<T>(total == 0.0f ? 0.0f : sum / total);
      if (column == 0) p.row_max[stat] = most, p.log_sum[stat] = total == 0.0f ? 0.0f : logf(total);
    }
  }
}

// One warp a row.
template <class T>
__global__ void __launch_bounds__(kAttentionSmallThreads)
    attention_kvcache_merge_kernel(const __grid_constant__ CacheArgs args) {
  const AttentionFwdParams& p = args.p;
  const AttentionInputs& in = p.in;
  const int64_t rows = in.B * in.H * in.S;
  const int64_t stat = int64_t{blockIdx.x} * (kAttentionSmallThreads / 32) + threadIdx.x / 32;
  if (stat >= rows) return;
  const AttentionCacheParts& parts = args.parts;
  float most = -INFINITY, total = 0.0f;
  for (int split = 0; split < args.splits; ++split) most = fmaxf(most, parts.row_max[split * rows + stat]);
  const float base = finite_max(most);
  for (int split = 0; split < args.splits; ++split) {
    total = fmaf(parts.sum[split * rows + stat], exp_of<T>(parts.row_max[split * rows + stat] - base), total);
  }
  const int64_t head = stat / in.S, i = stat % in.S, b = head / in.H, h = head % in.H;
  const AttentionStrides& s = p.out_strides;
  T* const out = static_cast<T*>(p.out) + b * s.batch + h * s.head + i * s.row;
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  for (int64_t column = threadIdx.x % 32; column < in.Dv; column += 32) {
    float sum = 0.0f;
    for (int split = 0; split < args.splits; ++split) {
      const int64_t part = split * rows + stat;
      sum = fmaf(parts.out[part * in.Dv + column], exp_of<T>(parts.row_max[part] - base), sum);
    }
    out[column] = narrow<T>(sum * inverse);
  }
  if (threadIdx.x % 32 == 0) p.row_max[stat] = most, p.log_sum[stat] = total == 0.0f ? 0.0f : logf(total);
}

template <class T, int kDim>
struct Decode {
  static auto get() { return &attention_kvcache_kernel<T, kDim>; }
};

}  // namespace

const char* attention_kvcache_fwd(const AttentionFwdParams& params, const AttentionPlan& plan,
                                  const AttentionCachePlan& cache, const AttentionCacheParts& parts, void* stream) {
  if (!cache.decode) return attention_fwd(params, plan, stream);
  const AttentionInputs& in = params.in;
  const CacheArgs args{params, parts, static_cast<int>(cache.row_tiles), static_cast<int>(cache.splits), plan.wide};
  const Launch launched = attention_launch(attention_cache_blocks(in, cache),
                                           32 * attention_cache_tile(plan.row_bytes).warps,
                                           attention_cache_shared(plan.row_bytes));
  const char* error = launch(choose_general<Decode>(in.dtype, plan), args, launched, stream);
  if (error != nullptr || cache.splits == 1) return error;
  const auto merge = in.dtype == DType::kFloat32   ? &attention_kvcache_merge_kernel<float>
                     : in.dtype == DType::kFloat16 ? &attention_kvcache_merge_kernel<__half>
                                                   : &attention_kvcache_merge_kernel<__nv_bfloat16>;
  const Launch merging =
      attention_launch(ceil_div(in.B * in.H * in.S, kAttentionSmallThreads / 32), kAttentionSmallThreads, 0);
  return launch(merge, args, merging, stream);
}

}  // namespace llmkernels::cuda
