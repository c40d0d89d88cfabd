// What a planner knows of a GPU, and what it decides. Planners are pure functions, free of CUDA and of torch, so that
// tests can run a kernel exactly as the product launches it.
#pragma once

#include <cstdint>

namespace llmkernels::cuda {

struct Gpu {
  int multiprocessors;
  // Bytes of shared memory; known where the planner asks for it (ask_shared in gpu.h).
  int64_t shared_per_block = 0;
  int64_t shared_per_multiprocessor = 0;
  int64_t shared_reserved = 0;  // of every block, by the system
  int64_t registers_per_multiprocessor = 0;  // of 32 bits; known where the planner asks for it (ask_registers)
};

struct Launch {
  unsigned grid[2] = {1, 1};
  unsigned block[2] = {1, 1};
  unsigned shared = 0;  // bytes of dynamic shared memory
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Null pointers are aligned to anything.
inline bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Whether rows of elements of `bytes` bytes starting at `pointer` all begin at a whole 16-byte vector.
inline bool rows_are_wide(const void* pointer, int64_t row_stride, int64_t rows, int64_t bytes) {
  return pointer == nullptr || (aligned(pointer, 16) && (rows <= 1 || row_stride * bytes % 16 == 0));
}

}  // namespace llmkernels::cuda
