// The forward of attention on the CPU, compiled once per instruction set: tiles of scores in the first cache, softmax
// as they come. The maths is in attention.h.
//
// A task is a block of the rows of a key head, which are the queries of all its heads. Its keys are all, or with a
// single block of rows a part of them, whose results are merged. Keys and values are packed once for all tasks of a key
// head that a thread works on; where rows are few they are read where they lie.
#include "ops/attention/attention_cpu.h"
#include "ops/attention/attention_cpu_direct.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kBlockRows = 96;   // rows of a task: what a packed block of keys is read for
constexpr int64_t kBlockKeys = 128;  // K and V of it fit the first cache with D = 64
constexpr int64_t kDirectRows = 32;  // up to this many rows of a key head packing takes longer than it saves (Zen 5)
constexpr int64_t kSplitKeys = 512;  // keys of a task where they are split
constexpr int kStats = 2;            // row_max and the sum, in front of a split's result

struct FwdPlan {
  bool direct;
  int64_t blocks, splits;  // tasks are (b, key head, block, split)
  int64_t group, rows;     // query heads of a key head; the most rows that a task has

  explicit FwdPlan(const AttentionInputs& in) {
    group = in.Hk > 0 ? in.H / in.Hk : 1;
    const int64_t all = group * in.S;
    direct = all <= kDirectRows;
    rows = all < kBlockRows ? all : kBlockRows;
    blocks = div_up(all, kBlockRows);
    splits = blocks == 1 && in.T > kSplitKeys ? div_up(in.T, kSplitKeys) : 1;
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
  float *acc, *s, *top, *total;
  Word* p;
  ScoreRow* rows;
  int64_t bytes;

  FwdMemory(const AttentionInputs& in, const FwdPlan& plan, char* base) {
    Arena arena{base};
    const int64_t most = plan.rows + n;
    q_row = round_up(div_up(in.D, kPerWord<C>), n);
    acc_row = round_up(in.Dv, n);
    key_words = words_of<C>(in.D) * kBlockKeys;
    value_words = kBlockKeys / kPerWord<C> * acc_row;
    q = arena.take<Word>(most * q_row);
    acc = arena.take<float>(most * acc_row);
    s = arena.take<float>(kTileRows * kBlockKeys);
    p = arena.take<Word>(kTileRows * kBlockKeys / kPerWord<C>);
    top = arena.take<float>(most);
    total = arena.take<float>(most * n);
    rows = arena.take<ScoreRow>(most);
    const int64_t packed = plan.direct ? 0 : div_up(in.T, kBlockKeys);
    is_packed = arena.take<uint8_t>(packed);
    k = arena.take<Word>(packed * key_words);
    v = arena.take<Word>(packed * value_words);
    bytes = arena.used;
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

template <class T>
class FwdTask {
  using C = ProductOf<T>;
  static constexpr int n = kLanes<float>;
  static constexpr int kTileRows = CPU_CAPABILITY::kTileRows<C>;
  static constexpr int kKeyStep = kPerWord<C> * kWordStep<C> > n ? kPerWord<C> * kWordStep<C> : n;  // a product's

 public:
  FwdTask(const AttentionFwdParams& params, const FwdPlan& plan, const FwdMemory<T>& memory)
      : p(params), in(params.in), plan(plan), memory(memory), plain(is_plain(params.in)) {}

  void run(int64_t task, float* partial) {
    const int64_t split = task % plan.splits, block = task / plan.splits % plan.blocks;
    const int64_t b = task / (plan.splits * plan.blocks * in.Hk);
    const int64_t key_head = task / (plan.splits * plan.blocks) % in.Hk;
    const Sequence seq = sequence(in, b);
    const int64_t first = mixed(block) * kBlockRows, left = plan.group * seq.queries - first;
    const int64_t count = left < kBlockRows ? left : kBlockRows;
    if (count <= 0) return;
    const TaskRows rows{key_head * plan.group, first, seq.queries};
    start(b, seq, rows, count, split == 0);
    const HeadRows<T> keys = key_rows<T>(in, in.k, in.k_strides, b, key_head, seq);
    const HeadRows<T> values = key_rows<T>(in, in.v, in.v_strides, b, key_head, seq);
    int64_t low = seq.keys, high = 0;
    for (int64_t r = 0; r < count; ++r) {
      const ScoreRow& row = memory.rows[r];
      if (row.low >= row.high) continue;
      low = row.low < low ? row.low : low;
      high = row.high > high ? row.high : high;
    }
    if (plan.splits > 1) {
      low = low < split * kSplitKeys ? split * kSplitKeys : low;
      high = high > (split + 1) * kSplitKeys ? (split + 1) * kSplitKeys : high;
    }
    if (!plan.direct && b * in.Hk + key_head != packed_head) {
      packed_head = b * in.Hk + key_head;
      for (int64_t i = 0; i < div_up(in.T, kBlockKeys); ++i) memory.is_packed[i] = 0;
    }
    for (int64_t key = low / kBlockKeys * kBlockKeys; key < high; key += kBlockKeys) {
      if (plan.direct) {
        direct_block(keys, values, key, seq.keys, low, high, count);
      } else {
        packed_block(keys, values, key, seq.keys, count);
      }
    }
    if (plan.splits > 1) {
      keep_partial(partial + task * plan.rows * (kStats + in.Dv), count, low < high);
    } else {
      finish(seq, rows, count);
    }
  }

 private:
  // First and last blocks in turn: with a causal mask the later ones take longer, and threads get neighbouring tasks.
  int64_t mixed(int64_t block) const { return block % 2 == 0 ? block / 2 : plan.blocks - 1 - block / 2; }

  void start(int64_t b, const Sequence& seq, const TaskRows& rows, int64_t count, bool with_sink) {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t head = rows.head_of(r), query = rows.query_of(r);
      memory.rows[r] = score_row(in, seq, b, head, query);
      const HeadRows<T> q = query_rows<T>(in.q, in.q_strides, b, head, seq);
      pack_rows<C, T>([&](int64_t) { return q(query); }, 1, in.D, memory.q + r * memory.q_row, memory.q_row);
      const float sink = in.sinks != nullptr && with_sink ? in.sinks[head] : -kInfinity;
      memory.top[r] = sink;
      store(memory.total + r * n, FloatVector{});
      if (!(sink == -kInfinity)) memory.total[r * n] = 1.0f;
    }
    for (int64_t i = count * memory.q_row; i < (count + n) * memory.q_row; i += n) {
      store_words(memory.q + i, UInt32Vector{});
    }
    for (int64_t i = 0; i < count * memory.acc_row; i += n) store(memory.acc + i, FloatVector{});
    for (int r = 0; r < n; ++r) memory.top[count + r] = -kInfinity;
  }

  // Products in memory.s to weights. `end`: the keys of the sequence.
  template <class P>
  void weigh(int64_t first_row, int count, int64_t key, int64_t c0, int64_t c1, int64_t end, P* weights,
             float* factors) const {
    for (int i = 0; i < count; ++i) {
      const ScoreRow& row = memory.rows[first_row + i];
      float* s = memory.s + i * kBlockKeys;
      if (!plain) finish_scores<T>(in, row, key + c0, c1 - c0, end, s + c0, nullptr);
      if (row.low > key + c0 || row.high < key + c1) {
        leave_out(s + c0, c1 - c0, row.low - key - c0, row.high - key - c0);
      }
    }
    const auto softmax = plain ? softmax_rows<T, P, true> : softmax_rows<T, P, false>;
    for (int i = 0; i < count; i += kSoftmaxRows<T>) {
      const int rows = count - i < kSoftmaxRows<T> ? count - i : kSoftmaxRows<T>;
      softmax(in, memory, memory.s + i * kBlockKeys, first_row + i, rows, key, c0, c1, weights + i * kBlockKeys,
              factors + i);
    }
  }

  void packed_block(const HeadRows<T>& keys, const HeadRows<T>& values, int64_t key, int64_t end, int64_t count) {
    const int64_t block = key / kBlockKeys, there = end - key < kBlockKeys ? end - key : kBlockKeys;
    Word* k = memory.k + block * memory.key_words;
    Word* v = memory.v + block * memory.value_words;
    float factors[kTileRows > n ? kTileRows : n];
    for (int64_t r = 0; r < count; r += kTileRows) {
      const int rows = static_cast<int>(count - r < kTileRows ? count - r : kTileRows);
      int64_t c0, c1;
      if (!seen_keys(in, memory.rows + r, rows, key, kBlockKeys, end, kKeyStep, c0, c1)) continue;
      if (!memory.is_packed[block]) {
        memory.is_packed[block] = 1;
        pack_transposed<C, T>([&](int64_t i) { return keys(key + i); }, there, in.D, k, kBlockKeys);
        pack_summed<C, T>([&](int64_t i) { return values(key + i); }, there, kBlockKeys, in.Dv, v, memory.acc_row);
      }
      const int64_t soon = count - r - rows < kTileRows ? count - r - rows : kTileRows;
      fetch_masks(in, memory.rows + r + rows, soon, key, there);
      product_rows<C>({memory.q + r * memory.q_row, memory.q_row, 1, k + c0, kBlockKeys, words_of<C>(in.D),
                       memory.s + c0, kBlockKeys, nullptr}, rows, c1 - c0);
      weigh(r, rows, key, c0, c1, end, reinterpret_cast<C*>(memory.p), factors);
      product_rows<C>({memory.p + c0 / kPerWord<C>, kBlockKeys / kPerWord<C>, 1,
                       v + c0 / kPerWord<C> * memory.acc_row, memory.acc_row, (c1 - c0) / kPerWord<C>,
                       memory.acc + r * memory.acc_row, memory.acc_row, factors}, rows, memory.acc_row);
    }
  }

  // Keys [low, high) of one block; the memory behind `high` may belong to nobody.
  void direct_block(const HeadRows<T>& keys, const HeadRows<T>& values, int64_t key, int64_t end, int64_t low,
                    int64_t high, int64_t count) {
    float factors[kLanes<float>];
    for (int64_t r = 0; r < count; r += kDirectTileRows) {
      const int rows = static_cast<int>(count - r < kDirectTileRows ? count - r : kDirectTileRows);
      int64_t c0, c1;
      if (!seen_keys(in, memory.rows + r, rows, key, kBlockKeys, end, kKeyStep, c0, c1)) continue;
      const int64_t from = low - key > c0 ? low - key : c0, to = high - key < c1 ? high - key : c1;
      if (from >= to) continue;
      // The first rows fetch for all.
      const int64_t stop = r == 0 ? high : 0, k_bytes = in.D * sizeof(T), v_bytes = in.Dv * sizeof(T);
      const Ahead<T> after_keys{keys, values, key, key, k_bytes, v_bytes, kBlockKeys, stop};
      const Ahead<T> after_values{values, keys, key, key + kBlockKeys, v_bytes, k_bytes, kBlockKeys, stop};
      const auto scores = [&](auto tile) {
        direct_scores<T, decltype(tile)::value>(memory.q + r * memory.q_row, memory.q_row, keys, key, c0, to, in.D,
                                                memory.s, kBlockKeys, after_keys);
      };
      rows == 1 ? scores(Int<1>{}) : rows == 2 ? scores(Int<2>{}) : scores(Int<4>{});
      c1 = round_up(to, n);
      C* const weights = kPerWord<C> == 1 ? reinterpret_cast<C*>(memory.s) : reinterpret_cast<C*>(memory.p);
      weigh(r, rows, key, c0, c1, key + to, weights, factors);
      with_count<kDirectTileRows>(rows, [&](auto tile) {
        direct_values<T, decltype(tile)::value>(weights, kBlockKeys, values, key, from, to, in.Dv,
                                                memory.acc + r * memory.acc_row, memory.acc_row, factors, after_values);
      });
    }
  }

  static float sum_of(const float* total) { return sum<float>(load(total)); }

  void finish(const Sequence& seq, const TaskRows& rows, int64_t count) const {
    const float scale = keep_scale(in);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t head = rows.head_of(r), query = rows.query_of(r);
      const float total = sum_of(memory.total + r * n);
      write_row(p, seq, head, query, memory.top[r], total, memory.acc + r * memory.acc_row, scale);
    }
  }

  void keep_partial(float* to, int64_t count, bool any) const {
    for (int64_t r = 0; r < count; ++r, to += kStats + in.Dv) {
      to[0] = memory.top[r];
      to[1] = sum_of(memory.total + r * n);
      if (any) __builtin_memcpy(to + kStats, memory.acc + r * memory.acc_row, in.Dv * sizeof(float));
      if (!any) __builtin_memset(to + kStats, 0, in.Dv * sizeof(float));
    }
  }

 public:
  static void write_row(const AttentionFwdParams& p, const Sequence& seq, int64_t head, int64_t query, float top,
                        float total, const float* acc, float scale) {
    const int64_t at = stat_index(p.in, seq, head, query);
    p.row_max[at] = top;
    p.log_sum[at] = total == 0.0f ? 0.0f : __builtin_logf(total);
    const float factor = total == 0.0f ? 0.0f : scale / total;
    T* out = static_cast<T*>(p.out) + seq.q_batch * p.out_strides.batch + head * p.out_strides.head +
             (seq.q_first + query) * p.out_strides.row;
    for_each_vector<float>(0, p.in.Dv, [&](int64_t j, auto part) { part.store(out + j, part.load(acc + j) * factor); });
  }

 private:
  const AttentionFwdParams& p;
  const AttentionInputs& in;
  const FwdPlan& plan;
  const FwdMemory<T>& memory;
  const bool plain;
  int64_t packed_head = -1;  // whose keys memory has
};

template <class T>
void merge_rows(const AttentionFwdParams& p, int64_t begin, int64_t end, const float* partial) {
  const AttentionInputs& in = p.in;
  const FwdPlan plan(in);
  const int64_t size = kStats + in.Dv;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t query = index % in.S, head = index / in.S % in.H, b = index / (in.S * in.H);
    const Sequence seq = sequence(in, b);
    if (query >= seq.queries) continue;
    const int64_t row = head % plan.group * seq.queries + query;
    const float* first = partial + (b * in.Hk + head / plan.group) * plan.splits * plan.rows * size + row * size;
    const int64_t step = plan.rows * size;
    float top = -kInfinity;
    for (int64_t i = 0; i < plan.splits; ++i) top = first[i * step] > top ? first[i * step] : top;
    // The sums are collected in the result of the first split.
    float* acc = const_cast<float*>(first);
    float total = 0.0f;
    for (int64_t i = 0; i < plan.splits; ++i) {
      const float* part = first + i * step;
      if (i > 0 && part[0] == -kInfinity && part[1] == 0.0f) continue;  // nothing was seen there
      const float factor = exp<float>(splat(part[0] - finite(top)))[0];
      total += part[1] * factor;
      for_each_vector<float>(kStats, size, [&](int64_t j, auto some) {
        const FloatVector mine = some.load(part + j) * factor;
        some.store(acc + j, i == 0 ? mine : some.load(acc + j) + mine);
      });
    }
    FwdTask<T>::write_row(p, seq, head, query, top, total, acc + kStats, keep_scale(in));
  }
}

}  // namespace

AttentionFwdWork attention_fwd_work(const AttentionFwdParams& p) {
  const FwdPlan plan(p.in);
  AttentionFwdWork work{};
  work.tasks = p.in.B * p.in.Hk * plan.blocks * plan.splits;
  with_narrow_type(p.in.dtype, [&](auto t) { work.scratch_bytes = FwdMemory<decltype(t)>(p.in, plan, nullptr).bytes; });
  if (plan.splits > 1) {
    work.partial_floats = work.tasks * plan.rows * (kStats + p.in.Dv);
    work.merge_rows = p.in.B * p.in.H * p.in.S;
  }
  work.task_flops = 2 * plan.rows * (plan.splits > 1 ? kSplitKeys : p.in.T) * (p.in.D + p.in.Dv);
  return work;
}

void attention_fwd(const AttentionFwdParams& p, int64_t begin, int64_t end, char* scratch, float* partial) {
  const FwdPlan plan(p.in);
  with_narrow_type(p.in.dtype, [&](auto t) {
    using T = decltype(t);
    const ProductScope<ProductOf<T>> scope;
    const FwdMemory<T> memory(p.in, plan, scratch);
    FwdTask<T> task(p, plan, memory);
    for (int64_t i = begin; i < end; ++i) task.run(i, partial);
  });
}

void attention_merge(const AttentionFwdParams& p, int64_t begin, int64_t end, const float* partial) {
  with_narrow_type(p.in.dtype, [&](auto t) { merge_rows<decltype(t)>(p, begin, end, partial); });
}

}  // namespace llmkernels::cpu::CPU_CAPABILITY
