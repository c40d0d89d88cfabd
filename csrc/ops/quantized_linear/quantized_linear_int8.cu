// Activations rounded to int8, a row at a time, and their product with int8 weights on tensor cores: sums of integers,
// exact, which meet both scales at the end. The product with int4 weights is in quantized_linear_w4a8.cu.
#include "common/cuda/launch.h"
#include "common/cuda/reduce.cuh"
#include "ops/quantized_linear/quantized_linear_int8.cuh"

namespace llmkernels::cuda {
namespace {

// ---- rows of x ----

// Over all threads of the block.
__device__ uint32_t block_max(uint32_t value) {
  __shared__ uint32_t of_warp[kRoundThreads / kWarpSize];
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  if (threadIdx.x % kWarpSize == 0) of_warp[threadIdx.x / kWarpSize] = value;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kRoundThreads / kWarpSize; ++warp) value = max(value, of_warp[warp]);
  return value;
}

// Neighbours `first` and on, as the product with int4 wants them: of 32 columns the even ones before the odd ones.
template <int kVec>
__device__ void store_apart(int8_t* row, int first, const Vec<int8_t, kVec>& vector) {
  Vec<int8_t, kVec / 2> half[2];
#pragma unroll
  for (int e = 0; e < kVec; ++e) half[e % 2].at[e / 2] = vector.at[e];
  const int even = first / kRoundedBlock * kRoundedBlock + first % kRoundedBlock / 2;
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    *reinterpret_cast<Vec<int8_t, kVec / 2>*>(row + even + odd * kRoundedBlock / 2) = half[odd];
  }
}

// Neighbours of the norm's weight, one beyond K.
template <class T, int kVec>
__device__ void norm_weight(const QuantizedNorm& norm, bool wide, int first, int K, float (&weight)[kVec]) {
  if (wide && first + kVec <= K) {
    load_widened<T, kVec>(norm.weight, norm.is_float, first / kVec, weight);
    return;
  }
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    const int k = first + e;
    weight[e] = k >= K           ? 1.0f
                : norm.is_float ? static_cast<const float*>(norm.weight)[k]
                                : widen(static_cast<const T*>(norm.weight)[k]);
  }
}

// One block to a row. Threads own vectors of columns, in every pass the same ones; the row comes from L1 after the first
// time, or from L2 if it is long. With kNorm the row is divided by the root of its mean square, multiplied by a weight
// and rounded to T first, as by the kernel of rms_norm.
template <class T, bool kNorm>
__global__ void __launch_bounds__(kRoundThreads)
    quantized_round_kernel(const __grid_constant__ QuantizedLinearArgs args) {
  constexpr int kVec = kVectorBytes / static_cast<int>(sizeof(T));
  const int row = static_cast<int>(blockIdx.x), K = static_cast<int>(args.p.weight.K);
  const int pitch = (K + kRoundedBlock - 1) / kRoundedBlock * kRoundedBlock;  // rounded_pitch
  const int begin = static_cast<int>(threadIdx.x) * kVec, step = kRoundThreads * kVec;
  const bool apart = args.p.weight.format == WeightFormat::kInt4;
  const T* const x = static_cast<const T*>(args.p.x) + row * args.p.x_row_stride;
  const bool wide = args.x_unit == kVectorBytes;
  const auto given = [&](int first) {
    Vec<T, kVec> vector;
    if (wide && first + kVec <= K) {
      vector = load<T, kVec>(x, first / kVec);
    } else {
#pragma unroll
      for (int e = 0; e < kVec; ++e) vector.at[e] = first + e < K ? x[first + e] : narrow<T>(0.0f);
    }
    return vector;
  };
  float rstd = 0.0f;
  if constexpr (kNorm) {
    float squares[1] = {0.0f};
    for (int first = begin; first < K; first += step) {
      const auto vector = given(first);
#pragma unroll
      for (int e = 0; e < kVec; ++e) squares[0] += widen(vector.at[e]) * widen(vector.at[e]);
    }
    RowGroup<true, float>().sum(squares);
    rstd = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(squares[0], static_cast<float>(K)) + args.norm.eps));
    if (threadIdx.x == 0) args.norm.rstd[row] = rstd;
  }
  const auto columns = [&](int first) {
    auto vector = given(first);
    if constexpr (kNorm) {
      float weight[kVec];
      const bool has_weight = args.norm.weight != nullptr;
      if (has_weight) norm_weight<T, kVec>(args.norm, args.norm.is_wide, first, K, weight);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        const float xhat = widen(vector.at[e]) * rstd;
        vector.at[e] = narrow<T>(has_weight ? xhat * weight[e] : xhat);
      }
    }
    return vector;
  };
  // The bits of magnitudes are in the order of the magnitudes, those of infinity and then NaN last.
  uint32_t most = 0;
  for (int first = begin; first < K; first += step) {
    const auto vector = columns(first);
#pragma unroll
    for (int e = 0; e < kVec; ++e) most = max(most, __float_as_uint(widen(vector.at[e])) & 0x7fffffffu);
  }
  most = block_max(most);
  const bool finite = most < 0x7f800000u;
  float scale = __fdiv_rn(__uint_as_float(most), 127.0f);
  if (scale == 0.0f) scale = 1.0f;
  if (threadIdx.x == 0) args.work.x_scales[row] = finite ? scale : NAN;
  for (int first = begin; first < pitch; first += step) {
    const auto vector = columns(first);
    Vec<int8_t, kVec> rounded;
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      // A subnormal scale may be so coarse that a quotient is beyond 127.
      const int value = finite ? __float2int_rn(__fdiv_rn(widen(vector.at[e]), scale)) : 0;
      rounded.at[e] = static_cast<int8_t>(min(max(value, -127), 127));
    }
    int8_t* const out = args.work.rounded + int64_t{row} * pitch;
    if (apart) {
      store_apart(out, first, rounded);
    } else {
      store(out, first / kVec, rounded);
    }
  }
}

// ---- the product ----

template <class T, int kTokens>
__global__ void __launch_bounds__(kInt8Threads, 1)
    quantized_int8_kernel(const __grid_constant__ QuantizedLinearArgs args) {
  using Tile = Int8Tile<kTokens>;
  constexpr int kStage = Tile::kXBytes + kInt8Rows * kInt8Columns;
  extern __shared__ __align__(1024) unsigned char shared[];
  const QuantizedWeight& w = args.p.weight;
  const Int8Place<kTokens> place(args.p);
  const int lane = place.lane, token_of_warp = place.token_of_warp, row_of_warp = place.row_of_warp;
  const auto fetch_step = [&](int step) {
    if (step < place.steps) {
      unsigned char* const stage = shared + step % kInt8Stages * kStage;
      const int column = (place.first_stage + step) * kInt8Columns;
      fetch_rows<kTokens>(stage, args.work.rounded, place.first_token, place.M, column, place.pitch, place.pitch,
                          kVectorBytes);
      fetch_rows<kInt8Rows>(stage + Tile::kXBytes, w.data, place.first_row, place.N, column, place.K, place.K,
                            args.weight_unit);
    }
    ptx::cp_async_commit();
  };

  int32_t sums[Tile::kRowTiles][Tile::kTiles][4] = {};
  for (int step = 0; step < kInt8Stages - 1; ++step) fetch_step(step);
  for (int step = 0; step < place.steps; ++step) {
    ptx::cp_async_wait<kInt8Stages - 2>();
    __syncthreads();  // this stage is there for everybody, and nobody reads the one before any more
    fetch_step(step + kInt8Stages - 1);
    const uint32_t x_tile = ptx::shared_address(shared + step % kInt8Stages * kStage);
    const uint32_t weight_tile = x_tile + Tile::kXBytes;
#pragma unroll
    for (int chunk = 0; chunk < kInt8Columns / kVectorBytes; chunk += 2) {
      uint32_t left[Tile::kRowTiles][4];
#pragma unroll
      for (int m = 0; m < Tile::kRowTiles; ++m) {
        ptx::ldmatrix_x4(left[m], x_tile + int8_chunk(token_of_warp + m * 16 + lane % 16, chunk + lane / 16));
      }
#pragma unroll
      for (int n = 0; n < Tile::kTiles; n += 2) {
        uint32_t right[4];
        const int row = row_of_warp + n * 8 + lane / 16 * 8 + lane % 8;
        ptx::ldmatrix_x4(right, weight_tile + int8_chunk(row, chunk + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < Tile::kRowTiles; ++m) {
          ptx::mma_m16n8k32_s8(sums[m][n], left[m], {right[0], right[1]});
          ptx::mma_m16n8k32_s8(sums[m][n + 1], left[m], {right[2], right[3]});
        }
      }
    }
  }
  ptx::cp_async_wait<0>();
  place.template store_sums<T>(args, sums);
}

template <bool kNorm>
auto choose_round(DType dtype) {
  return dtype == DType::kFloat32   ? &quantized_round_kernel<float, kNorm>
         : dtype == DType::kFloat16 ? &quantized_round_kernel<__half, kNorm>
                                    : &quantized_round_kernel<__nv_bfloat16, kNorm>;
}

template <class T>
auto choose(int tokens) {
  return tokens == 16   ? &quantized_int8_kernel<T, 16>
         : tokens == 64 ? &quantized_int8_kernel<T, 64>
                        : &quantized_int8_kernel<T, 128>;
}

}  // namespace

const char* quantized_round_rows(const QuantizedLinearArgs& args, void* stream) {
  const auto kernel = args.norm.rstd != nullptr ? choose_round<true>(args.p.dtype) : choose_round<false>(args.p.dtype);
  return launch(kernel, args, plan_round_rows(args.p.M), stream);
}

const char* quantized_int8(const QuantizedLinearArgs& args, const QuantizedLinearPlan& plan, void* stream) {
  const auto kernel = args.p.dtype == DType::kFloat32   ? choose<float>(plan.tokens)
                      : args.p.dtype == DType::kFloat16 ? choose<__half>(plan.tokens)
                                                        : choose<__nv_bfloat16>(plan.tokens);
  return launch(kernel, args, plan.launch, stream);
}

}  // namespace llmkernels::cuda
