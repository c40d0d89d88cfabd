// Memory for what a call returns.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_cpu_dispatch.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace llmkernels {

// The C library's highest threshold for mmap: what is larger comes in fresh pages in every call, which the kernel maps
// and clears one by one as they are first written. In pages of 4 KiB that takes five times as long as the writing.
constexpr size_t kFreshBytes = size_t{32} << 20;
constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

// Asks for huge pages where they lie in `tensor` wholly, so that no memory is taken beyond it. A refusal changes nothing.
inline void advise_huge_pages(const at::Tensor& tensor) {
#if defined(MADV_HUGEPAGE)
  const auto first = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t begin = (first + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (first + tensor.nbytes()) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// at::empty without the dispatcher where the device is known: a call's outputs take a third less time to allocate.
inline at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (!options.device().is_cpu()) return at::empty(sizes, options);
  at::Tensor tensor = at::cpu::empty(sizes, options);
  if (tensor.nbytes() > kFreshBytes) advise_huge_pages(tensor);
  return tensor;
}

}  // namespace llmkernels
