// The stages of quantized_linear_tokens.cu: how they lie in shared memory, who fetches what, and the scales and zero
// points that belong to them.
#pragma once

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

}  // namespace
}  // namespace llmkernels::cuda
