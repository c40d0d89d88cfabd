#include "tensor_map.h"

#include <cstring>

namespace ptxsim {

std::string check_tensor_map(const TensorMapData& m) {
  const auto number = [](uint64_t v) { return std::to_string(v); };
  if (m.rank < 1 || m.rank > 5) return "a rank of " + number(m.rank) + " is not in 1 to 5";
  if (m.element_bytes != 1 && m.element_bytes != 2 && m.element_bytes != 4 && m.element_bytes != 8)
    return "elements of " + number(m.element_bytes) + " bytes";
  if (m.swizzle > 3) return "swizzle mode " + number(m.swizzle);
  if (m.base % 16 != 0) return "the global address is not aligned to 16 bytes";
  for (int i = 0; i < m.rank; ++i) {
    if (m.sizes[i] == 0 || m.sizes[i] > uint64_t{1} << 32) return "size " + number(i) + " is " + number(m.sizes[i]);
    if (m.box[i] == 0 || m.box[i] > 256) return "box dimension " + number(i) + " is " + number(m.box[i]) + ", not in 1 to 256";
  }
  for (int i = 0; i + 1 < m.rank; ++i) {
    if (m.strides[i] % 16 != 0) return "stride " + number(i) + " of " + number(m.strides[i]) + " bytes is no multiple of 16";
    if (m.strides[i] >= uint64_t{1} << 40) return "stride " + number(i) + " of " + number(m.strides[i]) + " bytes";
  }
  const uint64_t inner = uint64_t{m.box[0]} * m.element_bytes;
  if (inner % 16 != 0) return "the inner box dimension of " + number(inner) + " bytes is no multiple of 16";
  const uint64_t span = m.swizzle == 0 ? 0 : 16u << m.swizzle;
  if (span != 0 && inner > span)
    return "the inner box dimension of " + number(inner) + " bytes is larger than the swizzle span of " + number(span);
  return {};
}

std::string encode_tensor_map(TensorMap& map, int element_bytes, int rank, const void* base, const uint64_t* sizes,
                              const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                              int interleave, Swizzle swizzle, bool nan_fill, int element_type) {
  std::memset(map.opaque, 0, sizeof map.opaque);
  if (rank < 1 || rank > 5) return "a rank of " + std::to_string(rank) + " is not in 1 to 5";
  if (interleave != 0) return "(interpreter) interleaved layouts are not implemented";
  TensorMapData m{};
  m.magic = kTensorMapMagic;
  m.element_bytes = static_cast<uint8_t>(element_bytes);
  m.rank = static_cast<uint8_t>(rank);
  m.swizzle = static_cast<uint8_t>(swizzle);
  m.nan_fill = nan_fill;
  m.element_type = static_cast<uint8_t>(element_type < 0 ? 255 : element_type);
  m.base = reinterpret_cast<uint64_t>(base);
  for (int i = 0; i < rank; ++i) {
    if (box[i] > 256) return "box dimension " + std::to_string(i) + " is " + std::to_string(box[i]) + ", not in 1 to 256";
    if (element_strides[i] != 1) return "(interpreter) element strides other than 1 are not implemented";
    m.sizes[i] = sizes[i];
    m.box[i] = static_cast<uint16_t>(box[i]);
    if (i > 0) m.strides[i - 1] = strides[i - 1];
  }
  if (element_bytes == 1 && nan_fill) return "NaN fill needs a floating-point type";
  std::string error = check_tensor_map(m);
  if (error.empty()) std::memcpy(map.opaque, &m, sizeof m);
  return error;
}

}  // namespace ptxsim
