// The forward of attention on the CPU, compiled once per instruction set: tiles of scores in the first cache, softmax
// as they come. The maths is in attention.h.
//
// A task is a block of the rows of a key head, which are the queries of all its heads. Its keys are all, or with a
// single block of rows a part of them, whose results are merged. Keys and values are packed once for all tasks of a key
// head that a thread works on; where rows are few they are read where they lie. Of a cache whose keys have their heads
// side by side, a task then has all of them, and reads in the order of memory.
#include "ops/attention/attention_cpu.h"
#include "ops/attention/attention_cpu_fwd.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

template <class T>
class FwdTask {
  using C = ProductOf<T>;
  static constexpr int n = kLanes<float>;
  static constexpr int kTileRows = CPU_CAPABILITY::kTileRows<C>;
  static constexpr int kKeyStep = kPerWord<C> * kWordStep<C> > n ? kPerWord<C> * kWordStep<C> : n;  // a product's

 public:
  FwdTask(const AttentionFwdParams& params, const FwdPlan& plan, const FwdMemory<T>& memory)
      : p(params), in(params.in), plan(plan), whole(memory), memory(memory), plain(is_plain(params.in)) {}

  void run(int64_t task, float* partial) { plan.swept ? run_swept(task, partial) : run_head(task, partial); }

 private:
  void run_head(int64_t task, float* partial) {
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
    int64_t low, high;
    keys_of(split, seq, count, low, high);
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

  // All key heads, a few keys at a time, in the order of memory.
  void run_swept(int64_t task, float* partial) {
    const int64_t split = task % plan.splits, b = task / plan.splits;
    const Sequence seq = sequence(in, b);
    const int64_t count = plan.group * seq.queries;
    if (count <= 0) return;
    const auto rows_of = [&](int64_t head) { return TaskRows{head * plan.group, 0, seq.queries}; };
    for (int64_t head = 0; head < plan.heads; ++head) {  // in this order: a head's padding is the next one's first rows
      memory = whole.from(head * plan.head_rows);
      start(b, seq, rows_of(head), count, split == 0);
    }
    int64_t low, high;
    memory = whole;
    keys_of(split, seq, count, low, high);
    const HeadRows<T> keys = key_rows<T>(in, in.k, in.k_strides, b, 0, seq);
    const HeadRows<T> values = key_rows<T>(in, in.v, in.v_strides, b, 0, seq);
    for (int64_t key = low / kBlockKeys * kBlockKeys; key < high; key += kBlockKeys) {
      swept_block(keys, values, key, low, high, count);
    }
    for (int64_t head = 0; head < plan.heads; ++head) {
      memory = whole.from(head * plan.head_rows);
      if (plan.splits > 1) {
        const int64_t at = (b * in.Hk + head) * plan.splits + split;
        keep_partial(partial + at * plan.rows * (kStats + in.Dv), count, low < high);
      } else {
        finish(seq, rows_of(head), count);
      }
    }
  }

  // The keys [low, high) that some row of a split sees.
  void keys_of(int64_t split, const Sequence& seq, int64_t count, int64_t& low, int64_t& high) const {
    low = seq.keys, high = 0;
    for (int64_t r = 0; r < count; ++r) {
      const ScoreRow& row = memory.rows[r];
      if (row.low >= row.high) continue;
      low = row.low < low ? row.low : low;
      high = row.high > high ? row.high : high;
    }
    if (plan.splits > 1) {
      low = low < split * plan.split_keys ? split * plan.split_keys : low;
      high = high > (split + 1) * plan.split_keys ? (split + 1) * plan.split_keys : high;
    }
  }

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

  // The same for all key heads; `keys` and `values` are those of the first.
  void swept_block(const HeadRows<T>& keys, const HeadRows<T>& values, int64_t key, int64_t low, int64_t high,
                   int64_t count) {
    const int64_t from = low > key ? low - key : 0, to = high - key < kBlockKeys ? high - key : kBlockKeys;
    const int64_t c0 = from / n * n, c1 = round_up(to, n);
    const auto head_of = [](HeadRows<T> rows, const AttentionStrides& strides, int64_t head) {
      rows.base += head * strides.head;
      return rows;
    };
    const int64_t k_bytes = in.D * sizeof(T), v_bytes = in.Dv * sizeof(T);
    Sweep<T> after_keys{keys, values, key, key, k_bytes, v_bytes, in.k_strides, in.v_strides, in.Hk, kBlockKeys, high};
    Sweep<T> after_values{values, keys, key, key + kBlockKeys, v_bytes, k_bytes, in.v_strides, in.k_strides, in.Hk,
                          kBlockKeys, high};
    const Nothing nothing;
    after_keys.start(c0);
    const int64_t keys_at_once = count == 1 ? kLanes<float> : kSweptKeys;
    for (int64_t j = c0; j < to; j += keys_at_once) {
      const int64_t stop = j + keys_at_once < to ? j + keys_at_once : to;
      for (int64_t head = 0; head < plan.heads; ++head) {
        const HeadRows<T> head_keys = head_of(keys, in.k_strides, head);
        for (int64_t r = 0; r < count; r += kDirectTileRows) {
          const int64_t at = head * plan.head_rows + r, rows = count - r;
          const auto scores = [&](auto tile, auto& ahead) {
            direct_scores<T, decltype(tile)::value>(whole.q + at * whole.q_row, whole.q_row, head_keys, key, j, stop,
                                                    in.D, whole.s + at * kBlockKeys, kBlockKeys, ahead);
          };
          const auto tiles = [&](auto& ahead) {
            rows == 1 ? scores(Int<1>{}, ahead) : rows == 2 ? scores(Int<2>{}, ahead) : scores(Int<4>{}, ahead);
          };
          r == 0 ? tiles(after_keys) : tiles(nothing);
        }
      }
    }
    C* const weights = kPerWord<C> == 1 ? reinterpret_cast<C*>(whole.s) : reinterpret_cast<C*>(whole.p);
    for (int64_t head = 0; head < plan.heads; ++head) {
      const int64_t at = head * plan.head_rows;
      memory = whole.from(at);
      weigh(0, static_cast<int>(count), key, c0, c1, key + to, weights + at * kBlockKeys, memory.factors);
    }
    float ones[kDirectTileRows];
    for (int i = 0; i < kDirectTileRows; ++i) ones[i] = 1.0f;
    after_values.start(from);
    for (int64_t j = from; j < to;) {
      const int64_t next = round_up(j + 1, kSweptValues<T>), stop = next < to ? next : to;
      for (int64_t head = 0; head < plan.heads; ++head) {
        const HeadRows<T> head_values = head_of(values, in.v_strides, head);
        for (int64_t r = 0; r < count; r += kDirectTileRows) {
          const int64_t at = head * plan.head_rows + r;
          const int rows = static_cast<int>(count - r < kDirectTileRows ? count - r : kDirectTileRows);
          const auto tiles = [&](auto& ahead) {
            with_count<kDirectTileRows>(rows, [&](auto tile) {
              direct_values<T, decltype(tile)::value>(weights + at * kBlockKeys, kBlockKeys, head_values, key, j, stop,
                                                      in.Dv, whole.acc + at * whole.acc_row, whole.acc_row,
                                                      j == from ? whole.factors + at : ones, ahead);
            });
          };
          r == 0 ? tiles(after_values) : tiles(nothing);
        }
      }
      j = stop;
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
  const FwdMemory<T>& whole;
  FwdMemory<T> memory;  // of the rows at hand
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
  work.tasks = p.in.B * (plan.swept ? 1 : p.in.Hk) * plan.blocks * plan.splits;
  with_narrow_type(p.in.dtype, [&](auto t) { work.scratch_bytes = FwdMemory<decltype(t)>(p.in, plan, nullptr).bytes; });
  if (plan.splits > 1) {
    work.partial_floats = p.in.B * p.in.Hk * plan.blocks * plan.splits * plan.rows * (kStats + p.in.Dv);
    work.merge_rows = p.in.B * p.in.H * p.in.S;
  }
  work.task_flops = 2 * plan.heads * plan.rows * (plan.splits > 1 ? plan.split_keys : p.in.T) * (p.in.D + p.in.Dv);
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
