// What becomes of the product of a query and a key, the same in every kernel: scale, softcap, ALiBi, masks, the window,
// the end of a sequence, dropout. attention.h has the formulas.
#pragma once

#include "common/cuda/ptx.cuh"
#include "common/cuda/vec.cuh"
#include "common/random.h"
#include "ops/attention/attention_plan.h"

namespace llmkernels::cuda {
namespace {

constexpr float kLog2e = 1.44269504f;

// The rows of one entry of the batch: all, or a packed sequence, or what a cache holds. Lengths on a GPU are values
// that nobody has checked, so they are clamped.
struct AttentionSpan {
  int first_q = 0, rows, first_k = 0, keys;

  __device__ AttentionSpan(const AttentionInputs& in, int b)
      : rows(static_cast<int>(in.q_rows)), keys(static_cast<int>(in.k_rows)) {
    if (in.cu_seqlens_q != nullptr) {
      const int q_rows = rows, k_rows = keys;
      first_q = min(max(in.cu_seqlens_q[b], 0), q_rows);
      rows = min(max(in.cu_seqlens_q[b + 1], first_q), q_rows) - first_q;
      first_k = min(max(in.cu_seqlens_k[b], 0), k_rows);
      keys = min(max(in.cu_seqlens_k[b + 1], first_k), k_rows) - first_k;
    } else if (in.seqlens_k != nullptr) {
      keys = min(max(in.seqlens_k[b], 0), keys);
    }
  }

  // Of q or dq and the like, of k or dk and the like, and of what has one number for each row.
  template <class T>
  __device__ T* queries(T* base, const AttentionStrides& s, int b, int h) const {
    return base + b * s.batch + h * s.head + first_q * s.row;
  }
  template <class T>
  __device__ T* keys_of(T* base, const AttentionStrides& s, int b, int hk) const {
    return base + b * s.batch + hk * s.head + first_k * s.row;
  }
  // Also dropout's number of the first row.
  __device__ int64_t first_stat(const AttentionInputs& in, int b, int h) const {
    return ((in.cu_seqlens_q != nullptr ? 0 : b * in.H) + h) * in.q_rows + first_q;
  }
};

// exp of a number that is at most 0, or a little more.
template <class T>
__device__ float exp_of(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return expf(x);
  } else {
    return ptx::exp2_approx(x * kLog2e);
  }
}

template <class T>
__device__ float tanh_of(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return tanhf(x);
  } else {
    return 1.0f - __fdividef(2.0f, 1.0f + ptx::exp2_approx(x * (2.0f * kLog2e)));  // absolute error 1e-7
  }
}

// row_max of a row without keys is -inf, and its scores are too: exp(-inf - 0) is 0, where -inf + inf would be NaN.
__device__ inline float finite_max(float row_max) { return row_max == -INFINITY ? 0.0f : row_max; }

struct Range {
  int begin, end;
};

// The rules of one head. Plain: scores stay products of q and k without their scale, and what is not seen is -inf.
template <class T, bool kGeneral>
class ScoreRules {
 public:
  __device__ ScoreRules(const AttentionInputs& in, const AttentionSpan& span, int b, int h)
      : in_(in), rows_(span.rows), keys_(span.keys), shift_(in.top_left ? 0 : span.keys - span.rows),
        left_(limit(in.window_left)), right_(limit(in.window_right)), unit_(in.scale * kLog2e) {
    if constexpr (kGeneral) {
      if (in.alibi_slopes != nullptr) slope_ = in.alibi_slopes[b * in.slope_batch_stride + h];
      mask_offset_ = b * in.mask_strides[0] + h * in.mask_strides[1];
      if (in.softcap > 0.0f) inverse_cap_ = 1.0f / in.softcap;
    }
  }

  // Keys that any of the queries first .. last sees, and queries that see any of the keys.
  __device__ Range keys_of(int first, int last) const {
    last = min(last, rows_ - 1);
    const int begin = max(0, first + shift_ - left_), end = min(keys_, last + shift_ + right_ + 1);
    return {begin, max(begin, end)};
  }
  __device__ Range queries_of(int first, int last) const {
    last = min(last, keys_ - 1);
    const int begin = max(0, first - shift_ - right_), end = min(rows_, last - shift_ + left_ + 1);
    return {begin, max(begin, end)};
  }
  __device__ bool sees(int i, int j) const {
    return i < rows_ && j < keys_ && j >= i + shift_ - left_ && j <= i + shift_ + right_;
  }
  // Whether each of queries i .. i_last sees each of keys j .. j_last.
  __device__ bool sees_all(int i, int i_last, int j, int j_last) const {
    return i_last < rows_ && j_last < keys_ && j >= i_last + shift_ - left_ && j_last <= i + shift_ + right_;
  }

  // Products of a warp's 16 rows and 8 kTiles columns become scores. A lane's first row is `row` and its first column
  // `column`: query and key, or key and query where kTransposed. `slope`: the derivative of softcap, where kSlope.
  template <bool kTransposed, bool kSlope, int kTiles>
  __device__ void scores(float (&s)[kTiles][4], float (&slope)[kSlope ? kTiles : 1][4], int row, int column,
                         bool whole) const {
    if constexpr (kGeneral) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int own = row + e / 2 * 8, other = column + n * 8 + e % 2;
          float factor = 1.0f;
          s[n][e] = score(s[n][e], kTransposed ? other : own, kTransposed ? own : other, slope_, factor);
          if constexpr (kSlope) slope[n][e] = factor;
        }
      }
    } else if (!whole) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int own = row + e / 2 * 8, other = column + n * 8 + e % 2;
          if (!sees(kTransposed ? other : own, kTransposed ? own : other)) s[n][e] = -INFINITY;
        }
      }
    }
  }

  __device__ float score(float product, int i, int j, float alibi, float& slope) const {
    float x = product * in_.scale;
    if (in_.softcap > 0.0f) {
      const float ratio = tanh_of<T>(x * inverse_cap_);
      slope = 1.0f - ratio * ratio;
      x = in_.softcap * ratio;
    }
    if (alibi != 0.0f) x -= alibi * static_cast<float>(abs(i + shift_ - j));
    if (!sees(i, j)) return -INFINITY;
    return in_.mask_kind == MaskKind::kNone ? x : masked(x, i, j);
  }

  // exp(score - base), for `base` of the same unit.
  __device__ float power(float score, float base) const {
    return kGeneral ? exp_of<T>(score - base) : ptx::exp2_approx(fmaf(score, unit_, -base * unit_));
  }
  // A maximum of scores in natural units.
  __device__ float natural(float score) const { return kGeneral ? score : score * in_.scale; }

  // The weight of a score, of a row with this row_max and log_sum.
  struct Base {
    float row_max, log_sum;
  };
  __device__ Base base(float row_max, float log_sum) const {
    if (kGeneral) return {finite_max(row_max), log_sum};
    return {row_max == -INFINITY ? 0.0f : -(row_max + log_sum) * kLog2e, 0.0f};
  }
  __device__ float weight(float score, const Base& base) const {
    return kGeneral ? exp_of<T>((score - base.row_max) - base.log_sum)
                    : ptx::exp2_approx(fmaf(score, unit_, base.row_max));
  }

 private:
  static __device__ int limit(int64_t entry) {
    return entry < 0 || entry > kAttentionOpen ? kAttentionOpen : static_cast<int>(entry);
  }

  __device__ float masked(float x, int i, int j) const {
    const int64_t index = mask_offset_ + i * in_.mask_strides[2] + j * in_.mask_strides[3];
    if (in_.mask_kind == MaskKind::kBool) return static_cast<const uint8_t*>(in_.mask)[index] != 0 ? x : -INFINITY;
    if (in_.mask_kind == MaskKind::kElement) return x + widen(static_cast<const T*>(in_.mask)[index]);
    return x + static_cast<const float*>(in_.mask)[index];
  }

  const AttentionInputs& in_;
  int rows_, keys_, shift_, left_, right_;
  float unit_, slope_ = 0.0f, inverse_cap_ = 0.0f;
  int64_t mask_offset_ = 0;
};

// Dropout of the elements of a row: 0, or what a kept one is multiplied with. Without dropout everything is kept.
class Dropout {
 public:
  __device__ explicit Dropout(const AttentionInputs& in)
      : drops_(in.seed != nullptr), threshold_(in.dropout_threshold),
        inverse_(drops_ ? 1.0f / fmaxf(1.0f - in.dropout_p, 1e-30f) : 1.0f), seed_(drops_ ? *in.seed : 0) {}
  __device__ bool drops() const { return drops_; }
  __device__ float inverse() const { return inverse_; }
  __device__ RowKeys keys(int64_t row) const { return row_keys(seed_, row); }
  __device__ bool keeps(RowKeys keys, int column) const {
    return random_bits(keys, static_cast<uint32_t>(column)) >> 8 >= threshold_;
  }

 private:
  bool drops_;
  uint32_t threshold_;
  float inverse_;
  int64_t seed_;
};

}  // namespace
}  // namespace llmkernels::cuda
