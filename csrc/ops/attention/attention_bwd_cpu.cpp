// The backward of attention on the CPU, compiled once per instruction set. The maths is in attention.h.
//
// Scores are made again, a tile of queries by a tile of keys at a time. Where a task is a key head, a tile gives its
// part of dq, dk and dv at once (five products); dq of the head is summed in memory meanwhile. Where it is a block of
// keys, or of queries, two steps make them (seven products, more tasks). Tiles, their order and so every sum are the
// same either way: the choice, which depends on the number of threads, cannot be seen in the results.
#include "ops/attention/attention_cpu.h"
#include "ops/attention/attention_cpu_scores.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kBwdRows = 96, kBwdKeys = 64;

template <class F>
inline void with_element(DType dtype, F&& f) {
  if (dtype == DType::kFloat32) return f(float{});
  if (dtype == DType::kBFloat16) return f(BFloat16{});
  f(Float16{});
}

// Sizes in words or floats.
template <class T>
struct BwdSizes {
  using C = ProductOf<T>;
  static constexpr int n = kLanes<float>;
  int64_t group, row_blocks, key_blocks;
  int64_t d, dv;                    // words of a row of q, of dout
  int64_t d_row, dv_row;            // the same rounded up to vectors
  int64_t d_wide, dv_wide;          // D and Dv rounded up to vectors

  explicit BwdSizes(const AttentionInputs& in) {
    group = in.Hk > 0 ? in.H / in.Hk : 1;
    row_blocks = div_up(in.S, kBwdRows), key_blocks = div_up(in.T, kBwdKeys);
    d = div_up(in.D, kPerWord<C>), dv = div_up(in.Dv, kPerWord<C>);
    d_row = round_up(d, n), dv_row = round_up(dv, n);
    d_wide = round_up(in.D, n), dv_wide = round_up(in.Dv, n);
  }
};

// A block of queries of one head, packed.
template <class T>
struct QueryBlock {
  Word *q, *dout;                // A of the products with keys and values
  Word *q_summed, *dout_summed;  // B of the products for dk and dv; for floats it is the same
  ScoreRow* rows;
  float *top, *log_sum, *delta;
  float* dq;
  int64_t count;

  QueryBlock(const BwdSizes<T>& z, Arena& arena, bool with_dq) {
    constexpr bool kSame = kPerWord<ProductOf<T>> == 1;
    q = arena.take<Word>(kBwdRows * z.d_row);
    dout = arena.take<Word>(kBwdRows * z.dv_row);
    q_summed = kSame ? q : arena.take<Word>(kBwdRows / 2 * z.d_wide);
    dout_summed = kSame ? dout : arena.take<Word>(kBwdRows / 2 * z.dv_wide);
    rows = arena.take<ScoreRow>(kBwdRows);
    top = arena.take<float>(kBwdRows), log_sum = arena.take<float>(kBwdRows), delta = arena.take<float>(kBwdRows);
    dq = with_dq ? arena.take<float>(kBwdRows * z.d_wide) : nullptr;
    count = 0;
  }
};

// A block of keys of one key head, packed.
template <class T>
struct KeyBlock {
  Word *k, *v, *k_summed;
  float *dk, *dv;

  KeyBlock(const BwdSizes<T>& z, Arena& arena, bool with_sums) {
    k = arena.take<Word>(z.d * kBwdKeys);
    v = arena.take<Word>(z.dv * kBwdKeys);
    k_summed = arena.take<Word>(kBwdKeys / kPerWord<ProductOf<T>> * z.d_wide);
    dk = with_sums ? arena.take<float>(kBwdKeys * z.d_wide) : nullptr;
    dv = with_sums ? arena.take<float>(kBwdKeys * z.dv_wide) : nullptr;
  }
};

// One tile on its way.
template <class T>
struct Tile {
  using C = ProductOf<T>;
  float *s, *dp, *slopes;             // of one chunk of rows: kTileRows x kBwdKeys
  Word *p_summed, *ds, *ds_summed;    // of the tile; for floats ds_summed is ds. `summed`: the summed axis are rows
  float* dmask;                       // ds before softcap's derivative, kBwdRows x kBwdKeys
  float* ones;

  Tile(Arena& arena, bool with_dmask) {
    constexpr bool kSame = kPerWord<C> == 1;
    s = arena.take<float>(kTileRows * kBwdKeys), dp = arena.take<float>(kTileRows * kBwdKeys);
    slopes = arena.take<float>(kTileRows * kBwdKeys);
    p_summed = arena.take<Word>(kBwdRows * kBwdKeys / kPerWord<C>);
    ds = arena.take<Word>(kBwdRows * kBwdKeys / kPerWord<C>);
    ds_summed = kSame ? ds : arena.take<Word>(kBwdRows * kBwdKeys / 2);
    dmask = with_dmask ? arena.take<float>(kBwdRows * kBwdKeys) : nullptr;
    ones = arena.take<float>(kTileRows);
    if (arena.base != nullptr) {
      for (int i = 0; i < kTileRows; ++i) ones[i] = 1.0f;
    }
  }
};

// Where the mask's gradient is as large as the scores it is written as they come; else a step of its own sums it.
inline bool mask_is_whole(const AttentionBwdParams& p) {
  return p.dmask_sizes[0] == p.in.B && p.dmask_sizes[1] == p.in.H && p.dmask_sizes[2] == p.in.S &&
         p.dmask_sizes[3] == p.in.T;
}

template <class T>
class Backward {
  using C = ProductOf<T>;
  static constexpr int n = kLanes<float>;

 public:
  Backward(const AttentionBwdParams& params)
      : p(params), in(params.in), z(params.in), plain(is_plain(params.in)), scale(keep_scale(params.in)) {}

  // delta of the query rows [begin, end), counted as [B, H, S].
  void delta_step(int64_t begin, int64_t end) const {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t query = index % in.S, head = index / in.S % in.H, b = index / (in.S * in.H);
      const Sequence seq = sequence(in, b);
      if (query >= seq.queries) continue;
      const T* dout = query_rows<T>(p.dout, p.dout_strides, seq.q_batch, head, seq)(query);
      const T* out = query_rows<T>(p.out, p.out_strides, seq.q_batch, head, seq)(query);
      FloatVector total{};
      for_each_vector<float>(0, in.Dv, [&](int64_t j, auto part) { total += part.load(dout + j) * part.load(out + j); });
      const int64_t at = stat_index(in, seq, head, query);
      p.delta[at] = sum<float>(total) - (p.dlse != nullptr ? p.dlse[at] : 0.0f);
    }
  }

  // Tasks are key heads.
  int64_t heads_step(int64_t begin, int64_t end, char* base) {
    Arena arena{base};
    Tile<T> tile(arena, p.dmask != nullptr);
    KeyBlock<T> keys(z, arena, true);
    QueryBlock<T>* queries = arena.take<QueryBlock<T>>(z.group * z.row_blocks);
    for (int64_t i = 0; i < z.group * z.row_blocks; ++i) {
      const QueryBlock<T> block(z, arena, p.dq != nullptr);
      if (base != nullptr) queries[i] = block;
    }
    for (int64_t task = begin; task < end && base != nullptr; ++task) {
      const int64_t b = task / in.Hk, key_head = task % in.Hk;
      const Sequence seq = sequence(in, b);
      for (int64_t i = 0; i < z.group * z.row_blocks; ++i) {
        pack_queries(queries[i], seq, b, key_head * z.group + i / z.row_blocks, i % z.row_blocks, true);
      }
      for (int64_t key = 0; key < seq.keys; key += kBwdKeys) {
        key_block(tile, keys, queries, seq, b, key_head, key, p.dq != nullptr);
      }
      if (p.dq == nullptr) continue;
      for (int64_t i = 0; i < z.group * z.row_blocks; ++i) {
        write_dq(queries[i], seq, key_head * z.group + i / z.row_blocks, i % z.row_blocks);
      }
    }
    return arena.used;
  }

  // Tasks are blocks of keys: dk and dv.
  int64_t keys_step(int64_t begin, int64_t end, char* base) {
    Arena arena{base};
    Tile<T> tile(arena, p.dmask != nullptr);
    KeyBlock<T> keys(z, arena, true);
    QueryBlock<T>* queries = arena.take<QueryBlock<T>>(z.group * z.row_blocks);
    for (int64_t i = 0; i < z.group * z.row_blocks; ++i) {
      const QueryBlock<T> block(z, arena, false);
      if (base != nullptr) queries[i] = block;
    }
    int64_t packed_head = -1;
    for (int64_t task = begin; task < end && base != nullptr; ++task) {
      const int64_t key = task % z.key_blocks * kBwdKeys, key_head = task / z.key_blocks % in.Hk;
      const int64_t b = task / (z.key_blocks * in.Hk);
      const Sequence seq = sequence(in, b);
      if (key >= seq.keys) continue;
      if (packed_head != b * in.Hk + key_head) {
        packed_head = b * in.Hk + key_head;
        for (int64_t i = 0; i < z.group * z.row_blocks; ++i) {
          pack_queries(queries[i], seq, b, key_head * z.group + i / z.row_blocks, i % z.row_blocks, true);
        }
      }
      key_block(tile, keys, queries, seq, b, key_head, key, false);
    }
    return arena.used;
  }

  // Tasks are blocks of queries: dq.
  int64_t queries_step(int64_t begin, int64_t end, char* base) {
    Arena arena{base};
    Tile<T> tile(arena, p.dmask != nullptr);
    QueryBlock<T> queries(z, arena, true);
    uint8_t* is_packed = arena.take<uint8_t>(z.key_blocks);
    KeyBlock<T>* keys = arena.take<KeyBlock<T>>(z.key_blocks);
    for (int64_t i = 0; i < z.key_blocks; ++i) {
      const KeyBlock<T> block(z, arena, false);
      if (base != nullptr) keys[i] = block;
    }
    int64_t packed_head = -1;
    for (int64_t task = begin; task < end && base != nullptr; ++task) {
      const int64_t row_block = task % z.row_blocks, head = task / z.row_blocks % in.H;
      const int64_t b = task / (z.row_blocks * in.H), key_head = head / z.group;
      const Sequence seq = sequence(in, b);
      if (row_block * kBwdRows >= seq.queries) continue;
      if (packed_head != b * in.Hk + key_head) {
        packed_head = b * in.Hk + key_head;
        for (int64_t i = 0; i < z.key_blocks; ++i) is_packed[i] = 0;
      }
      pack_queries(queries, seq, b, head, row_block, false);
      for (int64_t key = 0; key < seq.keys; key += kBwdKeys) {
        if (!tile_is_seen(queries, key)) continue;
        KeyBlock<T>& block = keys[key / kBwdKeys];
        if (!is_packed[key / kBwdKeys]) pack_keys(block, seq, b, key_head, key, true);
        is_packed[key / kBwdKeys] = 1;
        make_tile(tile, queries, block, seq, key);
        // Whoever makes dk and dv writes the mask's gradient, so that one step does.
        if (p.dk == nullptr && p.dv == nullptr) write_dmask(tile, queries, seq, b, head, row_block, key);
        if (p.dq != nullptr) add_dq(tile, queries, block);
      }
      if (p.dq != nullptr) write_dq(queries, seq, head, row_block);
    }
    return arena.used;
  }

  // Tasks are rows of dmask in blocks, [dmask_sizes[0], dmask_sizes[1], row blocks], where it is broadcast.
  int64_t mask_step(int64_t begin, int64_t end, char* base) {
    Arena arena{base};
    Tile<T> tile(arena, true);
    QueryBlock<T> queries(z, arena, false);
    KeyBlock<T> keys(z, arena, false);
    const bool one_row = p.dmask_sizes[2] != in.S, one_key = p.dmask_sizes[3] != in.T;
    const int64_t rows = one_row ? 1 : kBwdRows, cols = one_key ? 1 : round_up(in.T, kBwdKeys);
    float* sums = arena.take<float>(rows * cols);
    const int64_t blocks = one_row ? 1 : z.row_blocks;
    for (int64_t task = begin; task < end && base != nullptr; ++task) {
      const int64_t block = task % blocks, mh = task / blocks % p.dmask_sizes[1], mb = task / (blocks * p.dmask_sizes[1]);
      for (int64_t i = 0; i < rows * cols; ++i) sums[i] = 0.0f;
      const bool every_b = p.dmask_sizes[0] != in.B, every_head = p.dmask_sizes[1] != in.H;
      for (int64_t b = every_b ? 0 : mb; b < (every_b ? in.B : mb + 1); ++b) {
        const Sequence seq = sequence(in, b);
        for (int64_t head = every_head ? 0 : mh; head < (every_head ? in.H : mh + 1); ++head) {
          for (int64_t r = one_row ? 0 : block; r < (one_row ? z.row_blocks : block + 1); ++r) {
            pack_queries(queries, seq, b, head, r, false);
            for (int64_t key = 0; key < seq.keys; key += kBwdKeys) {
              if (!tile_is_seen(queries, key)) continue;
              pack_keys(keys, seq, b, head / z.group, key, false);
              make_tile(tile, queries, keys, seq, key);
              add_to(sums, one_row ? 0 : cols, tile.dmask, queries.count, key, one_key);
            }
          }
        }
      }
      const int64_t first = block * kBwdRows, left = p.dmask_sizes[2] - first;
      for (int64_t i = 0; i < (left < rows ? left : rows); ++i) {
        write_mask_row(sums + i * cols, ((mb * p.dmask_sizes[1] + mh) * p.dmask_sizes[2] + first + i) * p.dmask_sizes[3],
                       p.dmask_sizes[3]);
      }
    }
    return arena.used;
  }

 private:
  void pack_queries(QueryBlock<T>& block, const Sequence& seq, int64_t b, int64_t head, int64_t row_block,
                    bool summed) const {
    const int64_t first = row_block * kBwdRows, left = seq.queries - first;
    block.count = left < 0 ? 0 : left < kBwdRows ? left : kBwdRows;
    if (block.count == 0) return;
    const HeadRows<T> q = query_rows<T>(in.q, in.q_strides, b, head, seq);
    const HeadRows<T> dout = query_rows<T>(p.dout, p.dout_strides, b, head, seq);
    const auto q_row = [&](int64_t i) { return q(first + i); };
    const auto dout_row = [&](int64_t i) { return dout(first + i); };
    pack_rows<C, T>(q_row, block.count, in.D, block.q, z.d_row);
    pack_rows<C, T>(dout_row, block.count, in.Dv, block.dout, z.dv_row);
    if (kPerWord<C> == 2 && summed) {
      const int64_t padded = round_up(block.count, 2);
      pack_summed<C, T>(q_row, block.count, padded, in.D, block.q_summed, z.d_wide);
      pack_summed<C, T>(dout_row, block.count, padded, in.Dv, block.dout_summed, z.dv_wide);
    }
    for (int64_t i = 0; i < block.count; ++i) {
      const int64_t at = stat_index(in, seq, head, first + i);
      block.rows[i] = score_row(in, seq, b, head, first + i);
      block.top[i] = finite(p.row_max[at]);
      block.log_sum[i] = p.log_sum[at];
      block.delta[i] = p.delta[at];
    }
    if (block.dq != nullptr) {
      for (int64_t i = 0; i < block.count * z.d_wide; i += n) store(block.dq + i, FloatVector{});
    }
  }

  void pack_keys(KeyBlock<T>& block, const Sequence& seq, int64_t b, int64_t key_head, int64_t key, bool summed) const {
    const int64_t count = seq.keys - key < kBwdKeys ? seq.keys - key : kBwdKeys;
    const HeadRows<T> k = key_rows<T>(in, in.k, in.k_strides, b, key_head, seq);
    const HeadRows<T> v = key_rows<T>(in, in.v, in.v_strides, b, key_head, seq);
    const auto k_row = [&](int64_t i) { return k(key + i); };
    pack_transposed<C, T>(k_row, count, in.D, block.k, kBwdKeys);
    pack_transposed<C, T>([&](int64_t i) { return v(key + i); }, count, in.Dv, block.v, kBwdKeys);
    if (summed) pack_summed<C, T>(k_row, count, kBwdKeys, in.D, block.k_summed, z.d_wide);
  }

  // The keys [c0, c1) of a block, rounded outwards to vectors, that some row of a chunk sees; false: none.
  bool seen(const QueryBlock<T>& block, int64_t first, int64_t count, int64_t key, int64_t& c0, int64_t& c1) const {
    int64_t low = key + kBwdKeys, high = key;
    for (int64_t r = first; r < first + count; ++r) {
      const ScoreRow& row = block.rows[r];
      if (row.low >= row.high) continue;
      low = row.low < low ? row.low : low;
      high = row.high > high ? row.high : high;
    }
    low = low < key ? key : low;
    high = high > key + kBwdKeys ? key + kBwdKeys : high;
    c0 = (low - key) / n * n;
    c1 = round_up(high - key, n);
    return low < high;
  }

  bool tile_is_seen(const QueryBlock<T>& block, int64_t key) const {
    int64_t c0, c1;
    return seen(block, 0, block.count, key, c0, c1);
  }

  int chunk_of(const QueryBlock<T>& block, int64_t r) const {
    return static_cast<int>(block.count - r < kTileRows ? block.count - r : kTileRows);
  }

  // All queries of a key head against one block of its keys.
  void key_block(const Tile<T>& tile, KeyBlock<T>& keys, QueryBlock<T>* queries, const Sequence& seq, int64_t b,
                 int64_t key_head, int64_t key, bool with_dq) {
    pack_keys(keys, seq, b, key_head, key, with_dq);
    for (int64_t i = 0; i < kBwdKeys * z.d_wide; i += n) store(keys.dk + i, FloatVector{});
    for (int64_t i = 0; i < kBwdKeys * z.dv_wide; i += n) store(keys.dv + i, FloatVector{});
    for (int64_t i = 0; i < z.group * z.row_blocks; ++i) {
      QueryBlock<T>& block = queries[i];
      if (block.count == 0 || !tile_is_seen(block, key)) continue;
      make_tile(tile, block, keys, seq, key);
      write_dmask(tile, block, seq, b, key_head * z.group + i / z.row_blocks, i % z.row_blocks, key);
      add_keys(tile, block, keys, key);
      if (with_dq) add_dq(tile, block, keys);
    }
    const int64_t count = seq.keys - key < kBwdKeys ? seq.keys - key : kBwdKeys;
    const auto write = [&](void* to, const AttentionStrides& strides, const float* sums, int64_t row, int64_t dim,
                           float factor) {
      if (to == nullptr) return;
      const int64_t batch = in.cu_seqlens_k != nullptr ? 0 : b;
      T* first = static_cast<T*>(to) + batch * strides.batch + key_head * strides.head + (seq.k_first + key) * strides.row;
      for (int64_t j = 0; j < count; ++j) write_row(first + j * strides.row, sums + j * row, dim, factor);
    };
    write(p.dk, p.dk_strides, keys.dk, z.d_wide, in.D, in.scale);
    write(p.dv, p.dv_strides, keys.dv, z.dv_wide, in.Dv, scale);
  }

  static void write_row(T* to, const float* from, int64_t dim, float factor) {
    for_each_vector<float>(0, dim, [&](int64_t j, auto part) { part.store(to + j, part.load(from + j) * factor); });
  }

  void write_dq(const QueryBlock<T>& block, const Sequence& seq, int64_t head, int64_t row_block) const {
    T* to = static_cast<T*>(p.dq) + seq.q_batch * p.dq_strides.batch + head * p.dq_strides.head +
            (seq.q_first + row_block * kBwdRows) * p.dq_strides.row;
    for (int64_t i = 0; i < block.count; ++i) {
      write_row(to + i * p.dq_strides.row, block.dq + i * z.d_wide, in.D, in.scale);
    }
  }

  // p and ds of a tile, in the layouts that the products with them read.
  void make_tile(const Tile<T>& tile, const QueryBlock<T>& block, const KeyBlock<T>& keys, const Sequence& seq,
                 int64_t key) const {
    for (int64_t r = 0; r < block.count; r += kTileRows) {
      const int rows = chunk_of(block, r);
      int64_t c0, c1;
      const bool any = seen(block, r, rows, key, c0, c1);
      if (!any) c0 = c1 = 0;
      if (any) {
        product_rows<C>({block.q + r * z.d_row, z.d_row, 1, keys.k + c0, kBwdKeys, z.d, tile.s + c0, kBwdKeys, nullptr},
                        rows, c1 - c0);
        product_rows<C>({block.dout + r * z.dv_row, z.dv_row, 1, keys.v + c0, kBwdKeys, z.dv, tile.dp + c0, kBwdKeys,
                         nullptr}, rows, c1 - c0);
      }
      for (int i = 0; i < rows && any; ++i) {
        const ScoreRow& row = block.rows[r + i];
        float* s = tile.s + i * kBwdKeys;
        if (!plain) finish_scores<T>(in, row, key + c0, c1 - c0, seq.keys, s + c0, tile.slopes + i * kBwdKeys + c0);
        if (row.low > key + c0 || row.high < key + c1) {
          leave_out(s + c0, c1 - c0, row.low - key - c0, row.high - key - c0);
        }
      }
      if (plain) {
        weigh<true>(tile, block, r, rows, key, c0, c1);
      } else {
        weigh<false>(tile, block, r, rows, key, c0, c1);
      }
    }
  }

  template <bool kPlain>
  __attribute__((noinline)) void weigh(const Tile<T>& tile, const QueryBlock<T>& block, int64_t first, int rows,
                                       int64_t key, int64_t c0, int64_t c1) const {
    // In a plain call m + log l is exact enough to be one number.
    struct Pair {
      FloatVector p, ds;
    };
    const bool capped = !kPlain && in.softcap > 0.0f;
    const auto one = [&](int i, int64_t j) -> Pair {
      const int64_t r = first + i;
      const FloatVector s = load(tile.s + i * kBwdKeys + j);
      const FloatVector x =
          kPlain ? s * in.scale - (block.top[r] + block.log_sum[r]) : (s - block.top[r]) - block.log_sum[r];
      FloatVector p = exp<float, sizeof(T) == 2>(x), dp = load(tile.dp + i * kBwdKeys + j), used = p;
      if (in.seed != nullptr) {
        const UInt32Vector keep = kept(block.rows[r].random, key + j, in.dropout_threshold);
        used = select(keep, p);
        dp = select(keep, dp) * scale;
      }
      FloatVector ds = p * (dp - block.delta[r]);
      if (tile.dmask != nullptr) store(tile.dmask + r * kBwdKeys + j, ds);
      if (capped) ds = ds * load(tile.slopes + i * kBwdKeys + j);
      return {used, ds};
    };
    const auto zero = [&](int i, int64_t j) -> Pair {
      if (tile.dmask != nullptr) store(tile.dmask + (first + i) * kBwdKeys + j, FloatVector{});
      return {FloatVector{}, FloatVector{}};
    };
    const auto sweep = [&](int64_t begin, int64_t end, auto value) {
      if constexpr (kPerWord<C> == 1) {
        for (int i = 0; i < rows; ++i) {
          float* p = reinterpret_cast<float*>(tile.p_summed) + (first + i) * kBwdKeys;
          float* ds = reinterpret_cast<float*>(tile.ds) + (first + i) * kBwdKeys;
          for (int64_t j = begin; j < end; j += n) {
            const Pair pair = value(i, j);
            store(p + j, pair.p);
            store(ds + j, pair.ds);
          }
        }
      } else {
        for (int i = 0; i < rows; i += 2) {
          for (int64_t j = begin; j < end; j += n) {
            const Pair a = value(i, j), b = i + 1 < rows ? value(i + 1, j) : Pair{};
            store_words(tile.p_summed + (first + i) / 2 * kBwdKeys + j, interleaved(a.p, b.p));
            store_words(tile.ds_summed + (first + i) / 2 * kBwdKeys + j, interleaved(a.ds, b.ds));
            BFloat16* ds = reinterpret_cast<BFloat16*>(tile.ds) + (first + i) * kBwdKeys + j;
            store(ds, a.ds);
            store(ds + kBwdKeys, b.ds);
          }
        }
      }
    };
    sweep(0, c0, zero);
    sweep(c0, c1, one);
    sweep(c1, kBwdKeys, zero);
  }

  // Words of a bf16 of a and below it one of b.
  static UInt32Vector interleaved(FloatVector a, FloatVector b) {
    return zero_extend(narrow(a, BFloat16{})) | zero_extend(narrow(b, BFloat16{})) << 16;
  }

  // dv += p^T dout and dk += ds^T q, over the rows that see some of the keys.
  void add_keys(const Tile<T>& tile, const QueryBlock<T>& block, const KeyBlock<T>& keys, int64_t key) const {
    const int64_t words = div_up(block.count, kPerWord<C>);
    for (int64_t j = 0; j < kBwdKeys; j += kTileRows) {
      const int rows = static_cast<int>(kBwdKeys - j < kTileRows ? kBwdKeys - j : kTileRows);
      if (p.dv != nullptr) {
        product_rows<C>({tile.p_summed + j, 1, kBwdKeys, block.dout_summed, kPerWord<C> == 1 ? z.dv_row : z.dv_wide,
                         words, keys.dv + j * z.dv_wide, z.dv_wide, tile.ones}, rows, z.dv_wide);
      }
      if (p.dk != nullptr) {
        product_rows<C>({tile.ds_summed + j, 1, kBwdKeys, block.q_summed, kPerWord<C> == 1 ? z.d_row : z.d_wide, words,
                         keys.dk + j * z.d_wide, z.d_wide, tile.ones}, rows, z.d_wide);
      }
    }
  }

  // dq += ds k.
  void add_dq(const Tile<T>& tile, const QueryBlock<T>& block, const KeyBlock<T>& keys) const {
    for (int64_t r = 0; r < block.count; r += kTileRows) {
      product_rows<C>({tile.ds + r * kBwdKeys / kPerWord<C>, kBwdKeys / kPerWord<C>, 1, keys.k_summed, z.d_wide,
                       kBwdKeys / kPerWord<C>, block.dq + r * z.d_wide, z.d_wide, tile.ones}, chunk_of(block, r),
                      z.d_wide);
    }
  }

  void write_mask_row(const float* from, int64_t at, int64_t count) const {
    if (in.mask_kind == MaskKind::kFloat32) {
      float* to = static_cast<float*>(p.dmask) + at;
      for_each_vector<float>(0, count, [&](int64_t j, auto part) { part.store(to + j, part.load(from + j)); });
    } else {
      write_row(static_cast<T*>(p.dmask) + at, from, count, 1.0f);
    }
  }

  void write_dmask(const Tile<T>& tile, const QueryBlock<T>& block, const Sequence& seq, int64_t b, int64_t head,
                   int64_t row_block, int64_t key) const {
    if (p.dmask == nullptr || !mask_is_whole(p)) return;
    const int64_t count = seq.keys - key < kBwdKeys ? seq.keys - key : kBwdKeys;
    for (int64_t i = 0; i < block.count; ++i) {
      const int64_t row = (b * in.H + head) * in.S + row_block * kBwdRows + i;
      write_mask_row(tile.dmask + i * kBwdKeys, row * in.T + key, count);
    }
  }

  static void add_to(float* sums, int64_t sums_row, const float* ds, int64_t count, int64_t key, bool one_key) {
    for (int64_t i = 0; i < count; ++i) {
      float* row = sums + i * sums_row;
      FloatVector total{};
      for (int64_t j = 0; j < kBwdKeys; j += n) {
        const FloatVector some = load(ds + i * kBwdKeys + j);
        if (one_key) total += some;
        if (!one_key) store(row + key + j, load(row + key + j) + some);
      }
      if (one_key) *row += sum<float>(total);
    }
  }

  const AttentionBwdParams& p;
  const AttentionInputs& in;
  const BwdSizes<T> z;
  const bool plain;
  const float scale;  // of what dropout keeps
};

}  // namespace

AttentionBwdWork attention_bwd_work(const AttentionBwdParams& p, int64_t threads) {
  AttentionBwdWork work{};
  const AttentionInputs& in = p.in;
  const int delta = static_cast<int>(AttentionBwdStep::kDelta), heads = static_cast<int>(AttentionBwdStep::kHeads);
  const int keys = static_cast<int>(AttentionBwdStep::kKeys), queries = static_cast<int>(AttentionBwdStep::kQueries);
  const int mask = static_cast<int>(AttentionBwdStep::kMask);
  const bool whole = p.dmask != nullptr && mask_is_whole(p);
  with_element(in.dtype, [&](auto t) {
    using T = decltype(t);
    Backward<T> backward(p);
    const BwdSizes<T> z(in);
    const int64_t pairs = in.B * in.Hk;
    const bool for_keys = p.dk != nullptr || p.dv != nullptr, for_queries = p.dq != nullptr || (whole && !for_keys);
    // A pair of tiles costs 5 products on the threads that get one of `pairs`, or 7 on all of them.
    const bool by_head = for_keys && div_up(pairs, threads) * threads * 5 <= pairs * 7;
    const auto set = [&](int step, int64_t tasks, int64_t bytes, int64_t flops) {
      work.tasks[step] = tasks, work.scratch_bytes[step] = bytes, work.task_flops[step] = flops;
    };
    set(delta, in.B * in.H * in.S, 0, 2 * in.Dv);
    const int64_t tile = 2 * kBwdRows * kBwdKeys * (in.D + in.Dv);
    if (by_head) {
      set(heads, pairs, backward.heads_step(0, 0, nullptr), z.group * z.row_blocks * z.key_blocks * tile);
    } else {
      if (for_keys) {
        set(keys, pairs * z.key_blocks, backward.keys_step(0, 0, nullptr), z.group * z.row_blocks * tile);
      }
      if (for_queries) {
        set(queries, in.B * in.H * z.row_blocks, backward.queries_step(0, 0, nullptr), z.key_blocks * tile);
      }
    }
    if (p.dmask != nullptr && !whole) {
      const int64_t blocks = p.dmask_sizes[2] != in.S ? 1 : z.row_blocks;
      set(mask, p.dmask_sizes[0] * p.dmask_sizes[1] * blocks, backward.mask_step(0, 0, nullptr), z.key_blocks * tile);
    }
  });
  return work;
}

void attention_bwd(const AttentionBwdParams& p, AttentionBwdStep step, int64_t begin, int64_t end, char* scratch) {
  with_element(p.in.dtype, [&](auto t) {
    Backward<decltype(t)> backward(p);
    switch (step) {
      case AttentionBwdStep::kDelta:
        backward.delta_step(begin, end);
        break;
      case AttentionBwdStep::kHeads:
        backward.heads_step(begin, end, scratch);
        break;
      case AttentionBwdStep::kKeys:
        backward.keys_step(begin, end, scratch);
        break;
      case AttentionBwdStep::kQueries:
        backward.queries_step(begin, end, scratch);
        break;
      case AttentionBwdStep::kMask:
        backward.mask_step(begin, end, scratch);
        break;
    }
  });
}

}  // namespace llmkernels::cpu::CPU_CAPABILITY
