// Memory for what a call returns.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_cpu_dispatch.h>

#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace llmkernels {

// `tensor`, just allocated on the CPU, in huge pages where the system grants them to who asks: fresh memory is mapped and
// cleared page by page as it is first written, which in pages of 4 KiB takes five times as long as the writing (a tenth
// of a training step of an LSTM). Only pages that lie in `tensor` wholly, so that no memory is taken beyond it.
inline at::Tensor on_huge_pages(at::Tensor tensor) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const auto first = reinterpret_cast<uintptr_t>(tensor.is_cpu() ? tensor.data_ptr() : nullptr);
  const uintptr_t begin = (first + kPage - 1) & ~(kPage - 1), end = (first + tensor.nbytes()) & ~(kPage - 1);
  if (first != 0 && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return tensor;
}

// The C library's highest threshold for mmap: what is larger comes in fresh pages in every call.
constexpr size_t kFreshBytes = size_t{32} << 20;
inline at::Tensor fresh(at::Tensor tensor) {
  return tensor.nbytes() > kFreshBytes ? on_huge_pages(std::move(tensor)) : tensor;
}

// at::empty without the dispatcher where the device is known: a call's outputs take a third less time to allocate.
inline at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return options.device().is_cpu() ? fresh(at::cpu::empty(sizes, options)) : at::empty(sizes, options);
}

}  // namespace llmkernels
