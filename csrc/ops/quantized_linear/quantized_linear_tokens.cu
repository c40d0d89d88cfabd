// Up to 64 rows of 16-bit x times a quantized weight on tensor cores. The product is turned over, y^T = weight x^T, so
// that 16 rows of the weight are the tall side of mma.m16n8k16 and 8 rows of x fill the other. Packed weights and x come
// in stages of 128 columns by cp.async; the weights become 16-bit floats, exact ones but for nf4, in the registers of
// the warp that multiplies them, and the scale of a group multiplies its sum.
//
// The columns of a product may come in any order that both factors share. Here lane t of four has columns 8 t .. 8 t + 7
// of 32, which are one word of four-bit weights and one vector of x, and gives them to two instructions.
#include "common/cuda/launch.h"
#include "ops/quantized_linear/quantized_linear_decode.cuh"

namespace llmkernels::cuda {
namespace {

template <WeightFormat kFormat, int kTokens>
struct Stage {
  static constexpr int kRowBytes = kTokensColumns / (kFourBits<kFormat> ? 2 : 1), kChunks = kRowBytes / kVectorBytes;
  static constexpr int kXChunks = kTokensColumns * 2 / kVectorBytes;
  static constexpr int kWeightBytes = kTokensRows * kRowBytes;
  static constexpr int kBytes = tokens_stage_bytes(kFourBits<kFormat>, kTokens);
  static constexpr int kStages = tokens_stages(kFourBits<kFormat>, kTokens);
  static_assert(kStages >= 2 && kBytes == kWeightBytes + kTokens * kTokensColumns * 2);

  // Byte offsets of chunks of 16 bytes. Eight rows are read at once: a word of each (four bits, two rows fill all
  // banks), or half a chunk of each (eight bits, one row does, four rows at a time).
  static __device__ int weight_chunk(int row, int chunk) {
    const int exchanged = kFourBits<kFormat> ? chunk ^ (row / 2 % 4) : chunk ^ (row % 4 * 2);
    return (row * kChunks + exchanged) * kVectorBytes;
  }
  // Four chunks each of two rows are read at once.
  static __device__ int x_chunk(int row, int chunk) {
    return kWeightBytes + (row * kXChunks + (chunk ^ (row % 2 * 4))) * kVectorBytes;
  }
};

template <class T, WeightFormat kFormat, int kTokens>
__device__ void fetch_stage(unsigned char* stage, const QuantizedLinearArgs& args, int first_row, int column) {
  using S = Stage<kFormat, kTokens>;
  const QuantizedWeight& w = args.p.weight;
  const int N = static_cast<int>(w.N), M = static_cast<int>(args.p.M), K = static_cast<int>(w.K);
  const int row_bytes = kFourBits<kFormat> ? (K + 1) / 2 : K, byte = column / (kFourBits<kFormat> ? 2 : 1);
  static_assert(kTokensRows * S::kChunks % kTokensThreads == 0);
#pragma unroll 4
  for (int i = 0; i < kTokensRows * S::kChunks / kTokensThreads; ++i) {
    const int index = static_cast<int>(threadIdx.x) + i * kTokensThreads, row = index / S::kChunks;
    const int chunk = index % S::kChunks, at = byte + chunk * kVectorBytes;
    const int inside = first_row + row < N ? min(max(row_bytes - at, 0), kVectorBytes) : 0;
    const auto* source = static_cast<const unsigned char*>(w.data) + (int64_t{first_row} + row) * row_bytes + at;
    fetch_packed(stage + S::weight_chunk(row, chunk), inside > 0 ? source : static_cast<const unsigned char*>(w.data),
                 inside, args.weight_unit);
  }
  for (int index = static_cast<int>(threadIdx.x); index < kTokens * S::kXChunks; index += kTokensThreads) {
    const int row = index / S::kXChunks, chunk = index % S::kXChunks, at = column + chunk * 8;
    const int inside = row < M ? min(max(K - at, 0) * 2, kVectorBytes) : 0;
    const auto* source = reinterpret_cast<const unsigned char*>(static_cast<const T*>(args.p.x) + row * args.p.x_row_stride + at);
    fetch_packed(stage + S::x_chunk(row, chunk), inside > 0 ? source : static_cast<const unsigned char*>(args.p.x),
                 inside, args.x_unit);
  }
  ptx::cp_async_commit();
}

template <bool kFirst, class A>
__device__ A& first_if(A& first, A& second) {
  if constexpr (kFirst) return first;
  return second;
}

template <class T, WeightFormat kFormat, int kTokens>
__global__ void __launch_bounds__(kTokensThreads, 1) quantized_tokens_kernel(const __grid_constant__ QuantizedLinearArgs args) {
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
  const auto fetch_step = [&](int step) {
    if (step < steps) {
      fetch_stage<T, kFormat, kTokens>(shared + step % S::kStages * S::kBytes, args, first_row,
                                       (first_stage + step) * kTokensColumns);
    } else {
      ptx::cp_async_commit();  // an empty group, so that as many are always behind the one waited for
    }
  };
  // The rows of this lane are row_of_warp + 8 half.
  const auto weight_row = [&](int half) { return min(first_row + row_of_warp + 8 * half, N - 1); };

  float sums[kTiles][4] = {};
  for (int step = 0; step < S::kStages - 1; ++step) fetch_step(step);
  for (int step = 0; step < steps; ++step) {
    const int column = (first_stage + step) * kTokensColumns;
    float scales[kBlocks][2];
    uint32_t middles[kBlocks][2];
    // Whether a group ends with this block of 32 columns; with the stage it does, or is done with it.
    const auto ends = [&](int block) {
      return block == kBlocks - 1 || (kFourBits<kFormat> && (block + 1) % (1 << min(args.group_shift - 5, 2)) == 0);
    };
    if constexpr (!kRowScales) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        if (!kFourBits<kFormat> && block < kBlocks - 1) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t group = group_index<kFormat>(w, args.group_shift, weight_row(half), column + 32 * block);
          if (ends(block)) scales[block][half] = scale_at<kFormat>(w, group);
          middles[block][half] = middle_at<T, kFormat>(w, group);
        }
      }
    }
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
          decode<T, kFormat>(word, middles[block][half], levels, pairs[half]);
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
        if (ends(block)) {
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              sums[n][e] = fmaf(parts[n][e], scales[block][e / 2], sums[n][e]);
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
  static auto get() { return &quantized_tokens_kernel<T, kFormat, kTokens>; }
};

template <class T>
auto choose(WeightFormat format, int tokens) {
  return tokens == 8    ? choose_format<Tokens, T, 8>(format)
         : tokens == 16 ? choose_format<Tokens, T, 16>(format)
         : tokens == 32 ? choose_format<Tokens, T, 32>(format)
                        : choose_format<Tokens, T, 64>(format);
}

}  // namespace

const char* quantized_tokens(const QuantizedLinearArgs& args, const QuantizedLinearPlan& plan, void* stream) {
  const auto kernel = args.p.dtype == DType::kFloat16 ? choose<__half>(args.p.weight.format, plan.tokens)
                                                      : choose<__nv_bfloat16>(args.p.weight.format, plan.tokens);
  return launch(kernel, args, plan.launch, stream);
}

}  // namespace llmkernels::cuda
