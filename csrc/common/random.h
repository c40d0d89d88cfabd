// The random bits of dropout: a pure function of (seed, row, column). llmkernels/_random.py is the same in Python and
// says where it comes from. An element is kept where random_bits(...) >> 8 is at least `threshold` = round(p * 2^24).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LLMKERNELS_HOST_DEVICE __host__ __device__
#else
#define LLMKERNELS_HOST_DEVICE
#endif

namespace llmkernels {
namespace {

struct RowKeys {
  uint32_t key0, key1;
};

LLMKERNELS_HOST_DEVICE inline RowKeys row_keys(int64_t seed, int64_t row) {
  uint64_t z = static_cast<uint64_t>(seed) + (static_cast<uint64_t>(row) + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return {static_cast<uint32_t>(z), static_cast<uint32_t>(z >> 32)};
}

// Bits: uint32_t, or a vector of them with the operators of its elements.
template <class Bits>
LLMKERNELS_HOST_DEVICE inline Bits random_bits(RowKeys keys, Bits column) {
  Bits h = column + keys.key0;
  h = ((h ^ (h >> 16)) * 0x21f0aaadu) ^ keys.key1;
  h = (h ^ (h >> 15)) * 0x735a2d97u;
  return h ^ (h >> 15);
}

}  // namespace
}  // namespace llmkernels
