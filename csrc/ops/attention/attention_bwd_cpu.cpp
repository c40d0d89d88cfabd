// The backward of attention on the CPU, compiled once per instruction set. The maths is in attention.h.
//
// Scores are made again, a tile of queries by a tile of keys at a time. Where a task is a key head, a tile gives its
// part of dq, dk and dv at once (five products); dq of the head is summed in memory meanwhile. Where it is a block of
// keys, or of queries, two steps make them (seven products, more tasks). Tiles, their order and so every sum are the
// same either way: the choice, which depends on the number of threads, cannot be seen in the results.
#include "ops/attention/attention_cpu.h"
#include "ops/attention/attention_cpu_tiles.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

// Where the mask's gradient is as large as the scores it is written as they come. Else it is summed: by a task that has
// all the heads which share a part of it, or by a step of its own, which makes all scores once more. An element's sum
// is over batch, heads and rows in this order either way.
inline bool mask_is_whole(const AttentionBwdParams& p) {
  return p.dmask_sizes[0] == p.in.B && p.dmask_sizes[1] == p.in.H && p.dmask_sizes[2] == p.in.S &&
         p.dmask_sizes[3] == p.in.T;
}

template <class T>
class Backward : BackwardTiles<T> {
  using Tiles = BackwardTiles<T>;
  using Tiles::add_dq, Tiles::add_keys, Tiles::make_tile, Tiles::n, Tiles::pack_keys, Tiles::pack_queries;
  using Tiles::in, Tiles::p, Tiles::scale, Tiles::tile_is_seen, Tiles::z;

 public:
  Backward(const AttentionBwdParams& params, float* mask_sums)
      : Tiles(params),
        mask_sums(mask_sums),
        every_b(mask_sums != nullptr && params.dmask_sizes[0] != params.in.B),
        every_head(mask_sums != nullptr && params.dmask_sizes[1] != params.in.H) {}

  // delta of the query rows [begin, end), counted as [B, H, S].
  void delta_step(int64_t begin, int64_t end) const {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t query = index % in.S, head = index / in.S % in.H, b = index / (in.S * in.H);
      const Sequence seq = sequence(in, b);
      if (query >= seq.queries) continue;
      const T* dout = query_rows<T>(p.dout, p.dout_strides, seq.q_batch, head, seq)(query);
      const T* out = query_rows<T>(p.out, p.out_strides, seq.q_batch, head, seq)(query);
      FloatVector total{};
      for_each_vector<float>(0, in.Dv, [&](int64_t j, auto part) {
        total += part.load(dout + j) * part.load(out + j);
      });
      const int64_t at = stat_index(in, seq, head, query);
      p.delta[at] = sum<float>(total) - (p.dlse != nullptr ? p.dlse[at] : 0.0f);
    }
  }

  // Tasks are key heads; with mask_sums all of those that add to the same elements of it.
  int64_t heads_step(int64_t begin, int64_t end, char* base) {
    Arena arena{base};
    Tile<T> tile(arena, p.dmask != nullptr);
    KeyBlock<T> keys(z, arena, true);
    QueryBlock<T>* queries = arena.take<QueryBlock<T>>(z.group * z.row_blocks);
    for (int64_t i = 0; i < z.group * z.row_blocks; ++i) {
      const QueryBlock<T> block(z, arena, p.dq != nullptr);
      if (base != nullptr) queries[i] = block;
    }
    const int64_t heads = every_head ? 1 : in.Hk;
    for (int64_t task = begin; task < end && base != nullptr; ++task) {
      for (int64_t b = every_b ? 0 : task / heads; b < (every_b ? in.B : task / heads + 1); ++b) {
        for (int64_t h = every_head ? 0 : task % heads; h < (every_head ? in.Hk : task % heads + 1); ++h) {
          one_head(tile, keys, queries, b, h);
        }
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
        if (!tile_is_seen(queries, seq, key)) continue;
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

  // With mask_sums, tasks are rows of dmask.
  void round_mask_step(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      write_mask_row(mask_sums + row * p.dmask_sizes[3], row * p.dmask_sizes[3], p.dmask_sizes[3]);
    }
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
      const int64_t block = task % blocks, mh = task / blocks % p.dmask_sizes[1];
      const int64_t mb = task / (blocks * p.dmask_sizes[1]);
      for (int64_t i = 0; i < rows * cols; ++i) sums[i] = 0.0f;
      const bool every_b = p.dmask_sizes[0] != in.B, every_head = p.dmask_sizes[1] != in.H;
      for (int64_t b = every_b ? 0 : mb; b < (every_b ? in.B : mb + 1); ++b) {
        const Sequence seq = sequence(in, b);
        for (int64_t head = every_head ? 0 : mh; head < (every_head ? in.H : mh + 1); ++head) {
          for (int64_t r = one_row ? 0 : block; r < (one_row ? z.row_blocks : block + 1); ++r) {
            pack_queries(queries, seq, b, head, r, false);
            for (int64_t key = 0; key < seq.keys; key += kBwdKeys) {
              if (!tile_is_seen(queries, seq, key)) continue;
              pack_keys(keys, seq, b, head / z.group, key, false);
              make_tile(tile, queries, keys, seq, key);
              add_to(sums, one_row ? 0 : cols, tile.dmask, queries.count, key, one_key);
            }
          }
        }
      }
      const int64_t first = block * kBwdRows, left = p.dmask_sizes[2] - first;
      for (int64_t i = 0; i < (left < rows ? left : rows); ++i) {
        const int64_t row = (mb * p.dmask_sizes[1] + mh) * p.dmask_sizes[2] + first + i;
        write_mask_row(sums + i * cols, row * p.dmask_sizes[3], p.dmask_sizes[3]);
      }
    }
    return arena.used;
  }

 private:
  void one_head(const Tile<T>& tile, KeyBlock<T>& keys, QueryBlock<T>* queries, int64_t b, int64_t key_head) {
    const Sequence seq = sequence(in, b);
    for (int64_t i = 0; i < z.group * z.row_blocks; ++i) {
      pack_queries(queries[i], seq, b, key_head * z.group + i / z.row_blocks, i % z.row_blocks, true);
    }
    for (int64_t key = 0; key < seq.keys; key += kBwdKeys) {
      key_block(tile, keys, queries, seq, b, key_head, key, p.dq != nullptr);
    }
    if (p.dq == nullptr) return;
    for (int64_t i = 0; i < z.group * z.row_blocks; ++i) {
      write_dq(queries[i], seq, key_head * z.group + i / z.row_blocks, i % z.row_blocks);
    }
  }

  // All queries of a key head against one block of its keys.
  void key_block(const Tile<T>& tile, KeyBlock<T>& keys, QueryBlock<T>* queries, const Sequence& seq, int64_t b,
                 int64_t key_head, int64_t key, bool with_dq) {
    pack_keys(keys, seq, b, key_head, key, with_dq);
    for (int64_t i = 0; i < kBwdKeys * z.d_wide; i += n) store(keys.dk + i, FloatVector{});
    for (int64_t i = 0; i < kBwdKeys * z.dv_wide; i += n) store(keys.dv + i, FloatVector{});
    for (int64_t i = 0; i < z.group * z.row_blocks; ++i) {
      QueryBlock<T>& block = queries[i];
      if (block.count == 0 || !tile_is_seen(block, seq, key)) continue;
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
      T* first = static_cast<T*>(to) + batch * strides.batch + key_head * strides.head +
                 (seq.k_first + key) * strides.row;
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
    if (mask_sums != nullptr) return add_dmask(tile, block, seq, b, head, row_block, key);
    if (p.dmask == nullptr || !mask_is_whole(p)) return;
    const int64_t count = seq.keys - key < kBwdKeys ? seq.keys - key : kBwdKeys;
    for (int64_t i = 0; i < block.count; ++i) {
      const int64_t row = (b * in.H + head) * in.S + row_block * kBwdRows + i;
      write_mask_row(tile.dmask + i * kBwdKeys, row * in.T + key, count);
    }
  }

  void add_dmask(const Tile<T>& tile, const QueryBlock<T>& block, const Sequence& seq, int64_t b, int64_t head,
                 int64_t row_block, int64_t key) const {
    const int64_t count = seq.keys - key < kBwdKeys ? seq.keys - key : kBwdKeys;
    const int64_t mb = p.dmask_sizes[0] == 1 ? 0 : b, mh = p.dmask_sizes[1] == 1 ? 0 : head;
    for (int64_t i = 0; i < block.count; ++i) {
      const int64_t query = p.dmask_sizes[2] == 1 ? 0 : row_block * kBwdRows + i;
      float* to = mask_sums + ((mb * p.dmask_sizes[1] + mh) * p.dmask_sizes[2] + query) * p.dmask_sizes[3] + key;
      const float* ds = tile.dmask + i * kBwdKeys;
      for_each_vector<float>(0, count, [&](int64_t j, auto part) {
        part.store(to + j, part.load(to + j) + part.load(ds + j));
      });
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

  float* const mask_sums;
  const bool every_b, every_head;  // what a task of mask_sums has to go through
};

}  // namespace

AttentionBwdWork attention_bwd_work(const AttentionBwdParams& p, int64_t threads) {
  AttentionBwdWork work{};
  const AttentionInputs& in = p.in;
  const int delta = static_cast<int>(AttentionBwdStep::kDelta), heads = static_cast<int>(AttentionBwdStep::kHeads);
  const int keys = static_cast<int>(AttentionBwdStep::kKeys), queries = static_cast<int>(AttentionBwdStep::kQueries);
  const int mask = static_cast<int>(AttentionBwdStep::kMask);
  const bool whole = p.dmask != nullptr && mask_is_whole(p);
  with_narrow_type(in.dtype, [&](auto t) {
    using T = decltype(t);
    Backward<T> backward(p, nullptr);
    const BwdSizes<T> z(in);
    const int64_t pairs = in.B * in.Hk;
    const bool for_keys = p.dk != nullptr || p.dv != nullptr, for_queries = p.dq != nullptr || (whole && !for_keys);
    // Five products for a pair of tiles on the threads that get one of `pairs`, or seven on all of them; and two more
    // for a mask's gradient by itself, or five on the threads that get one of `shares`.
    const int64_t by_pairs = for_keys ? div_up(pairs, threads) * threads * 5 : pairs * 8;
    const bool by_head = by_pairs <= pairs * 7, sums = p.dmask != nullptr && !whole;
    const int64_t shares = (p.dmask_sizes[0] != in.B ? 1 : in.B) * (p.dmask_sizes[1] != in.H ? 1 : in.Hk);
    const bool by_share = sums && for_keys && p.dmask_sizes[3] == in.T &&
                          div_up(shares, threads) * threads * 5 * (pairs / shares) <=
                              (by_head ? by_pairs : pairs * 7) + pairs * 2;
    const auto set = [&](int step, int64_t tasks, int64_t bytes, int64_t flops) {
      work.tasks[step] = tasks, work.scratch_bytes[step] = bytes, work.task_flops[step] = flops;
    };
    if (!p.has_delta) set(delta, in.B * in.H * in.S, 0, 2 * in.Dv);
    const int64_t tile = 2 * kBwdRows * kBwdKeys * (in.D + in.Dv);
    if (by_head || by_share) {
      set(heads, by_share ? shares : pairs, backward.heads_step(0, 0, nullptr),
          z.group * z.row_blocks * z.key_blocks * tile);
    } else {
      if (for_keys) {
        set(keys, pairs * z.key_blocks, backward.keys_step(0, 0, nullptr), z.group * z.row_blocks * tile);
      }
      if (for_queries) {
        set(queries, in.B * in.H * z.row_blocks, backward.queries_step(0, 0, nullptr), z.key_blocks * tile);
      }
    }
    if (by_share) {
      const int64_t rows = p.dmask_sizes[0] * p.dmask_sizes[1] * p.dmask_sizes[2];
      work.mask_floats = rows * p.dmask_sizes[3];
      if (in.mask_kind != MaskKind::kFloat32 && in.dtype != DType::kFloat32) set(mask, rows, 0, p.dmask_sizes[3]);
    } else if (sums) {
      const int64_t blocks = p.dmask_sizes[2] != in.S ? 1 : z.row_blocks;
      set(mask, p.dmask_sizes[0] * p.dmask_sizes[1] * blocks, backward.mask_step(0, 0, nullptr), z.key_blocks * tile);
    }
  });
  return work;
}

void attention_bwd(const AttentionBwdParams& p, AttentionBwdStep step, int64_t begin, int64_t end, char* scratch,
                   float* mask_sums) {
  with_narrow_type(p.in.dtype, [&](auto t) {
    const ProductScope<ProductOf<decltype(t)>> scope;
    Backward<decltype(t)> backward(p, mask_sums);
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
        mask_sums != nullptr ? backward.round_mask_step(begin, end) : (void)backward.mask_step(begin, end, scratch);
        break;
    }
  });
}

}  // namespace llmkernels::cpu::CPU_CAPABILITY
