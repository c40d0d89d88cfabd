// The CPU kernels of the GRU: the LSTM's products, panels and team of threads around another cell.
#pragma once

#include "ops/gru/gru.h"
#include "ops/lstm/lstm_cpu.h"

namespace llmkernels::cpu {

// As those of the LSTM, without a second product. Of the scratch memory they use hh_panels and operand (h, or the
// gradients of h @ w_hh^T), and backward dh: all that arrives at h of the step before but what its product gives.
LLMKERNELS_CPU_DECLARE(
    LSTMLayout gru_layout(DType dtype, const LSTMSteps& at, bool forward);
    void gru_fwd_begin(const GRUFwdParams& params, const LSTMScratch& scratch);
    void gru_bwd_begin(const GRUBwdParams& params, const LSTMScratch& scratch);
    void gru_fwd_pack(const GRUFwdParams& params, const LSTMScratch& scratch, int64_t begin, int64_t end);
    void gru_bwd_pack(const GRUBwdParams& params, const LSTMScratch& scratch, int64_t begin, int64_t end);
    void gru_fwd_step(const GRUFwdParams& params, const LSTMScratch& scratch, bool packed, int64_t step, int64_t begin,
                      int64_t end);
    void gru_bwd_step(const GRUBwdParams& params, const LSTMScratch& scratch, bool packed, int64_t step, int64_t begin,
                      int64_t end);
    void gru_fwd_end(const GRUFwdParams& params, const LSTMScratch& scratch);
    void gru_bwd_end(const GRUBwdParams& params, const LSTMScratch& scratch);)

}  // namespace llmkernels::cpu
