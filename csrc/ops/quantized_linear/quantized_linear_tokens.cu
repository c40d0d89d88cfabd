// Up to 64 rows of 16-bit x times a quantized weight on tensor cores. The product is turned over, y^T = weight x^T: 16
// rows of the weight are the tall side of mma.m16n8k16, and 8 rows of x fill the other. Packed weights and x come in
// stages of 128 columns by cp.async; the weights become 16-bit floats, exact ones but for nf4, in the registers of the
// warp that multiplies them, and the scale of a group multiplies its sum.
//
// The columns of a product may come in any order that both factors share. Here lane t of four has columns 8 t ... of 32,
// eight that are one word of four-bit weights and one vector of x, and gives them to two instructions.
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

// What a thread fetches of each stage: chunks of the weight, one and the same of several rows, and of x likewise.
template <class T, WeightFormat kFormat, int kTokens, bool kWide>
class Fetch {
  using S = Stage<kFormat, kTokens>;
  static constexpr int kDown = kTokensThreads / S::kChunks, kXDown = kTokensThreads / S::kXChunks;
  static constexpr int kRows = kTokensRows / kDown, kXRows = (kTokens + kXDown - 1) / kXDown;
  static_assert(kTokensRows % kDown == 0);

 public:
  __device__ Fetch(const QuantizedLinearArgs& args, int first_row)
      : args_(args), rows_(static_cast<int>(args.p.weight.N) - first_row), K_(static_cast<int>(args.p.weight.K)) {
    row_bytes_ = kFourBits<kFormat> ? (K_ + 1) / 2 : K_;
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t row = first_row + thread / S::kChunks, x_row = thread / S::kXChunks;
    weight_ = static_cast<const unsigned char*>(args.p.weight.data) + (row * row_bytes_ + weight_byte());
    x_ = static_cast<const T*>(args.p.x) + (x_row * args.p.x_row_stride + x_column());
  }

  __device__ void operator()(unsigned char* stage, int column) const {
    const int thread = static_cast<int>(threadIdx.x), byte = column / (kFourBits<kFormat> ? 2 : 1);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = thread / S::kChunks + i * kDown, inside = row < rows_ ? row_bytes_ - byte - weight_byte() : 0;
      one(stage + S::weight_chunk(row, thread % S::kChunks), args_.p.weight.data,
          weight_ + (int64_t{i * kDown} * row_bytes_ + byte), inside, args_.weight_unit);
    }
#pragma unroll
    for (int i = 0; i < kXRows; ++i) {
      const int row = thread / S::kXChunks + i * kXDown;
      if (kTokens % kXDown != 0 && row >= kTokens) break;
      const int inside = row < static_cast<int>(args_.p.M) ? 2 * (K_ - column - x_column()) : 0;
      one(stage + S::x_chunk(row, thread % S::kXChunks), args_.p.x, x_ + (i * kXDown * args_.p.x_row_stride + column),
          inside, args_.x_unit);
    }
    ptx::cp_async_commit();
  }

 private:
  // Where in a stage this thread's chunks begin.
  static __device__ int weight_byte() { return static_cast<int>(threadIdx.x) % S::kChunks * kVectorBytes; }
  static __device__ int x_column() { return static_cast<int>(threadIdx.x) % S::kXChunks * 8; }

  // `inside` bytes, or as many as fit, from `source`; nothing from `tensor`, which is a valid address.
  static __device__ void one(unsigned char* target, const void* tensor, const void* source, int inside, int unit) {
    source = inside > 0 ? source : tensor;
    if constexpr (kWide) {
      ptx::cp_async<kVectorBytes>(ptx::shared_address(target), source, inside > 0 ? kVectorBytes : 0);
    } else {
      fetch_packed(target, static_cast<const unsigned char*>(source), min(max(inside, 0), kVectorBytes), unit);
    }
  }

  const QuantizedLinearArgs& args_;
  int rows_, K_, row_bytes_;
  const unsigned char* weight_;
  const T* x_;
};

// Scales and zero points of the two rows of a lane, row and row + 8, in the blocks of 32 columns of a stage.
template <class T, WeightFormat kFormat>
struct Groups {
  static constexpr int kBlocks = kTokensColumns / 32;
  float scales[kBlocks][2];
  uint32_t middles[kBlocks][2];

  __device__ Groups(const QuantizedLinearArgs& args, int row) : w_(args.p.weight), shift_(args.group_shift) {
    last_ = static_cast<int>(w_.groups) - 1;
    every_ = kFourBits<kFormat> && shift_ < 7 ? 1 << (shift_ - 5) : kBlocks;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = min(row + 8 * half, static_cast<int>(w_.N) - 1);
      base_[half] = group_index<kFormat>(w_, shift_, n, 0);
      const int size = w_.scale_type == ScaleType::kFloat32 ? 4 : w_.scale_type == ScaleType::kInt8 ? 1 : 2;
      scales_[half] = static_cast<const char*>(w_.scales) + base_[half] * size;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) middles[block][half] = middle_pair<T>(kInt4Middle);
    }
  }

  // Whether a group ends with this block; with the stage it does, or is done with it.
  __device__ bool ends(int block) const { return block == kBlocks - 1 || ((block + 1) & (every_ - 1)) == 0; }

  // Those of a stage. The branches are the same for all threads, and outside of what is unrolled.
  __device__ void load(int column) {
    if constexpr (!kFourBits<kFormat>) {
      load_every<kBlocks>(column);
    } else if (every_ == 1) {
      load_every<1>(column);
    } else if (every_ == 2) {
      load_every<2>(column);
    } else {
      load_every<kBlocks>(column);
    }
  }

 private:
  // With a group to so many blocks.
  template <int kEvery>
  __device__ void load_every(int column) {
    if (!kFourBits<kFormat> || w_.scale_type == ScaleType::kFloat32) {
      load_scales<kEvery, float>(column);
    } else if (w_.scale_type == ScaleType::kBFloat16) {
      load_scales<kEvery, __nv_bfloat16>(column);
    } else if (w_.scale_type == ScaleType::kFloat16) {
      load_scales<kEvery, __half>(column);
    } else if constexpr (kFormat == WeightFormat::kNf4) {
      each<kEvery>(column, [&](int block, int half, int group) {
        scales[block][half] = scale_at<kFormat>(w_, base_[half] + group);
      });
    }
    if constexpr (kFormat == WeightFormat::kInt4) {
      if (w_.zeros == nullptr) return;
      each<kEvery>(column, [&](int block, int half, int group) {
        const uint32_t middle = middle_pair<T>((w_.zeros + base_[half])[group]);
#pragma unroll
        for (int i = 0; i < kEvery; ++i) middles[block - i][half] = middle;
      });
    }
  }
  template <int kEvery, class Scale>
  __device__ void load_scales(int column) {
    each<kEvery>(column, [&](int block, int half, int group) {
      scales[block][half] = widen(reinterpret_cast<const Scale*>(scales_[half])[group]);
    });
  }
  // f(block, half, group) of the last block of each group.
  template <int kEvery, class F>
  __device__ void each(int column, F&& f) {
#pragma unroll
    for (int block = kEvery - 1; block < kBlocks; block += kEvery) {
      const int group = min((column + 32 * block) >> shift_, last_);
#pragma unroll
      for (int half = 0; half < 2; ++half) f(block, half, group);
    }
  }

  const QuantizedWeight& w_;
  int shift_, last_, every_;
  int64_t base_[2];
  const char* scales_[2];
};

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
