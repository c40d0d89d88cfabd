// From products of queries and keys to scores, for attention on the CPU: what each query sees, the options that change
// a score, dropout.
#pragma once

#include "common/cpu/math.h"
#include "common/random.h"
#include "ops/attention/attention_cpu_pack.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

constexpr float kInfinity = __builtin_inff();

inline FloatVector maximum(FloatVector a, FloatVector b) {  // b if either is a NaN
#if defined(CPU_CAPABILITY_AVX512)
  return bit_cast<FloatVector>(_mm512_maskz_max_ps(0xffff, bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(CPU_CAPABILITY_AVX2)
  return bit_cast<FloatVector>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

inline UInt32Vector lane_numbers() {
  UInt32Vector lanes;
  for (int i = 0; i < kLanes<float>; ++i) lanes[i] = static_cast<uint32_t>(i);
  return lanes;
}

// One sequence of a call.
struct Sequence {
  int64_t queries, keys;       // how many
  int64_t q_first, k_first;    // their first rows in the tensors
  int64_t q_batch;             // and the batch index there
};

inline Sequence sequence(const AttentionInputs& in, int64_t b) {
  if (in.cu_seqlens_q != nullptr) {
    const int64_t q = in.cu_seqlens_q[b], k = in.cu_seqlens_k[b];
    return {in.cu_seqlens_q[b + 1] - q, in.cu_seqlens_k[b + 1] - k, q, k, 0};
  }
  return {in.S, in.seqlens_k != nullptr ? in.seqlens_k[b] : in.T, 0, 0, b};
}

template <class T>
inline HeadRows<T> key_rows(const AttentionInputs& in, const void* base, const AttentionStrides& strides, int64_t b,
                            int64_t head, const Sequence& s) {
  const T* from = static_cast<const T*>(base) + head * strides.head;
  if (in.block_table != nullptr) {
    return {from, strides.row, in.block_table + b * in.block_table_stride, in.page_size, strides.batch};
  }
  return {from + b * strides.batch + s.k_first * strides.row, strides.row};
}

template <class T>
inline HeadRows<T> query_rows(const void* base, const AttentionStrides& strides, int64_t b, int64_t head,
                              const Sequence& s) {
  return {static_cast<const T*>(base) + b * strides.batch + head * strides.head + s.q_first * strides.row, strides.row};
}

// Where a query's statistics are, [B, H, q_rows].
inline int64_t stat_index(const AttentionInputs& in, const Sequence& s, int64_t head, int64_t query) {
  return (s.q_batch * in.H + head) * in.q_rows + s.q_first + query;
}

// What the scores of one query need besides the products.
struct ScoreRow {
  int64_t low, high;  // it sees the keys in [low, high)
  const char* mask;
  float center, slope;
  RowKeys random;
};

inline ScoreRow score_row(const AttentionInputs& in, const Sequence& s, int64_t b, int64_t head, int64_t query) {
  ScoreRow row{};
  const int64_t center = in.top_left ? query : query + s.keys - s.queries;
  const int64_t low = in.window_left >= 0 && center > in.window_left ? center - in.window_left : 0;
  const bool ends = in.window_right >= 0 && s.keys - center > in.window_right;
  const int64_t high = ends ? center + in.window_right + 1 : s.keys;
  row.low = low < s.keys ? low : s.keys;
  row.high = high < row.low ? row.low : high;
  row.center = static_cast<float>(center);
  if (in.alibi_slopes != nullptr) row.slope = in.alibi_slopes[b * in.slope_batch_stride + head];
  if (in.mask != nullptr) {
    const int64_t size = in.mask_kind == MaskKind::kBool ? 1 : in.mask_kind == MaskKind::kFloat32 ? 4
                                                                                  : element_bytes(in.dtype);
    row.mask = static_cast<const char*>(in.mask) +
               size * (b * in.mask_strides[0] + head * in.mask_strides[1] + query * in.mask_strides[2]);
  }
  if (in.seed != nullptr) row.random = row_keys(*in.seed, stat_index(in, s, head, query));
  return row;
}

// Whether scores are scale * product alone; then the largest product has the largest score.
inline bool is_plain(const AttentionInputs& in) {
  return in.mask == nullptr && in.alibi_slopes == nullptr && in.softcap <= 0.0f && in.scale > 0.0f;
}

typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));  // as many lanes as FloatVector

// A mask's elements at keys j .. j + count of a row: added to a score, -inf for what a boolean one leaves out.
template <class M>
inline FloatVector load_mask(const char* row, int64_t stride, int64_t j, int64_t count) {
  const M* from = reinterpret_cast<const M*>(row);
  if constexpr (std::is_same_v<M, bool>) {
    Bytes bytes{};
    if (stride == 0) {
      bytes = bytes + static_cast<uint8_t>(*from);
    } else if (count >= kLanes<float>) {
      __builtin_memcpy(&bytes, from + j, sizeof(bytes));
    } else {
      for (int i = 0; i < count; ++i) bytes[i] = static_cast<uint8_t>(from[j + i]);
    }
#if defined(CPU_CAPABILITY_AVX512)
    const UInt32Vector seen = bit_cast<UInt32Vector>(_mm512_maskz_cvtepu8_epi32(0xffff, bit_cast<__m128i>(bytes)));
#else
    const UInt32Vector seen = __builtin_convertvector(bytes, UInt32Vector);
#endif
    return seen != 0u ? FloatVector{} : splat(-kInfinity);
  } else {
    if (stride == 0) {
      M same[kLanes<float>];
      for (int i = 0; i < kLanes<float>; ++i) same[i] = *from;
      return load(same);
    }
    return count >= kLanes<float> ? load(from + j) : load_tail(from + j, static_cast<int>(count > 0 ? count : 0));
  }
}

// Asks the memory for the masks of rows that come soon: of each only a few lines are read at a time, which no processor
// foresees. Inlined by order: gcc 12 drops calls of a function that only prefetches.
__attribute__((always_inline)) inline void fetch_masks(const AttentionInputs& in, const ScoreRow* rows, int64_t count,
                                                       int64_t first, int64_t keys) {
  if (in.mask == nullptr || in.mask_strides[2] == 0 || in.mask_strides[3] == 0) return;
  const int64_t size = in.mask_kind == MaskKind::kBool ? 1 : in.mask_kind == MaskKind::kFloat32 ? 4
                                                                                : element_bytes(in.dtype);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t byte = 0; byte < keys * size; byte += 64) __builtin_prefetch(rows[i].mask + first * size + byte);
  }
}

// Whether a boolean mask shows one of the keys first .. first + lanes to some of the rows. `keys`: how many there are.
inline bool mask_shows(const AttentionInputs& in, const ScoreRow* rows, int64_t count, int64_t first, int64_t keys) {
  const int64_t stride = in.mask_strides[3], there = stride == 0 ? 1 : keys - first;
  Bytes any{};
  for (int64_t i = 0; i < count; ++i) {
    const char* from = rows[i].mask + first * stride;
    Bytes bytes{};
    if (there >= kLanes<float>) {
      __builtin_memcpy(&bytes, from, sizeof(bytes));
    } else {
      for (int64_t j = 0; j < there; ++j) bytes[j] = static_cast<uint8_t>(from[j]);
    }
    any |= bytes;
  }
  for (int i = 0; i < kLanes<float>; ++i) {
    if (any[i] != 0) return true;
  }
  return false;
}

// The keys [c0, c1) of the block of `size` from `key` on that some of `count` rows sees, rounded outwards to `step`, a
// multiple of the lanes; false: none. `keys`: how many the sequence has.
inline bool seen_keys(const AttentionInputs& in, const ScoreRow* rows, int64_t count, int64_t key, int64_t size,
                      int64_t keys, int64_t step, int64_t& c0, int64_t& c1) {
  constexpr int n = kLanes<float>;
  int64_t low = key + size, high = key;
  for (int64_t r = 0; r < count; ++r) {
    if (rows[r].low >= rows[r].high) continue;
    low = rows[r].low < low ? rows[r].low : low;
    high = rows[r].high > high ? rows[r].high : high;
  }
  low = low < key ? key : low;
  high = high > key + size ? key + size : high;
  if (low >= high) return false;
  c0 = (low - key) / n * n;
  c1 = round_up(high - key, n);
  if (in.mask_kind == MaskKind::kBool) {
    while (c0 < c1 && !mask_shows(in, rows, count, key + c0, keys)) c0 += n;
    while (c0 < c1 && !mask_shows(in, rows, count, key + c1 - n, keys)) c1 -= n;
  }
  const bool any = c0 < c1;
  c0 = c0 / step * step;
  c1 = round_up(c1, step);
  return any;
}

template <class M>
struct Type {
  using type = M;
};

// Products in `s` to scores, before what a row does not see is left out: keys first .. first + count, a multiple of the
// lanes. Where `slopes` is given it gets the derivative of softcap, or of nothing, at each score.
template <class T, class Mask>
inline void add_options(const AttentionInputs& in, const ScoreRow& row, int64_t first, int64_t count, int64_t keys,
                        float* s, float* slopes, Mask) {
  using M = typename Mask::type;
  const FloatVector lanes = __builtin_convertvector(lane_numbers(), FloatVector);
  const bool capped = in.softcap > 0.0f, biased = in.alibi_slopes != nullptr;
  const float inverse = capped ? 1.0f / in.softcap : 0.0f;
  for (int64_t j = 0; j < count; j += kLanes<float>) {
    FloatVector x = load(s + j) * in.scale;
    if (capped) {
      const FloatVector t = tanh<float>(x * inverse);
      x = t * in.softcap;
      if (slopes != nullptr) store(slopes + j, 1.0f - t * t);
    }
    if (biased) {
      const FloatVector distance = lanes + (static_cast<float>(first + j) - row.center);
      x = x - bit_cast<FloatVector>(bit_cast<UInt32Vector>(distance) & 0x7fffffffu) * row.slope;
    }
    if constexpr (!std::is_same_v<M, void>) {
      const FloatVector mask = load_mask<M>(row.mask, in.mask_strides[3], first + j, keys - first - j);
      x = std::is_same_v<M, bool> ? (mask < 0.0f ? mask : x) : x + mask;  // what is left out may be a NaN
    }
    store(s + j, x);
  }
}

template <class T>
__attribute__((noinline)) void finish_scores(const AttentionInputs& in, const ScoreRow& row, int64_t first,
                                             int64_t count, int64_t keys, float* s, float* slopes) {
  switch (in.mask_kind) {
    case MaskKind::kNone:
      return add_options<T>(in, row, first, count, keys, s, slopes, Type<void>{});
    case MaskKind::kBool:
      return add_options<T>(in, row, first, count, keys, s, slopes, Type<bool>{});
    case MaskKind::kElement:
      return add_options<T>(in, row, first, count, keys, s, slopes, Type<T>{});
    case MaskKind::kFloat32:
      return add_options<T>(in, row, first, count, keys, s, slopes, Type<float>{});
  }
}

// -inf outside [low, high), positions in `s` of `count` keys.
inline void leave_out(float* s, int64_t count, int64_t low, int64_t high) {
  constexpr int n = kLanes<float>;
  typedef int32_t Signed __attribute__((vector_size(kVectorBytes)));
  const Signed lanes = bit_cast<Signed>(lane_numbers());
  low = low < 0 ? 0 : low > count ? count : low;
  high = high < low ? low : high > count ? count : high;
  for (int64_t j = 0; j < low; j += n) {
    store(s + j, lanes < static_cast<int32_t>(low - j) ? splat(-kInfinity) : load(s + j));
  }
  for (int64_t j = high / n * n; j < count; j += n) {
    store(s + j, lanes >= static_cast<int32_t>(high - j) ? splat(-kInfinity) : load(s + j));
  }
}

// Which elements of a row dropout keeps, at the keys from `column` on: all bits set or none.
inline UInt32Vector kept(RowKeys keys, int64_t column, uint32_t threshold) {
  const UInt32Vector bits = random_bits(keys, lane_numbers() + static_cast<uint32_t>(column));
  return bit_cast<UInt32Vector>((bits >> 8) >= threshold);
}

inline FloatVector select(UInt32Vector mask, FloatVector value) {
  return bit_cast<FloatVector>(bit_cast<UInt32Vector>(value) & mask);
}

// What is kept is divided by 1 - p; with p = 1 nothing is.
inline float keep_scale(const AttentionInputs& in) {
  const float keep = 1.0f - in.dropout_p;
  return in.seed == nullptr ? 1.0f : keep > 0.0f ? 1.0f / keep : 0.0f;
}

inline float finite(float row_max) { return row_max == -kInfinity ? 0.0f : row_max; }

// Weights as a product reads them. Without the care of `store` for denormals, which are nothing beside a weight of 1.
inline void store_weights(float* to, FloatVector value) { store(to, value); }
#if defined(CPU_CAPABILITY_AVX512_BF16)
inline void store_weights(BFloat16* to, FloatVector value) {
  const UInt16Half bits = bit_cast<UInt16Half>(_mm512_cvtneps_pbh(bit_cast<__m512>(value)));
  __builtin_memcpy(to, &bits, sizeof(bits));
}

// Two rows at once, and as words of an element of a and below it one of b.
inline UInt32Vector store_weights(BFloat16* to_a, BFloat16* to_b, FloatVector a, FloatVector b) {
  const __m512i both = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(b), bit_cast<__m512>(a)));
  if (to_a != nullptr) {
    const UInt32Vector bits = bit_cast<UInt32Vector>(both);
    __builtin_memcpy(to_a, &bits, sizeof(bits) / 2);
    __builtin_memcpy(to_b, reinterpret_cast<const char*>(&bits) + sizeof(bits) / 2, sizeof(bits) / 2);
  }
  UInt16Vector order;
  for (int i = 0; i < 2 * kLanes<float>; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * kLanes<float>);
  return bit_cast<UInt32Vector>(_mm512_permutexvar_epi16(bit_cast<__m512i>(order), both));
}
#endif

// --- reductions of several rows at once: lane i of the result is of row i ---

struct Sum {
  FloatVector operator()(FloatVector a, FloatVector b) const { return a + b; }
};
struct Max {
  FloatVector operator()(FloatVector a, FloatVector b) const { return maximum(a, b); }
};

// Neighbouring lanes of a and b combined: a's in the first half of the result, b's in the second.
template <class Op>
inline FloatVector halve(FloatVector a, FloatVector b, Op op) {
  constexpr int n = kLanes<float>;
  UInt32Vector even, odd;
  for (int i = 0; i < n; ++i) even[i] = static_cast<uint32_t>(2 * i), odd[i] = static_cast<uint32_t>(2 * i + 1);
  return op(__builtin_shuffle(a, b, even), __builtin_shuffle(a, b, odd));
}

// `kCount` vectors, a power of two up to the lanes; vector i is combined into lane i, and those repeat.
template <int kCount, class Op>
inline FloatVector combine_lanes(const FloatVector* vectors, Op op) {
  FloatVector level[kCount];
  for (int i = 0; i < kCount; ++i) level[i] = vectors[i];
  for (int width = kCount; width > 1; width /= 2) {
    for (int i = 0; i < width / 2; ++i) level[i] = halve(level[2 * i], level[2 * i + 1], op);
  }
  for (int rest = kLanes<float> / kCount; rest > 1; rest /= 2) level[0] = halve(level[0], level[0], op);
  return level[0];
}

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
