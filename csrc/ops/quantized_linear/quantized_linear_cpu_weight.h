// Rows of a quantized weight as operands: scales and zero points, and the codes of a block of columns, expanded.
#pragma once

#include "ops/quantized_linear/quantized_linear_cpu_operands.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

inline bool four_bits(WeightFormat format) { return format == WeightFormat::kInt4 || format == WeightFormat::kNf4; }

inline int64_t row_bytes(const QuantizedWeight& weight) {
  return four_bits(weight.format) ? (weight.K + 1) / 2 : weight.K;
}

// Bytes of so many columns, an even number.
inline int64_t bytes_of(const QuantizedWeight& weight, int64_t columns) {
  return four_bits(weight.format) ? columns / 2 : columns;
}

inline const uint8_t* row_of(const QuantizedWeight& weight, int64_t n) {
  return static_cast<const uint8_t*>(weight.data) + n * row_bytes(weight);
}

// --- scales and zero points of groups ---

// Elements from one row of scales to the next: a vector is loaded from any group on.
inline int64_t groups_stride(const QuantizedWeight& weight) { return weight.groups + kWords; }

template <class T>
inline void widen_scales(const void* from, int64_t first, int64_t count, float* to) {
  const T* scales = static_cast<const T*>(from) + first;
  for_each_vector<float>(0, count, [&](int64_t g, auto part) { part.store(to + g, part.load(scales + g)); });
}

// The scales of row `n` in fp32, and minus its zero points (null: it has none); behind them a vector of zeros.
inline void read_groups(const QuantizedWeight& weight, int64_t n, float* scales, int32_t* minus_zeros) {
  const int64_t groups = weight.groups;
  const bool blocks = weight.format == WeightFormat::kFp8 && weight.group_size != 0;
  const int64_t first = (blocks ? n / kFp8Block : n) * groups;
  if (weight.scale_type == ScaleType::kFloat32) widen_scales<float>(weight.scales, first, groups, scales);
  if (weight.scale_type == ScaleType::kBFloat16) widen_scales<BFloat16>(weight.scales, first, groups, scales);
  if (weight.scale_type == ScaleType::kFloat16) widen_scales<Float16>(weight.scales, first, groups, scales);
  if (weight.scale_type == ScaleType::kInt8) {
    const int8_t* steps = static_cast<const int8_t*>(weight.scales) + first;
    const float mean = weight.second_scales[0];
    for (int64_t g = 0; g < groups; ++g) {
      scales[g] = mean + weight.second_scales[1 + (first + g) / kSecondScales] * static_cast<float>(steps[g]);
    }
  }
  store(scales + groups, FloatVector{});  // for the lanes of a row's last block that have no group
  if (minus_zeros == nullptr) return;
  store_bits(minus_zeros + groups, Bits{});
  for (int64_t g = 0; g < groups; ++g) minus_zeros[g] = -static_cast<int32_t>(weight.zeros[n * groups + g]);
}

// Which of a row's groups the lanes of a block belong to; each has eight columns, and groups have 32, 64 or 128.
struct GroupLanes {
  int64_t blocks = 1;     // of a group, if it has several or one
  int64_t per_block = 1;  // groups, if a block has several
  Int32Vector lanes{};

  explicit GroupLanes(int64_t group_size) {
    if (group_size == 0) {
      blocks = int64_t{1} << 40;
    } else if (group_size >= kBlockColumns) {
      blocks = group_size / kBlockColumns;
    } else {
      per_block = kBlockColumns / group_size;
      for (int i = 0; i < kWords; ++i) lanes[i] = static_cast<int32_t>(8 * i / group_size);
    }
    shift = 0;
    while ((int64_t{1} << shift) < blocks) ++shift;
  }

  // `kSplit`: whether a block has several groups.
  template <bool kSplit, class T>
  auto of(const T* groups, int64_t block) const {
    using V = std::conditional_t<std::is_same_v<T, float>, FloatVector, Int32Vector>;
    if constexpr (kSplit) return __builtin_shuffle(bit_cast<V>(load_bits(groups + block * per_block)), lanes);
    return V{} + groups[block >> shift];
  }
  FloatVector of(const float* groups, int64_t block) const {
    if (per_block == 1) return splat(groups[block >> shift]);
    return __builtin_shuffle(load(groups + block * per_block), lanes);
  }
  Int32Vector of(const int32_t* groups, int64_t block) const {
    if (per_block == 1) return Int32Vector{} + groups[block >> shift];
    return __builtin_shuffle(bit_cast<Int32Vector>(load_bits(groups + block * per_block)), lanes);
  }

 private:
  int shift = 0;
};

// --- bytes ---

inline FloatVector int8_values(const uint8_t* from) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return bit_cast<FloatVector>(_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bytes)));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return bit_cast<FloatVector>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
#else
  FloatVector value;
  for (int i = 0; i < kWords; ++i) value[i] = static_cast<float>(static_cast<int8_t>(from[i]));
  return value;
#endif
}

// The bits of e4m3, moved, are fp16 of another bias; 0x7f and 0xff are NaN.
inline FloatVector fp8_values(const uint8_t* from) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i moved = _mm256_srai_epi16(_mm256_slli_epi16(words, 8), 1);
  const __m256i size = _mm256_and_si256(words, _mm256_set1_epi16(0x7f));
  const __mmask16 is_nan = _mm256_cmpeq_epi16_mask(size, _mm256_set1_epi16(0x7f));
  const __m256i half = _mm256_mask_mov_epi16(_mm256_and_si256(moved, _mm256_set1_epi16(static_cast<int16_t>(0xbfff))),
                                             is_nan, _mm256_set1_epi16(0x7e00));
  return bit_cast<FloatVector>(_mm512_maskz_cvtph_ps(0xffff, half)) * 256.0f;
#elif defined(CPU_CAPABILITY_AVX2)
  const __m128i words = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  const __m128i moved = _mm_srai_epi16(_mm_slli_epi16(words, 8), 1);
  const __m128i size = _mm_and_si128(words, _mm_set1_epi16(0x7f));
  const __m128i is_nan = _mm_cmpeq_epi16(size, _mm_set1_epi16(0x7f));
  const __m128i half = _mm_or_si128(_mm_and_si128(moved, _mm_set1_epi16(static_cast<int16_t>(0xbfff))),
                                    _mm_and_si128(is_nan, _mm_set1_epi16(0x7e00)));
  return bit_cast<FloatVector>(_mm256_cvtph_ps(half)) * 256.0f;
#else
  UInt32Vector bits;
  for (int i = 0; i < kWords; ++i) bits[i] = from[i];
  const UInt32Vector size = bits & 0x7fu;
  const FloatVector small = __builtin_convertvector(bit_cast<Int32Vector>(size), FloatVector) * 0x1p-9f;
  const UInt32Vector normal = (size << 20) + (120u << 23);
  UInt32Vector value = (size < 8u) ? bit_cast<UInt32Vector>(small) : normal;
  value = (size == 0x7fu) ? (size * 0u + 0x7fc00000u) : value;
  return bit_cast<FloatVector>(value | (bits & 0x80u) << 24);
#endif
}

template <WeightFormat kFormat>
inline FloatVector byte_values(const uint8_t* from) {
  return kFormat == WeightFormat::kFp8 ? fp8_values(from) : int8_values(from);
}

// --- codes of four bits ---

// What the sixteen codes stand for, each more by `shift` and then times `scale`; of nf4 there is no shift.
struct Levels {
  static constexpr int kVectors = 16 / kWords;
  FloatVector of[kVectors];

  explicit Levels(WeightFormat format) {
    for (int i = 0; i < 16; ++i) {
      of[i / kWords][i % kWords] = format == WeightFormat::kNf4 ? kNf4Levels[i] : static_cast<float>(i);
    }
  }
  Levels with(float scale, float shift) const {
    Levels levels = *this;
    for (int v = 0; v < kVectors; ++v) levels.of[v] = (of[v] + shift) * scale;
    return levels;
  }
};

// Levels to be looked up, by the low four bits of each lane.
template <class Operand>
struct Table;

template <>
struct Table<FloatOperand> {
#if defined(CPU_CAPABILITY_AVX512)
  FloatVector levels;
  explicit Table(const Levels& from) : levels(from.of[0]) {}
  Bits look_up(Bits codes) const {
    return bit_cast<Bits>(_mm512_maskz_permutexvar_ps(0xffff, bit_cast<__m512i>(codes), bit_cast<__m512>(levels)));
  }
#elif defined(CPU_CAPABILITY_AVX2)
  FloatVector low, high;
  explicit Table(const Levels& from) : low(from.of[0]), high(from.of[1]) {}
  Bits look_up(Bits codes) const {
    const __m256 a = _mm256_permutevar8x32_ps(bit_cast<__m256>(low), bit_cast<__m256i>(codes));
    const __m256 b = _mm256_permutevar8x32_ps(bit_cast<__m256>(high), bit_cast<__m256i>(codes));
    return bit_cast<Bits>(_mm256_blendv_ps(a, b, bit_cast<__m256>(codes << 28)));
  }
#else
  float levels[16];
  explicit Table(const Levels& from) { __builtin_memcpy(levels, from.of, sizeof(levels)); }
  Bits look_up(Bits codes) const {
    FloatVector value;
    for (int i = 0; i < kWords; ++i) value[i] = levels[codes[i] & 15u];
    return bit_cast<Bits>(value);
  }
#endif

  // kWords columns, from half as many bytes.
  void natural(const uint8_t* from, float* to) const {
#if defined(CPU_CAPABILITY_AVX512)
    const __m512i bytes = _mm512_maskz_cvtepu8_epi64(0xff, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    const Bits codes = bit_cast<Bits>(_mm512_or_si512(bytes, _mm512_maskz_slli_epi64(0xff, bytes, 28)));
#elif defined(CPU_CAPABILITY_AVX2)
    int32_t four;
    __builtin_memcpy(&four, from, sizeof(four));
    const __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    const Bits codes = bit_cast<Bits>(_mm256_or_si256(bytes, _mm256_slli_epi64(bytes, 28)));
#else
    Bits codes;
    for (int i = 0; i < kWords; ++i) codes[i] = static_cast<uint32_t>(from[i / 2] >> (i % 2 * 4));
#endif
    const Bits values = look_up(codes);
    __builtin_memcpy(to, &values, sizeof(values));
  }
};

#if defined(CPU_CAPABILITY_AVX512_BF16)
template <>
struct Table<PairOperand> {
  __m512i levels;  // the sixteen twice: the bit above a code does not matter
  explicit Table(const Levels& from) {
    const __m256i half = bit_cast<__m256i>(narrow(from.of[0], BFloat16{}));
    levels = _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
  }
  // For codes less a zero point, -16 ... 15, by their low five bits.
  struct Signed {};
  explicit Table(Signed) {
    UInt16Vector table;
    for (int i = 0; i < 32; ++i) {
      const float value = static_cast<float>(i < 16 ? i : i - 32);
      table[i] = PairOperand::element(value);
    }
    levels = bit_cast<__m512i>(table);
  }
  Bits look_up(__m512i codes) const {
    return bit_cast<Bits>(_mm512_maskz_permutexvar_epi16(0xffffffff, codes, levels));
  }

  // 2 kWords columns, from half as many bytes.
  void natural(const uint8_t* from, uint16_t* to) const {
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m512i bytes = _mm512_maskz_cvtepu8_epi32(0xffff, sixteen);
    const Bits values = look_up(_mm512_or_si512(bytes, _mm512_maskz_slli_epi32(0xffff, bytes, 12)));
    __builtin_memcpy(to, &values, sizeof(values));
  }
};
#endif

// --- a row in natural order, for products of floats ---

inline void store_values(float* to, FloatVector a, FloatVector b) {
  store(to, a);
  store(to + kWords, b);
}
#if defined(CPU_CAPABILITY_AVX512_BF16)
inline void store_values(uint16_t* to, FloatVector a, FloatVector b) {
  const __m512bh both = _mm512_cvtne2ps_pbh(bit_cast<__m512>(b), bit_cast<__m512>(a));
  __builtin_memcpy(to, &both, sizeof(both));
}
#endif

// Asks for the bytes of a block, some rows further down: those are the next ones, and a processor does not see it.
inline void fetch_ahead(const QuantizedWeight& weight, const uint8_t* from) {
  constexpr int64_t kRows = 8;
  const char* const ahead = reinterpret_cast<const char*>(from) + kRows * row_bytes(weight);
  for (int64_t line = 0; line < bytes_of(weight, kBlockColumns); line += 64) __builtin_prefetch(ahead + line);
}

// Scales, zero points and where to read them from: one row of a weight.
struct WeightRow {
  const uint8_t* bytes;
  const float* scales;         // of its groups
  const int32_t* minus_zeros;  // null: it has none
};

// The columns [first, end) of a row, whole blocks but for the row's end, where what follows up to a whole block is
// something finite. Not scaled: without the scale of the row, which has one.
template <class Operand>
inline void expand(const QuantizedWeight& weight, const WeightRow& row, bool scaled, int64_t first, int64_t end,
                   typename Operand::Element* to) {
  const bool codes = four_bits(weight.format);
  const Levels levels(weight.format);
  const float middle = weight.format == WeightFormat::kInt4 ? -static_cast<float>(kInt4Middle) : 0.0f;
  for (int64_t k = first; k < end; k += kBlockColumns) {
    const uint8_t* from = row.bytes + bytes_of(weight, k);
    fetch_ahead(weight, from);
    uint8_t rest[kBlockColumns] = {};
    if (weight.K - k < kBlockColumns) {
      const int64_t left = row_bytes(weight) - bytes_of(weight, k);
      __builtin_memcpy(rest, from, static_cast<uint64_t>(left));
      from = rest;
    }
    if (!codes) {
      const float scale = !scaled ? 1.0f : row.scales[weight.group_size != 0 ? k / weight.group_size : 0];
      for (int64_t i = 0; i < kBlockColumns; i += 2 * kWords) {
        if (weight.format == WeightFormat::kFp8) {
          store_values(to + i, fp8_values(from + i) * scale, fp8_values(from + i + kWords) * scale);
        } else {
          store_values(to + i, int8_values(from + i) * scale, int8_values(from + i + kWords) * scale);
        }
      }
    } else {
      const int64_t size = weight.group_size;
      const int64_t step = size != 0 && size < kBlockColumns ? size : kBlockColumns;
      for (int64_t i = 0; i < kBlockColumns; i += step) {
        const int64_t wanted = size != 0 ? (k + i) / size : 0;
        const int64_t group = wanted < weight.groups ? wanted : weight.groups - 1;
        const float shift = row.minus_zeros != nullptr ? static_cast<float>(row.minus_zeros[group]) : middle;
        const Table<Operand> table(levels.with(scaled ? row.scales[group] : 1.0f, shift));
        const int64_t stop = i + step;
        for (int64_t j = i; j < stop; j += kPlaneElements<Operand>) table.natural(from + j / 2, to + j);
      }
    }
    to += kBlockColumns;
  }
}

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
