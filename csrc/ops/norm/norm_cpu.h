// The CPU kernels of the norm family, over a range of rows, blocks or columns; the caller owns the threads.
#pragma once

#include "common/cpu/declare.h"
#include "ops/norm/norm.h"

namespace llmkernels::cpu {

LLMKERNELS_CPU_DECLARE(
    void norm_fwd(const NormFwdParams& params, int64_t row_begin, int64_t row_end);
    void norm_bwd(const NormBwdParams& params, int64_t block, int64_t row_begin, int64_t row_end);
    void norm_bwd_reduce(const NormBwdParams& params, int64_t column_begin, int64_t column_end);)

// Into how many blocks of rows the backward is cut. Each block sums dweight and dbias in row order into its own
// partial row, and norm_bwd_reduce adds the partial rows in block order. The number depends on the shape alone, so
// the result is bitwise the same for any number of threads.
inline int64_t norm_bwd_blocks(int64_t rows, int64_t cols) {
  constexpr int64_t kMaxBlocks = 64;             // enough for 64 threads to share the work
  constexpr int64_t kMaxPartial = int64_t{1} << 22;  // elements: keeps the workspace of very long rows small
  constexpr int64_t kMinRows = 4;
  int64_t blocks = (rows + kMinRows - 1) / kMinRows;
  if (blocks > kMaxBlocks) blocks = kMaxBlocks;
  if (cols > 0 && blocks > kMaxPartial / cols) blocks = kMaxPartial / cols;
  return blocks > 1 ? blocks : 1;
}

}  // namespace llmkernels::cpu
