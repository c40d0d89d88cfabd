// Rows that are asked for ahead. As vec.h: everything in the anonymous namespace of the instruction set.
#pragma once

#include "common/cpu/vec.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

// A kernel that walks over a row twice reads it from the cache the second time, and mostly writes: meanwhile the next
// row can come from memory. The processor does not see to that by itself, since the first walk over the next row begins
// only when this one is done. Longer rows would push out of the first caches what is still to be read.
constexpr int64_t kAheadBytes = 16384;

template <class T>
class NextRow {
 public:
  // The row of `cols` elements that lies `stride` elements behind `row`, unless it is long; none without `another`.
  NextRow(const T* row, int64_t stride, int64_t cols, bool another)
      : next_(another && cols * static_cast<int64_t>(sizeof(T)) <= kAheadBytes ? row + stride : nullptr) {}

  void fetch(int64_t column) const {
    if (next_ != nullptr) __builtin_prefetch(next_ + column);
  }

 private:
  const T* next_;
};

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
