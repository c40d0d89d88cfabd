// The CPU kernel of rope over a range of blocks of places; the caller owns the threads.
#pragma once

#include <initializer_list>

#include "common/cpu/declare.h"
#include "ops/rope/rope.h"

namespace llmkernels::cpu {

// Elements of cos, and of sin, that are staged at a time: as fp32 both of them are 16 KB, a third of a first-level cache.
constexpr int64_t kRopeStaged = 2048;

// Places of a sequence in a block: as many rows as fit, so that all heads find them in the first-level cache.
inline int64_t rope_block_rows(const RopeParams& p) {
  const int64_t rows = kRopeStaged / (p.half < kRopeStaged ? p.half : kRopeStaged);
  return rows < p.seq ? rows : p.seq;
}
inline int64_t rope_blocks_of_sequence(const RopeParams& p) {
  const int64_t rows = rope_block_rows(p);
  return (p.seq + rows - 1) / rows;
}

// Where a call finds its data: in a cache, or in memory, and then whether stores may pass the caches by, which spares the
// reading of what they overwrite and asks for whole aligned vectors.
enum class RopeMemory : int { kNear = 0, kFar = 1, kFarStream = 2 };

// A result of this size is not in a cache by the time that all of it is written. Streaming and asking for rows ahead
// made 42 MB of fp32 take 0.55 times as long (Zen 5 with 32 MB of third-level cache).
constexpr int64_t kRopeFarBytes = 16 << 20;
constexpr int64_t kRopeStreamAlignment = 64;

inline RopeMemory rope_memory(const RopeParams& p) {
  const int64_t bytes = element_bytes(p.dtype);
  if (p.batch * p.seq * (p.tensors[0].heads + p.tensors[1].heads) * p.cols * bytes < kRopeFarBytes) {
    return RopeMemory::kNear;
  }
  for (const RopeTensor& t : p.tensors) {
    if (t.heads == 0) continue;
    if (t.x == t.y || reinterpret_cast<uintptr_t>(t.y) % kRopeStreamAlignment != 0) return RopeMemory::kFar;
    for (const int64_t stride : {t.y_batch_stride, t.y_seq_stride, t.y_head_stride, p.half}) {
      if (stride * bytes % kRopeStreamAlignment != 0) return RopeMemory::kFar;
    }
  }
  return RopeMemory::kFarStream;
}

// Blocks are counted sequence after sequence. Every position has been checked; `memory` is what rope_memory says.
LLMKERNELS_CPU_DECLARE(void rope(const RopeParams& params, RopeMemory memory, int64_t begin, int64_t end);)

}  // namespace llmkernels::cpu
