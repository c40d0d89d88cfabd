// Up to eight rows of fp32 x, which tensor cores would round, times a quantized weight. What counts is to read the
// weight once: a warp owns a few of its rows, each lane has 16 bytes of each on their way while it adds the products of
// those before, and x lies in shared memory, a slice of columns at a time.
#include "common/cuda/launch.h"
#include "common/cuda/reduce.cuh"
#include "ops/quantized_linear/quantized_linear_decode.cuh"

namespace llmkernels::cuda {
namespace {

// The part of x in shared memory: rows of matvec_columns. A lane reads its kPerVector elements of a row in chunks of 16
// bytes, of which those of neighbouring lanes are exchanged so that eight lanes find eight groups of banks.
template <class T, int kPerVector>
struct Slice {
  static constexpr int kPerChunk = kVectorBytes / static_cast<int>(sizeof(T)), kChunks = kPerVector / kPerChunk;
  static constexpr int kLanes = kChunks < 8 ? 8 / kChunks : 1;  // neighbours that fill all banks

  static __device__ int chunk_of(int vector, int chunk) {
    return vector * kChunks + (chunk ^ (vector / kLanes % kChunks));
  }
  // Columns first .. first + kColumns of a row that ends at K, zeros beyond.
  template <int kColumns>
  static __device__ void fill(Vec<T, kPerChunk>* row, const T* x, int first, int K, bool wide) {
    for (int i = static_cast<int>(threadIdx.x); i < kColumns / kPerChunk; i += kMatvecThreads) {
      const int column = first + i * kPerChunk;
      Vec<T, kPerChunk> chunk;
      if (wide && column + kPerChunk <= K) {
        chunk = *reinterpret_cast<const Vec<T, kPerChunk>*>(x + column);
      } else {
#pragma unroll
        for (int e = 0; e < kPerChunk; ++e) chunk.at[e] = column + e < K ? x[column + e] : narrow<T>(0.0f);
      }
      row[chunk_of(i / kChunks, i % kChunks)] = chunk;
    }
  }
};

template <class T, WeightFormat kFormat, int kTokens>
struct MatvecShape {
  static constexpr int kRows = matvec_rows(kTokens), kColumns = matvec_columns(kTokens);
  static constexpr int kStep = kWarpSize * kPerVector<kFormat>;  // columns of a warp at once
  using X = Slice<T, kPerVector<kFormat>>;
  static_assert(kColumns % kStep == 0);
};

template <class T, WeightFormat kFormat, int kTokens>
__global__ void __launch_bounds__(kMatvecThreads, 1)
    quantized_matvec_kernel(const __grid_constant__ QuantizedLinearArgs args) {
  using Shape = MatvecShape<T, kFormat, kTokens>;
  using X = typename Shape::X;
  constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns, kStep = Shape::kStep;
  constexpr int kVector = kPerVector<kFormat>, kWord = kPerWord<kFormat>;
  constexpr int kTogether = X::kPerChunk < kWord ? X::kPerChunk : kWord;  // elements of a chunk for a word
  __shared__ Vec<T, X::kPerChunk> slice[kTokens][kColumns / X::kPerChunk];
  __shared__ float levels[16];
  const QuantizedLinearFwdParams& p = args.p;
  const QuantizedWeight& w = p.weight;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int M = static_cast<int>(p.M), N = static_cast<int>(w.N), K = static_cast<int>(w.K);
  if constexpr (kFormat == WeightFormat::kNf4) fill_levels(levels);

  const int slices = (K + kColumns - 1) / kColumns, splits = static_cast<int>(gridDim.y);
  const int first = static_cast<int>(int64_t{slices} * blockIdx.y / splits) * kColumns;
  const int end = min(K, static_cast<int>(int64_t{slices} * (blockIdx.y + 1) / splits) * kColumns);
  const int first_row = (static_cast<int>(blockIdx.x) * (kMatvecThreads / kWarpSize) + warp) * kRows;
  const int row_bytes = kFourBits<kFormat> ? (K + 1) / 2 : K;

  // What the next step needs of each row.
  uint4 next[kRows];
  float next_scales[kRows];
  uint32_t next_middles[kRows];
  const auto load_next = [&](int first_of_warp) {
    const int column = first_of_warp + lane * kVector, byte = column / (kVector / kVectorBytes);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = first_row + r, inside = row < N && first_of_warp < end ? row_bytes - byte : 0;
      next[r] = load_packed(static_cast<const unsigned char*>(w.data) + int64_t{row} * row_bytes + byte, inside,
                            args.weight_unit);
      const int64_t group = group_index<kFormat>(w, args.group_shift, min(row, N - 1), column);
      next_scales[r] = scale_at<kFormat>(w, group);
      next_middles[r] = middle_at<__nv_bfloat16, kFormat>(w, group);
    }
  };

  float sums[kRows * kTokens] = {};
  load_next(first);
  for (int start = first; start < end; start += kColumns) {
    __syncthreads();  // nobody reads the slice before any more
    for (int t = 0; t < min(kTokens, M); ++t) {
      X::template fill<kColumns>(slice[t], static_cast<const T*>(p.x) + t * p.x_row_stride, start, K,
                                 args.x_unit == kVectorBytes);
    }
    __syncthreads();
    for (int step = 0; step < kColumns && start + step < end; step += kStep) {
      const int vector = step / kVector + lane;
      uint4 now[kRows];
      float scales[kRows];
      uint32_t middles[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        now[r] = next[r], scales[r] = next_scales[r], middles[r] = next_middles[r];
      }
      load_next(start + step + kStep);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float weights[kRows][kWord];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const uint32_t word = i == 0 ? now[r].x : i == 1 ? now[r].y : i == 2 ? now[r].z : now[r].w;
          decode_floats<kFormat>(word, middles[r], levels, weights[r]);
        }
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          if (t >= M) break;
#pragma unroll
          for (int e = 0; e < kWord; e += kTogether) {
            const auto chunk = slice[t][X::chunk_of(vector, (i * kWord + e) / X::kPerChunk)];
            float dots[kRows] = {};  // of a chunk: short sums are rounded less
#pragma unroll
            for (int j = 0; j < kTogether; ++j) {
              const float value = widen(chunk.at[(i * kWord + e) % X::kPerChunk + j]);
#pragma unroll
              for (int r = 0; r < kRows; ++r) dots[r] = fmaf(value, weights[r][e + j], dots[r]);
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r) sums[r * kTokens + t] = fmaf(dots[r], scales[r], sums[r * kTokens + t]);
          }
        }
      }
    }
  }

  warp_sum(sums);
  if (lane != 0) return;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int row = first_row + r;
      if (row < N && t < M) {
        if (splits > 1) {
          static_cast<float*>(args.work.partial)[(int64_t{blockIdx.y} * M + t) * N + row] = sums[r * kTokens + t];
        } else {
          const float bias = p.bias == nullptr ? 0.0f : widen(static_cast<const T*>(p.bias)[row]);
          static_cast<T*>(p.y)[int64_t{t} * N + row] = narrow<T>(sums[r * kTokens + t] + bias);
        }
      }
    }
  }
}

template <class T, WeightFormat kFormat, int kTokens>
struct Matvec {
  static auto get() { return &quantized_matvec_kernel<T, kFormat, kTokens>; }
};

}  // namespace

const char* quantized_matvec(const QuantizedLinearArgs& args, const QuantizedLinearPlan& plan, void* stream) {
  const WeightFormat format = args.p.weight.format;
  const auto kernel = plan.tokens == 1   ? choose_format<Matvec, float, 1>(format)
                      : plan.tokens == 4 ? choose_format<Matvec, float, 4>(format)
                                         : choose_format<Matvec, float, 8>(format);
  return launch(kernel, args, plan.launch, stream);
}

}  // namespace llmkernels::cuda
