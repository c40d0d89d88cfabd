// Softmax over keys that come in tiles: maxima, sums and output of a lane's two rows so far. And rows of a cache.
#pragma once

#include "ops/attention/attention_scores.cuh"
#include "ops/attention/attention_tiles.cuh"

namespace llmkernels::cuda {
namespace {

template <int kRows, int kOut>
struct Softmax {
  float most[kRows][2];  // the same in the four lanes of a row
  float total[kRows][2] = {};  // of this lane's columns
  float out[kRows][kOut][4] = {};

  __device__ Softmax() {
#pragma unroll
    for (int m = 0; m < kRows; ++m) most[m][0] = most[m][1] = -INFINITY;
  }

  // With a score that has no value, a sink, for a row of each 16: that of lane / 4, or the one 8 below.
  __device__ void start(int half, float score) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      most[m][half] = score;
      total[m][half] = threadIdx.x % 4 == 0 && score != -INFINITY ? 1.0f : 0.0f;
    }
  }

  // Scores become their weights, relative to the maximum so far; what was summed is made relative to it.
  template <int kTiles, class Rules>
  __device__ void update(float (&s)[kRows][kTiles][4], const Rules& rules) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float next = most[m][half];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) next = fmaxf(next, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        next = quad_max(next);
        const float base = finite_max(next);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) s[m][n][e] = rules.power(s[m][n][e], base);
        }
        const float shrink = rules.power(most[m][half], base);
        most[m][half] = next;
        // Maxima soon stay what they are. NaN is not equal to 1 either.
        if (__any_sync(kWholeWarp, shrink != 1.0f)) {
          total[m][half] *= shrink;
#pragma unroll
          for (int n = 0; n < kOut; ++n) {
            out[m][n][2 * half] *= shrink;
            out[m][n][2 * half + 1] *= shrink;
          }
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n) total[m][half] += s[m][n][2 * half] + s[m][n][2 * half + 1];
      }
    }
  }
};

// The rows of k or v of a head, which may lie on pages. Entries of the table outside the cache become its ends.
template <class T, bool kPages>
class CacheRows {
 public:
  __device__ CacheRows(const AttentionInputs& in, const void* base, const AttentionStrides& s,
                       const AttentionSpan& span, int b, int hk)
      : row_(s.row) {
    base_ = static_cast<const T*>(base) + hk * s.head;
    if (kPages && in.block_table != nullptr) {
      table_ = in.block_table + b * in.block_table_stride;
      page_ = s.batch, page_size_ = static_cast<int>(in.page_size), last_page_ = static_cast<int>(in.pages) - 1;
    } else {
      base_ += b * s.batch + span.first_k * s.row;
    }
  }
  __device__ const T* operator()(int row) const {
    if (kPages && table_ != nullptr) {
      const int page = min(max(table_[row / page_size_], 0), last_page_);
      return base_ + page * page_ + row % page_size_ * row_;
    }
    return base_ + row * row_;
  }

 private:
  const T* base_;
  const int32_t* table_ = nullptr;
  int64_t row_, page_ = 0;
  int page_size_ = 1, last_page_ = 0;
};

}  // namespace
}  // namespace llmkernels::cuda
