// Up to 64 rows of 16-bit x times a quantized weight on tensor cores. The product is turned over, y^T = weight x^T: 16
// rows of the weight are the tall side of mma.m16n8k16, and 8 rows of x fill the other. Packed weights and x come in
// stages of 128 columns by cp.async; the weights become 16-bit floats, exact ones but for nf4, in the registers of the
// warp that multiplies them, and the scale of a group multiplies its sum.
//
// The columns of a product may come in any order that both factors share. Here lane t of four has eight of 32 columns,
// 8 t and on, one word of four-bit weights and one vector of x, and gives them to two instructions.
#include "common/cuda/launch.h"
#include "ops/quantized_linear/quantized_linear_tokens.cuh"

namespace llmkernels::cuda {
namespace {

template <bool kFirst, class A>
__device__ A& first_if(A& first, A& second) {
  if constexpr (kFirst) return first;
  return second;
}

template <class T, WeightFormat kFormat, int kTokens, bool kWide>
__global__ void __launch_bounds__(kTokensThreads, 1)
    quantized_tokens_kernel(const __grid_constant__ QuantizedLinearArgs args) {
  using S = Stage<kFormat, kTokens>;
  constexpr int kTiles = kTokens / 8, kBlocks = kTokensColumns / 32;
  constexpr bool kRowScales = kFormat == WeightFormat::kInt8;  // applied once, at the end
  extern __shared__ __align__(1024) unsigned char shared[];
  float* const levels = reinterpret_cast<float*>(shared + S::kStages * S::kBytes);
  const QuantizedLinearFwdParams& p = args.p;
  const QuantizedWeight& w = p.weight;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int M = static_cast<int>(p.M), N = static_cast<int>(w.N), K = static_cast<int>(w.K);
  if constexpr (kFormat == WeightFormat::kNf4) fill_levels(levels);

  const int stages = (K + kTokensColumns - 1) / kTokensColumns, splits = static_cast<int>(gridDim.y);
  const int first_stage = static_cast<int>(int64_t{stages} * blockIdx.y / splits);
  const int steps = static_cast<int>(int64_t{stages} * (blockIdx.y + 1) / splits) - first_stage;
  const int first_row = static_cast<int>(blockIdx.x) * kTokensRows, row_of_warp = warp * 16 + g;
  const Fetch<T, kFormat, kTokens, kWide> fetch(args, first_row);
  const auto fetch_step = [&](int step) {
    if (step < steps) {
      fetch(shared + step % S::kStages * S::kBytes, (first_stage + step) * kTokensColumns);
    } else {
      ptx::cp_async_commit();  // an empty group, so that as many are always behind the one waited for
    }
  };

  Groups<T, kFormat> groups(args, first_row + row_of_warp);
  float sums[kTiles][4] = {};
  for (int step = 0; step < S::kStages - 1; ++step) fetch_step(step);
  for (int step = 0; step < steps; ++step) {
    if constexpr (!kRowScales) groups.load((first_stage + step) * kTokensColumns);
    ptx::cp_async_wait<S::kStages - 2>();
    __syncthreads();  // this stage is there for everybody, and nobody reads the one before any more
    fetch_step(step + S::kStages - 1);

    const unsigned char* const stage = shared + step % S::kStages * S::kBytes;
    float parts[kTiles][4] = {};
    auto& into = first_if<kRowScales>(sums, parts);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      uint32_t pairs[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of_warp + 8 * half;
        if constexpr (kFourBits<kFormat>) {
          const uint32_t word = *reinterpret_cast<const uint32_t*>(stage + S::weight_chunk(row, block) + 4 * t);
          decode<T, kFormat>(word, groups.middles[block][half], levels, pairs[half]);
        } else {
          const uint2 words =
              *reinterpret_cast<const uint2*>(stage + S::weight_chunk(row, 2 * block + t / 2) + t % 2 * 8);
          uint32_t low[2], high[2];
          decode<T, kFormat>(words.x, 0, levels, low);
          decode<T, kFormat>(words.y, 0, levels, high);
          pairs[half][0] = low[0], pairs[half][1] = low[1], pairs[half][2] = high[0], pairs[half][3] = high[1];
        }
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const uint4 x = *reinterpret_cast<const uint4*>(stage + S::x_chunk(8 * n + g, 4 * block + t));
        const uint32_t early[2] = {x.x, x.y}, late[2] = {x.z, x.w};
        ptx::mma_m16n8k16<T>(into[n], {pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]}, early);
        ptx::mma_m16n8k16<T>(into[n], {pairs[0][2], pairs[1][2], pairs[0][3], pairs[1][3]}, late);
      }
      if constexpr (!kRowScales) {
        if (groups.ends(block)) {
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              sums[n][e] = fmaf(parts[n][e], groups.scales[block][e / 2], sums[n][e]);
              parts[n][e] = 0.0f;
            }
          }
        }
      }
    }
  }
  ptx::cp_async_wait<0>();

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + row_of_warp + 8 * half;
    if (row >= N) continue;
    const float factor = kRowScales ? static_cast<const float*>(w.scales)[row] : 1.0f;
    const float bias = p.bias == nullptr ? 0.0f : widen(static_cast<const T*>(p.bias)[row]);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int token = 8 * n + 2 * t + e;
        const float sum = sums[n][half * 2 + e] * factor;
        if (token >= M) continue;
        if (splits > 1) {
          static_cast<float*>(args.work.partial)[(int64_t{blockIdx.y} * M + token) * N + row] = sum;
        } else {
          static_cast<T*>(p.y)[int64_t{token} * N + row] = narrow<T>(sum + bias);
        }
      }
    }
  }
}

template <class T, WeightFormat kFormat, int kTokens>
struct Tokens {
  static auto get() { return &quantized_tokens_kernel<T, kFormat, kTokens, true>; }
};
template <class T, WeightFormat kFormat, int kTokens>
struct AnyAlignment {
  static auto get() { return &quantized_tokens_kernel<T, kFormat, kTokens, false>; }
};

template <class T>
auto choose(WeightFormat format, const QuantizedLinearPlan& plan) {
  if (!plan.wide) {
    return plan.tokens == 8 ? choose_format<AnyAlignment, T, 8>(format) : choose_format<AnyAlignment, T, 64>(format);
  }
  return plan.tokens == 8    ? choose_format<Tokens, T, 8>(format)
         : plan.tokens == 16 ? choose_format<Tokens, T, 16>(format)
         : plan.tokens == 32 ? choose_format<Tokens, T, 32>(format)
                             : choose_format<Tokens, T, 64>(format);
}

}  // namespace

const char* quantized_tokens(const QuantizedLinearArgs& args, const QuantizedLinearPlan& plan, void* stream) {
  const auto kernel = args.p.dtype == DType::kFloat16 ? choose<__half>(args.p.weight.format, plan)
                                                      : choose<__nv_bfloat16>(args.p.weight.format, plan);
  return launch(kernel, args, plan.launch, stream);
}

}  // namespace llmkernels::cuda
