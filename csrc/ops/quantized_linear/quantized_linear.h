// quantized_linear: y = x @ weight^T + bias with a weight in one of the formats of llmkernels/quantization, where the
// bits are drawn. The contract between kernels and bindings.
//
//   int8   weight[n, k] = scales[n] * q[n, k]
//   int4   weight[n, k] = scales[n, g] * (q[n, k] - zeros[n, g]),  zeros null: 8,  g = k / group_size
//   nf4    weight[n, k] = scale[n, g] * kNf4Levels[q[n, k]],  scale = scales[n, g], or with second_scales
//          second_scales[0] + second_scales[1 + i / 256] * scales[n, g],  i = n * groups + g
//   fp8    weight[n, k] = scales[n] * q[n, k],  or scales[n / 128, k / 128] * q[n, k] with group_size 128
//
// Four-bit codes share a byte, the even column in the low half. With rounded activations each row of x has the scale
// max |x| / 127 (int8) or / 448 (fp8), 1 where that is zero, and its elements are x / scale in fp32, rounded to
// nearest, ties to even; a row with a NaN or an infinity gives NaN. Integer sums of a group are exact.
//
// T is the element type of x, bias and y: float, bfloat16 or float16. Sums are float. Strides are in elements; the last
// dimension of every tensor is contiguous. No pointer needs more than the alignment of its element type.
#pragma once

#include "common/dtype.h"

namespace llmkernels {

enum class WeightFormat : int { kInt8 = 0, kInt4 = 1, kNf4 = 2, kFp8 = 3 };
enum class Activations : int { kPlain = 0, kInt8 = 1, kFp8 = 2 };
enum class ScaleType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };  // kInt8: nf4 with second_scales

constexpr int64_t kFp8Block = 128;      // rows and columns that share a scale, of fp8 with groups
constexpr int64_t kSecondScales = 256;  // scales that share a step, of nf4 with second_scales
constexpr int kInt4Middle = 8;          // the zero point of int4 without zeros

// Quantiles of the normal distribution: Dettmers et al. 2023, arXiv:2305.14314, appendix E.
constexpr float kNf4Levels[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                                  -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                                  0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f,
                                  0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
                                  0.7229568362236023f, 1.0f};

struct QuantizedWeight {
  const void* data;            // [N, K] int8 or fp8, [N, ceil(K / 2)] bytes of int4 or nf4; contiguous
  const void* scales;          // [N] float of int8 and fp8; [N, groups] scale_type of int4 and nf4;
                               // [ceil(N / 128), groups] float of fp8 with group_size 128; contiguous
  const uint8_t* zeros;        // [N, groups] of int4; null: 8
  const float* second_scales;  // [1 + ceil(N * groups / 256)] of nf4; null: scales are scales
  int64_t N;
  int64_t K;
  int64_t group_size;          // columns; 0: the whole row
  int64_t groups;              // in a row, one at least
  WeightFormat format;
  ScaleType scale_type;
};

struct QuantizedLinearFwdParams {
  const void* x;     // [M, K]  T, row stride x_row_stride
  const void* bias;  // [N]     T, contiguous; null: none
  void* y;           // [M, N]  T, contiguous
  QuantizedWeight weight;
  int64_t M;
  int64_t x_row_stride;
  DType dtype;
  Activations activations;
};

// dx = dy @ weight; the rounding of activations passes gradients as they are.
struct QuantizedLinearBwdParams {
  const void* dy;  // [M, N]  T, row stride dy_row_stride
  void* dx;        // [M, K]  T, contiguous
  QuantizedWeight weight;
  int64_t M;
  int64_t dy_row_stride;
  DType dtype;
};

}  // namespace llmkernels
