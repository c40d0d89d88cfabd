// dx = dy @ weight: 128 columns of dx to a block, which walks over the rows of the weight. Packed weights of the next
// step come to registers while those of this one, written out in shared memory as T, are multiplied: on tensor cores,
// or by FMAs in fp32.
#include "common/cuda/launch.h"
#include "ops/quantized_linear/quantized_linear_decode.cuh"

namespace llmkernels::cuda {
namespace {

// Tiles of one step, twice: kDxRows rows of the weight, and as many columns of kTokens rows of dy.
template <class T, int kTokens>
struct DxTiles {
  static constexpr int kPerChunk = kVectorBytes / static_cast<int>(sizeof(T));
  static constexpr int kChunks = kDxColumns / kPerChunk, kDyChunks = kDxRows / kPerChunk;
  unsigned char weight[2][kDxRows * kDxColumns * sizeof(T)];
  unsigned char dy[2][kTokens * kDxRows * sizeof(T)];
  float levels[16];

  // Byte offsets of chunks of 16 bytes; ldmatrix reads the same one of eight rows.
  static __device__ int weight_chunk(int row, int chunk) {
    return (row * kChunks + (chunk ^ (row % 8))) * kVectorBytes;
  }
  static __device__ int dy_chunk(int row, int chunk) {
    const int exchanged = kDyChunks == 4 ? chunk ^ (row / 2 % 4) : chunk ^ (row % 8);
    return (row * kDyChunks + exchanged) * kVectorBytes;
  }
};

// Where the packed weights of one thread are: 16 bytes of each of a few rows, `row` and more steps of it apart.
template <WeightFormat kFormat>
struct Mine {
  static constexpr int kAcross = kDxColumns / kPerVector<kFormat>, kDown = kDxThreads / kAcross;
  static constexpr int kCount = kDxRows / kDown;
  static __device__ int row(int i) { return static_cast<int>(threadIdx.x) / kAcross + i * kDown; }
  static __device__ int column() { return static_cast<int>(threadIdx.x) % kAcross * kPerVector<kFormat>; }
};

template <WeightFormat kFormat>
__device__ void load_weights(uint4 (&packed)[Mine<kFormat>::kCount], const QuantizedLinearBwdArgs& args, int first_row,
                             int first_column) {
  const QuantizedWeight& w = args.p.weight;
  const int N = static_cast<int>(w.N), K = static_cast<int>(w.K);
  const int row_bytes = kFourBits<kFormat> ? (K + 1) / 2 : K;
  const int byte = (first_column + Mine<kFormat>::column()) / (kFourBits<kFormat> ? 2 : 1);
#pragma unroll
  for (int i = 0; i < Mine<kFormat>::kCount; ++i) {
    const int row = first_row + Mine<kFormat>::row(i), inside = row < N ? row_bytes - byte : 0;
    packed[i] = load_packed(static_cast<const unsigned char*>(w.data) + int64_t{row} * row_bytes + byte, inside,
                            args.weight_unit);
  }
}

// As the reference writes a weight out: scale * code in fp32, rounded to T.
template <class T, WeightFormat kFormat, class Tiles>
__device__ void write_weights(unsigned char* tile, const uint4 (&packed)[Mine<kFormat>::kCount],
                              const QuantizedLinearBwdArgs& args, const float* levels, int first_row,
                              int first_column) {
  const QuantizedWeight& w = args.p.weight;
  const int N = static_cast<int>(w.N), column = Mine<kFormat>::column();
#pragma unroll
  for (int i = 0; i < Mine<kFormat>::kCount; ++i) {
    const int row = Mine<kFormat>::row(i);
    const int64_t group = group_index<kFormat>(w, args.group_shift, min(first_row + row, N - 1), first_column + column);
    const float scale = scale_at<kFormat>(w, group);
    const uint32_t middle = middle_at<__nv_bfloat16, kFormat>(w, group);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      constexpr int kWord = kPerWord<kFormat>, kVec = kWord < Tiles::kPerChunk ? kWord : Tiles::kPerChunk;
      float values[kWord];
      decode_floats<kFormat>(j == 0 ? packed[i].x : j == 1 ? packed[i].y : j == 2 ? packed[i].z : packed[i].w, middle,
                             levels, values);
#pragma unroll
      for (int e = 0; e < kWord; e += kVec) {
        Vec<T, kVec> vector;
#pragma unroll
        for (int k = 0; k < kVec; ++k) vector.at[k] = narrow<T>(values[e + k] * scale);
        const int at = column + j * kWord + e, within = at % Tiles::kPerChunk * static_cast<int>(sizeof(T));
        *reinterpret_cast<Vec<T, kVec>*>(tile + Tiles::weight_chunk(row, at / Tiles::kPerChunk) + within) = vector;
      }
    }
  }
}

// The sums of a block. Warps share its columns, four of them with 16 rows of dy and two by two with 64.
template <class T, int kTokens>
struct DxSums {
  using Tiles = DxTiles<T, kTokens>;
  static constexpr int kAcross = kTokens == 16 ? 4 : 2, kRowTiles = kTokens / (4 / kAcross) / 16;
  static constexpr int kTiles = kDxColumns / kAcross / 8;
  float sums[kRowTiles][kTiles][4] = {};
  int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int row_of_warp = warp / kAcross * 16 * kRowTiles, column_of_warp = warp % kAcross * 8 * kTiles;

  __device__ void add(const unsigned char* weight, const unsigned char* dy) {
    const uint32_t weight_tile = ptx::shared_address(weight), dy_tile = ptx::shared_address(dy);
#pragma unroll
    for (int k = 0; k < kDxRows; k += 16) {
      uint32_t left[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        ptx::ldmatrix_x4(left[m], dy_tile + Tiles::dy_chunk(row_of_warp + m * 16 + lane % 16, k / 8 + lane / 16));
      }
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        uint32_t right[4];
        ptx::ldmatrix_x4_trans(right,
                               weight_tile + Tiles::weight_chunk(k + lane % 16, column_of_warp / 8 + n + lane / 16));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          ptx::mma_m16n8k16<T>(sums[m][n], left[m], {right[0], right[1]});
          ptx::mma_m16n8k16<T>(sums[m][n + 1], left[m], {right[2], right[3]});
        }
      }
    }
  }

  // f(row, column, sum) for each.
  template <class F>
  __device__ void each(F&& f) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          f(row_of_warp + m * 16 + lane / 4 + e / 2 * 8, column_of_warp + n * 8 + lane % 4 * 2 + e % 2, sums[m][n][e]);
        }
      }
    }
  }
};

// A lane has four columns, and its warp each fourth row.
template <int kTokens>
struct DxSums<float, kTokens> {
  using Tiles = DxTiles<float, kTokens>;
  static constexpr int kRows = kTokens / 4;
  float sums[kRows][4] = {};
  int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;

  __device__ void add(const unsigned char* weight, const unsigned char* dy) {
#pragma unroll 1
    for (int k = 0; k < kDxRows; k += 4) {
      float4 right[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        right[j] = *reinterpret_cast<const float4*>(weight + Tiles::weight_chunk(k + j, lane));
      }
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        const float4 left = *reinterpret_cast<const float4*>(dy + Tiles::dy_chunk(m * 4 + warp, k / 4));
        const float factors[4] = {left.x, left.y, left.z, left.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[m][0] = fmaf(factors[j], right[j].x, sums[m][0]);
          sums[m][1] = fmaf(factors[j], right[j].y, sums[m][1]);
          sums[m][2] = fmaf(factors[j], right[j].z, sums[m][2]);
          sums[m][3] = fmaf(factors[j], right[j].w, sums[m][3]);
        }
      }
    }
  }

  template <class F>
  __device__ void each(F&& f) const {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) f(m * 4 + warp, lane * 4 + e, sums[m][e]);
    }
  }
};

template <class T, WeightFormat kFormat, int kTokens>
__global__ void __launch_bounds__(kDxThreads, 1)
    quantized_dx_kernel(const __grid_constant__ QuantizedLinearBwdArgs args) {
  using Tiles = DxTiles<T, kTokens>;
  static_assert(sizeof(Tiles) == 2 * kDxRows * (kDxColumns + kTokens) * sizeof(T) + kLevelBytes);  // dx_shared
  extern __shared__ __align__(1024) unsigned char shared[];
  Tiles& tiles = *reinterpret_cast<Tiles*>(shared);
  const QuantizedLinearBwdParams& p = args.p;
  const int M = static_cast<int>(p.M), N = static_cast<int>(p.weight.N), K = static_cast<int>(p.weight.K);
  const int first_column = static_cast<int>(blockIdx.x) % args.column_blocks * kDxColumns;
  const int first_token = static_cast<int>(blockIdx.x) / args.column_blocks * kTokens;
  if constexpr (kFormat == WeightFormat::kNf4) {
    fill_levels(tiles.levels);
    __syncthreads();
  }

  const auto fetch_dy = [&](int step) {
    for (int index = static_cast<int>(threadIdx.x); index < kTokens * Tiles::kDyChunks; index += kDxThreads) {
      const int row = index / Tiles::kDyChunks, chunk = index % Tiles::kDyChunks;
      const int at = step * kDxRows + chunk * Tiles::kPerChunk, size = static_cast<int>(sizeof(T));
      const int inside = first_token + row < M ? min(max(N - at, 0) * size, kVectorBytes) : 0;
      const T* const dy = static_cast<const T*>(p.dy);
      const T* const source = inside > 0 ? dy + (first_token + row) * p.dy_row_stride + at : dy;
      fetch_packed(tiles.dy[step % 2] + Tiles::dy_chunk(row, chunk), reinterpret_cast<const unsigned char*>(source),
                   inside, args.dy_unit);
    }
    ptx::cp_async_commit();
  };

  DxSums<T, kTokens> sums;
  uint4 packed[Mine<kFormat>::kCount];
  const int steps = (N + kDxRows - 1) / kDxRows;
  if (steps > 0) {
    load_weights<kFormat>(packed, args, 0, first_column);
    fetch_dy(0);
  }
  for (int step = 0; step < steps; ++step) {
    // The buffer was read two steps ago: everybody has passed the barrier of the last one since.
    write_weights<T, kFormat, Tiles>(tiles.weight[step % 2], packed, args, tiles.levels, step * kDxRows, first_column);
    ptx::cp_async_wait<0>();
    __syncthreads();  // both tiles are there, and nobody reads those of the step before any more
    if (step + 1 < steps) {
      load_weights<kFormat>(packed, args, (step + 1) * kDxRows, first_column);
      fetch_dy(step + 1);
    }
    sums.add(tiles.weight[step % 2], tiles.dy[step % 2]);
  }

  T* const dx = static_cast<T*>(p.dx);
  sums.each([&](int row, int column, float sum) {
    const int token = first_token + row, k = first_column + column;
    if (token < M && k < K) dx[int64_t{token} * K + k] = narrow<T>(sum);
  });
}

template <class T, WeightFormat kFormat, int kTokens>
struct Dx {
  static auto get() { return &quantized_dx_kernel<T, kFormat, kTokens>; }
};

template <class T>
auto choose(WeightFormat format, int tokens) {
  return tokens == 16 ? choose_format<Dx, T, 16>(format) : choose_format<Dx, T, 64>(format);
}

}  // namespace

const char* quantized_linear_bwd(const QuantizedLinearBwdParams& params, const QuantizedLinearBwdPlan& plan,
                                 void* stream) {
  const QuantizedLinearBwdArgs args{params, plan.weight_unit, plan.dy_unit, group_shift(params.weight),
                                    plan.column_blocks};
  const WeightFormat format = params.weight.format;
  const auto kernel = params.dtype == DType::kFloat32   ? choose<float>(format, plan.tokens)
                      : params.dtype == DType::kFloat16 ? choose<__half>(format, plan.tokens)
                                                        : choose<__nv_bfloat16>(format, plan.tokens);
  return launch(kernel, args, plan.launch, stream);
}

}  // namespace llmkernels::cuda
