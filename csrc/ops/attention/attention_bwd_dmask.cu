// Attention backward: the gradient of an additive mask. A block owns a tile of the mask and walks over everything that
// the mask broadcasts over, in a fixed order.
#include "common/cuda/launch.h"
#include "ops/attention/attention_choose.cuh"
#include "ops/attention/attention_cuda.h"
#include "ops/attention/attention_scores.cuh"
#include "ops/attention/attention_tiles.cuh"

namespace llmkernels::cuda {
namespace {

struct MaskArgs {
  AttentionBwdParams p;
  int row_tiles, column_tiles;  // of the mask
  bool wide;
};

template <class T, int kDim>
__global__ void __launch_bounds__(BwdShape<T, kDim>::kThreads, 1)
    attention_bwd_dmask_kernel(const __grid_constant__ MaskArgs args) {
  using Shape = BwdShape<T, kDim>;
  constexpr int kOwn = Shape::kOwn, kStream = Shape::kStream, kThreads = Shape::kThreads, kTiles = kStream / 8;
  extern __shared__ __align__(1024) unsigned char shared[];
  const AttentionBwdParams& p = args.p;
  const AttentionInputs& in = p.in;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  unsigned char* const q_tile = shared;
  unsigned char* const dout_tile = q_tile + kOwn * Shape::kRowBytes;
  unsigned char* const k_tile = dout_tile + kOwn * Shape::kRowBytes;
  unsigned char* const v_tile = k_tile + kStream * Shape::kRowBytes;

  // What of each dimension this block walks over: one index of the mask, or all that it broadcasts over.
  int rest = static_cast<int>(blockIdx.x);
  const int64_t* const sizes = p.dmask_sizes;
  const auto part = [&](int dim, int tiles, int all) {
    const int at = rest % tiles;
    rest /= tiles;
    return sizes[dim] == 1 ? Range{0, all} : Range{at, at + 1};
  };
  const int S = static_cast<int>(in.S), keys_in_all = static_cast<int>(in.T);
  const Range key_tiles = part(3, args.column_tiles, (keys_in_all + kStream - 1) / kStream);
  const Range row_tiles = part(2, args.row_tiles, (S + kOwn - 1) / kOwn);
  const Range heads = part(1, static_cast<int>(sizes[1]), static_cast<int>(in.H));
  const Range batches = part(0, static_cast<int>(sizes[0]), static_cast<int>(in.B));
  const int D = static_cast<int>(in.D), Dv = static_cast<int>(in.Dv);
  const int group = static_cast<int>(in.H) / static_cast<int>(in.Hk);
  const Dropout dropout(in);

  float sum[kTiles][4] = {};
  for (int b = batches.begin; b < batches.end; ++b) {
    const AttentionSpan span(in, b);
    for (int h = heads.begin; h < heads.end; ++h) {
      const ScoreRules<T, true> rules(in, span, b, h);
      const int hk = h / group;
      const HeadRows<T> q{span.queries(static_cast<const T*>(in.q), in.q_strides, b, h), in.q_strides.row};
      const HeadRows<T> dout{span.queries(static_cast<const T*>(p.dout), p.dout_strides, b, h), p.dout_strides.row};
      const HeadRows<T> k{span.keys_of(static_cast<const T*>(in.k), in.k_strides, b, hk), in.k_strides.row};
      const HeadRows<T> v{span.keys_of(static_cast<const T*>(in.v), in.v_strides, b, hk), in.v_strides.row};
      const int64_t stat = span.first_stat(in, b, h);
      for (int row_tile = row_tiles.begin; row_tile < row_tiles.end; ++row_tile) {
        const int first = row_tile * kOwn, row = first + warp * 16 + lane / 4;
        const Range range = rules.keys_of(first, first + kOwn - 1);
        for (int key_tile = key_tiles.begin; key_tile < key_tiles.end; ++key_tile) {
          const int key = key_tile * kStream;
          if (key >= range.end || key + kStream <= range.begin) continue;  // the same for the whole block
          __syncthreads();  // nobody uses the tiles any more
          fetch<T, kDim, kOwn, kThreads, true>(q_tile, q, first, span.rows, D, args.wide);
          fetch<T, kDim, kOwn, kThreads, true>(dout_tile, dout, first, span.rows, Dv, args.wide);
          fetch<T, kDim, kStream, kThreads, true>(k_tile, k, key, span.keys, D, args.wide);
          fetch<T, kDim, kStream, kThreads, true>(v_tile, v, key, span.keys, Dv, args.wide);
          ptx::cp_async_commit();
          ptx::cp_async_wait<0>();
          __syncthreads();
          float s[kTiles][4] = {}, dp[kTiles][4] = {}, unused[1][4];
          Products<T>::template scores<kDim>(s, q_tile, warp * 16, k_tile, 0);
          rules.template scores<false, false>(s, unused, row, key + lane % 4 * 2, false);
          Products<T>::template scores<kDim>(dp, dout_tile, warp * 16, v_tile, 0);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int64_t query = stat + row + half * 8;
            if (row + half * 8 >= span.rows) continue;
            const auto base = rules.base(p.row_max[query], p.log_sum[query]);
            const float delta = p.delta[query];
            const RowKeys keys = dropout.drops() ? dropout.keys(query) : RowKeys{};
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
#pragma unroll
              for (int e = 2 * half; e < 2 * half + 2; ++e) {
                const bool kept = !dropout.drops() || dropout.keeps(keys, key + n * 8 + lane % 4 * 2 + e % 2);
                const float dweight = kept ? dp[n][e] * dropout.inverse() : 0.0f;
                sum[n][e] += rules.weight(s[n][e], base) * (dweight - delta);
              }
            }
          }
        }
      }
    }
  }

  // Through shared memory: sums over the tile's keys, and over its queries, where those are broadcast too.
  __syncthreads();
  float* const tile = reinterpret_cast<float*>(shared);
  constexpr int kPitch = kStream + 1;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      tile[(warp * 16 + lane / 4 + e / 2 * 8) * kPitch + n * 8 + lane % 4 * 2 + e % 2] = sum[n][e];
    }
  }
  __syncthreads();
  int rows = kOwn, columns = kStream;
  if (sizes[3] == 1) {
    columns = 1;
    if (threadIdx.x < kOwn) {
      float* const row = tile + threadIdx.x * kPitch;
      for (int j = 1; j < kStream; ++j) row[0] += row[j];
    }
    __syncthreads();
  }
  if (sizes[2] == 1) {
    rows = 1;
    if (static_cast<int>(threadIdx.x) < columns) {
      for (int i = 1; i < kOwn; ++i) tile[threadIdx.x] += tile[i * kPitch + threadIdx.x];
    }
    __syncthreads();
  }
  for (int index = static_cast<int>(threadIdx.x); index < rows * columns; index += kThreads) {
    const int i = index / columns, j = index % columns;
    const int64_t row = sizes[2] == 1 ? 0 : row_tiles.begin * kOwn + i, column = sizes[3] == 1 ? 0 : key_tiles.begin * kStream + j;
    if (row >= sizes[2] || column >= sizes[3]) continue;
    const int64_t head = (sizes[0] == 1 ? 0 : batches.begin) * sizes[1] + (sizes[1] == 1 ? 0 : heads.begin);
    const int64_t at = (head * sizes[2] + row) * sizes[3] + column;
    const float value = tile[i * kPitch + j];
    if (in.mask_kind == MaskKind::kFloat32) {
      static_cast<float*>(p.dmask)[at] = value;
    } else {
      static_cast<T*>(p.dmask)[at] = narrow<T>(value);
    }
  }
}

template <class T, int kDim>
struct Dmask {
  static auto get() { return &attention_bwd_dmask_kernel<T, kDim>; }
};

}  // namespace

const char* attention_bwd_dmask(const AttentionBwdParams& params, const AttentionPlan& plan, void* stream) {
  const AttentionTile tile = attention_bwd_tile(plan.row_bytes);
  const MaskArgs args{params, static_cast<int>(ceil_div(params.dmask_sizes[2], tile.own)),
                      static_cast<int>(ceil_div(params.dmask_sizes[3], tile.stream)), plan.wide};
  const Launch launched =
      attention_launch(attention_dmask_blocks(params, plan), tile.threads(), attention_dmask_shared(plan.row_bytes));
  return launch(choose_general<Dmask>(params.in.dtype, plan), args, launched, stream);
}

}  // namespace llmkernels::cuda
