// Packed weights in registers: a word of four or eight of them becomes pairs of 16-bit floats or single floats, without
// a conversion instruction. The last bits of 128 in bf16, and of 1024 in fp16, count ones: a code written into them is
// that much more, and a subtraction, exact, leaves the code.
#pragma once

#include "common/cuda/ptx.cuh"
#include "common/cuda/vec.cuh"
#include "ops/quantized_linear/quantized_linear_cuda.h"

namespace llmkernels::cuda {
namespace {

template <WeightFormat kFormat>
constexpr bool kFourBits = kFormat == WeightFormat::kInt4 || kFormat == WeightFormat::kNf4;
template <WeightFormat kFormat>
constexpr int kPerWord = kFourBits<kFormat> ? 8 : 4;
template <WeightFormat kFormat>
constexpr int kPerVector = 4 * kPerWord<kFormat>;  // in 16 bytes

// 128 or 1024 in both halves.
template <class T>
constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x64006400u : 0x43004300u;

template <class T>
struct PairOf {
  using type = __nv_bfloat162;
};
template <>
struct PairOf<__half> {
  using type = __half2;
};

template <class To, class From>
__device__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
__device__ uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  using Pair = typename PairOf<T>::type;
  return bits_as<uint32_t>(__hsub2(bits_as<Pair>(a), bits_as<Pair>(b)));
}
template <class T>
__device__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  using Pair = typename PairOf<T>::type;
  return bits_as<uint32_t>(__hmul2(bits_as<Pair>(a), bits_as<Pair>(b)));
}
template <class T>
__device__ uint32_t pack_pair(float low, float high) {
  return std::is_same_v<T, __half> ? ptx::pack_f16x2(low, high) : ptx::pack_bf16x2(low, high);
}

// What is subtracted from the codes of int4, as `decode` takes it: a zero point of 0 ... 16.
template <class T>
__device__ uint32_t middle_pair(int zero) {
  return kOnes<T> + static_cast<uint32_t>(zero) * 0x00010001u;
}

// Pairs of neighbours: weights 0 and 1 of the word, 2 and 3, ... `middle` is that of int4, `levels` the table of nf4.
template <class T, WeightFormat kFormat>
__device__ void decode(uint32_t word, uint32_t middle, const float* levels,
                       uint32_t (&pairs)[kPerWord<kFormat> / 2]) {
  if constexpr (kFormat == WeightFormat::kInt4) {
    const uint32_t odd = word >> 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t spread = __byte_perm(word, odd, i * 0x11 + (i + 4) * 0x1100);
      pairs[i] = subtract_pairs<T>((spread & 0x000f000fu) | kOnes<T>, middle);
    }
  } else if constexpr (kFormat == WeightFormat::kNf4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[i] = pack_pair<T>(levels[word >> (8 * i) & 15], levels[word >> (8 * i + 4) & 15]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t spread = __byte_perm(word, kOnes<T> >> 8, 0x4040 + 2 * i + (2 * i + 1) * 0x100);
      if constexpr (kFormat == WeightFormat::kInt8) {
        pairs[i] = subtract_pairs<T>(spread & 0xff7fff7fu, spread & 0xff80ff80u);  // the sign bit counts -128
      } else {
        const uint32_t low = spread & 0x007f007fu, sign = spread & 0x00800080u;
        // The same exponent and fraction in wider fields, whose bias is larger by 8 or 120: the product is exact, of
        // subnormals too.
        constexpr bool kHalf = std::is_same_v<T, __half>;
        const uint32_t narrow_bias = sign << 8 | low << (kHalf ? 7 : 4);
        pairs[i] = multiply_pairs<T>(narrow_bias, kHalf ? 0x5c005c00u : 0x7b807b80u);
      }
    }
  }
}

__device__ inline float low_float(uint32_t bf16_pair) { return __uint_as_float(bf16_pair << 16); }
__device__ inline float high_float(uint32_t bf16_pair) { return __uint_as_float(bf16_pair & 0xffff0000u); }

// The same as floats. bf16 holds every code and every number of fp8; levels of nf4 are as they are.
template <WeightFormat kFormat>
__device__ void decode_floats(uint32_t word, uint32_t middle, const float* levels,
                              float (&values)[kPerWord<kFormat>]) {
  if constexpr (kFormat == WeightFormat::kNf4) {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = levels[word >> (4 * i) & 15];
  } else {
    uint32_t pairs[kPerWord<kFormat> / 2];
    decode<__nv_bfloat16, kFormat>(word, middle, levels, pairs);
#pragma unroll
    for (int i = 0; i < kPerWord<kFormat> / 2; ++i) {
      values[2 * i] = low_float(pairs[i]), values[2 * i + 1] = high_float(pairs[i]);
    }
  }
}

// Where the group of column k of row n is among scales and zeros.
template <WeightFormat kFormat>
__device__ int64_t group_index(const QuantizedWeight& w, int shift, int n, int k) {
  if constexpr (kFormat == WeightFormat::kInt8) return n;
  const int group = min(k >> shift, static_cast<int>(w.groups) - 1);
  if constexpr (kFormat == WeightFormat::kFp8) {
    if (w.group_size != 0) n /= static_cast<int>(kFp8Block);
  }
  return int64_t{n} * w.groups + group;
}

template <WeightFormat kFormat>
__device__ float scale_at(const QuantizedWeight& w, int64_t index) {
  if constexpr (kFourBits<kFormat>) {
    switch (w.scale_type) {
      case ScaleType::kBFloat16:
        return widen(static_cast<const __nv_bfloat16*>(w.scales)[index]);
      case ScaleType::kFloat16:
        return widen(static_cast<const __half*>(w.scales)[index]);
      case ScaleType::kInt8:
        return w.second_scales[0] + w.second_scales[1 + index / kSecondScales] *
                                        static_cast<float>(static_cast<const int8_t*>(w.scales)[index]);
      case ScaleType::kFloat32:
        break;
    }
  }
  return static_cast<const float*>(w.scales)[index];
}

template <class T, WeightFormat kFormat>
__device__ uint32_t middle_at(const QuantizedWeight& w, int64_t index) {
  if constexpr (kFormat != WeightFormat::kInt4) return 0;
  return middle_pair<T>(w.zeros == nullptr ? kInt4Middle : w.zeros[index]);
}

// The levels of nf4 in shared memory, one to a bank: lanes that read the same or different ones do so at once. Complete
// for everybody after a barrier.
template <int kIndex = 0>
__device__ void fill_levels(float* levels) {
  constexpr float kLevel = kNf4Levels[kIndex];  // a constant of the host's, so that it may be read here
  if (threadIdx.x == kIndex) levels[kIndex] = kLevel;
  if constexpr (kIndex + 1 < 16) fill_levels<kIndex + 1>(levels);
}

// `inside` (0 ... 16) bytes from `source`, zeros behind them.
__device__ inline uint4 load_packed(const unsigned char* source, int inside, int unit) {
  uint4 found = make_uint4(0, 0, 0, 0);
  if (unit == 16 && inside >= 16) return *reinterpret_cast<const uint4*>(source);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (unit >= 4 && inside >= 4 * i + 4) {
      words[i] = reinterpret_cast<const uint32_t*>(source)[i];
    } else {
      for (int j = 0; j < 4; ++j) {
        if (4 * i + j < inside) words[i] |= static_cast<uint32_t>(source[4 * i + j]) << (8 * j);
      }
    }
  }
  found.x = words[0], found.y = words[1], found.z = words[2], found.w = words[3];
  return found;
}

// The same to shared memory, without waiting where the alignment allows it: complete for everybody after
// cp_async_commit, cp_async_wait and a barrier.
__device__ inline void fetch_packed(unsigned char* target, const unsigned char* source, int inside, int unit) {
  const uint32_t shared = ptx::shared_address(target);
  if (unit == 16) {
    ptx::cp_async<16>(shared, source, inside);
  } else if (unit == 4) {
#pragma unroll
    for (int i = 0; i < 16; i += 4) ptx::cp_async<4>(shared + i, source + i, min(max(inside - i, 0), 4));
  } else {
    *reinterpret_cast<uint4*>(target) = load_packed(source, inside, unit);
  }
}

// From run-time facts to the instance of a kernel: Kernel<T, kFormat, kTokens>::get().
template <template <class, WeightFormat, int> class Kernel, class T, int kTokens>
auto choose_format(WeightFormat format) {
  switch (format) {
    case WeightFormat::kInt4:
      return Kernel<T, WeightFormat::kInt4, kTokens>::get();
    case WeightFormat::kNf4:
      return Kernel<T, WeightFormat::kNf4, kTokens>::get();
    case WeightFormat::kFp8:
      return Kernel<T, WeightFormat::kFp8, kTokens>::get();
    case WeightFormat::kInt8:
      break;
  }
  return Kernel<T, WeightFormat::kInt8, kTokens>::get();
}

}  // namespace
}  // namespace llmkernels::cuda
