// Softmax over keys that come in tiles: maxima, sums and output of a lane's two rows so far. And rows of a cache.
#pragma once

#include "ops/attention/attention_scores.cuh"
#include "ops/attention/attention_tiles.cuh"

namespace llmkernels::cuda {
namespace {

template <int kOut>
struct Softmax {
  float most[2] = {-INFINITY, -INFINITY};  // the same in the four lanes of a row
  float total[2] = {0.0f, 0.0f};           // of this lane's columns
  float out[kOut][4] = {};

  // With a score for each of the two rows that has no value: a sink.
  __device__ void start(float upper, float lower) {
    most[0] = upper, most[1] = lower;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (threadIdx.x % 4 == 0 && most[half] != -INFINITY) total[half] = 1.0f;
    }
  }

  // Scores become their weights, relative to the maximum so far; what was summed is made relative to it.
  template <int kTiles, class Rules>
  __device__ void update(float (&s)[kTiles][4], const Rules& rules) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float next = most[half];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) next = fmaxf(next, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      next = quad_max(next);
      const float base = finite_max(next), shrink = rules.power(most[half], base);
      most[half] = next;
      total[half] *= shrink;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          s[n][e] = rules.power(s[n][e], base);
          total[half] += s[n][e];
        }
      }
#pragma unroll
      for (int n = 0; n < kOut; ++n) {
        out[n][2 * half] *= shrink;
        out[n][2 * half + 1] *= shrink;
      }
    }
  }
};

// The rows of k or v of a head, which may lie on pages. Entries of the table outside the cache become its ends.
template <class T, bool kPages>
class CacheRows {
 public:
  __device__ CacheRows(const AttentionInputs& in, const void* base, const AttentionStrides& s, const AttentionSpan& span,
                       int b, int hk)
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
