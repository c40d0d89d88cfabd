#pragma once

#include <cstdint>

#include "ptxsim.h"

namespace ptxsim {

// What the 128 bytes of an emulated CUtensorMap hold.
struct TensorMapData {
  uint32_t magic;
  uint8_t element_bytes, rank, swizzle, nan_fill;
  uint64_t base;
  uint64_t sizes[5];
  uint64_t strides[4];  // bytes, without the innermost
  uint16_t box[5];
  uint8_t element_type;
};
static_assert(sizeof(TensorMapData) <= 128);
constexpr uint32_t kTensorMapMagic = 0x70614d54;

// What is wrong with it, or empty: the checks of cuTensorMapEncodeTiled.
std::string check_tensor_map(const TensorMapData& map);

// Swizzling moves 16-byte chunks within 128-byte lines, by the absolute shared address.
inline uint32_t swizzled(uint32_t address, int swizzle) {
  const uint32_t mask = swizzle == 3 ? 7 : swizzle == 2 ? 3 : swizzle == 1 ? 1 : 0;
  return address ^ (((address >> 7) & mask) << 4);
}

}  // namespace ptxsim
