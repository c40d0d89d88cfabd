// Tiles of the backward of attention on the CPU: a block of queries by a block of keys, both packed, to weights and
// gradients of scores, and the products with those.
#pragma once

#include "ops/attention/attention_cpu_scores.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kBwdRows = 96, kBwdKeys = 64;

// Sizes in words or floats.
template <class T>
struct BwdSizes {
  using C = ProductOf<T>;
  static constexpr int n = kLanes<float>;
  static_assert(kBwdRows % (kPerWord<C> * kWordStep<C>) == 0 && kBwdKeys % (kPerWord<C> * kWordStep<C>) == 0);
  static_assert(!kOnAmx<C> || (kBwdRows <= kPerWord<C> * kMostTransposed && kBwdKeys % kTileRows<C> == 0));
  int64_t group, row_blocks, key_blocks;
  int64_t d, dv;                    // words of a row of q, of dout, as products have them
  int64_t d_row, dv_row;            // the same rounded up to vectors
  int64_t d_wide, dv_wide;          // D and Dv rounded up to vectors

  explicit BwdSizes(const AttentionInputs& in) {
    group = in.Hk > 0 ? in.H / in.Hk : 1;
    row_blocks = div_up(in.S, kBwdRows), key_blocks = div_up(in.T, kBwdKeys);
    d = words_of<C>(in.D), dv = words_of<C>(in.Dv);
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
  static constexpr int kTileRows = CPU_CAPABILITY::kTileRows<C>;
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

template <class T>
class BackwardTiles {
 protected:
  using C = ProductOf<T>;
  static constexpr int n = kLanes<float>;
  static constexpr int kTileRows = CPU_CAPABILITY::kTileRows<C>;

  explicit BackwardTiles(const AttentionBwdParams& params)
      : p(params), in(params.in), z(params.in), plain(is_plain(params.in)), scale(keep_scale(params.in)) {}

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
      const int64_t padded = words_of<C>(block.count) * kPerWord<C>;
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

  bool tile_is_seen(const QueryBlock<T>& block, const Sequence& seq, int64_t key) const {
    int64_t c0, c1;
    return seen_keys(in, block.rows, block.count, key, kBwdKeys, seq.keys, n, c0, c1);
  }

  int chunk_of(const QueryBlock<T>& block, int64_t r) const {
    return static_cast<int>(block.count - r < kTileRows ? block.count - r : kTileRows);
  }

  // p and ds of a tile, in the layouts that the products with them read.
  void make_tile(const Tile<T>& tile, const QueryBlock<T>& block, const KeyBlock<T>& keys, const Sequence& seq,
                 int64_t key) const {
    for (int64_t r = 0; r < block.count; r += kTileRows) {
      const int rows = chunk_of(block, r);
      int64_t c0, c1;
      const bool any = seen_keys(in, block.rows + r, rows, key, kBwdKeys, seq.keys, n, c0, c1);
      if (!any) c0 = c1 = 0;
      if (any) {
        const int64_t soon = block.count - r - rows < kTileRows ? block.count - r - rows : kTileRows;
        fetch_masks(in, block.rows + r + rows, soon, key, seq.keys - key < kBwdKeys ? seq.keys - key : kBwdKeys);
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
    for (int64_t w = div_up(block.count, kPerWord<C>); w < words_of<C>(block.count); ++w) {
      for (int64_t j = 0; j < kBwdKeys; j += n) {
        store_words(tile.p_summed + w * kBwdKeys + j, UInt32Vector{});
        store_words(tile.ds_summed + w * kBwdKeys + j, UInt32Vector{});
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
            const int64_t at = (first + i) / 2 * kBwdKeys + j;
            BFloat16* ds = reinterpret_cast<BFloat16*>(tile.ds) + (first + i) * kBwdKeys + j;
            store_words(tile.p_summed + at, store_weights(nullptr, nullptr, a.p, b.p));
            store_words(tile.ds_summed + at, store_weights(ds, ds + kBwdKeys, a.ds, b.ds));
          }
        }
      }
    };
    sweep(0, c0, zero);
    sweep(c0, c1, one);
    sweep(c1, kBwdKeys, zero);
  }

  // dv += p^T dout and dk += ds^T q, over the rows that see some of the keys.
  void add_keys(const Tile<T>& tile, const QueryBlock<T>& block, const KeyBlock<T>& keys, int64_t key) const {
    const int64_t words = words_of<C>(block.count);
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

  const AttentionBwdParams& p;
  const AttentionInputs& in;
  const BwdSizes<T> z;
  const bool plain;
  const float scale;  // of what dropout keeps
};

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
