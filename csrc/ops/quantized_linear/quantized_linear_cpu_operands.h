// What products with a quantized weight are made of: operands and their dot product, and the rows of x as operands. As
// vec.h: raw vectors in the anonymous namespace of the instruction set.
//
// A dot product goes along the rows of x and of the weight, which are both contiguous there, a block of kBlockColumns
// at a time. Each lane of 32 bits has eight columns of a block: the eight codes of four bits in one word. A block of
// operands is kPlanes vectors, in one of two orders of its columns:
//
//   natural    column by column
//   planes     element i of plane j is column kPlanes * i + j: what a shift of the words of codes by kPlanes bits gives
#pragma once

#include "common/cpu/product.h"
#include "ops/quantized_linear/quantized_linear_cpu.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

typedef int32_t Int32Vector __attribute__((vector_size(kVectorBytes)));
typedef int16_t Int16Vector __attribute__((vector_size(kVectorBytes)));
typedef uint8_t UInt8Vector __attribute__((vector_size(kVectorBytes)));
using Bits = UInt32Vector;  // a vector of operands of any type

constexpr int kWords = kLanes<float>;
constexpr int64_t kBlockColumns = 8 * kWords;
static_assert(128 % kBlockColumns == 0, "a block has one scale of fp8, or whole groups of four-bit codes");

inline Bits load_bits(const void* from) {
  Bits bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return bits;
}

inline void store_bits(void* to, Bits bits) { __builtin_memcpy(to, &bits, sizeof(bits)); }

inline FloatVector as_float(FloatVector sum) { return sum; }
inline FloatVector as_float(Int32Vector sum) { return __builtin_convertvector(sum, FloatVector); }

// --- operands: sum + the products of the elements of each lane ---

struct FloatOperand {
  using Element = float;
  using Sum = FloatVector;
  static constexpr int kPlanes = 8;
  static Sum dot(Sum sum, Bits w, Bits x) { return sum + bit_cast<FloatVector>(w) * bit_cast<FloatVector>(x); }
  static float element(float value) { return value; }
};

#if defined(CPU_CAPABILITY_AVX512_BF16)
struct PairOperand {
  using Element = uint16_t;  // bits of bf16
  using Sum = FloatVector;
  static constexpr int kPlanes = 4;
  static Sum dot(Sum sum, Bits w, Bits x) {
    return bit_cast<FloatVector>(
        _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(w), bit_cast<__m512bh>(x)));
  }
  static uint16_t element(float value) { return static_cast<uint16_t>(bit_cast<uint32_t>(value) >> 16); }
};
#endif

// Exact, as x and the weight are within -128 ... 127 where 16 bits have room for -32768 ... 32767.
struct ShortOperand {
  using Element = int16_t;
  using Sum = Int32Vector;
  static constexpr int kPlanes = 4;
  static Sum dot(Sum sum, Bits w, Bits x) {
#if defined(CPU_CAPABILITY_AVX512)
    return sum + bit_cast<Sum>(_mm512_madd_epi16(bit_cast<__m512i>(w), bit_cast<__m512i>(x)));
#elif defined(CPU_CAPABILITY_AVX2)
    return sum + bit_cast<Sum>(_mm256_madd_epi16(bit_cast<__m256i>(w), bit_cast<__m256i>(x)));
#else
    const Int32Vector a = bit_cast<Int32Vector>(w), b = bit_cast<Int32Vector>(x);
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
  }
  static int16_t element(float value) { return static_cast<int16_t>(value); }
};

// The weight's bytes are unsigned, x's signed: what an offset of the weight adds is taken away again in the end.
#if defined(CPU_CAPABILITY_AVX512_VNNI)
struct ByteOperand {
  using Element = int8_t;
  using Sum = Int32Vector;
  static constexpr int kPlanes = 2;
  static Sum dot(Sum sum, Bits w, Bits x) {
    return bit_cast<Sum>(_mm512_dpbusd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(w), bit_cast<__m512i>(x)));
  }
  static int8_t element(float value) { return static_cast<int8_t>(value); }
};
// The other way round, for codes of four bits that are expanded into the cache: what the offset of x adds, `surplus`
// of a vector, is the same for all its rows.
struct SignedByteOperand {
  using Element = int8_t;
  using Sum = Int32Vector;
  static constexpr int kPlanes = 2;
  static Sum dot(Sum sum, Bits w, Bits x) { return ByteOperand::dot(sum, x, w); }
  static Sum surplus(Sum sum, Bits w) { return dot(sum, w, Bits{} + 0x80808080u); }
  static int8_t element(float value) { return static_cast<int8_t>(static_cast<int8_t>(value) ^ -128); }
};
using IntegerOperand = ByteOperand;
using CachedCodes = SignedByteOperand;
constexpr bool kBytes = true;
#else
using IntegerOperand = ShortOperand;
using CachedCodes = ShortOperand;
constexpr bool kBytes = false;
#endif

template <class Operand>
constexpr bool kIsFloat = std::is_same_v<typename Operand::Sum, FloatVector>;
template <class Operand>
constexpr int kPlaneElements = kVectorBytes / static_cast<int>(sizeof(typename Operand::Element));

// --- sums of lanes: four vectors at once, in the same order for each, which no place in a tile changes ---

// The elements of a and b by turns, kWide at a time, within each quarter of four lanes: those of its lower half and
// those of its upper half, added.
template <int kWide, class V>
inline V add_halves(V a, V b) {
  Int32Vector low, high;
  for (int i = 0; i < kWords; ++i) {
    const int quarter = i / 4 * 4, turn = i % 4 / kWide % 2 * kWords;
    const int element = kWide == 1 ? i % 4 / 2 : i % 2;
    low[i] = quarter + element + turn;
    high[i] = quarter + element + 2 + turn;
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// Lanes 0 ... 3 of the result are the sums of `in`.
template <class V>
inline V sum_four(const V (&in)[4]) {
  V sums = add_halves<2>(add_halves<1>(in[0], in[1]), add_halves<1>(in[2], in[3]));
#pragma GCC unroll 2
  for (int left = kWords / 2; left >= 4; left /= 2) {
    Int32Vector upper;
    for (int i = 0; i < kWords; ++i) upper[i] = (i + left) % kWords;
    sums += __builtin_shuffle(sums, upper);
  }
  return sums;
}

// --- the rows of x ---

// What product.h calls these operands; integers of 16 bits are none of its.
template <class Operand, int kSize = sizeof(typename Operand::Element)>
using ProductElement =
    std::conditional_t<kSize == 1, int8_t, std::conditional_t<kSize == 2 && kIsFloat<Operand>, BFloat16, float>>;

// Where the operands and the sums of a row are in the memory that `prepare` fills.
struct PreparedRows {
  float* scales;        // [M], of rounded activations
  int32_t* sums;        // [M], of integers
  char* operands;       // [M], `stride` bytes apart, zeros behind the last column
  int64_t stride;
  int64_t block_sums;   // bytes into a row, of the sums of each lane of each block
  int64_t bytes;        // of all

  template <class Operand>
  const typename Operand::Element* row(int64_t m) const {
    return reinterpret_cast<const typename Operand::Element*>(operands + m * stride);
  }
  const int32_t* lane_sums(int64_t m) const {
    return reinterpret_cast<const int32_t*>(operands + m * stride + block_sums);
  }
};

template <class Operand>
inline PreparedRows prepared_rows(char* memory, int64_t rows, int64_t columns, bool lane_sums) {
  PreparedRows p;
  p.scales = reinterpret_cast<float*>(memory);
  p.sums = reinterpret_cast<int32_t*>(p.scales + rows);
  const int64_t head = round_up(rows * 8, 64);
  p.operands = memory + head;
  const int64_t blocks = div_up(columns, kBlockColumns);
  p.block_sums = blocks * kBlockColumns * static_cast<int64_t>(sizeof(typename Operand::Element));
  // One line more: rows that are a multiple of 4096 bytes apart would share the lines of the nearest cache.
  p.stride = p.block_sums + (lane_sums ? blocks * kVectorBytes : 0) + 64;
  // Tiles of AMX read whole, beyond the last row.
  p.bytes = head + round_up(rows, kTileRows<ProductElement<Operand>>) * p.stride;
  return p;
}

// One block of values as operands. Values of PairOperand have bits in their upper halves only.
template <class Operand, bool kInPlanes>
inline void store_block(typename Operand::Element* to, const float (&values)[kBlockColumns]) {
  constexpr int kPlanes = Operand::kPlanes, kElements = kPlaneElements<Operand>;
  for (int j = 0; j < kPlanes; ++j) {
    for (int i = 0; i < kElements; ++i) {
      to[j * kElements + i] = Operand::element(values[kInPlanes ? kPlanes * i + j : kElements * j + i]);
    }
  }
}

// --- rounded activations: llmkernels/quantization/_rows.py ---

// The scale of a row with the largest size `largest`: NaN if that is not finite.
inline float row_scale(float largest, float steps) {
  const float scale = largest / steps;
  if (!(scale < __builtin_inff())) return __builtin_nanf("");
  return scale == 0.0f ? 1.0f : scale;
}

template <class T>
inline float largest_size(const T* x, int64_t columns) {
  FloatVector largest{}, strange{};
  for_each_vector<float>(0, columns, [&](int64_t k, auto part) {
    const FloatVector value = part.load(x + k);
    const FloatVector size = bit_cast<FloatVector>(bit_cast<UInt32Vector>(value) & 0x7fffffffu);
    largest = size > largest ? size : largest;
    strange += value * 0.0f;  // NaN from a NaN or an infinity on
  });
  float result = 0.0f;
  for (int i = 0; i < kWords; ++i) {
    if (!(strange[i] == 0.0f)) return __builtin_inff();
    result = largest[i] > result ? largest[i] : result;
  }
  return result;
}

inline FloatVector clamp_size(FloatVector value, float most) {
  value = value > most ? splat(most) : value;
  return value < -most ? splat(-most) : value;
}

// To a whole number -127 ... 127, ties to even. `rounded`: a compiler may not see that this is no identity.
inline FloatVector round_to_int8(FloatVector value) {
  const FloatVector shifted = rounded(clamp_size(value, 127.0f) + 0x1.8p23f);
  return rounded(shifted - 0x1.8p23f);
}

// To the nearest number of e4m3, ties to even.
inline FloatVector round_to_fp8(FloatVector value) {
  value = clamp_size(value, 448.0f);
  const UInt32Vector bits = bit_cast<UInt32Vector>(value);
  // Three digits behind the first; below 2^-6 multiples of 2^-9.
  const UInt32Vector normal = (bits + (((bits >> 20) & 1u) + 0x7ffffu)) & 0xfff00000u;
  const FloatVector small = rounded(rounded(value + 0x1.8p14f) - 0x1.8p14f);
  const FloatVector size = bit_cast<FloatVector>(bits & 0x7fffffffu);
  return size < 0x1p-6f ? small : bit_cast<FloatVector>(normal);
}

// Row `m` of x, rounded as `activations` says, to `rows`, with the sums of its lanes times `lane_factor`; 0: without.
template <class Operand, bool kInPlanes, class T>
inline void prepare_row(const T* x, int64_t columns, Activations activations, const PreparedRows& rows, int64_t m,
                        int32_t lane_factor) {
  auto* to = reinterpret_cast<typename Operand::Element*>(rows.operands + m * rows.stride);
  float scale = 1.0f;
  if (activations != Activations::kPlain) {
    scale = row_scale(largest_size(x, columns), activations == Activations::kInt8 ? 127.0f : 448.0f);
  }
  const bool finite = scale == scale;
  int32_t total = 0;
  for (int64_t block = 0; block * kBlockColumns < columns; ++block) {
    const int64_t first = block * kBlockColumns;
    const int64_t end = first + kBlockColumns < columns ? first + kBlockColumns : columns;
    float values[kBlockColumns] = {};
    for_each_vector<float>(first, finite ? end : first, [&](int64_t k, auto part) {
      FloatVector value = part.load(x + k);
      if (activations == Activations::kInt8) value = round_to_int8(value / scale);
      if (activations == Activations::kFp8) value = round_to_fp8(value / scale);
      part.store(values + (k - first), value);
    });
    store_block<Operand, kInPlanes>(to + first, values);
    if constexpr (!kIsFloat<Operand>) {
      int32_t lanes[kWords];
      for (int i = 0; i < kWords; ++i) {
        float sum = 0.0f;
        for (int j = 0; j < 8; ++j) sum += values[8 * i + j];
        total += static_cast<int32_t>(sum);
        lanes[i] = static_cast<int32_t>(sum) * lane_factor;
      }
      if (lane_factor != 0) {
        __builtin_memcpy(rows.operands + m * rows.stride + rows.block_sums + block * kVectorBytes, lanes, kVectorBytes);
      }
    }
  }
  rows.scales[m] = scale;
  rows.sums[m] = total;
}

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
