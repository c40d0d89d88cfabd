// The element types of tensors, as kernels, planners and bindings name them.
#pragma once

#include <cstdint>

namespace llmkernels {

enum class DType : int { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

inline int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

}  // namespace llmkernels
