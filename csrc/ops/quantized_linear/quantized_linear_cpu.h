// The CPU kernels of quantized_linear, over a range of rows or tasks; the caller owns the threads and the memory.
#pragma once

#include "common/cpu/declare.h"
#include "ops/quantized_linear/quantized_linear.h"

namespace llmkernels::cpu {

// What a call needs: memory for the rows of its input in the form that products take, tasks that do not depend on each
// other, and memory for whoever runs some of them. No result depends on who does which.
struct QuantizedLinearWork {
  int64_t rows_bytes;
  int64_t tasks;
  int64_t task_flops;
  int64_t scratch_bytes;
};

// `prepare` fills the rows [begin, end) of `rows`; when all are there, the others run the tasks [begin, end).
LLMKERNELS_CPU_DECLARE_VNNI_AMX(
    QuantizedLinearWork quantized_linear_fwd_work(const QuantizedLinearFwdParams& params);
    void quantized_linear_fwd_prepare(const QuantizedLinearFwdParams& params, char* rows, int64_t begin, int64_t end);
    void quantized_linear_fwd(const QuantizedLinearFwdParams& params, const char* rows, int64_t begin, int64_t end,
                              char* scratch);
    QuantizedLinearWork quantized_linear_bwd_work(const QuantizedLinearBwdParams& params);
    void quantized_linear_bwd_prepare(const QuantizedLinearBwdParams& params, char* rows, int64_t begin, int64_t end);
    void quantized_linear_bwd(const QuantizedLinearBwdParams& params, const char* rows, int64_t begin, int64_t end,
                              char* scratch);)

}  // namespace llmkernels::cpu
