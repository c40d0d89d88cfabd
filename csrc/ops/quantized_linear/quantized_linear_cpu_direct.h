// Products of a few rows of x with a weight that is expanded in registers: each of its bytes is read once.
#pragma once

#include "ops/quantized_linear/quantized_linear_cpu_weight.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

// How the codes of a weight become operands in registers: four-bit ones by a table of levels (integers: less the middle
// of int4), or less zero points.
enum class Codes { kInt8, kFp8, kLevels, kZeros };

// What the scales of a block of a row are: the row's, which is left to the end, a group's, or those of several groups.
enum class Scales { kRow, kGroup, kGroups };

constexpr bool in_four_bits(Codes codes) { return codes == Codes::kLevels || codes == Codes::kZeros; }

// Of codes without zero points, not scaled.
inline Levels levels_of(WeightFormat format) {
  return Levels(format).with(1.0f, format == WeightFormat::kInt4 ? -static_cast<float>(kInt4Middle) : 0.0f);
}

// The vectors of a block of a row, from its bytes. Four-bit codes come out in planes, bytes in natural order.
template <class Operand, Codes kCodes>
struct Expander;

template <Codes kCodes>
struct Expander<FloatOperand, kCodes> {
  Table<FloatOperand> table;
  explicit Expander(WeightFormat format) : table(levels_of(format)) {}
  void operator()(const uint8_t* from, Int32Vector minus_zeros, Bits (&w)[8]) const {
    if constexpr (in_four_bits(kCodes)) {
      const Bits codes = load_bits(from);
      const FloatVector shift = as_float(minus_zeros + kInt4Middle);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        w[j] = table.look_up(codes >> (4 * j));
        if (kCodes == Codes::kZeros) w[j] = bit_cast<Bits>(bit_cast<FloatVector>(w[j]) + shift);
      }
    } else {
      constexpr WeightFormat kFormat = kCodes == Codes::kFp8 ? WeightFormat::kFp8 : WeightFormat::kInt8;
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) w[j] = bit_cast<Bits>(byte_values<kFormat>(from + j * kWords));
    }
  }
};

#if defined(CPU_CAPABILITY_AVX512_BF16)
template <Codes kCodes>
struct Expander<PairOperand, kCodes> {
  Table<PairOperand> table;
  explicit Expander(WeightFormat format)
      : table(kCodes == Codes::kZeros ? Table<PairOperand>(Table<PairOperand>::Signed{})
                                      : Table<PairOperand>(levels_of(format))) {}
  void operator()(const uint8_t* from, Int32Vector minus_zeros, Bits (&w)[4]) const {
    if constexpr (kCodes == Codes::kLevels) {
      const __m512i codes = bit_cast<__m512i>(load_bits(from));
      w[0] = table.look_up(codes);
      w[1] = table.look_up(_mm512_maskz_srli_epi16(0xffffffff, codes, 4));
      w[2] = table.look_up(_mm512_maskz_srli_epi16(0xffffffff, codes, 8));
      w[3] = table.look_up(_mm512_maskz_srli_epi16(0xffffffff, codes, 12));
    } else if constexpr (kCodes == Codes::kZeros) {
      const UInt16Vector codes = bit_cast<UInt16Vector>(load_bits(from));
      const UInt16Vector zeros = bit_cast<UInt16Vector>((minus_zeros & 0xffff) | minus_zeros << 16);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) w[j] = table.look_up(bit_cast<__m512i>(((codes >> (4 * j)) & 15) + zeros));
    } else {
      constexpr WeightFormat kFormat = kCodes == Codes::kFp8 ? WeightFormat::kFp8 : WeightFormat::kInt8;
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const FloatVector low = byte_values<kFormat>(from + 2 * j * kWords);
        const FloatVector high = byte_values<kFormat>(from + (2 * j + 1) * kWords);
        w[j] = bit_cast<Bits>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(high), bit_cast<__m512>(low)));
      }
    }
  }
};
#endif

// Exact: codes less their zero points, or bytes, as numbers of 16 bits.
template <Codes kCodes>
struct Expander<ShortOperand, kCodes> {
  explicit Expander(WeightFormat) {}
  void operator()(const uint8_t* from, Int32Vector minus_zeros, Bits (&w)[4]) const {
    if constexpr (in_four_bits(kCodes)) {
      if (kCodes == Codes::kLevels) minus_zeros = Int32Vector{} - kInt4Middle;
      const UInt16Vector codes = bit_cast<UInt16Vector>(load_bits(from));
      const UInt16Vector zeros = bit_cast<UInt16Vector>((minus_zeros & 0xffff) | minus_zeros << 16);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) w[j] = bit_cast<Bits>(((codes >> (4 * j)) & 15) + zeros);
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
#if defined(CPU_CAPABILITY_AVX512)
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 2 * j * kWords));
        w[j] = bit_cast<Bits>(_mm512_maskz_cvtepi8_epi16(0xffffffff, bytes));
#elif defined(CPU_CAPABILITY_AVX2)
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * j * kWords));
        w[j] = bit_cast<Bits>(_mm256_cvtepi8_epi16(bytes));
#else
        Int16Vector values;
        for (int i = 0; i < 2 * kWords; ++i) values[i] = static_cast<int8_t>(from[2 * j * kWords + i]);
        w[j] = bit_cast<Bits>(values);
#endif
      }
    }
  }
};

// Bytes without a sign: codes as they are, or numbers and 128.
#if defined(CPU_CAPABILITY_AVX512_VNNI)
template <Codes kCodes>
struct Expander<ByteOperand, kCodes> {
  explicit Expander(WeightFormat) {}
  void operator()(const uint8_t* from, Int32Vector, Bits (&w)[2]) const {
    if constexpr (in_four_bits(kCodes)) {
      const Bits codes = load_bits(from);
      w[0] = codes & 0x0f0f0f0fu;
      w[1] = (codes >> 4) & 0x0f0f0f0fu;
    } else {
      w[0] = load_bits(from) ^ 0x80808080u;
      w[1] = load_bits(from + kVectorBytes) ^ 0x80808080u;
    }
  }
};

// Codes less their zero points, as bytes with a sign.
template <Codes kCodes>
struct Expander<SignedByteOperand, kCodes> {
  explicit Expander(WeightFormat) {}
  void operator()(const uint8_t* from, Int32Vector minus_zeros, Bits (&w)[2]) const {
    if (kCodes == Codes::kLevels) minus_zeros = Int32Vector{} - kInt4Middle;
    const Bits codes = load_bits(from);
    const UInt8Vector zeros = bit_cast<UInt8Vector>(bit_cast<Bits>(minus_zeros & 0xff) * 0x01010101u);
    w[0] = bit_cast<Bits>(bit_cast<UInt8Vector>(codes & 0x0f0f0f0fu) + zeros);
    w[1] = bit_cast<Bits>(bit_cast<UInt8Vector>((codes >> 4) & 0x0f0f0f0fu) + zeros);
  }
};
#endif

// What the zero points of a block take from the sums of its lanes, where operands are codes as they are. The middle of
// int4 is in `lane_sums` already.
template <class Operand, Codes kCodes>
inline typename Operand::Sum start_of(Int32Vector minus_zeros, const int32_t* lane_sums) {
#if defined(CPU_CAPABILITY_AVX512_VNNI)
  if constexpr (std::is_same_v<Operand, ByteOperand>) {
    if constexpr (kCodes == Codes::kLevels) return bit_cast<Int32Vector>(load_bits(lane_sums));
    // Products of the lower halves: both fit there.
    return bit_cast<Int32Vector>(
        _mm512_madd_epi16(bit_cast<__m512i>(minus_zeros & 0xffff), bit_cast<__m512i>(load_bits(lane_sums))));
  }
#endif
  return typename Operand::Sum{};
}

constexpr int kTileWeights = 4;   // rows of the weight side by side
constexpr int kDirectRows = 4;    // most rows of x beside them

// sums[m * stride + i] for kRows rows of x and four of the weight; what is beyond `count` of those repeats the first.
template <class Operand, Codes kCodes, Scales kScales, int kRows>
__attribute__((noinline)) void direct_tile(const QuantizedWeight& weight, const WeightRow* w_rows, int count,
                                           const GroupLanes& lanes, const PreparedRows& rows, int64_t m, float* sums,
                                           int64_t stride) {
  constexpr bool kGrouped = kScales != Scales::kRow, kSplit = kScales == Scales::kGroups;
  using Sum = typename Operand::Sum;
  using Total = std::conditional_t<kGrouped, FloatVector, Sum>;
  constexpr int kPlanes = Operand::kPlanes, kElements = kPlaneElements<Operand>;
  // Of few sums each waits for the last one: they are made by turns.
  constexpr int kTurns = kRows <= 2 && !kGrouped ? 2 : 1;
  constexpr bool kStart = kGrouped && in_four_bits(kCodes) && !kIsFloat<Operand> && kBytes;
  constexpr bool kNeedsZeros = kCodes == Codes::kZeros && (kGrouped || kIsFloat<Operand> || !kBytes);
  const Expander<Operand, kCodes> expander(weight.format);
  const typename Operand::Element* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = rows.row<Operand>(m + r);
  WeightRow w_row[kTileWeights];
  for (int i = 0; i < kTileWeights; ++i) w_row[i] = w_rows[i < count ? i : 0];
  Total totals[kTurns][kTileWeights][kRows] = {};

  const auto step = [&](int i, const uint8_t* from, int64_t block) __attribute__((always_inline)) {
    Int32Vector minus_zeros{};
    if constexpr (kNeedsZeros) minus_zeros = lanes.of<kSplit>(w_row[i].minus_zeros, block);
    Bits w[kPlanes];
    expander(from, minus_zeros, w);
    FloatVector scale{};
    if constexpr (kGrouped) scale = lanes.of<kSplit>(w_row[i].scales, block);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const auto* at = x[r] + block * kBlockColumns;
      if constexpr (kGrouped) {
        Sum parts[2] = {};
        if constexpr (kStart) parts[0] = start_of<Operand, kCodes>(minus_zeros, rows.lane_sums(m + r) + block * kWords);
#pragma GCC unroll 8
        for (int j = 0; j < kPlanes; ++j) {
          Sum& part = parts[kPlanes > 4 ? j % 2 : 0];
          part = Operand::dot(part, w[j], load_bits(at + j * kElements));
        }
        totals[0][i][r] += as_float(kPlanes > 4 ? parts[0] + parts[1] : parts[0]) * scale;
      } else {
#pragma GCC unroll 8
        for (int j = 0; j < kPlanes; ++j) {
          Sum& total = totals[j % kTurns][i][r];
          total = Operand::dot(total, w[j], load_bits(at + j * kElements));
        }
      }
    }
  };

  const int64_t block_bytes = bytes_of(weight, kBlockColumns), whole = weight.K / kBlockColumns;
  // The four rows that come next: the processor's own prefetching ends with a page, about as long as a row.
  const int64_t ahead = kTileWeights * row_bytes(weight);
  for (int64_t block = 0; block < whole; ++block) {
#pragma GCC unroll 4
    for (int i = 0; i < kTileWeights; ++i) {
      const uint8_t* const from = w_row[i].bytes + block * block_bytes;
      for (int64_t line = 0; line < block_bytes; line += 64) __builtin_prefetch(from + ahead + line);
      step(i, from, block);
    }
  }
  if (whole * kBlockColumns < weight.K) {
    uint8_t rest[kTileWeights][kBlockColumns] = {};
    const int64_t left = row_bytes(weight) - whole * block_bytes;
    for (int i = 0; i < kTileWeights; ++i) {
      __builtin_memcpy(rest[i], w_row[i].bytes + whole * block_bytes, static_cast<uint64_t>(left));
    }
#pragma GCC unroll 4
    for (int i = 0; i < kTileWeights; ++i) step(i, rest[i], whole);
  }
  for (int r = 0; r < kRows; ++r) {
    Total four[kTileWeights];
    for (int i = 0; i < kTileWeights; ++i) {
      four[i] = totals[0][i][r];
      if (kTurns > 1) four[i] += totals[kTurns - 1][i][r];
    }
    const Total result = sum_four(four);
    __builtin_memcpy(sums + r * stride, &result, 4 * sizeof(float));
  }
}

// All rows of x, in tiles as equal as can be.
template <class Operand, Codes kCodes, Scales kScales>
inline void direct_rows(const QuantizedWeight& weight, const WeightRow* w_rows, int count, const GroupLanes& lanes,
                        const PreparedRows& rows, int64_t m_count, float* sums, int64_t stride) {
  const int64_t tiles = div_up(m_count, kDirectRows);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t m = m_count * tile / tiles;
    const int64_t n = m_count * (tile + 1) / tiles - m;
    float* to = sums + m * stride;
    with_count<kDirectRows>(static_cast<int>(n), [&](auto r) {
      direct_tile<Operand, kCodes, kScales, decltype(r)::value>(weight, w_rows, count, lanes, rows, m, to, stride);
    });
  }
}

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
