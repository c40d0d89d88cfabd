// Large outputs on large pages.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace llmkernels {

// `tensor`, just allocated on the CPU, on pages of 2 MiB where the system gives them to who asks: memory that is new to
// the process costs a fault and the zeroing of a page, which on pages of 4 KiB took a tenth of a training step of an
// LSTM. Only advice: nothing depends on it.
inline at::Tensor on_large_pages(at::Tensor tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.is_cpu() ? tensor.data_ptr() : nullptr);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + tensor.nbytes()) / kPage * kPage;
  if (begin != 0 && last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

}  // namespace llmkernels
