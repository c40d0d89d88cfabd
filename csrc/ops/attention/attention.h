// Attention: the contract between kernels and bindings. llmkernels/ops/attention/reference.py has the maths.
//
//   s = scale * q_i . k_j;  s = softcap * tanh(s / softcap) where softcap > 0
//   s = s - slope * |center(i) - j| + mask;  center(i) = i where top_left, else i + T - S (the lengths of the sequence)
//   s = -inf where a boolean mask is 0, j < center(i) - window_left or j > center(i) + window_right (-1: open)
//   m = max_j s, sink;  l = sum_j exp(s - m) + exp(sink - m);  out = sum_j keep * exp(s - m) / l / (1 - dropout_p) * v_j
//
// A row without any key has m = -inf, log l = 0 and out = 0. m and log l are kept apart, because their sum loses log l
// where m is as large as a mask of finfo.min: p = exp((s - m) - log l). In such a row s - m must not become Inf or NaN:
// nothing is multiplied by log2(e) before the subtraction.
//
// T is the element type of q, k, v, out and their gradients: float, bfloat16 or float16; sums are in float. Strides are
// in elements; the last dimension of q, k, v, out and their gradients is contiguous. No pointer needs more than the
// alignment of its element type. Query head h reads key head h / (H / Hk).
//
// Packed (cu_seqlens_q not null): sequence b has the rows cu_seqlens_q[b] .. cu_seqlens_q[b + 1] of q, out, row_max,
// log_sum and the gradients, and the rows cu_seqlens_k[b] .. cu_seqlens_k[b + 1] of k and v; batch strides are 0. On a
// GPU nobody has looked at these values: kernels clamp them to [0, q_rows] and [0, k_rows].
#pragma once

#include "common/dtype.h"

namespace llmkernels {

enum class MaskKind : int { kNone = 0, kBool = 1, kElement = 2, kFloat32 = 3 };  // kElement: T, added; bool: 1 byte

// Rows of one tensor, [B, heads, rows, dim].
struct AttentionStrides {
  int64_t batch, head, row;
};

struct AttentionInputs {
  const void* q;              // [B, H, S, D]    T
  const void* k;              // [B, Hk, T, D]   T; paged: [pages, Hk, page_size, D]
  const void* v;              // [B, Hk, T, Dv]  T; paged: [pages, Hk, page_size, Dv]
  const void* mask;           // [B, H, S, T]    of mask_kind; a stride of 0 broadcasts, the last one is 0 or 1
  const float* alibi_slopes;  // [B, H]          batch stride slope_batch_stride (0: the same for all); null: none
  const float* sinks;         // [H]             null: none
  const int64_t* seed;        // []              null: no dropout. common/random.h; row (b * H + h) * q_rows + i, column j
  const int32_t* cu_seqlens_q;  // [B + 1]       null: not packed
  const int32_t* cu_seqlens_k;  // [B + 1]
  const int32_t* seqlens_k;     // [B]           keys of each sequence, at most T; null: T. A cache only
  const int32_t* block_table;   // [B, pages of a sequence]  row stride block_table_stride; null: not paged
  AttentionStrides q_strides, k_strides, v_strides;
  int64_t mask_strides[4];
  int64_t slope_batch_stride, block_table_stride;
  int64_t B, H, Hk, D, Dv;
  int64_t S, T;            // packed: no sequence is longer (T: of the backward only)
  int64_t q_rows, k_rows;  // of q and k: S and T, or packed all of them
  int64_t page_size, pages;
  int64_t window_left, window_right;
  float scale, softcap, dropout_p;
  uint32_t dropout_threshold;  // round(dropout_p * 2^24); packed: the row's number is h * q_rows + the packed row
  bool top_left;
  DType dtype;
  MaskKind mask_kind;
};

struct AttentionFwdParams {
  AttentionInputs in;
  void* out;       // [B, H, S, Dv]  T
  float* row_max;  // [B, H, q_rows] contiguous; packed: [H, q_rows]
  float* log_sum;  // as row_max
  AttentionStrides out_strides;
};

// With p = exp((s - m) - log l) and dp_ij = keep / (1 - dropout_p) * dout_i . v_j:
//   delta_i = dout_i . out_i - dlse_i;  ds = p * (dp - delta);  dmask = ds, summed over what it broadcasts
//     (sum_j p dp is dout_i . out_i too, without the rounding of out)
//   dv_j = sum_i keep / (1 - dropout_p) * p * dout_i;  ds becomes scale * ds * (1 - (capped / softcap)^2)
//   dq_i = sum_j ds k_j;  dk_j = sum_i ds q_i
struct AttentionBwdParams {
  AttentionInputs in;
  const void* dout;      // [B, H, S, Dv]  T
  const void* out;       // [B, H, S, Dv]  T
  const float* row_max;  // [B, H, q_rows]
  const float* log_sum;  // as row_max
  const float* dlse;     // as row_max; null: none
  float* delta;          // as row_max: written by the kernels, unless it is there; dsinks are made from it
  void* dq;              // [B, H, S, D]   T; null: not wanted
  void* dk;              // [B, Hk, T, D]  T; null: not wanted
  void* dv;              // [B, Hk, T, Dv] T; null: not wanted
  void* dmask;           // the shape of the mask, contiguous, of mask_kind; null: not wanted
  AttentionStrides dout_strides, out_strides, dq_strides, dk_strides, dv_strides;
  int64_t dmask_sizes[4];  // each 1 or that of [B, H, S, T]
  bool has_delta;          // delta is there already
};

}  // namespace llmkernels
