// What the tasks of the forward of attention on the CPU work on: how a call is cut into them, their memory, softmax.
#pragma once

#include "ops/attention/attention_cpu_direct.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kBlockRows = 96;   // rows of a task: what a packed block of keys is read for
constexpr int64_t kBlockKeys = 128;  // K and V of it fit the first cache with D = 64
constexpr int64_t kDirectRows = 32;  // up to this many rows of a key head packing takes longer than it saves (Zen 5)
constexpr int64_t kSplitKeys = 512;  // keys of a task where they are split
// Where a task has all key heads: the same; the most rows of one of them, with more of which products and not memory
// take the time; bytes of the queries and sums of all of them, which stay in the second cache.
constexpr int64_t kSweptSplitKeys = 256, kSweptRows = 8, kSweptBytes = 128 * 1024;
constexpr int kStats = 2;            // row_max and the sum, in front of a split's result

struct FwdPlan {
  bool direct;
  bool swept;              // a task has all key heads: (b, split)
  int64_t blocks, splits;  // tasks are (b, key head, block, split)
  int64_t split_keys;
  int64_t group, rows;     // query heads of a key head; the most rows of one that a task has
  int64_t heads, head_rows;  // key heads of a task; rows from one to the next

  explicit FwdPlan(const AttentionInputs& in) {
    group = in.Hk > 0 ? in.H / in.Hk : 1;
    const int64_t all = group * in.S;
    direct = all <= kDirectRows;
    rows = all < kBlockRows ? all : kBlockRows;
    blocks = div_up(all, kBlockRows);
    head_rows = round_up(rows, kDirectTileRows);
    // Where a key's heads lie side by side, going through one head reads a few lines here and there.
    const bool side_by_side = in.k_strides.head < in.k_strides.row && in.v_strides.head < in.v_strides.row;
    swept = all <= kSweptRows && in.Hk > 1 && side_by_side && in.mask_kind == MaskKind::kNone &&
            in.Hk * rows * (in.D + in.Dv) * static_cast<int64_t>(sizeof(float)) <= kSweptBytes;
    heads = swept ? in.Hk : 1;
    split_keys = swept ? kSweptSplitKeys : kSplitKeys;
    splits = blocks == 1 && in.T > split_keys ? div_up(in.T, split_keys) : 1;
  }
};

template <class T>
struct FwdMemory {
  using C = ProductOf<T>;
  static constexpr int n = kLanes<float>;
  static constexpr int kTileRows = CPU_CAPABILITY::kTileRows<C>;
  int64_t q_row, acc_row, key_words, value_words;  // of a row of q, of the sums; of a packed block of K, of V
  Word *q, *k, *v;
  uint8_t* is_packed;
  float *acc, *s, *top, *total, *factors;
  Word* p;
  ScoreRow* rows;
  int64_t bytes;

  FwdMemory(const AttentionInputs& in, const FwdPlan& plan, char* base) {
    Arena arena{base};
    const int64_t most = (plan.swept ? plan.heads * plan.head_rows : plan.rows) + n;
    const int64_t score_rows = plan.swept ? most : kTileRows;
    q_row = round_up(div_up(in.D, kPerWord<C>), n);
    acc_row = round_up(in.Dv, n);
    key_words = words_of<C>(in.D) * kBlockKeys;
    value_words = kBlockKeys / kPerWord<C> * acc_row;
    q = arena.take<Word>(most * q_row);
    acc = arena.take<float>(most * acc_row);
    s = arena.take<float>(score_rows * kBlockKeys);
    p = arena.take<Word>(score_rows * kBlockKeys / kPerWord<C>);
    top = arena.take<float>(most);
    total = arena.take<float>(most * n);
    factors = arena.take<float>(plan.swept ? most : 0);
    rows = arena.take<ScoreRow>(most);
    const int64_t packed = plan.direct ? 0 : div_up(in.T, kBlockKeys);
    is_packed = arena.take<uint8_t>(packed);
    k = arena.take<Word>(packed * key_words);
    v = arena.take<Word>(packed * value_words);
    bytes = arena.used;
  }

  // What of it belongs to the rows from `first` on.
  FwdMemory from(int64_t first) const {
    FwdMemory part = *this;
    part.q += first * q_row, part.acc += first * acc_row, part.rows += first;
    part.s += first * kBlockKeys, part.p += first * kBlockKeys / kPerWord<C>;
    part.top += first, part.total += first * n, part.factors += first;
    return part;
  }
};

// The rows of a task as they are in its tensors.
struct TaskRows {
  int64_t head, first, queries;  // row r is query (first + r) % queries of head + (first + r) / queries
  int64_t head_of(int64_t r) const { return head + (first + r) / queries; }
  int64_t query_of(int64_t r) const { return (first + r) % queries; }
};

// Rows of one call of softmax_rows: their maxima are one vector.
template <class T>
constexpr int kSoftmaxRows = kTileRows<ProductOf<T>> > 8 ? kLanes<float> : kTileRows<ProductOf<T>> > 4 ? 8 : 4;

// Scores to weights, and the running maximum and sum. Gives the factors of the earlier sums.
template <class T, class P, bool kPlain>
__attribute__((noinline)) void softmax_rows(const AttentionInputs& in, const FwdMemory<T>& memory, const float* s,
                                            int64_t first_row, int count, int64_t first_key, int64_t c0, int64_t c1,
                                            P* weights, float* factors) {
  constexpr int n = kLanes<float>;
  constexpr int kCount = kSoftmaxRows<T>;
  constexpr bool kCoarse = sizeof(T) == 2;
  FloatVector tops[kCount];
  for (int i = 0; i < kCount; ++i) tops[i] = splat(-kInfinity);
  for (int i = 0; i < count; ++i) {
    FloatVector top = splat(-kInfinity);
    for (int64_t j = c0; j < c1; j += n) top = maximum(load(s + i * kBlockKeys + j), top);
    tops[i] = top;
  }
  FloatVector top = combine_lanes<kCount>(tops, Max{});
  if (kPlain) top = top * in.scale;
  const FloatVector before = load(memory.top + first_row);
  const FloatVector now = maximum(top, before);
  const FloatVector safe = now == -kInfinity ? FloatVector{} : now;
  store(factors, exp<float>(before - safe));
  store_tail(memory.top + first_row, now, count);
  float subtracted[n];
  store(subtracted, safe);
  for (int i = 0; i < count; ++i) {
    const float* row = s + i * kBlockKeys;
    P* to = weights + i * kBlockKeys;
    const float highest = subtracted[i];
    const auto weight = [&](int64_t j) {
      const FloatVector x = kPlain ? load(row + j) * in.scale - highest : load(row + j) - highest;
      return exp<float, kCoarse>(x);
    };
    FloatVector sum{};
    if (in.seed != nullptr) {
      const RowKeys random = memory.rows[first_row + i].random;
      for (int64_t j = c0; j < c1; j += n) {
        const FloatVector w = weight(j);
        sum += w;
        store_weights(to + j, select(kept(random, first_key + j, in.dropout_threshold), w));
      }
    } else {
      for (int64_t j = c0; j < c1; j += n) {
        const FloatVector w = weight(j);
        sum += w;
        store_weights(to + j, w);
      }
    }
    float* total = memory.total + (first_row + i) * n;
    store(total, load(total) * factors[i] + sum);
  }
}

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
