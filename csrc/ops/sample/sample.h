// sample: one token of each row of logits. The contract between kernels and bindings.
//
//   e = exp((x - max(x)) / temperature), the probabilities up to a factor. Taken are the x that are
//     at least the top_k-th largest                                          (top_k > 0)
//     at least the largest t for which sum(e : x >= t) >= top_p * (the sum over those of top_k)      (top_p < 1)
//     of e >= min_p
//   the token is the first one for which the sum of what is taken, in order of the columns, exceeds u times all of it.
//   temperature = 0: the first of the largest x.
//
// Equal x are taken or left together. A row with a NaN or +inf, or of -inf alone, gives -1.
//
// T is float, bfloat16 or float16; e is computed in float and summed in double.
#pragma once

#include "common/dtype.h"

namespace llmkernels {

struct SampleParams {
  const void* logits;  // [rows, cols]  T, row stride row_stride
  const double* u;     // [rows], in [0, 1)
  int64_t* tokens;     // [rows]
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  int64_t top_k;  // 0: all
  double temperature;
  double top_p;
  double min_p;
  DType dtype;
};

}  // namespace llmkernels
